"""Triton kernel of `codebook_matmul`: it reads packed codes, looks them up, and never writes Ŵ.

Imported only when a product needs them, because importing it imports Triton.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows up to which products are summed by the threads that looked the weights up: a dot takes 16 rows at least.
_SUMMED_ROWS = 2


@triton.jit
def _codes(words, ns, ks, first, inside, N, W, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes uint32 (BLOCK_K, BLOCK_N) of rows `ns` and columns `ks`, from `first` on, of words int32 (N, W)."""
    rows = ns[None, :].to(tl.int64) * W
    if 32 % BITS == 0:
        # A word is loaded once and spread over its codes in registers.
        ws = first // (32 // BITS) + tl.arange(0, BLOCK_K * BITS // 32)
        here = (ws < W)[:, None] & (ns < N)[None, :]
        word = tl.load(words + rows + ws[:, None], mask=here, other=0).to(tl.uint32, bitcast=True)
        shifts = (tl.arange(0, 32 // BITS) * BITS)[None, :, None]
        code = tl.reshape(word[:, None, :] >> shifts, (BLOCK_K, BLOCK_N))
    else:
        bit = ks * BITS
        shift = (bit & 31)[:, None]
        at = rows + (bit >> 5)[:, None]
        code = tl.load(words + at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
        rest = tl.load(words + at + 1, mask=inside & (shift + BITS > 32), other=0).to(tl.uint32, bitcast=True)
        code |= rest << ((32 - shift) & 31)
    return code & (2**BITS - 1)


@triton.jit
def _product(
    x, words, table, scale, absmax, mean, levels, out, M, N, K, W, SIZE, ROW_BLOCKS,
    BITS: tl.constexpr, TABLES: tl.constexpr, SCALES: tl.constexpr, DOUBLE: tl.constexpr, CROSSING: tl.constexpr,
    DOT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out (M, N), x (M, K) floating; words int32 (N, W).

    A weight's block is ROW_BLOCKS · row + column // SIZE, or where blocks run on over the ends of rows (CROSSING) its
    number in the flattened matrix // SIZE. TABLES: table (blocks, 2**BITS), else (1, 2**BITS). SCALES: scale (blocks,)
    floating; DOUBLE: uint8, and the scale is mean + levels[scale] · absmax[block // 256], levels float32 (256,),
    absmax float32, mean one number. DOT: products go through tl.dot; otherwise a program has one row of x and sums
    them. WIDEN: multiply in float32 what is already rounded to x's dtype; Triton's interpreter takes bf16 for integers
    in a dot.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    ms = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(0) // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M if DOT else BLOCK_K, BLOCK_N), dtype=tl.float32)
    for step in range(STEPS):
        first = step * BLOCK_K
        ks = first + tl.arange(0, BLOCK_K)
        inside = (ks < K)[:, None] & (ns < N)[None, :]
        code = _codes(words, ns, ks, first, inside, N, W, BITS, BLOCK_N, BLOCK_K).to(tl.int32)
        if CROSSING:
            block = (ns[None, :].to(tl.int64) * K + ks[:, None]) // SIZE
        else:
            block = ns[None, :].to(tl.int64) * ROW_BLOCKS + (ks // SIZE)[:, None]
        if TABLES:
            value = tl.load(table + block * (2**BITS) + code, mask=inside, other=0.0).to(tl.float32)
        else:
            value = tl.load(table + code).to(tl.float32)
        if SCALES:
            factor = tl.load(scale + block, mask=inside, other=0)
            if DOUBLE:
                part = tl.load(absmax + block // 256, mask=inside, other=0.0)
                factor = tl.load(levels + factor.to(tl.int32)) * part + tl.load(mean)
            value *= factor.to(tl.float32)
        a = tl.load(x + ms[:, None].to(tl.int64) * K + ks[None, :], mask=(ms < M)[:, None] & (ks < K)[None, :], other=0)
        b = value.to(a.dtype)
        if DOT:
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        else:
            acc += tl.reshape(a, (BLOCK_K, 1)).to(tl.float32) * b.to(tl.float32)
    place = ms[:, None].to(tl.int64) * N + ns[None, :]
    result = acc if DOT else tl.sum(acc, axis=0)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@dataclass(frozen=True)
class Plan:
    """Whether products go through a dot, and block sizes."""

    dot: bool
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"triton codebook {'dot' if self.dot else 'gemv'}"


def plan(rows: int, columns: int) -> Plan:
    """Blocks for `rows` rows of x of `columns` columns.

    Few rows are bound by reading the weight: narrow blocks keep every multiprocessor at it. With many rows a block is
    looked up once for 128 of them.
    """
    if rows <= _SUMMED_ROWS:
        return Plan(False, 1, 8, min(256, max(32, triton.next_power_of_2(columns))), 4, 2)
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_n = 32 if block_m == 16 else 64 if block_m <= 64 else 128
    block_k = min(128 if block_m <= 32 else 64, max(32, triton.next_power_of_2(columns)))
    return Plan(True, block_m, block_n, block_k, 8 if block_m == 128 else 4, 3)


def multiply(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    scale: Tensor | None,
    double: tuple[Tensor, Tensor, Tensor] | None,
    *,
    bits: int,
    size: int,
    row_blocks: int | None,
    chosen: Plan | None = None,
) -> Tensor:
    """x (M, K) floating, words int32 (N, W), table (tables, 2**bits), scale (blocks,) or None -> (M, N).

    double: absmax, mean and levels of quantized scales. A block is `size` columns of a row that has `row_blocks` blocks
    (0: those of all rows are the same); or, where that is None, `size` numbers of the flattened matrix.
    """
    (rows, columns), (out, width) = x.shape, words.shape
    chosen = chosen or plan(rows, columns)
    x = x.contiguous()
    result = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    # Pointers that are never read must be passed all the same.
    absmax, mean, levels = (table, table, table) if double is None else double
    blocks = triton.cdiv(rows, chosen.block_m) * triton.cdiv(out, chosen.block_n)
    _product[(blocks,)](
        x, words, table, table if scale is None else scale, absmax, mean, levels, result,
        rows, out, columns, width, size, row_blocks or 0,
        BITS=bits, TABLES=len(table) > 1, SCALES=scale is not None, DOUBLE=double is not None,
        CROSSING=row_blocks is None, DOT=chosen.dot, WIDEN=x.device.type == "cpu",
        BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k,
        STEPS=triton.cdiv(columns, chosen.block_k), num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return result
