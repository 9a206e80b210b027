"""Triton kernels of `int8_matmul`: inputs become int8 and are multiplied as such, the sum is rescaled once.

Imported only when a product needs them, because importing it imports Triton.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows up to which a program rounds its own rows of x: each one reads all of them twice, from the level-2 cache.
_FUSED_ROWS = 16


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """value, float32, as DTYPE would hold it: the integers depend on the dtype that x is divided in."""
    if DTYPE.is_bf16():
        # Spelt out, since Triton's interpreter cuts off where a GPU rounds halves to even.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -65536).to(tl.float32, bitcast=True)
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def _token_scale(
    x, ms, M, K, EPSILON: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """float32 (BLOCK_M,): max|x| / 127.5 of rows `ms` of x (M, K), rounded to x's dtype; NaN where one holds NaN."""
    highest = tl.zeros((BLOCK_M,), dtype=tl.float32)
    poison = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for step in range(STEPS):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
        here = (ms < M)[:, None] & (ks < K)[None, :]
        value = tl.load(x + ms[:, None] * K + ks[None, :], mask=here, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.max(tl.abs(value), axis=1))
        # A maximum passes over NaN; a product with zero does not.
        poison += tl.sum(value * 0.0, axis=1)
    scale = _rounded(tl.div_rn(highest, tl.full((BLOCK_M,), 127.5, tl.float32)), x.dtype.element_ty)
    return tl.where(scale == 0, EPSILON, scale) + poison


@triton.jit
def _integers(value, scale, zero, DTYPE: tl.constexpr):
    """round(clamp(value / scale + zero, -128, 127)) as int8; quotient and sum rounded to DTYPE, halves to even."""
    level = _rounded(tl.div_rn(value, scale), DTYPE)
    level = _rounded(level + zero, DTYPE)
    level = tl.minimum(tl.maximum(level, -128.0), 127.0)
    # Above 1.5 · 2^23 float32 holds integers only, so the sum is rounded to one.
    return ((level + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _quantize(
    x, row_scale, row_zero, codes, M, K,
    TOKENS: tl.constexpr, EPSILON: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """codes int8 (M, K) of x (M, K), a row a program.

    TOKENS: row_scale float32 (M,) is written too; else it and row_zero hold one number each for all rows.
    """
    ms = tl.program_id(0) + tl.arange(0, 1)
    if TOKENS:
        zero = 0.0
        scale = _token_scale(x, ms, M, K, EPSILON, 1, BLOCK_K, STEPS)
        tl.store(row_scale + ms, scale)
    else:
        zero = tl.load(row_zero).to(tl.float32)
        scale = tl.load(row_scale).to(tl.float32) + tl.zeros((1,), dtype=tl.float32)
    for step in range(STEPS):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
        where = ms[:, None].to(tl.int64) * K + ks[None, :]
        value = tl.load(x + where, mask=(ks < K)[None, :], other=0.0).to(tl.float32)
        level = _integers(value, tl.broadcast_to(scale[:, None], value.shape), zero, x.dtype.element_ty)
        tl.store(codes + where, level, mask=(ks < K)[None, :])


@triton.jit
def _product(
    x, row_scale, row_zero, codes, scale, row_sums, out, M, N, K, SCALE_STRIDE,
    TOKENS: tl.constexpr, FUSED: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out (M, N) floating; codes: int8 (N, K); scale: (N,) or one number, as SCALE_STRIDE is 1 or 0.

    TOKENS: a scale per row of x, found here or read from row_scale float32 (M,); else row_scale and row_zero hold one
    number each for all rows and row_sums is int32 (N,). FUSED: x is floating and rounded here; otherwise it is int8.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    ms = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    if TOKENS:
        zero = 0.0
        if FUSED:
            factor = _token_scale(x, ms, M, K, EPSILON, BLOCK_M, BLOCK_K, STEPS)
        else:
            factor = tl.load(row_scale + ms, mask=ms < M, other=1.0)
    else:
        zero = tl.load(row_zero).to(tl.float32)
        factor = tl.load(row_scale).to(tl.float32) + tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(STEPS):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
        here = (ms < M)[:, None] & (ks < K)[None, :]
        a = tl.load(x + ms[:, None].to(tl.int64) * K + ks[None, :], mask=here, other=0)
        if FUSED:
            spread = tl.broadcast_to(factor[:, None], a.shape)
            a = _integers(a.to(tl.float32), spread, zero, x.dtype.element_ty)
        # Beyond the last column the weights are zero, whatever an input of zero was rounded to.
        inside = (ks < K)[:, None] & (ns < N)[None, :]
        b = tl.load(codes + ns[None, :].to(tl.int64) * K + ks[:, None], mask=inside, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    if not TOKENS:
        acc -= tl.load(row_zero).to(tl.int32) * tl.load(row_sums + ns, mask=ns < N, other=0)[None, :]
    both = factor[:, None] * tl.load(scale + ns * SCALE_STRIDE, mask=ns < N, other=0.0).to(tl.float32)[None, :]
    place = ms[:, None].to(tl.int64) * N + ns[None, :]
    result = _rounded(acc.to(tl.float32) * both, out.dtype.element_ty)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@dataclass(frozen=True)
class Plan:
    """Whether x is rounded in the launch that multiplies it, and block sizes."""

    fused: bool
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"triton int8 dot, {'quantized in one launch' if self.fused else 'quantized before'}"


def plan(rows: int, shape: tuple[int, int]) -> Plan:
    """Blocks for `rows` rows of x and a weight (out, in) of `shape`.

    Few rows are bound by reading the weight: narrow blocks keep every multiprocessor at it. Many rows are bound by
    the dot, and rounding a row once is cheaper than once for every block of outputs.
    """
    if rows <= _FUSED_ROWS:
        return Plan(True, 16, 16 if shape[0] < 4096 else 32, 256, 4, 4)
    block_m = min(128, max(32, triton.next_power_of_2(rows)))
    block_n = 64 if block_m <= 64 else 128
    return Plan(False, block_m, block_n, 128, 8 if block_m == 128 else 4, 3)


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    activation: tuple[Tensor, Tensor, Tensor] | None,
    chosen: Plan | None = None,
) -> Tensor:
    """x (M, K) floating, codes int8 (N, K), scale (N, 1) or (1, 1) -> (M, N) in x's dtype.

    activation: scale (1,) in x's dtype, zero point int8 (1,) and row sums int32 (N,) of inputs rounded per tensor;
    None for a scale per row of x.
    """
    (rows, columns), out = x.shape, codes.shape[0]
    tokens = activation is None
    chosen = chosen or plan(rows, (out, columns))
    x = x.contiguous()
    epsilon = torch.finfo(x.dtype).eps
    result = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device) if activation is None else activation[0]
    # Never read per token, but pointers must be passed.
    row_zero, row_sums = (codes, codes) if activation is None else activation[1:]
    if not chosen.fused:
        rounded = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        block = min(4096, triton.next_power_of_2(columns))
        _quantize[(rows,)](
            x, row_scale, row_zero, rounded, rows, columns,
            TOKENS=tokens, EPSILON=epsilon, BLOCK_K=block, STEPS=triton.cdiv(columns, block),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        x = rounded
    blocks = triton.cdiv(rows, chosen.block_m) * triton.cdiv(out, chosen.block_n)
    _product[(blocks,)](
        x, row_scale, row_zero, codes, scale, row_sums, result, rows, out, columns, int(scale.shape[0] > 1),
        TOKENS=tokens, FUSED=chosen.fused, EPSILON=epsilon,
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k,
        STEPS=triton.cdiv(columns, chosen.block_k),
        num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return result
