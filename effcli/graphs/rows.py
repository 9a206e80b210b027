"""Rows of integer weights: signed codes with one scale per output channel, or entries of a table of them.

A weight that is compressed already keeps its codes where integers can stand for them: symmetric codes as they are, and
codes for a table (k-means) with the table rounded to int8, once and for all weights that share it. The weight is then
table[code] · scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from effcli.formats import Entries, Integers, Quantized

Numbers = NDArray[np.float64]

# Codes from -127 to 127, so that they are symmetric as the scale is.
_LARGEST = 127
# Below four fifths of the range the error of the clipped weights outweighs every gain at 8 bits.
_SHRINKS = np.linspace(1, 0.8, 21)


@dataclass(frozen=True)
class Rows:
    """Codes int8 (out, ...) that stand for code · scale, scales float64 (out,).

    bits: how the codes can be stored; raised: rows whose scale is larger than their weights ask for, since their bias
    would not fit otherwise; rounded_again: the weight was compressed in another form before. table: int8
    (1 or out, entries) of which all codes of a row are entries, stored by numbers of `bits` bits; None without one.
    unrolled: there was a table, which would take more room than it saves.
    """

    codes: NDArray[np.int8]
    scales: Numbers
    bits: Literal[2, 4, 8] = 8
    raised: int = 0
    rounded_again: bool = False
    table: NDArray[np.int8] | None = None
    unrolled: bool = False

    def reshaped(self, shape: tuple[int, ...]) -> Rows:
        return replace(self, codes=self.codes.reshape(shape))


def rows_of(weight: Numbers, stored: Quantized | None, least: Numbers, silent: float, clip: bool) -> Rows:
    """Codes in the shape of `weight` (out, ...).

    stored: its codes are kept when they are symmetric, or stand for a table, with a scale or a table per channel or
    tensor. least: the smallest scale (out,) with which the bias fits; silent: the scale of a row of zeros; clip: search
    for the range with the least squared error.
    """
    if stored is not None and stored.input_scale is None:
        integers, entries = stored.integers(), stored.entries()
        if integers is not None:
            return _kept(integers, stored.format.signed_bits, weight.shape, least, silent)
        if entries is not None and stored.format.strategy != "group":
            return _entries(entries, stored.format.bits, weight, least, silent)
    matrix = weight.reshape(len(weight), -1)
    largest = np.abs(matrix).max(axis=1, initial=0)
    if clip:
        largest = largest * _shrinks(matrix, largest)
    scales = np.where(largest > 0, largest / _LARGEST, silent)
    raised = scales < least
    scales = np.maximum(scales, least).astype(np.float32).astype(np.float64)
    codes = np.clip(np.rint(matrix / scales[:, None]), -_LARGEST, _LARGEST).astype(np.int8)
    return Rows(codes.reshape(weight.shape), scales, 8, int((raised & (largest > 0)).sum()), stored is not None)


def _kept(stored: Integers, bits: int, shape: tuple[int, ...], least: Numbers, silent: float) -> Rows:
    """Integers times a scale, exactly; a scale of 0 leaves zeros."""
    codes = stored.codes.numpy()
    scales = np.broadcast_to(stored.scale.double().numpy(), len(codes))
    codes, scales, raised = _raised(codes, scales, least, silent)
    return Rows(codes.reshape(shape), scales, 2 if bits <= 2 else 4 if bits <= 4 else 8, raised)


def _raised(
    codes: NDArray[np.int8], scales: Numbers, least: Numbers, silent: float
) -> tuple[NDArray[np.int8], Numbers, int]:
    """Codes (out, in) and scales of which none is too small for its row's bias, and how many rows were changed.

    A scale of 0 means a row of zeros.
    """
    dead, small = scales <= 0, (scales > 0) & (scales < least)
    found = np.where(dead, np.maximum(silent, least), np.where(small, least, scales))
    ratio = np.where(dead, 0.0, scales / found)
    changed = (dead | small)[:, None]
    rounded = np.where(changed, np.rint(codes * ratio[:, None]), codes).astype(np.int8)
    return rounded, found, int(small.sum())


def _entries(stored: Entries, code_bits: int, weight: Numbers, least: Numbers, silent: float) -> Rows:
    """Weights that are entries of a table, which is rounded under the scale that its largest weight asks for."""
    tables, out = len(stored.tables), len(weight)
    largest = np.abs(weight.reshape(tables, -1)).max(axis=1, initial=0)
    # What shares a table shares its scale.
    needed = least.reshape(tables, -1).max(axis=1, initial=0)
    scales = np.where(largest > 0, largest / _LARGEST, silent)
    raised = (scales < needed) & (largest > 0)
    scales = np.maximum(scales, needed).astype(np.float32).astype(np.float64)
    steps = np.rint(stored.tables.double().numpy() / scales[:, None])
    table = np.clip(steps, -_LARGEST, _LARGEST).astype(np.int8)
    codes = np.take_along_axis(table, stored.codes.long().numpy().reshape(tables, -1), 1).reshape(weight.shape)
    repeat = out // tables
    rows = Rows(codes, scales.repeat(repeat), 8, int(raised.sum()) * repeat)
    bits: Literal[2, 4] = 2 if code_bits <= 2 else 4
    if code_bits > 4 or out * math.ceil(codes[0].size * bits / 8) + table.size >= codes.size:
        return replace(rows, unrolled=True)
    return replace(rows, bits=bits, table=table)


def look_up(table: NDArray[np.int8], numbers: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Entries int8 (out, n) of a table (1 or out, entries), by their numbers; `IndexError` beyond its end."""
    return np.take_along_axis(np.broadcast_to(table, (len(numbers), table.shape[1])), numbers.astype(np.intp), 1)


def numbers_in(table: NDArray[np.int8], codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The inverse of `look_up`: of equal entries the first. `ValueError` for codes (out, n) that a table lacks."""
    found = np.zeros((len(table), 256), np.uint8)
    entries = np.arange(table.shape[1], dtype=np.uint8)[::-1]
    # In reverse, so that the first of equal entries stays.
    for entry in entries:
        found[np.arange(len(table)), table[:, entry].view(np.uint8)] = entry
    result = look_up(found.view(np.int8), codes.view(np.uint8)).view(np.uint8)
    if not np.array_equal(look_up(table, result), codes):
        raise ValueError("there are weights that the table lacks")
    return result


def _shrinks(matrix: Numbers, largest: Numbers) -> Numbers:
    """The factor (out,) of each row's range with the least squared error."""
    best, factors = np.full(len(matrix), np.inf), np.ones(len(matrix))
    for shrink in _SHRINKS:
        scale = np.maximum(largest * shrink / _LARGEST, np.finfo(np.float64).tiny)[:, None]
        rounded = np.clip(np.rint(matrix / scale), -_LARGEST, _LARGEST) * scale
        error = np.square(rounded - matrix).sum(1)
        factors = np.where(error < best, shrink, factors)
        best = np.minimum(best, error)
    return factors
