"""Triton kernel of `sparse_matmul`: it reads the kept weights of a 2:4 pattern and their places, and never writes Ŵ.

A block of four columns is a byte of two 4-bit codes, or two numbers, and half a byte of two places. The products are
those of the dense weight, so that what is saved is reading: 9/16 of a bf16 weight, 3/4 of a 4-bit one.

Imported only when a product needs it, because importing it imports Triton.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor below which the columns are split among more of them.
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _product(
    x, values, places, scale, zero, out, M, N, K, W, GROUP, GROUPS,
    CODES: tl.constexpr, FIXED_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out (SPLIT, M, N) float32, or x's dtype where SPLIT is 1; x (M, K) floating, K = 4 Q.

    places: uint8 (N, W), two blocks in a byte, the first low; of a block the place of the first kept weight in two
    bits, then that of the second. values: floating (N, 2 Q); with CODES uint8 (N, Q), the first code low, and a weight
    is (code - zero) · scale; scale (N, GROUPS) and zero uint8 (N, GROUPS), one for GROUP blocks. WIDEN: multiply in
    float32 what is already rounded to x's dtype; Triton's interpreter takes bf16 for integers in a dot.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    ms = ((tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ns = ((tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    part = tl.program_id(1)
    quads = K // 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS):
        first = (step * SPLIT + part) * BLOCK_Q
        qs = first + tl.arange(0, BLOCK_Q)
        inside = (qs < quads)[:, None] & (ns < N)[None, :]
        place = tl.load(places + ns[None, :] * W + (qs // 2)[:, None], mask=inside, other=0).to(tl.int32)
        place = place >> ((qs % 2) * 4)[:, None]
        if CODES:
            code = tl.load(values + ns[None, :] * quads + qs[:, None], mask=inside, other=0).to(tl.int32)
            where = ns[None, :] * GROUPS + (qs // GROUP)[:, None]
            factor = tl.load(scale + where, mask=inside, other=0.0).to(tl.float32)
            offset = tl.load(zero + where, mask=inside, other=0).to(tl.float32) if HAS_ZERO else FIXED_ZERO
            one = ((code & 15).to(tl.float32) - offset) * factor
            two = ((code >> 4).to(tl.float32) - offset) * factor
        else:
            at = ns[None, :] * (2 * quads) + (2 * qs)[:, None]
            one = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
            two = tl.load(values + at + 1, mask=inside, other=0.0).to(tl.float32)
        column = tl.arange(0, 4)[None, :, None]
        spread = tl.where((place & 3)[:, None, :] == column, one[:, None, :], 0.0)
        spread = tl.where(((place >> 2) & 3)[:, None, :] == column, two[:, None, :], spread)
        ks = first * 4 + tl.arange(0, 4 * BLOCK_Q)
        a = tl.load(x + ms[:, None] * K + ks[None, :], mask=(ms < M)[:, None] & (ks < K)[None, :], other=0.0)
        b = tl.reshape(spread, (4 * BLOCK_Q, BLOCK_N)).to(a.dtype)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    target = (part * M + ms)[:, None] * N + ns[None, :]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@dataclass(frozen=True)
class Plan:
    """Block sizes; block_q: in blocks of four columns."""

    block_m: int
    block_n: int
    block_q: int
    split: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"triton 2:4 dot, split {self.split}"


def plan(rows: int, shape: tuple[int, int], processors: int | None = None) -> Plan:
    """Blocks for `rows` rows of x and a weight (out, in) of `shape`."""
    out, columns = shape
    if processors is None:
        on_gpu = torch.cuda.is_available()
        processors = torch.cuda.get_device_properties().multi_processor_count if on_gpu else 1
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_n = 32 if block_m == 16 else 64
    block_q = min(32 if block_m <= 32 else 16, max(4, triton.next_power_of_2(columns // 4)))
    programs = triton.cdiv(rows, block_m) * triton.cdiv(out, block_n)
    # Partial sums are written and read: a part has four steps at least.
    split = max(1, min(triton.cdiv(processors * _PROGRAMS_PER_PROCESSOR, programs), columns // (16 * block_q)))
    return Plan(block_m, block_n, block_q, split, 8 if block_m == 128 else 4, 3)


def multiply(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    fixed_zero: int = 0,
    group: int = 1,
    chosen: Plan | None = None,
) -> Tensor:
    """x (M, K) floating -> (M, N). values: floating (N, K / 2), or with `scale` two codes a byte, uint8 (N, K / 4).

    places: uint8 (N, ceil(K / 8)); scale, zero uint8: (N, K / group) for groups of `group` columns, a multiple of 4.
    """
    (rows, columns), out = x.shape, len(values)
    chosen = chosen or plan(rows, (out, columns))
    partial = chosen.split > 1
    result = torch.empty(chosen.split, rows, out, dtype=torch.float32 if partial else x.dtype, device=x.device)
    # Pointers that are never read must be passed all the same.
    factor = values if scale is None else scale.contiguous()
    offset = places if zero is None else zero.contiguous()
    blocks = triton.cdiv(rows, chosen.block_m) * triton.cdiv(out, chosen.block_n)
    _product[(blocks, chosen.split)](
        x.contiguous(), values, places, factor, offset, result,
        rows, out, columns, places.shape[1], group // 4, factor.shape[1],
        CODES=scale is not None, FIXED_ZERO=fixed_zero, HAS_ZERO=zero is not None, WIDEN=x.device.type == "cpu",
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_Q=chosen.block_q, SPLIT=chosen.split,
        STEPS=triton.cdiv(columns // 4, chosen.split * chosen.block_q),
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return (result.sum(0) if partial else result[0]).to(x.dtype)
