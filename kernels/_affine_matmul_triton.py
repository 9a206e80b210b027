"""Triton kernels of `affine_matmul`: they read the packed words as they stand in the file and never write Ŵ.

Imported only when a product needs them, because importing it imports Triton.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor below which the columns are split among more of them: at few rows the product is bound
# by memory, and a read in flight needs someone to wait for it.
_PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def _gemv(
    x, words, scale, zero, out, N, K, W, GROUP, GROUPS, RUNS,
    BITS: tl.constexpr, FIXED_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, WORDS: tl.constexpr, CODES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out (SPLIT, M, N) float32, one row of x (M, K) a program.

    words: int32 (N, W); scale: (N, GROUPS); zero: uint8 (N, GROUPS). A run is the least number of words (WORDS) that
    a whole number of codes (CODES) fills; a lane takes a run, so every shift is a constant, and a code that straddles
    two words enters the sum in two parts. A group is a whole number of runs, so a run has one scale:
    Σ (q - zero) · scale · x = scale · (Σ q · x - zero · Σ x).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    m = tl.program_id(2)
    valid = rows < N
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for step in range(STEPS):
        runs = (step * SPLIT + part) * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R,), dtype=tl.float32)
        dots = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for i in tl.static_range(WORDS):
            at = runs * WORDS + i
            here = valid[:, None] & (at < W)[None, :]
            word = tl.load(words + rows[:, None] * W + at[None, :], mask=here, other=0).to(tl.uint32, bitcast=True)
            for j in tl.static_range(CODES):
                # Code j stands in bits [j·BITS, (j+1)·BITS) of the run, word i holds [32·i, 32·(i+1)).
                if j * BITS + BITS > 32 * i and j * BITS < 32 * (i + 1):
                    column = runs * CODES + j
                    value = tl.load(x + m * K + column, mask=column < K, other=0.0).to(tl.float32)
                    if j * BITS >= 32 * i:
                        total += value
                        code = (word >> (j * BITS - 32 * i)) & (2**BITS - 1)
                        dots += code.to(tl.float32) * value[None, :]
                    else:
                        code = word & (2 ** (j * BITS + BITS - 32 * i) - 1)
                        dots += code.to(tl.float32) * (value * (2 ** (32 * i - j * BITS)))[None, :]
        group = runs * CODES // GROUP
        known = valid[:, None] & (runs < RUNS)[None, :]
        where = rows[:, None] * GROUPS + group[None, :]
        factor = tl.load(scale + where, mask=known, other=0.0).to(tl.float32)
        offset = tl.load(zero + where, mask=known, other=0).to(tl.float32) if HAS_ZERO else FIXED_ZERO
        acc += factor * (dots - offset * total[None, :])
    tl.store(out + (part * tl.num_programs(2) + m) * N + rows, tl.sum(acc, axis=1), mask=valid)


@triton.jit
def _dot(
    x, words, scale, zero, out, M, N, K, W, GROUP, GROUPS,
    BITS: tl.constexpr, FIXED_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STEPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (SPLIT, M, N) float32, or x's dtype where SPLIT is 1; x (M, K), words int32 (N, W), scale, zero (N, GROUPS).

    Neighbouring programs share columns of x and differ in rows of it, so that a block of words is read from memory
    once. ONE_GROUP: a block of columns lies in one group, and its scales are loaded once. WIDEN: multiply in float32
    what is already rounded to x's dtype; Triton's interpreter takes bf16 for integers in a dot.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    ms = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS):
        first = (step * SPLIT + part) * BLOCK_K
        ks = first + tl.arange(0, BLOCK_K)
        inside = (ks < K)[:, None] & (ns < N)[None, :]
        if 32 % BITS == 0:
            # A word is loaded once and spread over its codes in registers.
            ws = first // (32 // BITS) + tl.arange(0, BLOCK_K * BITS // 32)
            here = (ws < W)[:, None] & (ns < N)[None, :]
            word = tl.load(words + ns[None, :] * W + ws[:, None], mask=here, other=0).to(tl.uint32, bitcast=True)
            shifts = (tl.arange(0, 32 // BITS) * BITS)[None, :, None]
            code = tl.reshape(word[:, None, :] >> shifts, (BLOCK_K, BLOCK_N))
        else:
            bit = ks * BITS
            shift = (bit & 31)[:, None]
            at = ns[None, :] * W + (bit >> 5)[:, None]
            code = tl.load(words + at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
            rest = tl.load(words + at + 1, mask=inside & (shift + BITS > 32), other=0).to(tl.uint32, bitcast=True)
            code |= rest << ((32 - shift) & 31)
        code = (code & (2**BITS - 1)).to(tl.float32)
        if ONE_GROUP:
            # A part's last block may lie beyond the columns; x is zero there, any scale will do.
            where = (ns * GROUPS + tl.minimum(first // GROUP, GROUPS - 1))[None, :]
            known = (ns < N)[None, :]
        else:
            where = ns[None, :] * GROUPS + (ks // GROUP)[:, None]
            known = inside
        factor = tl.load(scale + where, mask=known, other=0.0).to(tl.float32)
        offset = tl.load(zero + where, mask=known, other=0).to(tl.float32) if HAS_ZERO else FIXED_ZERO
        a = tl.load(x + ms[:, None] * K + ks[None, :], mask=(ms < M)[:, None] & (ks < K)[None, :], other=0.0)
        b = ((code - offset) * factor).to(a.dtype)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    place = (part * M + ms)[:, None] * N + ns[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@dataclass(frozen=True)
class Plan:
    """Which kernel, and its block sizes."""

    kernel: str
    block_m: int
    block_n: int
    block_k: int  # columns; runs for the GEMV
    split: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"triton {self.kernel}, split {self.split}"


def run_of(bits: int) -> tuple[int, int]:
    """Words and codes of the least run of codes of `bits` bits that fills whole words."""
    words = 1 if 32 % bits == 0 else bits // (2 if bits % 2 == 0 else 1)
    return words, 32 * words // bits


def plan(bits: int, group: int, rows: int, shape: tuple[int, int], processors: int | None = None) -> Plan:
    """Kernel and blocks for `rows` rows of x and a weight (out, in) of `shape`, `group` columns sharing a scale."""
    out, columns = shape
    if processors is None:
        on_gpu = torch.cuda.is_available()
        processors = torch.cuda.get_device_properties().multi_processor_count if on_gpu else 1
    wanted = processors * _PROGRAMS_PER_PROCESSOR
    _, codes = run_of(bits)
    if rows <= 2 and (group % codes == 0 or group >= columns):
        runs = triton.cdiv(columns, codes)
        block_n, block_r = 4, min(128, max(16, triton.next_power_of_2(runs)))
        programs = triton.cdiv(out, block_n) * rows
        split = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(runs, block_r)))
        return Plan("gemv", 1, block_n, block_r, split, 4, 2)
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_n = 64 if block_m <= 64 else 128
    block_k = min(128 if block_m <= 32 else 64, max(16, triton.next_power_of_2(columns)))
    # A block that lies in one group reads each scale once; groups below 16 columns are too short for a dot.
    while block_k > 16 and group < columns and group % block_k:
        block_k //= 2
    programs = triton.cdiv(rows, block_m) * triton.cdiv(out, block_n)
    # Partial sums are written and read: they may cost a quarter of the weight's bytes, and a part has four blocks.
    affordable = columns * bits // (128 * rows)
    split = max(1, min(triton.cdiv(wanted, 2 * programs), affordable, columns // (4 * block_k)))
    return Plan("dot", block_m, block_n, block_k, split, 8 if block_m == 128 else 4, 3)


def multiply(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    fixed_zero: int,
    group: int,
    chosen: Plan | None = None,
) -> Tensor:
    """x (M, K) floating, words int32 (N, W), scale (N, K / group), zero uint8 (N, K / group) or None -> (M, N)."""
    (rows, columns), (out, width) = x.shape, words.shape
    chosen = chosen or plan(bits, group, rows, (out, columns))
    # One scale for all rows arrives expanded, its stride zero: the kernels want rows of their own.
    x, scale = x.contiguous(), scale.contiguous()
    has_zero = zero is not None
    zero = words if zero is None else zero.contiguous()  # never read when symmetric, but a pointer must be passed
    groups = scale.shape[1]
    partial = chosen.kernel == "gemv" or chosen.split > 1
    result = torch.empty(chosen.split, rows, out, dtype=torch.float32 if partial else x.dtype, device=x.device)
    if chosen.kernel == "gemv":
        in_run, codes = run_of(bits)
        _gemv[(triton.cdiv(out, chosen.block_n), chosen.split, rows)](
            x, words, scale, zero, result, out, columns, width, group, groups, triton.cdiv(columns, codes),
            BITS=bits, FIXED_ZERO=fixed_zero, HAS_ZERO=has_zero, WORDS=in_run, CODES=codes,
            BLOCK_N=chosen.block_n, BLOCK_R=chosen.block_k, SPLIT=chosen.split,
            STEPS=triton.cdiv(triton.cdiv(columns, codes), chosen.split * chosen.block_k),
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        blocks = triton.cdiv(rows, chosen.block_m) * triton.cdiv(out, chosen.block_n)
        _dot[(blocks, chosen.split)](
            x, words, scale, zero, result, rows, out, columns, width, group, groups,
            BITS=bits, FIXED_ZERO=fixed_zero, HAS_ZERO=has_zero,
            ONE_GROUP=group >= columns or group % chosen.block_k == 0,
            BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, SPLIT=chosen.split,
            STEPS=triton.cdiv(columns, chosen.split * chosen.block_k), WIDEN=x.device.type == "cpu",
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return (result[0] if chosen.split == 1 else result.sum(0)).to(x.dtype)
