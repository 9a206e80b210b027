"""What `lowering` makes of operations that move codes or sum them up over axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from effcli.exporters.firmware import layout as layouts
from effcli.exporters.firmware import moves
from effcli.exporters.firmware.building import Building
from effcli.exporters.firmware.layout import Places
from effcli.exporters.firmware.program import Tensor, Window
from effcli.graphs import integer
from effcli.graphs.integer import Operation

# The axis of an image along which its rows follow each other.
_HEIGHT = 1


def mean(building: Building, step: integer.Mean) -> None:
    tensor, shape = building.tensors[step.inputs[0]], building.value(step.output).shape
    positions = layouts.inverse(tensor.places).reshape(tensor.shape)
    kept = [axis for axis in range(len(tensor.shape)) if axis not in step.axes]
    matrix = positions.transpose(*kept, *step.axes).reshape(math.prod(shape), -1)
    # Each output adds up the same offsets from where its sum begins.
    places = layouts.natural(shape)
    order = np.sort(matrix[0] - matrix[0, 0])
    building.add(
        moves.Mean,
        step,
        (tensor,),
        places,
        start=building.copy(layouts.natural(shape), matrix.min(1)),
        over=building.copy(layouts.natural(order.shape), order - order[0]),
        count=matrix.shape[1],
        bounds=(step.low, step.high),
        rescaling=(step.multiplier, step.shift),
    )


def reshape(building: Building, step: integer.Reshape) -> None:
    _rename(building, step, building.tensors[step.inputs[0]].places)


def transpose(building: Building, step: integer.Transpose) -> None:
    tensor = building.tensors[step.inputs[0]]
    _rename(building, step, layouts.transposed(tensor.shape, tensor.places, step.axes))


def _rename(building: Building, step: Operation, places: Places) -> None:
    """The same memory as another value."""
    before, value = building.tensors[step.inputs[0]], building.value(step.output)
    image = len(value.shape) == 3 and np.array_equal(places, layouts.channels_last(value.shape))
    rows = value.shape[1] if image else 1
    building.tensors[step.output] = Tensor(before.name, before.value, value.shape, value.zero, places, rows)


def pad(building: Building, step: integer.Pad) -> None:
    tensor, value = building.tensors[step.inputs[0]], building.value(step.output)
    order, tensor = _order(building, step.inputs[0], tensor)
    places = layouts.ordered(value.shape, order)
    inside = tuple(
        slice(before, before + extent) for (before, _), extent in zip(step.padding, tensor.shape, strict=True)
    )
    targets = layouts.inverse(places).reshape(value.shape)[inside].reshape(-1)[tensor.places]
    by_rows = len(step.padding) == 3 and not any(step.padding[_HEIGHT])
    _add_move(building, step, (tensor,), places, [(targets, layouts.natural(targets.shape))], by_rows, step.value)


def concatenate(building: Building, step: integer.Concatenate) -> None:
    shape = building.value(step.output).shape
    order, _ = _order(building, step.inputs[0], building.tensors[step.inputs[0]])
    places = layouts.ordered(shape, order)
    positions = layouts.inverse(places).reshape(shape)
    tensors, moves_, start = [], [], 0
    for name in step.inputs:
        tensor = building.placed(name, layouts.ordered(building.value(name).shape, order))
        part = (slice(None),) * step.axis + (slice(start, start + tensor.shape[step.axis]),)
        start += tensor.shape[step.axis]
        targets = positions[part].reshape(-1)[tensor.places]
        tensors.append(tensor)
        moves_.append((targets, layouts.natural(targets.shape)))
    _add_move(building, step, tuple(tensors), places, moves_, step.axis != _HEIGHT)


def take(building: Building, step: integer.Slice) -> None:
    tensor, shape = building.tensors[step.inputs[0]], building.value(step.output).shape
    order, tensor = _order(building, step.inputs[0], tensor)
    places = layouts.ordered(shape, order)
    part = (slice(None),) * step.axis + (slice(step.start, step.stop, step.step),)
    sources = layouts.inverse(tensor.places).reshape(tensor.shape)[part].reshape(-1)[places]
    window = Window(1, step.step, -step.start) if step.axis == _HEIGHT else Window()
    _add_move(building, step, (tensor,), places, [(layouts.natural(places.shape), sources)], window=window)


def _add_move(
    building: Building,
    step: Operation,
    tensors: tuple[Tensor, ...],
    places: Places,
    pairs: list[tuple[Places, Places]],
    by_rows: bool = True,
    background: int | None = None,
    window: Window | None = None,
) -> None:
    """Append copies from position to position, one pair of arrays for each input.

    by_rows: whether each row of an image is made of one row of each input, which `window` names.
    """
    output = building.tensor(step.output, places)
    windows = None
    if by_rows and output.rows > 1 and all(tensor.rows > 1 for tensor in tensors):
        window = window or Window()
        windows = (window,) * len(tensors)
        # All rows are alike: the copies of the first one.
        first = [targets < output.row_bytes for targets, _ in pairs]
        pairs = [
            (targets[kept], sources[kept] + window.above * tensor.row_bytes)
            for (targets, sources), kept, tensor in zip(pairs, first, tensors, strict=True)
        ]
    copies = tuple(building.copy(*pair) for pair in pairs)
    called = type(step).__name__.lower()
    options: dict[str, Any] = {"copies": copies, "background": background, "called": called, "windows": windows}
    building.add(moves.Move, step, tensors, places, **options)


def _order(building: Building, name: str, tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The order of axes in which a tensor lies, and the tensor, put into its natural order if it lies in none."""
    order = layouts.order_of(tensor.shape, tensor.places)
    if order is not None:
        return order, tensor
    return tuple(range(len(tensor.shape))), building.placed(name, layouts.natural(tensor.shape))
