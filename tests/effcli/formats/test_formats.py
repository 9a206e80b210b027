"""The table of formats: every one describes itself, can be packed and restored, and has a kernel."""

from __future__ import annotations

import pytest
import torch
from any_format import weight_in

from effcli.formats import (
    FORMATS,
    SUFFIXES,
    Affine,
    Bitmask,
    Codebook,
    Dense,
    DenseWeight,
    Gaps,
    NOfM,
    Packing,
    Sparse,
    format_from_json,
    unpack,
)
from effcli.kernels.quantized_matmul import KERNELS, matmul, prepare

EVERY: list[Packing] = [
    Dense(torch.bfloat16),
    Affine(4, "group", 4),
    Affine(3, "tensor", symmetric=True),
    Affine(8, "channel", symmetric=True, activations="token"),
    Affine(8, "channel", symmetric=True, activations="tensor"),
    Codebook("kmeans", 3, "channel", dtype=torch.float16),
    Codebook("kmeans", 4, "group", 4, huffman=True, dtype=torch.float32),
    Codebook("nf4", 4, "group", 64, double=True, dtype=torch.bfloat16),
    Codebook("binary", 1, "tensor", dtype=torch.float32),
    Codebook("ternary", 2, "group", 4, dtype=torch.float32),
    Sparse(Bitmask(), Dense(torch.float32)),
    Sparse(NOfM(2, 4), Affine(4, "group", 8)),
    Sparse(NOfM(1, 4), Affine(8, "channel", symmetric=True, activations="tensor")),
    Sparse(Gaps(3), Codebook("ternary", 2, "tensor", dtype=torch.float32)),
    Sparse(Gaps(2, huffman=True), Codebook("kmeans", 3, "channel", huffman=True, dtype=torch.bfloat16)),
]


def test_the_table_has_every_format() -> None:
    assert {type(format) for format in EVERY} == set(FORMATS.values())
    assert all(name == kind.name for name, kind in FORMATS.items())


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_a_format_says_of_itself_what_others_must_know(format: Packing) -> None:
    weight = weight_in(format, (6, 8))
    packed = weight.pack()
    assert set(packed) <= type(format).suffixes <= SUFFIXES
    assert sum(tensor.nbytes for tensor in packed.values()) <= format.nbytes(weight.shape, weight.dtype.itemsize)
    assert format_from_json(format.to_json()) == format
    assert bool(format.standard_obstacle) == (format.standard is None)
    assert format.rounds_inputs == (weight.input_grid is not None or "int8 inputs" in str(format))
    restored = unpack(format, packed, (6, 8))
    torch.testing.assert_close(restored.dequantize(), weight.dequantize(), rtol=0, atol=0)
    integers, entries = weight.integers(), weight.entries()
    assert (integers is not None) == bool(format.signed_bits) and (entries is not None) == format.learned
    if integers is not None:
        scaled = integers.codes.float() * integers.scale.float().unsqueeze(1)
        torch.testing.assert_close(scaled, weight.dequantize(torch.float32), rtol=0, atol=0)
    if format.row_group:
        with pytest.raises(ValueError, match=r"do(es)? not divide"):
            format.nbytes((6, format.row_group + 1))


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_every_tensor_is_checked(format: Packing) -> None:
    packed = weight_in(format, (6, 8)).pack()
    for suffix in packed.keys() - {"input_zero_point"}:
        with pytest.raises(ValueError, match=f"{suffix} is missing"):
            unpack(format, {key: tensor for key, tensor in packed.items() if key != suffix}, (6, 8))
    with pytest.raises(ValueError):
        unpack(format, packed, (7, 8))


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_every_format_has_a_kernel(format: Packing) -> None:
    weight = weight_in(format, (6, 8))
    assert type(weight) in KERNELS
    packed = prepare(weight)
    torch.testing.assert_close(packed.restore().dequantize(), weight.dequantize(), rtol=0, atol=0)
    if not format.rounds_inputs:
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(matmul(x, packed), x @ weight.dequantize(torch.float32).T, rtol=1e-5, atol=1e-5)


def test_weights_of_different_formats_are_not_joined() -> None:
    dense = weight_in(Dense(torch.float32), (2, 8))
    for format in EVERY[1:]:
        other = weight_in(format, (2, 8))
        for first, second in ((dense, other), (other, dense)):
            with pytest.raises(ValueError, match=r"different formats|cross the ends"):
                first.join([second])


def test_dense_numbers_are_their_own_codes() -> None:
    weight = weight_in(Dense(torch.bfloat16), (3, 5))
    assert isinstance(weight, DenseWeight) and weight.nbytes == 30
    assert weight.dequantize() is weight.codes
    assert torch.equal(weight.join([weight]).dequantize(), torch.cat([weight.codes, weight.codes]))
    scaled = weight.with_input_scale(torch.full((5,), 2.0))
    assert torch.equal(scaled.effective(torch.float32), weight.codes.float() / 2)
    assert torch.equal(unpack(weight.format, scaled.pack()).effective(), scaled.effective())
