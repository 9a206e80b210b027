"""Every route against the reference, the integers against compressed-tensors', and the sums against int64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.formats import Activations, Affine, AffineWeight, Strategy
from effcli.kernels import _packed, int8_matmul
from effcli.kernels.int8_matmul import Integers, matmul, prepare, quantize_tensor, quantize_tokens, reference
from effcli.kernels.quantized_matmul import route_name

# Where the Triton kernels run: on a GPU, or in Triton's interpreter (tests/conftest.py turns it on).
TRITON = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The sums are exact; what remains is one rounding to each dtype, and two of float32 before it.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_weight(
    shape: tuple[int, int],
    activations: Activations,
    strategy: Strategy = "channel",
    dtype: torch.dtype = torch.float32,
    zero: int = -37,
) -> AffineWeight:
    generator = torch.Generator().manual_seed(0)
    format = Affine(8, strategy, 0, True, activations)
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    scale = (torch.rand(format.scale_shape(shape), generator=generator) * 0.01 + 0.002).to(dtype)
    if activations == "token":
        return AffineWeight(format, codes, scale)
    fixed = torch.tensor([0.03125], dtype=dtype), torch.tensor([zero], dtype=torch.int8)
    return AffineWeight(format, codes, scale, activation_scale=fixed[0], activation_zero=fixed[1])


def make_input(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Not centred, with tokens of very different size, and beyond what a fixed scale holds.
    x = torch.randn(rows, columns, generator=generator) + 0.5
    return (x * torch.logspace(-1, 0.5, rows).unsqueeze(1)).to(dtype)


def assert_product(y: Tensor, x: Tensor, weight: AffineWeight) -> None:
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    torch.testing.assert_close(y, reference(x, weight), rtol=2 * TOLERANCE[x.dtype], atol=1e-6)


def run_triton(x: Tensor, weight: AffineWeight) -> Tensor:
    return Integers.build(weight, TRITON).multiply_triton(x.to(TRITON)).cpu()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_by_hand_per_token(dtype: torch.dtype) -> None:
    format = Affine(8, "channel", 0, True, "token")
    codes = torch.tensor([[129, 130, 131], [0, 128, 255]], dtype=torch.uint8)
    weight = AffineWeight(format, codes, torch.tensor([[0.5], [0.25]], dtype=dtype))
    x = torch.tensor([[127.5, -127.5, 63.0], [255 / 256, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    # Weights (1, 2, 3) and (-128, 0, 127), before their scales.
    found, scale = quantize_tokens(x)
    assert found.tolist() == [[127, -128, 63], [127, 64, 0], [0, 0, 0]]
    assert scale[:, 0].tolist() == [1, 1 / 128, torch.finfo(dtype).eps]
    y = matmul(x, prepare(weight))
    assert y[0].tolist() == torch.tensor([30, -2063.75], dtype=dtype).tolist()
    assert y[1].tolist() == [255 / 256, -31.75]
    assert y[2].tolist() == [0, 0]
    assert torch.equal(run_triton(x, weight), y) and torch.equal(reference(x, weight), y)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_by_hand_per_tensor(dtype: torch.dtype) -> None:
    format = Affine(8, "tensor", 0, True, "tensor")
    codes = torch.tensor([[129, 130], [126, 255]], dtype=torch.uint8)
    weight = AffineWeight(
        format,
        codes,
        torch.tensor([[2.0]], dtype=dtype),
        activation_scale=torch.tensor([0.5], dtype=dtype),
        activation_zero=torch.tensor([-3], dtype=torch.int8),
    )
    x = torch.tensor([[1.0, 1.25], [-80.0, 70.0]], dtype=dtype)
    # round(2 - 3), round(2.5 - 3) = round(-0.5) = 0; -163 and 137 are clamped.
    assert quantize_tensor(x, torch.tensor([0.5]), torch.tensor([-3])).tolist() == [[-1, 0], [-128, 127]]
    # Less the zero: (2, 3) and (-125, 130), times weights (1, 2) and (-2, 127), times 2 · 0.5.
    y = matmul(x, prepare(weight))
    assert y.tolist() == torch.tensor([[8.0, 377.0], [135.0, 16760.0]], dtype=dtype).tolist()
    assert torch.equal(run_triton(x, weight), y) and torch.equal(reference(x, weight), y)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_integers_are_those_of_compressed_tensors(dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = make_input(200, 300, dtype)
    x[7] = 0
    token = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=True)
    scale, zero = compute_dynamic_scales_and_zp(x.unsqueeze(0), token, torch.nn.Module())
    codes, own = quantize_tokens(x)
    assert torch.equal(own, scale[0])
    assert torch.equal(codes, quantize(x, scale[0], zero[0], token))
    tensor = QuantizationArgs(num_bits=8, strategy="tensor", dynamic=False, symmetric=False)
    scale, zero = torch.tensor([0.0123], dtype=dtype), torch.tensor([-37], dtype=torch.int8)
    assert torch.equal(quantize_tensor(x, scale, zero), quantize(x, scale, zero, tensor))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("columns", [1, 401, 1024, 4099])
def test_the_sums_are_exact(columns: int, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every product is the largest, at which kernels without VNNI are known to saturate."""
    monkeypatch.setattr(int8_matmul, "_has_dot_products", lambda: vnni)
    for fill in (0, 255, None):
        weight = make_weight((33, columns), "token")
        if fill is not None:
            weight = replace(weight, codes=torch.full_like(weight.codes, fill))
        packed = Integers.build(weight, torch.device("cpu"))
        for value in (-128, 127, None):
            codes = make_input(5, columns, torch.float32).mul(30).clamp(-128, 127).round()
            if value is not None:
                codes.fill_(value)
            assert torch.equal(packed.sums(codes).long(), codes.long() @ weight.signed.long().T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_cpu_routes(
    strategy: Strategy, activations: Activations, vnni: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_matmul, "_has_dot_products", lambda: vnni)
    for rows, out, columns in ((41, 401, 1271), (1, 64, 256), (1, 1, 1), (3, 7, 2050)):
        for stored in {dtype, torch.bfloat16}:
            weight = make_weight((out, columns), activations, strategy, stored)
            packed = prepare(weight)
            x = make_input(rows, columns, dtype)
            assert_product(matmul(x, packed), x, weight)
            assert ("_int_mm" in route_name(packed, rows, dtype)) == vnni


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize(
    ("rows", "out", "columns"), [(1, 70, 300), (5, 33, 1271), (16, 17, 64), (17, 40, 130), (41, 401, 1271)]
)
def test_triton(rows: int, out: int, columns: int, activations: Activations, dtype: torch.dtype) -> None:
    weight = make_weight((out, columns), activations, "channel" if out % 2 else "tensor", dtype)
    x = make_input(rows, columns, dtype)
    y = run_triton(x, weight)
    assert_product(y, x, weight)
    # Integer sums have one value, in whatever order they are taken.
    assert torch.equal(y, matmul(x, prepare(weight)))


@given(
    rows=st.integers(1, 6),
    out=st.integers(1, 70),
    columns=st.integers(1, 300),
    activations=st.sampled_from(["token", "tensor"]),
    strategy=st.sampled_from(["channel", "tensor"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    zero=st.integers(-128, 127),
    vnni=st.booleans(),
)
def test_the_route_does_not_matter(
    rows: int,
    out: int,
    columns: int,
    activations: Activations,
    strategy: Strategy,
    dtype: torch.dtype,
    zero: int,
    vnni: bool,
) -> None:
    weight = make_weight((out, columns), activations, strategy, dtype, zero)
    packed = prepare(weight)
    restored = packed.restore()
    assert restored.format == weight.format and torch.equal(restored.codes, weight.codes)
    for name, tensor in restored.pack().items():
        assert torch.equal(tensor, weight.pack()[name]) and tensor.dtype == weight.pack()[name].dtype
    x = make_input(rows, columns, dtype, seed=columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_matmul, "_has_dot_products", lambda: vnni)
        assert_product(matmul(x, packed), x, weight)


def test_columns_summed_in_float32() -> None:
    """As many as the weights allow: magnitudes of 2^17 times inputs of 2^7."""
    for code, columns, span in (
        (128 + 32, 4096, 4096),
        (128 + 33, 4096, 2048),
        (0, 4096, 1024),
        (128 + 127, 1500, 1024),
    ):
        weight = make_weight((3, columns), "token")
        codes = torch.full_like(weight.codes, 128)
        codes[1] = code
        packed = Integers.build(replace(weight, codes=codes), torch.device("cpu"))
        assert packed.span == (span if not int8_matmul._has_dot_products() else 1024)
        assert packed.sums(torch.full((2, columns), -128.0)).tolist() == [[0, -128 * columns * (code - 128), 0]] * 2


def test_triton_plans() -> None:
    from effcli.kernels._int8_matmul_triton import plan

    for rows in (1, 16, 17, 64, 512):
        for shape in ((4096, 4096), (1024, 4096), (40, 300)):
            chosen = plan(rows, shape)
            assert chosen.fused == (rows <= 16) and chosen.block_m >= min(rows, 128)
            # The weight is read by as many programs as a large GPU has multiprocessors, if it has so many rows.
            assert rows > 16 or -(-shape[0] // chosen.block_n) >= min(64, shape[0] // 16)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from effcli.kernels import _int8_matmul_triton as kernels

def compiled(kernel, warps, stages, x, **constants):
    types = {"x": x, "row_scale": "*fp32", "row_zero": "*i8", "codes": "*i8", "scale": "*bf16", "row_sums": "*i32"}
    types |= {"out": "*bf16"}
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for tokens in (True, False):
    shared = {"TOKENS": tokens, "EPSILON": 0.0078125}
    compiled(kernels._quantize, 4, 2, "*bf16", **shared, BLOCK_K=4096, STEPS=1)
    for rows, instruction in ((1, "mma.sync"), (512, "wgmma")):
        plan = kernels.plan(rows, (4096, 4096))
        blocks = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "FUSED": plan.fused}
        blocks["STEPS"] = 4096 // plan.block_k
        x = "*bf16" if plan.fused else "*i8"
        dot = compiled(kernels._product, plan.warps, plan.stages, x, **shared, **blocks)
        assert instruction in dot.asm["ptx"] and ".s32.s8.s8" in dot.asm["ptx"], rows
        assert dot.metadata.shared < 227 * 1024
"""


def test_triton_compiles_for_hopper() -> None:
    """The interpreter accepts what the compiler may not; compiling needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_empty_and_odd_inputs(activations: Activations) -> None:
    weight = make_weight((48, 64), activations)
    packed = prepare(weight)
    assert matmul(torch.empty(0, 64), packed).shape == (0, 48)
    assert matmul(torch.empty(2, 0, 64), packed).shape == (2, 0, 48)
    assert matmul(torch.ones(64), packed).shape == (48,)
    x = make_input(6, 128, torch.bfloat16)[:, ::2].view(2, 3, 64)
    assert_product(matmul(x, packed), x, weight)
    none = replace(weight, codes=weight.codes[:0], scale=weight.scale[:0])
    assert matmul(torch.ones(3, 64), prepare(none)).shape == (3, 0)
    with pytest.raises(ValueError, match="63 columns"):
        matmul(torch.ones(2, 63), packed)


def test_a_token_that_is_not_finite_shows() -> None:
    packed = prepare(make_weight((48, 64), "token"))
    x = make_input(3, 64, torch.float32)
    clean = matmul(x, packed)
    for poison in (float("nan"), float("inf")):
        x[1, 5] = poison
        y = matmul(x, packed)
        assert not y[1].isfinite().any()
        assert torch.equal(y[::2], clean[::2])


def test_a_sum_that_may_overflow_is_refused() -> None:
    prepare(make_weight((1, int8_matmul.MOST_COLUMNS), "token"))
    with pytest.raises(UnsupportedError, match="65537 inputs"):
        prepare(make_weight((1, int8_matmul.MOST_COLUMNS + 1), "token"))


def test_gradient_reaches_x() -> None:
    """Straight through the rounding; not to inputs beyond the fixed range."""
    weight = make_weight((48, 64), "token")
    x = make_input(5, 64, torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(matmul(x, prepare(weight)).sum(), x)
    through = weight.dequantize().sum(0).expand(5, -1)
    torch.testing.assert_close(gradient, through)
    weight = make_weight((48, 64), "tensor")
    x = make_input(5, 64, torch.float32).mul_(3).requires_grad_()
    (gradient,) = torch.autograd.grad(matmul(x, prepare(weight)).sum(), x)
    level = x.detach() / 0.03125 - 37
    inside = (level >= -128) & (level <= 127)
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(gradient, through * inside)


def test_tiles_cover_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packed, "_STEP", 7 * 64)
    strategies: list[Strategy] = ["channel", "tensor"]
    for strategy in strategies:
        weight = make_weight((67, 64), "token", strategy)
        packed = prepare(weight)
        whole = torch.cat([tile.clone() for _, tile in packed.tiles(torch.float32)])
        assert torch.equal(whole, weight.dequantize())
        x = make_input(9, 64, torch.float32)
        assert_product(matmul(x, packed), x, weight)


def test_memory_is_a_byte_a_weight() -> None:
    assert prepare(make_weight((256, 512), "token", dtype=torch.bfloat16)).nbytes == 256 * (512 + 2)
    assert prepare(make_weight((256, 512), "tensor", dtype=torch.bfloat16)).nbytes == 256 * (512 + 2 + 4) + 2 + 1
