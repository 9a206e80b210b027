"""Products with sparse weights: the kept weights alone, by hand, on odd shapes and in every dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from any_format import mask_of, weight_in
from torch import Tensor

from effcli.formats import (
    Affine,
    AffineWeight,
    Bitmask,
    Codebook,
    Dense,
    DenseWeight,
    Gaps,
    NOfM,
    Sparse,
    SparseWeight,
)
from effcli.formats.base import Values
from effcli.kernels import sparse_matmul
from effcli.kernels.quantized_matmul import prepare
from effcli.kernels.sparse_matmul import Filled, Pairs, Rows, matmul, reference, route_name

# Where the Triton kernel runs: on a GPU, or in Triton's interpreter (tests/conftest.py turns it on).
TRITON = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def sparse(values: Values, shape: tuple[int, int], density: float = 0.4, pattern: NOfM | None = None) -> SparseWeight:
    format = Sparse(pattern or Bitmask(), values)
    numbers = weight_in(values, shape)
    assert isinstance(numbers, AffineWeight | DenseWeight)
    return SparseWeight(format, numbers, mask_of(format.pattern, shape, 1, density))


def check(y: Tensor, x: Tensor, weight: SparseWeight) -> None:
    """Within the rounding of x's dtype, relative to Σ |x| |w|."""
    dense = weight.dequantize(torch.float32).double()
    size = x.double().abs() @ dense.abs().T
    error = (y.double() - x.double() @ dense.T).abs()
    assert y.dtype == x.dtype and bool((error <= TOLERANCE[x.dtype] * size + 1e-12).all())


def same(left: SparseWeight, right: object) -> None:
    assert isinstance(right, SparseWeight) and right.format == left.format and torch.equal(right.mask, left.mask)
    assert torch.equal(right.values.codes[right.mask], left.values.codes[left.mask])
    assert torch.equal(right.dequantize(), left.dequantize())


def test_pairs_by_hand() -> None:
    """Two blocks in a byte of places, two 4-bit codes in a byte."""
    mask = torch.tensor([[True, False, False, True, False, True, True, False]])
    codes = torch.tensor([[1, 9, 9, 2, 9, 3, 4, 9]], dtype=torch.uint8)
    format = Sparse(NOfM(2, 4), Affine(4, "channel"))
    numbers = AffineWeight(Affine(4, "channel"), codes, torch.tensor([[0.5]]), torch.tensor([[2]], dtype=torch.uint8))
    weight = SparseWeight(format, numbers, mask)
    packed = Pairs.build(weight, TRITON)
    assert packed.values.tolist() == [[0x21, 0x43]]
    assert packed.places.tolist() == [[0 | 3 << 2 | (1 | 2 << 2) << 4]]
    x = torch.arange(1.0, 9.0).view(1, 8)
    # -0.5·1 + 0·4 + 0.5·6 + 1·7
    assert packed.multiply(x.to(TRITON)).tolist() == [[9.5]]


PAIRED = [Dense(torch.float32), Dense(torch.bfloat16), Affine(4, "channel"), Affine(4, "group", 8), Affine(3, "tensor")]


@pytest.mark.parametrize("values", PAIRED, ids=str)
@pytest.mark.parametrize("rows, out, columns", [(1, 5, 8), (3, 70, 200), (33, 17, 88)])
def test_pairs(values: Values, rows: int, out: int, columns: int) -> None:
    weight = sparse(values, (out, columns), pattern=NOfM(2, 4))
    assert Pairs.serves(weight)
    packed = Pairs.build(weight, TRITON)
    same(weight, packed.restore())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
        check(packed.multiply(x.to(TRITON)).cpu(), x, weight)
    assert torch.equal(packed.step(1, out, torch.float32).cpu(), weight.dequantize(torch.float32)[1:])
    assert "2:4" in route_name(packed, rows, torch.float32)


def test_pairs_are_smaller_than_dense_ones() -> None:
    shape = 64, 256
    bf16 = sparse(Dense(torch.bfloat16), shape, pattern=NOfM(2, 4))
    assert Pairs.build(bf16, TRITON).nbytes == 2 * 64 * 256 * 9 // 16
    int4 = sparse(Affine(4, "channel", 0, True), shape, pattern=NOfM(2, 4))
    assert Pairs.build(int4, TRITON).nbytes - 64 * int4.dtype.itemsize == 64 * 256 * 3 // 8


def test_parts_of_the_columns_are_summed() -> None:
    from effcli.kernels import _sparse_matmul_triton as kernels

    weight = sparse(Dense(torch.float32), (9, 2080), pattern=NOfM(2, 4))
    packed = Pairs.build(weight, TRITON)
    x = torch.randn(2, 2080, generator=torch.Generator().manual_seed(2))
    chosen = kernels.plan(2, (9, 2080), processors=64)
    assert chosen.split > 1
    check(kernels.multiply(x.to(TRITON), packed.values, packed.places, chosen=chosen).cpu(), x, weight)


@pytest.mark.parametrize(
    "values", [Affine(4, "group", 2), Affine(8, "channel"), Affine(8, "channel", 0, True, "token")], ids=str
)
def test_pairs_serve_only_what_a_block_has_one_scale_for(values: Values) -> None:
    assert not Pairs.serves(sparse(values, (4, 8), pattern=NOfM(2, 4)))
    assert not Pairs.serves(sparse(Dense(torch.float32), (4, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, out, columns", [(1, 40, 100), (7, 33, 61), (sparse_matmul.ROWS + 1, 12, 130)])
def test_rows(dtype: torch.dtype, rows: int, out: int, columns: int) -> None:
    weight = sparse(Dense(dtype), (out, columns), density=0.05)
    packed = Rows.build(weight)
    assert "compressed rows" in route_name(packed, rows, dtype)
    same(weight, packed.restore())
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = matmul(x, packed)
    check(y, x, weight)
    torch.testing.assert_close(y, reference(x, weight))
    assert packed.nbytes < out * columns


def test_rows_that_keep_nothing_and_gradients() -> None:
    mask = torch.zeros(30, 20, dtype=torch.bool)
    mask[3, 4] = mask[3, 19] = True
    numbers = DenseWeight(Dense(torch.float32), torch.full((30, 20), 2.0))
    packed = Rows.build(SparseWeight(Sparse(Bitmask(), Dense(torch.float32)), numbers, mask))
    x = torch.ones(2, 20, requires_grad=True)
    y = matmul(x, packed)
    assert y[:, 3].tolist() == [4, 4] and int(torch.count_nonzero(y)) == 2
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (2.0 * mask).sum(0).expand(2, 20))
    assert matmul(torch.ones(0, 20), packed).shape == (0, 30)


def test_other_weights_are_multiplied_with_their_zeros() -> None:
    """A dense product is faster than one that skips every other weight."""
    for values in (Dense(torch.float32), Affine(4, "channel"), Codebook("nf4", 4, "group", 64, dtype=torch.float32)):
        for pattern in (Bitmask(), NOfM(2, 4), Gaps(3)):
            weight = SparseWeight(Sparse(pattern, values), weight_in(values, (6, 64)), mask_of(pattern, (6, 64)))  # type: ignore[arg-type]
            packed = prepare(weight)
            assert isinstance(packed, Filled) and "zeros filled in" in route_name(packed, 1, torch.float32)


def test_rows_serve_many_weights_of_which_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_matmul, "ROWS_WEIGHTS", 3200)
    assert isinstance(prepare(sparse(Dense(torch.float32), (50, 64), density=0.05)), Rows)
    assert isinstance(prepare(sparse(Dense(torch.float32), (50, 63), density=0.05)), Filled)
    assert isinstance(prepare(sparse(Dense(torch.float32), (50, 64), density=0.3)), Filled)
    assert isinstance(prepare(sparse(Affine(4, "channel"), (50, 64), density=0.02)), Filled)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from effcli.kernels import _sparse_matmul_triton as kernels

def compiled(codes, plan):
    constants = {"CODES": codes, "FIXED_ZERO": 8, "HAS_ZERO": codes, "WIDEN": False, "STEPS": 4, "SPLIT": plan.split}
    constants |= {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_Q": plan.block_q}
    types = {"x": "*bf16", "values": "*u8" if codes else "*bf16", "places": "*u8", "scale": "*bf16", "zero": "*u8"}
    types["out"] = "*fp32" if plan.split > 1 else "*bf16"
    names = kernels._product.arg_names
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(fn=kernels._product, signature=kinds, constexprs=constants)
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for rows in (1, 512):
    for codes in (True, False):
        made = compiled(codes, kernels.plan(rows, (4096, 4096), processors=132))
        assert made.metadata.shared < 227 * 1024
"""


def test_triton_compiles_for_hopper() -> None:
    """The interpreter accepts what the compiler may not; compiling needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
