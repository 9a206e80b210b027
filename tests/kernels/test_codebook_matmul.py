"""Every route against the reference: by hand, on weird shapes, with blocks that cross rows, and as properties."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import Codebook, CodebookWeight, DoubleQuantized, Kind, Strategy
from effcli.formats.codebook import NF4_LEVELS, fixed_table
from effcli.kernels import _packed
from effcli.kernels.codebook_matmul import Coded, matmul, prepare, reference
from effcli.kernels.quantized_matmul import route_name

# Where the Triton kernel runs: on a GPU, or in Triton's interpreter (tests/conftest.py turns it on).
TRITON = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Relative to Σ |x| |w|, which bounds what rounding can do. bf16 keeps 8 bits, float16 11; float32 sums 1271 products.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# Kind, bits, strategy, group size, whether scales are quantized.
Case = tuple[Kind, int, Strategy, int, bool]
CASES: list[Case] = [
    ("nf4", 4, "group", 64, False),
    ("nf4", 4, "group", 64, True),
    ("binary", 1, "channel", 0, False),
    ("binary", 1, "tensor", 0, False),
    ("ternary", 2, "channel", 0, False),
    ("ternary", 2, "group", 31, False),
    *[("kmeans", bits, "tensor", 0, False) for bits in range(1, 9)],
    *[("kmeans", bits, "channel", 0, False) for bits in range(1, 9)],
    *[("kmeans", bits, "group", 31, False) for bits in range(1, 9)],
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_weight(
    case: Case, shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> CodebookWeight:
    kind, bits, strategy, group, double = case
    generator = torch.Generator().manual_seed(seed)
    format = Codebook(kind, bits, strategy, group, double, dtype=dtype)
    blocks = format.blocks(shape)
    codes = torch.randint(0, 3 if kind == "ternary" else 2**bits, shape, generator=generator).to(torch.uint8)
    if kind == "kmeans":
        table = torch.randn(blocks, 2**bits, generator=generator).sort(1).values * 0.05
        return CodebookWeight(format, codes, table.to(dtype))
    if double:
        numbers = torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8)
        absmax = torch.rand(-(-blocks // 256), generator=generator) * 0.02
        return CodebookWeight(format, codes, fixed_table(kind), DoubleQuantized(numbers, absmax, torch.tensor(0.03)))
    scale = torch.rand(blocks, generator=generator) * 0.05 + 0.01
    return CodebookWeight(format, codes, fixed_table(kind), scale if kind == "nf4" else scale.to(dtype))


def make_input(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    # Not centred: an offset that every weight of a block shares must show.
    return (torch.randn(rows, columns, generator=generator) + 0.5).to(dtype)


def assert_product(y: Tensor, x: Tensor, weight: CodebookWeight, slack: float = 1) -> None:
    """y is x Ŵᵀ to the rounding of x's dtype."""
    assert y.dtype == x.dtype
    dense = weight.dequantize(torch.float64)
    bound = x.double().abs() @ dense.abs().T + 1e-30
    error = ((y.cpu().double() - x.double() @ dense.T) / bound).abs()
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=slack * TOLERANCE[x.dtype])


def run_triton(x: Tensor, weight: CodebookWeight) -> Tensor:
    return Coded.build(weight, TRITON).multiply_triton(x.to(TRITON)).cpu()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nf4_by_hand(dtype: torch.dtype) -> None:
    """Blocks of four in rows of three: number n of the flattened matrix has the scale n // 4."""
    codes = torch.tensor([[0, 7, 15], [15, 0, 15]], dtype=torch.uint8)
    weight = CodebookWeight(Codebook("nf4", 4, "group", 4), codes, fixed_table("nf4"), torch.tensor([2.0, 8.0]))
    # Ŵ = [[-2, 0, 2], [2, -8, 8]]
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 0.0]], dtype=dtype)
    expected = [[4.0, 10.0], [0.0, -4.0]]
    assert reference(x, weight).tolist() == expected
    assert matmul(x, prepare(weight)).tolist() == expected
    assert run_triton(x, weight).tolist() == [*run_triton(x[:1], weight).tolist(), expected[1]] == expected


def test_nf4_levels() -> None:
    weight = make_weight(("nf4", 4, "group", 64, False), (1, 16))
    weight = CodebookWeight(weight.format, torch.arange(16).to(torch.uint8).view(1, 16), weight.table, torch.ones(1))
    assert matmul(torch.eye(16), prepare(weight))[:, 0].tolist() == pytest.approx(NF4_LEVELS, abs=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kmeans_by_hand(dtype: torch.dtype) -> None:
    """A table of four for each group of two."""
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]], dtype=torch.uint8)
    table = torch.tensor([[-1.0, 0.5, 9, 9], [9, 9, 0.25, 4], [9, 9, 9, 2.0], [-3, 1, 9, 9]])
    weight = CodebookWeight(Codebook("kmeans", 2, "group", 2), codes, table)
    # Ŵ = [[-1, 0.5, 0.25, 4], [2, 2, -3, 1]]
    x = torch.tensor([[1.0, 2.0, 4.0, 0.5], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]], dtype=dtype)
    expected = [[3.0, -5.5], [-2.0, 4.0], [-4.0, -1.0]]
    assert matmul(x, prepare(weight)).tolist() == expected
    assert run_triton(x, weight).tolist() == expected


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_cpu_routes(case: Case, dtype: torch.dtype) -> None:
    for rows, out, columns in ((41, 401, 1271), (1, 48, 310), (3, 1, 31)):
        for stored in {dtype, torch.bfloat16}:
            weight = make_weight(case, (out, columns), stored)
            x = make_input(rows, columns, dtype)
            assert_product(matmul(x, prepare(weight)), x, weight)


@pytest.mark.parametrize("case", CASES)
def test_lookup_is_exact(case: Case) -> None:
    """Pairs and quadruples of codes, and single ones where blocks are short or rows odd: the same values."""
    for shape in ((64, 8192), (401, 1271), (7, 4096), (40, 93), (5, 31)):
        if case[2] == "group" and case[3] == 31 and shape[1] % 31:
            continue
        weight = make_weight(case, shape)
        dense = weight.dequantize()
        packed = prepare(weight)
        assert torch.equal(torch.cat([tile.clone() for _, tile in packed.tiles(torch.float32)]), dense)
        for start, stop in ((0, 1), (3, 5), (shape[0] - 1, shape[0])):
            assert torch.equal(packed.step(start, stop, torch.float32), dense[start:stop])


TRITON_CASES: list[tuple[int, int, int, Case]] = [
    (1, 70, 256, ("nf4", 4, "group", 64, False)),
    (2, 33, 1271, ("nf4", 4, "group", 64, True)),
    (41, 401, 1271, ("nf4", 4, "group", 64, False)),
    (5, 130, 384, ("nf4", 4, "group", 64, True)),
    (1, 9, 300, ("binary", 1, "channel", 0, False)),
    (17, 70, 96, ("binary", 1, "tensor", 0, False)),
    (3, 20, 310, ("ternary", 2, "group", 31, False)),
    (2, 20, 310, ("kmeans", 5, "group", 31, False)),
    (5, 48, 384, ("kmeans", 3, "channel", 0, False)),
    (1, 48, 384, ("kmeans", 4, "tensor", 0, False)),
    (64, 130, 64, ("kmeans", 8, "tensor", 0, False)),
    (3, 40, 200, ("kmeans", 7, "tensor", 0, False)),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "out", "columns", "case"), TRITON_CASES)
def test_triton(rows: int, out: int, columns: int, case: Case, dtype: torch.dtype) -> None:
    weight = make_weight(case, (out, columns), dtype)
    x = make_input(rows, columns, dtype)
    # Triton's interpreter cuts float32 down to bf16 where a GPU rounds: twice the error.
    assert_product(run_triton(x, weight), x, weight, slack=1 if TRITON.type == "cuda" else 2)


def test_triton_plans() -> None:
    from effcli.kernels._codebook_matmul_triton import plan

    for rows in (1, 2, 3, 16, 64, 512):
        for columns in (16, 300, 4096):
            chosen = plan(rows, columns)
            assert chosen.dot == (rows > 2)
            assert chosen.block_m >= min(rows, 128) or not chosen.dot
            assert 32 <= chosen.block_k < 2 * max(32, columns)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from effcli.kernels import _codebook_matmul_triton as kernels

def compiled(plan, scale, **constants):
    types = {"x": "*bf16", "words": "*i32", "table": "*fp32", "scale": scale, "absmax": "*fp32", "mean": "*fp32"}
    types |= {"levels": "*fp32", "out": "*bf16"}
    constants |= {"DOT": plan.dot, "WIDEN": False, "STEPS": 4096 // plan.block_k}
    constants |= {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k}
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernels._product.arg_names}
    source = ASTSource(fn=kernels._product, signature=kinds, constexprs=constants)
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for rows in (1, 64):
    plan = kernels.plan(rows, 4096)
    for bits, tables, scales, double, crossing in (
        (4, False, True, False, False),
        (4, False, True, True, True),
        (3, True, False, False, False),
    ):
        kind = "*u8" if double else "*fp32"
        made = compiled(
            plan, kind, BITS=bits, TABLES=tables, SCALES=scales, DOUBLE=double, CROSSING=crossing
        )
        assert ("wgmma" in made.asm["ptx"]) == plan.dot and made.metadata.shared < 227 * 1024
"""


def test_triton_compiles_for_hopper() -> None:
    """The interpreter accepts what the compiler may not; compiling needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WEIGHTS: dict[str, Any] = {
    "kind": st.sampled_from(["kmeans", "nf4", "binary", "ternary"]),
    "bits": st.integers(1, 8),
    "strategy": st.sampled_from(["tensor", "channel", "group"]),
    "group": st.sampled_from([1, 4, 5, 16, 64]),
    "double": st.booleans(),
    "out": st.integers(1, 60),
    "columns": st.integers(1, 160),
}


def drawn(kind: Kind, bits: int, strategy: Strategy, group: int, double: bool, columns: int) -> Case:
    """A case that is one: kinds with a fixed table have their own bits, and groups divide rows except nf4's."""
    bits = {"nf4": 4, "binary": 1, "ternary": 2}.get(kind, bits)
    if kind == "nf4":
        return kind, bits, "group", group, double
    assume(strategy != "group" or columns % group == 0)
    return kind, bits, strategy, group if strategy == "group" else 0, False


@given(**WEIGHTS)
def test_the_layout_gives_back_the_weight(
    kind: Kind, bits: int, strategy: Strategy, group: int, double: bool, out: int, columns: int
) -> None:
    weight = make_weight(drawn(kind, bits, strategy, group, double, columns), (out, columns), torch.bfloat16)
    restored = prepare(weight).restore()
    assert restored.format == weight.format and torch.equal(restored.codes, weight.codes)
    assert restored.dtype == prepare(weight).dtype == torch.bfloat16
    own, found = weight.pack(), restored.pack()
    assert own.keys() == found.keys()
    assert all(torch.equal(found[name], own[name]) and found[name].dtype == own[name].dtype for name in own)


@given(rows=st.integers(1, 3), **WEIGHTS)
def test_products(
    rows: int, kind: Kind, bits: int, strategy: Strategy, group: int, double: bool, out: int, columns: int
) -> None:
    weight = make_weight(drawn(kind, bits, strategy, group, double, columns), (out, columns), seed=columns)
    packed = prepare(weight)
    assert torch.equal(packed.step(0, out, torch.float32), weight.dequantize())
    x = make_input(rows, columns, torch.float32)
    assert_product(matmul(x, packed), x, weight)


@pytest.mark.parametrize("case", CASES[:6])
def test_tiles_cover_the_weight(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packed, "_STEP", 7 * 93)
    weight = make_weight(case, (67, 93))
    whole = torch.cat([tile.clone() for _, tile in prepare(weight).tiles(torch.float32)])
    assert torch.equal(whole, weight.dequantize())


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[11], CASES[15]])
def test_empty_and_odd_inputs(case: Case) -> None:
    weight = make_weight(case, (48, 62))
    packed = prepare(weight)
    assert matmul(torch.empty(0, 62), packed).shape == (0, 48)
    assert matmul(torch.empty(2, 0, 62), packed).shape == (2, 0, 48)
    assert matmul(torch.ones(62), packed).shape == (48,)
    x = make_input(6, 124, torch.bfloat16)[:, ::2]
    assert_product(matmul(x.view(2, 3, 62), packed).view(6, 48), x, weight)
    for shape in ((0, 62), (48, 0)):
        assert matmul(torch.ones(3, shape[1]), prepare(make_weight(case, shape))).tolist() == [[0.0] * shape[0]] * 3
    with pytest.raises(ValueError, match="61 columns"):
        matmul(torch.ones(2, 61), packed)


def test_gradient_reaches_x() -> None:
    for case in (CASES[0], CASES[4], CASES[9]):
        weight = make_weight(case, (48, 64))
        x = make_input(5, 64, torch.float32).requires_grad_()
        (gradient,) = torch.autograd.grad(matmul(x, prepare(weight)).square().sum(), x)
        y = x.detach() @ weight.dequantize().T
        torch.testing.assert_close(gradient, 2 * y @ weight.dequantize())


def test_memory_is_what_the_file_holds() -> None:
    """Codes in as few bits as they need, quantized scales quantized."""
    shape = (256, 1024)
    cases: list[tuple[Case, float]] = [
        (("nf4", 4, "group", 64, False), 4.51),
        (("nf4", 4, "group", 64, True), 4.13),
        (("binary", 1, "channel", 0, False), 1.02),
        (("ternary", 2, "channel", 0, False), 2.02),
        (("kmeans", 3, "tensor", 0, False), 3.01),
        (("kmeans", 4, "channel", 0, False), 4.26),
    ]
    for case, bits in cases:
        packed = prepare(make_weight(case, shape, torch.bfloat16))
        assert 8 * packed.nbytes <= bits * shape[0] * shape[1]
        assert "codebook" in route_name(packed, 1, torch.bfloat16)
        assert case[4] == ("scale_absmax" in packed.tensors())
