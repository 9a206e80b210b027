"""Sparse weights: each pattern by hand, every mask and every format of values from a file and back, and damage."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from any_format import mask_of, weight_in
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.errors import CheckpointError
from effcli.formats import (
    Affine,
    AffineWeight,
    Bitmask,
    Codebook,
    Dense,
    DenseWeight,
    Gaps,
    Integers,
    Mask,
    NOfM,
    Packing,
    Pattern,
    Sparse,
    SparseWeight,
    format_from_json,
    unpack,
)
from effcli.formats.base import Numbers, Values
from effcli.formats.patterns import smallest
from effcli.kernels.quantized_matmul import matmul, prepare, route_name

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PATTERNS: list[Pattern] = [Bitmask(), NOfM(2, 4), Gaps(3), Gaps(4, huffman=True)]


def dense(numbers: list[list[float]], pattern: Pattern, dtype: torch.dtype = torch.float32) -> SparseWeight:
    """The sparse weight that keeps what is not 0."""
    values = torch.tensor(numbers, dtype=dtype)
    return SparseWeight(Sparse(pattern, Dense(dtype)), DenseWeight(Dense(dtype), values), values != 0)


def held(packed: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in packed.values())


def test_a_bitmask_by_hand() -> None:
    numbers = [[0, 1.5, 0, 0, 0, 0, 0, 0, -2, 0], [0] * 10, [3, 0, 0, 0, 0, 0, 0, 4, 0, 5]]
    packed = dense(numbers, Bitmask()).pack()
    assert packed["weight_mask"].tolist() == [[0b10, 0b1], [0, 0], [0b1000_0001, 0b10]]
    assert packed["weight"].tolist() == [[1.5, -2, 3, 4, 5]]
    assert packed["weight_shape"].tolist() == [3, 10]
    assert held(packed) == 3 * 2 + 5 * 4 + 16


def test_two_of_four_by_hand() -> None:
    packed = dense([[0, 1, 2, 0, 3, 0, 0, 4]], NOfM(2, 4)).pack()
    # Places 1, 2 and 0, 3, two bits each, the first one lowest.
    assert packed["weight_indices"].tolist() == [[0b11_00_10_01]]
    assert packed["weight"].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="do not keep 2"):
        dense([[0, 1, 2, 3, 4, 0, 0, 5]], NOfM(2, 4))
    with pytest.raises(ValueError, match="do not divide"):
        dense([[0, 1, 2]], NOfM(2, 4))


def test_gaps_by_hand() -> None:
    """Figure 2 of Deep Compression: weights at places 1, 4 and 15, gaps of 3 bits; ten zeros need a filler."""
    numbers = [[0.0] * 16]
    numbers[0][1], numbers[0][4], numbers[0][15] = 3.4, 0.9, 1.7
    weight = dense(numbers, Gaps(3))
    assert Gaps(3).stream(weight.mask).tolist() == [1, 2, 7, 3]
    packed = weight.pack()
    assert packed["weight_gaps"].tolist() == [[1 | 2 << 3 | 7 << 6 | 3 << 9]]
    assert packed["weight_gap_count"].tolist() == [4]
    torch.testing.assert_close(packed["weight"], torch.tensor([[3.4, 0.9, 1.7]]), rtol=0, atol=0)


def test_kept_codes_follow_one_another() -> None:
    """Four bits each, scales and zero points those of the whole matrix; what is not kept is 0 without a code for it."""
    format = Affine(4, "channel")
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5], [2.0]]), torch.tensor([[0], [5]], dtype=torch.uint8)
    mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    weight = SparseWeight(Sparse(Bitmask(), format), AffineWeight(format, codes, scale, zero), mask)
    assert weight.dequantize().tolist() == [[0.5, 0, 0, 2], [0, 2, 4, 0]]
    assert weight.pack()["weight_packed"].tolist() == [[0x7641]]
    filled = weight.filled()
    assert filled is not None and filled.codes.tolist() == [[1, 0, 0, 4], [5, 6, 7, 5]]
    assert weight.density == 0.5 and str(weight.format) == "sparse bitmask, int4 channel asym"
    scaled = weight.with_input_scale(torch.tensor([1.0, 1, 2, 4]))
    assert scaled.effective().tolist() == [[0.5, 0, 0, 0.5], [0, 2, 2, 0]]


@given(
    pattern=st.one_of(
        st.just(Bitmask()),
        st.builds(Gaps, st.integers(1, 8), st.booleans()),
        st.integers(1, 9).flatmap(lambda of: st.builds(NOfM, st.integers(1, of), st.just(of))),
    ),
    rows=st.integers(0, 9),
    columns=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_mask_comes_back(pattern: Pattern, rows: int, columns: int, density: float, seed: int) -> None:
    shape = rows, columns - columns % (pattern.row_group or 1)
    mask = mask_of(pattern, shape, seed, density)
    packed = pattern.pack(mask)
    assert torch.equal(pattern.unpack(packed, shape), mask)
    assert held(packed) <= pattern.nbytes(shape)
    if not isinstance(pattern, Gaps):
        assert held(packed) == pattern.nbytes(shape)


@given(
    pattern=st.sampled_from(PATTERNS),
    values=st.one_of(
        st.builds(Dense, st.sampled_from(DTYPES)),
        st.builds(Affine, st.integers(1, 8), st.just("group"), st.just(4), st.booleans()),
        st.builds(Affine, st.integers(1, 8), st.sampled_from(["tensor", "channel"]), st.just(0), st.booleans()),
        st.just(Affine(8, "channel", 0, True, "token")),
        st.builds(
            lambda bits, strategy, huffman, dtype: Codebook("kmeans", bits, strategy, huffman=huffman, dtype=dtype),
            st.integers(1, 8), st.sampled_from(["tensor", "channel"]), st.booleans(), st.sampled_from(DTYPES),
        ),
        st.builds(Codebook, st.just("nf4"), st.just(4), st.just("group"), st.just(64), st.booleans()),
    ),
    rows=st.integers(0, 7),
    blocks=st.integers(0, 9),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_file_holds_the_weight_and_nbytes_its_size(
    pattern: Pattern, values: Values, rows: int, blocks: int, density: float, seed: int
) -> None:
    shape = rows, 4 * blocks
    inner = weight_in(values, shape, seed)
    assert isinstance(inner, Numbers)
    weight = SparseWeight(Sparse(pattern, values), inner, mask_of(pattern, shape, seed, density))
    packed = weight.pack()
    format = format_from_json(json.loads(json.dumps(weight.format.to_json())))
    assert format == weight.format
    restored = unpack(format, packed)
    assert isinstance(restored, SparseWeight)
    assert torch.equal(restored.mask, weight.mask)
    assert torch.equal(restored.values.codes[weight.mask], inner.codes[weight.mask])
    wanted = inner.dequantize() * weight.mask
    torch.testing.assert_close(restored.dequantize(), wanted, rtol=0, atol=0)
    assert restored.dtype == inner.dtype
    again = restored.pack()
    assert all(torch.equal(again[suffix], tensor) for suffix, tensor in packed.items()) and len(again) == len(packed)
    assert weight.nbytes == held(packed)
    stored = getattr(inner, "scale", None)
    itemsize = stored.dtype.itemsize if isinstance(stored, Tensor) else inner.dtype.itemsize
    promised = weight.format.nbytes(shape, itemsize)
    exact = isinstance(pattern, NOfM) and not getattr(values, "huffman", False)
    assert held(packed) == promised if exact else held(packed) <= promised


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("values", "route"),
    [
        (Dense(torch.float32), "torch, dense, cpu, zeros filled in"),
        (Affine(4, "group", 32), "zeros filled in"),
        (Affine(8, "channel", 0, True, "token"), "zeros filled in"),
        (Codebook("nf4", 4, "group", 64, dtype=torch.float32), "zeros filled in"),
        (Codebook("binary", 1, "channel", dtype=torch.float32), "torch, dense copy of sparse weights, cpu"),
    ],
    ids=str,
)
def test_products(pattern: Pattern, values: Values, route: str) -> None:
    weight = weight_in(Sparse(pattern, values), (6, 64))
    assert isinstance(weight, SparseWeight)
    packed = prepare(weight)
    assert route_name(packed, 2, torch.float32).endswith(route)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    filled = weight.filled()
    wanted = x @ weight.dequantize().T if filled is None else matmul(x, prepare(filled))
    found = matmul(x, packed)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, weight.dequantize().sum(0).expand(2, 64), rtol=1e-4, atol=1e-4)
    restored = packed.restore()
    torch.testing.assert_close(restored.dequantize(), weight.dequantize(), rtol=0, atol=0)
    assert all(torch.equal(restored.pack()[suffix], tensor) for suffix, tensor in weight.pack().items())
    assert packed.nbytes >= sum(tensor.nbytes for tensor in pattern.pack(weight.mask).values())


def test_rows_are_joined_and_integers_stay_exact() -> None:
    format = Sparse(Gaps(3), Affine(4, "tensor", symmetric=True))
    first, second = (weight_in(format, (rows, 8), rows) for rows in (2, 3))
    joined = first.join([second])
    assert joined.format == Sparse(Gaps(3), Affine(4, "channel", symmetric=True))
    wanted = torch.cat([first.dequantize(), second.dequantize()])
    assert torch.equal(joined.dequantize(), wanted)
    found = joined.integers()
    assert isinstance(found, Integers) and joined.format.signed_bits == 4
    assert torch.equal(found.codes * found.scale.unsqueeze(1), wanted)
    with pytest.raises(ValueError, match="different formats"):
        first.join([weight_in(Sparse(Bitmask(), format.values), (2, 8))])


def test_what_does_not_go_together() -> None:
    weight = dense([[0, 1, 2, 0]], Bitmask())
    wrong: list[dict[str, Any]] = [
        {"mask": weight.mask[:, :3]},
        {"mask": weight.mask.float()},
        {"values": weight.values.with_input_scale(torch.ones(4))},
        {"format": Sparse(Bitmask(), Dense(torch.float16))},
    ]
    for change in wrong:
        with pytest.raises(ValueError):
            SparseWeight(**({"format": weight.format, "values": weight.values, "mask": weight.mask} | change))
    with pytest.raises(ValueError, match="no explicit scale"):
        weight_in(Sparse(Bitmask(), Affine(8, "channel", 0, True, "token")), (2, 4)).with_input_scale(torch.ones(4))
    for made in (lambda: NOfM(3, 2), lambda: NOfM(1, 300), lambda: Gaps(0), lambda: Gaps(9)):
        with pytest.raises(ValueError):
            made()


def test_damaged_descriptions() -> None:
    described = Sparse(NOfM(2, 4), Affine(4, "channel")).to_json()
    wrong: list[dict[str, Any]] = [
        {**described, "values": described},
        {**described, "values": {**described["values"], "bits": 9}},
        {**described, "values": {**described["values"], "group_size": 8}},
        {**described, "pattern": {"kind": "n:m", "kept": 3, "of": 2}},
        {**described, "pattern": {"kind": "gaps", "bits": 0, "huffman": False}},
        {**described, "pattern": {"kind": "runs"}},
        {key: value for key, value in described.items() if key != "values"},
    ]
    for data in wrong:
        with pytest.raises(ValueError):
            format_from_json(data)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_damaged_patterns(pattern: Pattern) -> None:
    format: Packing = Sparse(pattern, Affine(4, "channel"))
    packed = weight_in(format, (5, 12)).pack()
    own = {
        suffix: tensor
        for suffix, tensor in packed.items()
        if suffix.startswith(("weight_mask", "weight_ind", "weight_gap"))
    }
    assert own
    for suffix, tensor in own.items():
        wrong = [tensor.float(), tensor.view(-1)[:-1], tensor.unsqueeze(0), torch.full_like(tensor, -1)]
        if tensor.dtype == torch.uint8:
            wrong[-1] = torch.full_like(tensor, 255)
        for damaged in wrong:
            with pytest.raises((ValueError, CheckpointError)):
                unpack(format, {**packed, suffix: damaged}, (5, 12))
    fewer = {**packed, "weight_packed": packed["weight_packed"][:, :-1]}
    with pytest.raises(ValueError, match="weight_packed is"):
        unpack(format, fewer, (5, 12))


def test_gaps_that_end_wrong() -> None:
    tensors = {"weight_gap_count": torch.tensor([2]), "weight_gaps": torch.tensor([[1 | 7 << 3]], dtype=torch.int32)}
    with pytest.raises(ValueError, match="do not end with a weight"):
        Gaps(3).unpack(tensors, (4, 4))
    tensors["weight_gaps"] = torch.tensor([[6 | 6 << 3]], dtype=torch.int32)
    assert Gaps(3).unpack(tensors, (2, 7)).view(-1).nonzero().view(-1).tolist() == [6, 13]
    with pytest.raises(ValueError, match="do not end with a weight"):
        Gaps(3).unpack(tensors, (1, 13))
    with pytest.raises(ValueError, match="weight_gap_count is"):
        Gaps(3).unpack({**tensors, "weight_gap_count": torch.tensor([2**40])}, (2, 7))


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 300),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_smallest_pattern(rows: int, columns: int, density: float, seed: int) -> None:
    """No other takes fewer bytes, but for Huffman codes that save less than a twentieth."""
    mask = mask_of(Bitmask(), (rows, columns), seed, density)
    chosen = smallest(mask)
    assert torch.equal(chosen.unpack(chosen.pack(mask), (rows, columns)), mask)
    # Words are whole; the estimate counts bytes.
    size = held(chosen.pack(mask)) - 3
    assert size <= held(Bitmask().pack(mask))
    assert all(size <= held(Gaps(bits).pack(mask)) for bits in range(2, 9))
    assert all(0.95 * size <= held(Gaps(bits, True).pack(mask)) for bits in (4, 8))


def test_patterns_by_density() -> None:
    """Half of the weights kept: a bit for each; a tenth: gaps; and what a pass asks for is stored so."""
    assert smallest(mask_of(Bitmask(), (64, 512), 0, 0.5)) == Bitmask()
    assert smallest(mask_of(Bitmask(), (64, 512), 0, 0.1)) == Gaps(4)
    weight = torch.randn(64, 512)
    made = Mask(mask_of(Bitmask(), (64, 512), 0, 0.1)).over(weight)
    assert made.format.pattern == Gaps(4) and 8 * held(made.pack()) / weight.numel() < 0.1 * 32 + 0.55
    explicit = Mask(mask_of(Bitmask(), (64, 512), 0, 0.1), Gaps(3)).over(weight)
    assert explicit.format.pattern == Gaps(3)


def test_a_sparse_file_is_smaller() -> None:
    """Half of a bf16 layer takes 9/16 of it, three fifths of a 4-bit layer less than all of it without a mask."""
    shape = (256, 512)
    half = Mask(mask_of(Bitmask(), shape, 0, 0.5)).over(torch.randn(shape).bfloat16())
    assert half.nbytes < 0.57 * 2 * 256 * 512
    dense = weight_in(Affine(4, "group", 64), shape)
    assert isinstance(dense, AffineWeight)
    pruned = Mask(mask_of(Bitmask(), shape, 0, 0.6)).over(dense)
    assert pruned.nbytes < 0.9 * dense.nbytes
