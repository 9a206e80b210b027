"""Where each number of a value lies in memory: permutations of flat indices, and copies between them as loops.

A layout is an array `places` int64 (n,): the number at physical position p is the one with flat index places[p] in the
value's own shape. Reshapes and transposes then move nothing, they only rename; what does move becomes nested loops.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
Shape = tuple[int, ...]


class Level(NamedTuple):
    """One loop of a copy: how often it runs, and how far each round moves in the output and in the input."""

    extent: int
    output: int
    input: int


class Copy(NamedTuple):
    """output[first_output + Σ k·level.output] = input[first_input + Σ k·level.input], outermost level first."""

    first_output: int
    first_input: int
    levels: tuple[Level, ...]


def natural(shape: Shape) -> Places:
    """The order of the shape itself, its last axis innermost."""
    return np.arange(math.prod(shape), dtype=np.int64)


def ordered(shape: Shape, order: tuple[int, ...]) -> Places:
    """The axes of `shape` from outermost to innermost as `order` lists them."""
    return natural(shape).reshape(shape).transpose(order).reshape(-1)


def channels_last(shape: Shape) -> Places:
    """(channels, height, width) with channels innermost; any other rank in its natural order."""
    return ordered(shape, (1, 2, 0)) if len(shape) == 3 else natural(shape)


def order_of(shape: Shape, places: Places) -> tuple[int, ...] | None:
    """The order of axes that gives `places`, None when no order does. Axes of extent 1 may stand anywhere."""
    for order in itertools.permutations(range(len(shape))):
        if np.array_equal(ordered(shape, order), places):
            return order
    return None


def transposed(shape: Shape, places: Places, axes: tuple[int, ...]) -> Places:
    """The layout of the transposed value when nothing moves; `shape` and `places` are those before."""
    index = np.unravel_index(places, shape)
    return np.ravel_multi_index(tuple(index[axis] for axis in axes), tuple(shape[axis] for axis in axes)).astype(
        np.int64
    )


def inverse(places: Places) -> Places:
    """The physical position of each flat index."""
    positions = np.empty_like(places)
    positions[places] = np.arange(len(places))
    return positions


def rows(places: Places, count: int) -> tuple[Places, Places] | None:
    """Matrix rows and columns of a layout of (count, n) whose rows lie one after the other.

    Returns the row that lies at each position (count,) and the column at each position within a row (n,), None when
    rows are interleaved or their columns differ in order.
    """
    matrix = places.reshape(count, -1)
    width = matrix.shape[1]
    row, column = matrix // width, matrix % width
    if np.any(row != row[:, :1]) or np.any(column != column[:1]):
        return None
    return row[:, 0], column[0]


def strides(positions: Places) -> tuple[int, ...] | None:
    """How far each axis of an array of positions advances, None where any does so unevenly."""
    found = []
    for axis in range(positions.ndim):
        steps = np.diff(positions, axis=axis)
        if steps.size and np.any(steps != steps.flat[0]):
            return None
        found.append(int(steps.flat[0]) if steps.size else 0)
    return tuple(found)


def copy(outputs: Places, inputs: Places) -> Copy:
    """Loops that copy position inputs[k] to position outputs[k] for all k; the last level runs fastest.

    The arrays must be made of a few nested strides, as those of permuted, sliced and joined axes are.
    """
    levels: list[Level] = []
    outputs, inputs = outputs.reshape(-1), inputs.reshape(-1)
    first = int(outputs[0]), int(inputs[0])
    while len(outputs) > 1:
        extent = _run(outputs, inputs)
        levels.insert(0, Level(extent, int(outputs[1] - outputs[0]), int(inputs[1] - inputs[0])))
        outputs, inputs = outputs[::extent], inputs[::extent]
    return Copy(*first, tuple(levels) or (Level(1, 1, 1),))


def _run(outputs: Places, inputs: Places) -> int:
    """The longest period that divides the length and within which both arrays advance evenly, everywhere alike."""
    total = len(outputs)
    steps = np.stack([np.diff(outputs), np.diff(inputs)])
    even = np.all(steps == steps[:, :1], axis=0)
    limit = int(np.argmin(even)) + 1 if not even.all() else total
    for extent in range(limit, 1, -1):
        if total % extent == 0 and _periodic(outputs, inputs, extent):
            return extent
    raise ValueError("the copy is no nest of strides")


def _periodic(outputs: Places, inputs: Places, extent: int) -> bool:
    for array in (outputs, inputs):
        blocks = array.reshape(-1, extent)
        if np.any(blocks - blocks[:, :1] != blocks[:1] - blocks[0, 0]):
            return False
    return True
