"""Every route against the reference: by hand, on weird shapes, and as properties."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import Affine, AffineWeight, Strategy, quantize_codes
from effcli.kernels import _packed, affine_matmul
from effcli.kernels.affine_matmul import Bytes, Nibbles, Packed, Words, matmul, prepare, reference, route_name

# Where the Triton kernels run: on a GPU, or in Triton's interpreter (tests/conftest.py turns it on).
TRITON = "cuda" if torch.cuda.is_available() else "cpu"

# Relative to Σ |x| |w|, which bounds what rounding can do. bf16 keeps 8 bits, float16 11; float32 sums 1271 products.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_weight(
    shape: tuple[int, int],
    bits: int,
    strategy: Strategy,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    seed: int = 0,
) -> AffineWeight:
    generator = torch.Generator().manual_seed(seed)
    format = Affine(bits, strategy, group if strategy == "group" else 0, symmetric)
    scales = format.scale_shape(shape)

    def codes(size: tuple[int, int]) -> Tensor:
        return torch.randint(0, 2**bits, size, generator=generator).to(torch.uint8)

    scale = (torch.rand(scales, generator=generator) * 0.01 + 0.002).to(dtype)
    return AffineWeight(format, codes(shape), scale, None if symmetric else codes(scales))


def make_input(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    # Not centred: an offset that every weight of a group shares must show.
    return (torch.randn(rows, columns, generator=generator) + 0.5).to(dtype)


def assert_product(y: Tensor, x: Tensor, weight: AffineWeight, slack: float = 1) -> None:
    """y is x Ŵᵀ to the rounding of x's dtype."""
    assert y.dtype == x.dtype
    dense = weight.dequantize(torch.float64)
    bound = x.double().abs() @ dense.abs().T
    error = ((y.cpu().double() - x.double() @ dense.T) / bound).abs()
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=slack * TOLERANCE[x.dtype])


def run_triton(x: Tensor, weight: AffineWeight) -> Tensor:
    packed = Words.build(weight)
    zero = None if packed.zero is None else packed.zero.to(TRITON)
    there = Words(packed.format, packed.shape, packed.dtype, packed.words.to(TRITON), packed.scale.to(TRITON), zero)
    return there.multiply_triton(x.to(TRITON)).cpu()


HAND = AffineWeight(
    Affine(4, "group", 2),
    codes=torch.tensor([[0, 15, 7, 8], [3, 3, 1, 2]], dtype=torch.uint8),
    scale=torch.tensor([[0.5, 2.0], [1.0, 0.25]]),
    zero=torch.tensor([[5, 8], [3, 0]], dtype=torch.uint8),
)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_by_hand(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, -1.0, 8.0]], dtype=dtype)
    expected = [[1.5, 2.75], [2.0, 3.75]]
    assert reference(x, HAND).tolist() == expected
    assert matmul(x, prepare(HAND)).tolist() == expected
    assert Words.build(HAND).multiply(x).tolist() == expected
    assert run_triton(x, HAND).tolist() == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cpu_routes(bits: int, dtype: torch.dtype) -> None:
    strategies: list[Strategy] = ["tensor", "channel", "group"]
    shapes = [(41, 401, 1271, 41), (1, 64, 256, 64), (5, 48, 384, 128), (40, 16, 96, 32), (3, 32, 128, 16)]
    for (rows, out, columns, group), strategy, symmetric in product(shapes, strategies, (True, False)):
        for stored in {dtype, torch.bfloat16}:
            weight = make_weight((out, columns), bits, strategy, group, symmetric, stored)
            x = make_input(rows, columns, dtype)
            assert_product(matmul(x, prepare(weight)), x, weight)


# Shapes and widths for both kernels, straddling codes, groups that no block divides, and columns split in parts.
TRITON_CASES: list[tuple[int, int, int, Strategy, int, int, bool, torch.dtype]] = [
    (1, 70, 256, "group", 64, 4, False, torch.bfloat16),
    (2, 33, 1271, "channel", 0, 3, False, torch.bfloat16),
    (1, 5, 192, "group", 32, 2, True, torch.float32),
    (1, 9, 300, "tensor", 0, 8, False, torch.float16),
    (2, 6, 160, "group", 32, 6, True, torch.float32),
    (1, 6, 124, "group", 31, 4, False, torch.float32),
    (41, 401, 1271, "channel", 0, 4, False, torch.bfloat16),
    (5, 48, 384, "group", 128, 3, True, torch.float32),
    (5, 48, 384, "group", 128, 4, True, torch.bfloat16),
    (3, 20, 310, "group", 31, 5, False, torch.float32),
    (17, 70, 96, "tensor", 0, 2, False, torch.float16),
    (64, 130, 64, "group", 32, 8, False, torch.float32),
]


@pytest.mark.parametrize(("rows", "out", "columns", "strategy", "group", "bits", "symmetric", "dtype"), TRITON_CASES)
def test_triton(
    rows: int, out: int, columns: int, strategy: Strategy, group: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = make_weight((out, columns), bits, strategy, group, symmetric, dtype)
    x = make_input(rows, columns, dtype)
    # Triton's interpreter cuts float32 down to bf16 where a GPU rounds: twice the error.
    assert_product(run_triton(x, weight), x, weight, slack=1 if TRITON == "cuda" else 2)


def test_triton_plans() -> None:
    from effcli.kernels._affine_matmul_triton import plan, run_of

    assert [run_of(bits) for bits in range(2, 9)] == [(1, 16), (3, 32), (1, 8), (5, 32), (3, 16), (7, 32), (1, 4)]
    for rows, shape, bits in product((1, 2, 3, 16, 64, 512), ((4096, 4096), (11008, 4096), (40, 300)), range(2, 9)):
        chosen = plan(bits, 128, rows, shape, processors=132)
        assert chosen.kernel == ("gemv" if rows <= 2 else "dot")
        assert chosen.split >= 1
        assert chosen.block_m >= min(rows, 128) or chosen.kernel == "gemv"
        # Few rows leave no multiprocessor without a program, many rows are not split at all.
        if shape[0] > 1000:
            assert rows < 512 or chosen.split == 1
            assert rows > 16 or chosen.split * -(-shape[0] // chosen.block_n) >= 132


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from effcli.kernels import _affine_matmul_triton as kernels

def compiled(kernel, warps, stages, **constants):
    types = {"x": "*bf16", "words": "*i32", "scale": "*bf16", "zero": "*u8", "out": "*fp32"}
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for bits in (3, 4):
    words, codes = kernels.run_of(bits)
    shared = {"BITS": bits, "FIXED_ZERO": 8, "HAS_ZERO": True}
    compiled(kernels._gemv, 4, 2, **shared, WORDS=words, CODES=codes, BLOCK_N=4, BLOCK_R=128, SPLIT=1, STEPS=4)
    plan = kernels.plan(bits, 128, 64, (4096, 4096), processors=132)
    blocks = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "SPLIT": plan.split}
    dot = compiled(kernels._dot, plan.warps, plan.stages, **shared, **blocks, STEPS=8, ONE_GROUP=True, WIDEN=False)
    assert "wgmma" in dot.asm["ptx"] and dot.metadata.shared < 227 * 1024
"""


def test_triton_compiles_for_hopper() -> None:
    """The interpreter accepts what the compiler may not; compiling needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FORMATS = {
    "bits": st.integers(1, 8),
    "out": st.integers(1, 70),
    "groups": st.integers(1, 4),
    "group": st.sampled_from([1, 5, 16, 32, 64, 128]),
    "strategy": st.sampled_from(["tensor", "channel", "group"]),
    "symmetric": st.booleans(),
    "stored": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
}


# A single row whose scale begins at an odd byte.
@example(bits=2, out=1, groups=4, group=1, strategy="tensor", symmetric=False, stored=torch.float32)
@given(**FORMATS)
def test_layouts_give_back_the_weight(
    bits: int, out: int, groups: int, group: int, strategy: Strategy, symmetric: bool, stored: torch.dtype
) -> None:
    weight = make_weight((out, groups * group), bits, strategy, group, symmetric, stored)
    for packed in (prepare(weight), Words.build(weight)):
        restored = packed.restore()
        assert restored.format == weight.format
        assert torch.equal(restored.codes, weight.codes)
        assert torch.equal(restored.scale, weight.scale) and restored.scale.dtype == stored
        assert (restored.zero is None) == (weight.zero is None)
        assert weight.zero is None or torch.equal(restored.zero, weight.zero)  # type: ignore[arg-type]


@given(**FORMATS)
def test_unit_rows_read_the_weight(
    bits: int, out: int, groups: int, group: int, strategy: Strategy, symmetric: bool, stored: torch.dtype
) -> None:
    weight = make_weight((out, groups * group), bits, strategy, group, symmetric, stored)
    columns = torch.eye(groups * group)
    read = matmul(columns, prepare(weight))
    torch.testing.assert_close(read, weight.dequantize(torch.float32).T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-4, 30.0, 1e5])
def test_scales_of_every_size(stored: torch.dtype, scale: float) -> None:
    weight = make_weight((32, 128), 4, "group", 32, False, torch.float32)
    factors = (weight.scale * scale).to(stored)
    if not factors.isfinite().all():
        factors = factors.clamp(max=1000)
    weight = AffineWeight(weight.format, weight.codes, factors, weight.zero)
    packed = prepare(weight)
    assert torch.equal(packed.restore().scale, factors)
    for rows, dtype in product((2, 64), (torch.float32, torch.bfloat16)):
        x = make_input(rows, 128, dtype)
        dense = weight.dequantize(torch.float64)
        largest = float((x.double().abs() @ dense.abs().T).max())
        y = matmul(x, packed)
        torch.testing.assert_close(
            y.double(), x.double() @ dense.T, rtol=0, atol=largest * TOLERANCE[dtype] + 1e-45, check_dtype=False
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_less_exact_than_dense(bits: int, symmetric: bool) -> None:
    """On weights as they are, bf16 routes err little more than a dense bf16 layer holding the same weight."""
    generator = torch.Generator().manual_seed(bits)
    dense = torch.randn(256, 1024, generator=generator) * 0.02
    format = Affine(bits, "group", 128, symmetric)
    grouped = format.grouped(dense)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if symmetric:
        scale = (grouped.abs().amax(-1) / (format.levels / 2)).bfloat16()
        codes, zero = quantize_codes(dense, scale.float(), float(format.fixed_zero), format), None
    else:
        scale = ((high - low) / format.levels).bfloat16()
        zeros = (-low / scale.float()).round().clamp(0, format.levels)
        codes, zero = quantize_codes(dense, scale.float(), zeros, format), zeros.to(torch.uint8)
    weight = AffineWeight(format, codes, scale, zero)
    packed = prepare(weight)
    for rows in (1, 4, 64):
        x = torch.randn(rows, 1024, generator=generator).bfloat16()
        exact = x.double() @ weight.dequantize(torch.float64).T
        error = (matmul(x, packed).double() - exact).norm()
        assert error <= 1.3 * (torch.nn.functional.linear(x, weight.dequantize()).double() - exact).norm()


def test_routes_and_their_memory() -> None:
    cases: list[tuple[int, Strategy, int, bool, type[Packed], str, str, float]] = [
        (4, "group", 128, False, Nibbles, "int4pack", "fbgemm 4-bit", 8.5),
        (3, "group", 64, True, Nibbles, "int4pack (3-bit weights held in 4 bits)", "fbgemm 4-bit", 9.0),
        (2, "channel", 0, False, Nibbles, "int4pack (2-bit weights held in 4 bits)", "fbgemm 2-bit", 6.2),
        (4, "group", 16, False, Nibbles, "fbgemm 4-bit", "fbgemm 4-bit", 6.0),
        (8, "channel", 0, True, Bytes, "int8pack", "int8 convert", 8.02),
        (6, "group", 128, False, Bytes, "int8pack", "int8 convert", 8.19),
        (1, "group", 128, False, Words, "unpack tiles", "unpack tiles", 1.19),
    ]
    for bits, strategy, group, symmetric, layout, few, many, size in cases:
        weight = make_weight((64, 1024), bits, strategy, group, symmetric, torch.bfloat16)
        packed = prepare(weight)
        assert isinstance(packed, layout)
        assert few in route_name(packed, 1, torch.bfloat16)
        assert many in route_name(packed, 128, torch.bfloat16)
        assert many in route_name(packed, 1, torch.float32) == route_name(packed, 1, torch.float16)
        assert packed.nbytes * 8 <= size * 64 * 1024


def test_float32_scales_keep_clear_of_bf16() -> None:
    weight = make_weight((64, 256), 4, "group", 64, False, torch.float32)
    assert "fbgemm" in route_name(prepare(weight), 1, torch.bfloat16)
    short = AffineWeight(weight.format, weight.codes, weight.scale.bfloat16().float(), weight.zero)
    assert "int4pack" in route_name(prepare(short), 1, torch.bfloat16)


def test_without_private_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine_matmul, "offers", lambda namespace, operator: False)
    for bits in (2, 4, 8):
        weight = make_weight((64, 256), bits, "group", 64, False, torch.bfloat16)
        packed = prepare(weight)
        assert "pack," not in route_name(packed, 1, torch.bfloat16)
        assert "fbgemm" not in route_name(packed, 1, torch.bfloat16)
        x = make_input(2, 256, torch.bfloat16)
        assert_product(matmul(x, packed), x, weight)


def test_tiles_cover_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packed, "_STEP", 7 * 64)
    for bits in (1, 4, 8):
        weight = make_weight((67, 64), bits, "group", 32, False, torch.float32)
        whole = torch.cat([tile.clone() for _, tile in prepare(weight).tiles(torch.float32)])
        torch.testing.assert_close(whole, weight.dequantize(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_empty_and_odd_inputs(bits: int) -> None:
    weight = make_weight((48, 64), bits, "group", 32, False, torch.bfloat16)
    packed = prepare(weight)
    assert matmul(torch.empty(0, 64), packed).shape == (0, 48)
    assert matmul(torch.empty(2, 0, 64), packed).shape == (2, 0, 48)
    assert matmul(torch.ones(64), packed).shape == (48,)
    x = make_input(6, 128, torch.bfloat16)[:, ::2]
    assert_product(matmul(x.view(2, 3, 64), packed).view(6, 48), x, weight)
    none = AffineWeight(Affine(bits, "channel"), weight.codes[:0], weight.scale[:0, :1], weight.scale[:0, :1].byte())
    assert matmul(torch.ones(3, 64), prepare(none)).shape == (3, 0)
    with pytest.raises(ValueError, match="63 columns"):
        matmul(torch.ones(2, 63), packed)


def test_gradient_reaches_x() -> None:
    weight = make_weight((48, 64), 4, "group", 32, False, torch.float32)
    x = make_input(5, 64, torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(matmul(x, prepare(weight)).square().sum(), x)
    y = x.detach() @ weight.dequantize().T
    torch.testing.assert_close(gradient, 2 * y @ weight.dequantize())
