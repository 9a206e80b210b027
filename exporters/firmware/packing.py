"""How weights lie in flash: in the order in which the kernels read them, so that one load serves one step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Numbers that one word of weights multiplies.
BLOCK = 4
# What makes a stored code unsigned, by bits.
OFFSET = {8: 128, 4: 8}


def padded(rows: Array, multiple: int, axis: int) -> Array:
    """`rows` with zeros appended along `axis` up to a multiple."""
    missing = -rows.shape[axis] % multiple
    widths = [(0, missing if other == axis else 0) for other in range(rows.ndim)]
    return np.pad(rows, widths)


def pairs(weight: Array, groups: int, bits: int) -> Array:
    """Weights (out, n) for two channels at a time: [group][pair][block][channel of two][number of four].

    int8 as they are; of 4 bits one uint32 for each [group][pair][block]. Numbers in a table of `bits` bits instead,
    uint8: one uint32 or uint16, see `table_words`.
    """
    rows = padded(weight.reshape(groups, len(weight) // groups, -1), 2, 1)
    rows = padded(rows, BLOCK, 2)
    blocks = rows.reshape(groups, rows.shape[1] // 2, 2, -1, BLOCK).swapaxes(2, 3)
    if weight.dtype == np.uint8:
        return table_words(blocks, bits)
    return words(blocks) if bits == 4 else np.ascontiguousarray(blocks).astype(np.int8)


def words(blocks: Array) -> Array:
    """Codes of 4 bits (..., 2, 4) of two channels as uint32 (...): k0 k1 of both channels, then k2 k3 of both."""
    nibbles = blocks.astype(np.int64) + OFFSET[4]
    halves = nibbles.reshape(*nibbles.shape[:-1], 2, 2).swapaxes(-3, -2)
    shifts = 4 * np.arange(8).reshape(2, 2, 2)
    result: Array = (halves << shifts).sum((-3, -2, -1)).astype(np.uint32)
    return result


def table_words(blocks: Array, bits: int) -> Array:
    """Numbers of `bits` bits in a table, (..., 2, 4) of two channels, as uint32 (4 bits) or uint16 (2 bits) (...).

    What one dual product multiplies stands side by side: k0 k2, then k1 k3 of the first channel, then of the second.
    """
    shifts = bits * np.array([[0, 2, 1, 3], [4, 6, 5, 7]])
    result: Array = (blocks.astype(np.int64) << shifts).sum((-2, -1)).astype(np.uint32 if bits == 4 else np.uint16)
    return result


def quads(weight: Array, chunk: int, bits: int) -> Array:
    """Weights (out, n) for four channels at a time: [chunk of n][quad][block][channel of four][number of four].

    Unsigned bytes w + 128; of 4 bits two uint32 in place of the last two axes. Numbers in a table of `bits` bits
    instead, uint8: two uint32 or uint16.
    """
    parts = []
    for start in range(0, weight.shape[1], chunk):
        rows = padded(padded(weight[:, start : start + chunk], BLOCK, 1), 4, 0)
        blocks = rows.reshape(len(rows) // 4, 4, -1, BLOCK).swapaxes(1, 2)
        halves = blocks.reshape(*blocks.shape[:2], 2, 2, BLOCK)
        if weight.dtype == np.uint8:
            part = table_words(halves, bits)
        elif bits == 4:
            part = words(halves)
        else:
            part = (blocks.astype(np.int16) + OFFSET[8]).astype(np.uint8)
        parts.append(part.reshape(-1))
    return np.concatenate(parts)


def cross_terms(weight: Array) -> Array:
    """Σ (256 + w₀) w₂ of weights (out, n): what halved products in `linear.c` add to each output (out,) for them.

    The sum is over the pairs (k, k + 2) and (k + 1, k + 3) of each block of four.
    """
    blocks = padded(weight.astype(np.int64), BLOCK, 1).reshape(len(weight), -1, 2, 2)
    result: Array = ((256 + blocks[:, :, 0]) * blocks[:, :, 1]).sum((1, 2))
    return result


def filters(weight: Array) -> Array:
    """Depthwise weights (channels, taps) as int8 [group of four channels][tap][channel of four]."""
    rows = padded(weight, 4, 0).astype(np.int8)
    return np.ascontiguousarray(rows.reshape(-1, 4, rows.shape[1]).swapaxes(1, 2))


def requantization(bias: Array, multiplier: Array) -> Array:
    """Bias and multiplier of each output side by side, int32 (out, 2)."""
    return np.stack([bias, multiplier], 1).astype(np.int32)
