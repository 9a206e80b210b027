"""From an integer network to the tasks of its C program.

Images lie with channels last; what comes before and after a reshape or a transpose is the same memory, read in another
order. Numbers move only where an operation asks for another order than they lie in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from effcli.errors import UnsupportedError
from effcli.exporters.firmware import attention, convolution, elementwise, linear, moves, pooling
from effcli.exporters.firmware import layout as layouts
from effcli.exporters.firmware.layout import Copy, Places
from effcli.exporters.firmware.program import Constant, Program, Spatial, Task, Tensor, Window
from effcli.exporters.firmware.requantize import constants
from effcli.graphs import integer
from effcli.graphs.integer import IntegerNetwork, Operation, Value


def lower(network: IntegerNetwork) -> Program:
    """The program of `network`. Raises `UnsupportedError` for an operation or a shape that has no C, by its name."""
    return _Lowering(network).program()


# The axis of an image along which its rows follow each other.
_HEIGHT = 1


class _Lowering:
    """tensors: what holds each value so far, by the value's name."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.tasks: list[Task] = []
        self.tensors: dict[str, Tensor] = {}
        self.source = ""
        self.layer = ""

    def program(self) -> Program:
        network = self.network.program
        value = network.values[network.input]
        entry = self.tensors[network.input] = self.tensor(network.input, layouts.channels_last(value.shape))
        for step in network.steps:
            self.layer, self.source = step.name, step.source
            handler = _HANDLERS.get(type(step))
            if handler is None:
                raise UnsupportedError(
                    f"{self.where} ({type(step).__name__.lower()}) has no C code", "leave it out of the network"
                )
            handler(self, step)
        self.layer, self.source = "output", ""
        value = network.values[network.output]
        output = self.placed(network.output, layouts.channels_last(value.shape))
        if output.name == entry.name or output.data is not None:
            output = self.moved(network.output, output, output.places)
        return Program(tuple(self.tasks), entry, output)

    @property
    def where(self) -> str:
        return f"{self.layer} ({self.source})" if self.source else self.layer

    def value(self, name: str) -> Value:
        return self.network.program.values[name]

    def tensor(self, name: str, places: Places) -> Tensor:
        """A new tensor for a value; an image with channels last has its rows."""
        value = self.value(name)
        image = len(value.shape) == 3 and np.array_equal(places, layouts.channels_last(value.shape))
        rows = value.shape[1] if image else 1
        taken = {tensor.name for tensor in (*self.tensors.values(), *(task.output for task in self.tasks))}
        unique = name if name not in taken else f"{name}.{len(self.tasks)}"
        return Tensor(unique, name, value.shape, value.zero, places, rows)

    def placed(self, name: str, places: Places) -> Tensor:
        """The tensor of a value in the layout `places`, copied there if it lies otherwise."""
        tensor = self.tensors[name]
        if np.array_equal(tensor.places, places):
            return tensor
        return self.fixed(name, tensor, places) if tensor.data is not None else self.moved(name, tensor, places)

    def fixed(self, name: str, tensor: Tensor, places: Places) -> Tensor:
        """A constant tensor in another layout."""
        assert tensor.data is not None
        codes = tensor.data[layouts.inverse(tensor.places)[places]]
        return replace(self.tensor(name, places), data=codes)

    def moved(self, name: str, tensor: Tensor, places: Places) -> Tensor:
        copied = self.copy(layouts.natural(places.shape), layouts.inverse(tensor.places)[places])
        output = self.tensor(name, places)
        self.tasks.append(
            moves.Move(f"{self.layer}.order", self.source, (tensor,), output, {}, copies=(copied,), called="reorder")
        )
        return output

    def copy(self, outputs: Places, inputs: Places) -> Copy:
        try:
            return layouts.copy(outputs, inputs)
        except ValueError:
            raise UnsupportedError(
                f"{self.where} moves numbers in an order that is no nest of loops", "change the network's reshapes"
            ) from None

    def image(self, name: str) -> Tensor:
        """The tensor of an image with channels last."""
        return self.placed(name, layouts.channels_last(self.value(name).shape))

    def add(
        self,
        make: Callable[..., Task],
        step: Operation,
        inputs: tuple[Tensor, ...],
        places: Places,
        arrays: dict[str, Constant] | None = None,
        **options: Any,
    ) -> None:
        """Append the task of `step`, whose output lies as `places`."""
        output = self.tensor(step.output, places)
        self.tasks.append(make(step.name, step.source, inputs, output, arrays or {}, **options))
        self.tensors[step.output] = output

    def spatial(self, step: Any, tensor: Tensor, dilation: tuple[int, int], kernel: tuple[int, int]) -> Spatial:
        (channels, height, width), (outputs, *extent) = tensor.shape, self.value(step.output).shape
        return Spatial(
            height, width, channels, extent[0], extent[1], outputs, kernel, step.stride, step.padding, dilation
        )


def _convolution(lowering: _Lowering, step: integer.Convolution) -> None:
    network = lowering.network
    weight = network.array(step, "weight")
    tensor = lowering.image(step.inputs[0])
    spatial = lowering.spatial(step, tensor, step.dilation, (weight.shape[2], weight.shape[3]))
    places = layouts.channels_last(lowering.value(step.output).shape)
    whole = spatial.out_height == spatial.out_width == 1 and spatial.kernel == (spatial.height, spatial.width)
    if whole and step.groups == 1 and not any(step.padding):
        _add_linear(lowering, step, tensor, weight.transpose(0, 2, 3, 1).reshape(len(weight), -1), places)
        return
    arrays = {suffix: network.array(step, suffix) for suffix in ("bias", "multiplier", "shift")}
    options: dict[str, Any] = {"spatial": spatial, "bounds": (step.low, step.high), "windows": (spatial.window,)}
    options["macs"] = math.prod(lowering.value(step.output).shape) * math.prod(weight.shape[1:])
    requantized = constants(arrays["bias"], arrays["multiplier"], arrays["shift"])
    if step.groups == spatial.channels == spatial.out_channels > 1:
        stored = {"weights": convolution.packed_filters(weight), "blank": convolution.blank(spatial, tensor.zero)}
        lowering.add(convolution.Depthwise, step, (tensor,), places, stored | requantized, **options)
        return
    bits = _bits(step)
    stored = {"weights": convolution.packed(weight, step.groups, bits)}
    options |= {"groups": step.groups, "bits": bits, "scratch": convolution.scratch(spatial, step.groups)}
    lowering.add(convolution.Convolution, step, (tensor,), places, stored | requantized, **options)


def _linear(lowering: _Lowering, step: integer.Linear) -> None:
    network = lowering.network
    weight, shape = network.array(step, "weight"), lowering.value(step.output).shape
    tensor, order, columns = _in_rows(lowering, step.inputs[0])
    count = len(order)
    places = (order[:, None] * shape[-1] + np.arange(shape[-1])).reshape(-1)
    weight = weight[:, columns]
    if count == 1:
        _add_linear(lowering, step, tensor, weight, places)
        return
    # Rows of a matrix are pixels of an image of one row.
    spatial = Spatial(1, count, weight.shape[1], 1, count, len(weight), (1, 1), (1, 1), (0, 0, 0, 0))
    arrays = {suffix: network.array(step, suffix) for suffix in ("bias", "multiplier", "shift")}
    stored = {"weights": convolution.packed(weight[:, :, None, None], 1, _bits(step))}
    stored |= constants(arrays["bias"], arrays["multiplier"], arrays["shift"])
    lowering.add(
        convolution.Convolution,
        step,
        (tensor.as_row(),),
        places,
        stored,
        spatial=spatial,
        bounds=(step.low, step.high),
        bits=_bits(step),
        windows=(spatial.window,),
        scratch=convolution.scratch(spatial, 1),
        macs=count * weight.size,
    )


def _add_linear(
    lowering: _Lowering, step: integer.Weighted, tensor: Tensor, weight: integer.Array, places: Places
) -> None:
    outputs, inputs = weight.shape
    if inputs > linear.MOST_INPUTS:
        raise UnsupportedError(f"{lowering.where} has {inputs} inputs", f"at most {linear.MOST_INPUTS} have C code")
    arrays = {suffix: lowering.network.array(step, suffix) for suffix in ("bias", "multiplier", "shift")}
    size = linear.chunk(inputs, outputs)
    lowering.add(
        linear.Linear,
        step,
        (tensor,),
        places,
        linear.packed(weight, size, _bits(step), arrays),
        bounds=(step.low, step.high),
        chunk=size,
        bits=_bits(step),
        size=(inputs, outputs),
        scratch=linear.scratch(inputs, outputs, size),
        macs=weight.size,
    )


def _bits(step: integer.Weighted) -> int:
    """How weights are stored in flash; those of 2 bits as of 4."""
    return 8 if step.weight_bits == 8 else 4


def _max_pool(lowering: _Lowering, step: integer.MaxPool) -> None:
    tensor = lowering.image(step.inputs[0])
    spatial = lowering.spatial(step, tensor, step.dilation, step.kernel)
    places = layouts.channels_last(lowering.value(step.output).shape)
    lowering.add(pooling.MaxPool, step, (tensor,), places, spatial=spatial, windows=(spatial.window,))


def _average_pool(lowering: _Lowering, step: integer.AveragePool) -> None:
    tensor = lowering.image(step.inputs[0])
    spatial = lowering.spatial(step, tensor, (1, 1), step.kernel)
    places = layouts.channels_last(lowering.value(step.output).shape)
    options: dict[str, Any] = {"bounds": (step.low, step.high), "rescaling": (step.multiplier, step.shift)}
    lowering.add(pooling.AveragePool, step, (tensor,), places, spatial=spatial, windows=(spatial.window,), **options)


def _pointwise(lowering: _Lowering, step: integer.Add | integer.Multiply) -> None:
    shape = lowering.value(step.output).shape
    first, second = (lowering.tensors[name] for name in step.inputs)
    names = step.inputs
    swapped = first.shape != shape
    if swapped:
        first, second, names = second, first, (names[1], names[0])
    if first.shape != shape:
        raise UnsupportedError(f"{lowering.where} broadcasts both of its inputs", "expand one of them first")
    places, strides = first.places, None
    if second.shape != shape:
        # Where each number of the output finds its partner.
        flat = np.broadcast_to(layouts.natural(second.shape).reshape(second.shape), shape).reshape(-1)
        strides = lowering.copy(layouts.natural(places.shape), layouts.inverse(second.places)[flat[places]])
    elif not np.array_equal(second.places, places):
        second = lowering.placed(names[1], places)
    options: dict[str, Any] = {"bounds": (step.low, step.high), "strides": strides}
    if strides is None and first.rows > 1:
        options["windows"] = (Window(), Window())
    if isinstance(step, integer.Add):
        multipliers = (step.multipliers[1], step.multipliers[0]) if swapped else step.multipliers
        offset = step.offset + (1 << (step.shift - 1))
        options |= {"multipliers": multipliers, "offset": offset, "shift": step.shift}
        lowering.add(elementwise.Add, step, (first, second), places, **options)
    else:
        options["rescaling"] = step.multiplier, step.shift
        lowering.add(elementwise.Multiply, step, (first, second), places, **options)


def _table(lowering: _Lowering, step: integer.Table) -> None:
    tensor = lowering.tensors[step.inputs[0]]
    arrays = {"table": Constant("int8_t", lowering.network.array(step, "table"))}
    windows = (Window(),) if tensor.rows > 1 else None
    lowering.add(elementwise.Table, step, (tensor,), tensor.places, arrays, windows=windows)


def _mean(lowering: _Lowering, step: integer.Mean) -> None:
    tensor, shape = lowering.tensors[step.inputs[0]], lowering.value(step.output).shape
    positions = layouts.inverse(tensor.places).reshape(tensor.shape)
    kept = [axis for axis in range(len(tensor.shape)) if axis not in step.axes]
    matrix = positions.transpose(*kept, *step.axes).reshape(math.prod(shape), -1)
    # Each output adds up the same offsets from where its sum begins.
    places = layouts.natural(shape)
    order = np.sort(matrix[0] - matrix[0, 0])
    lowering.add(
        moves.Mean,
        step,
        (tensor,),
        places,
        start=lowering.copy(layouts.natural(shape), matrix.min(1)),
        over=lowering.copy(layouts.natural(order.shape), order - order[0]),
        count=matrix.shape[1],
        bounds=(step.low, step.high),
        rescaling=(step.multiplier, step.shift),
    )


def _reshape(lowering: _Lowering, step: integer.Reshape) -> None:
    _rename(lowering, step, lowering.tensors[step.inputs[0]].places)


def _transpose(lowering: _Lowering, step: integer.Transpose) -> None:
    tensor = lowering.tensors[step.inputs[0]]
    _rename(lowering, step, layouts.transposed(tensor.shape, tensor.places, step.axes))


def _rename(lowering: _Lowering, step: Operation, places: Places) -> None:
    """The same memory as another value."""
    before, value = lowering.tensors[step.inputs[0]], lowering.value(step.output)
    image = len(value.shape) == 3 and np.array_equal(places, layouts.channels_last(value.shape))
    rows = value.shape[1] if image else 1
    lowering.tensors[step.output] = Tensor(before.name, before.value, value.shape, value.zero, places, rows)


def _pad(lowering: _Lowering, step: integer.Pad) -> None:
    tensor, value = lowering.tensors[step.inputs[0]], lowering.value(step.output)
    order, tensor = _order(lowering, step.inputs[0], tensor)
    places = layouts.ordered(value.shape, order)
    inside = tuple(
        slice(before, before + extent) for (before, _), extent in zip(step.padding, tensor.shape, strict=True)
    )
    targets = layouts.inverse(places).reshape(value.shape)[inside].reshape(-1)[tensor.places]
    by_rows = len(step.padding) == 3 and not any(step.padding[_HEIGHT])
    _add_move(lowering, step, (tensor,), places, [(targets, layouts.natural(targets.shape))], by_rows, step.value)


def _concatenate(lowering: _Lowering, step: integer.Concatenate) -> None:
    shape = lowering.value(step.output).shape
    order, _ = _order(lowering, step.inputs[0], lowering.tensors[step.inputs[0]])
    places = layouts.ordered(shape, order)
    positions = layouts.inverse(places).reshape(shape)
    tensors, moves_, start = [], [], 0
    for name in step.inputs:
        tensor = lowering.placed(name, layouts.ordered(lowering.value(name).shape, order))
        part = (slice(None),) * step.axis + (slice(start, start + tensor.shape[step.axis]),)
        start += tensor.shape[step.axis]
        targets = positions[part].reshape(-1)[tensor.places]
        tensors.append(tensor)
        moves_.append((targets, layouts.natural(targets.shape)))
    _add_move(lowering, step, tuple(tensors), places, moves_, step.axis != _HEIGHT)


def _slice(lowering: _Lowering, step: integer.Slice) -> None:
    tensor, shape = lowering.tensors[step.inputs[0]], lowering.value(step.output).shape
    order, tensor = _order(lowering, step.inputs[0], tensor)
    places = layouts.ordered(shape, order)
    part = (slice(None),) * step.axis + (slice(step.start, step.stop, step.step),)
    sources = layouts.inverse(tensor.places).reshape(tensor.shape)[part].reshape(-1)[places]
    window = Window(1, step.step, -step.start) if step.axis == _HEIGHT else Window()
    _add_move(lowering, step, (tensor,), places, [(layouts.natural(places.shape), sources)], window=window)


def _add_move(
    lowering: _Lowering,
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
    output = lowering.tensor(step.output, places)
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
    copies = tuple(lowering.copy(*pair) for pair in pairs)
    called = type(step).__name__.lower()
    options: dict[str, Any] = {"copies": copies, "background": background, "called": called, "windows": windows}
    lowering.add(moves.Move, step, tensors, places, **options)


def _order(lowering: _Lowering, name: str, tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The order of axes in which a tensor lies, and the tensor, put into its natural order if it lies in none."""
    order = layouts.order_of(tensor.shape, tensor.places)
    if order is not None:
        return order, tensor
    return tuple(range(len(tensor.shape))), lowering.placed(name, layouts.natural(tensor.shape))


def _matrix_product(lowering: _Lowering, step: integer.MatrixProduct) -> None:
    shape = lowering.value(step.output).shape
    rows, columns = shape[-2:]
    batch = math.prod(shape[:-2])
    tensors, steps = [], []
    for name in step.inputs:
        tensor = lowering.tensors[name]
        extents = (batch, *tensor.shape[-2:])
        found = layouts.strides(layouts.inverse(tensor.places).reshape(extents))
        if found is None:
            tensor = lowering.placed(name, layouts.natural(tensor.places.shape))
            found = layouts.strides(layouts.inverse(tensor.places).reshape(extents))
        assert found is not None
        tensors.append(tensor)
        steps.append(found)
    inner = lowering.value(step.inputs[0]).shape[-1]
    lowering.add(
        attention.MatrixProduct,
        step,
        tuple(tensors),
        layouts.natural((math.prod(shape),)),
        size=(batch, rows, inner, columns),
        steps=tuple(steps),
        bounds=(step.low, step.high),
        rescaling=(step.multiplier, step.shift),
        macs=batch * rows * inner * columns,
    )


def _in_rows(lowering: _Lowering, name: str) -> tuple[Tensor, Places, Places]:
    """A tensor whose last axis lies in rows, and the order of the rows and of the numbers within each."""
    shape = lowering.value(name).shape
    count = math.prod(shape[:-1])
    tensor = lowering.tensors[name]
    found = layouts.rows(tensor.places, count)
    if found is None:
        tensor = lowering.placed(name, layouts.natural(tensor.places.shape))
        found = layouts.rows(tensor.places, count)
    assert found is not None
    return tensor, *found


def _softmax(lowering: _Lowering, step: integer.Softmax) -> None:
    tensor, order, columns = _in_rows(lowering, step.inputs[0])
    arrays = {"table": Constant("uint32_t", lowering.network.array(step, "table"))}
    lowering.add(attention.Softmax, step, (tensor,), tensor.places, arrays, count=len(order), length=len(columns))


def _layer_norm(lowering: _Lowering, step: integer.LayerNorm) -> None:
    tensor, order, columns = _in_rows(lowering, step.inputs[0])
    factors = np.stack([lowering.network.array(step, suffix)[columns] for suffix in ("multiplier", "bias")], 1)
    options: dict[str, Any] = {"count": len(order), "length": len(columns), "bounds": (step.low, step.high)}
    options |= {"epsilon": step.epsilon, "shift": step.shift}
    arrays = {"factors": Constant("int32_t", factors)}
    lowering.add(attention.LayerNorm, step, (tensor,), tensor.places, arrays, **options)


def _embedding(lowering: _Lowering, step: integer.Embedding) -> None:
    tensor = lowering.tensors[step.inputs[0]]
    width = lowering.value(step.output).shape[-1]
    places = (tensor.places[:, None] * width + np.arange(width)).reshape(-1)
    arrays = {"table": Constant("int8_t", lowering.network.array(step, "table"))}
    lowering.add(attention.Embedding, step, (tensor,), places, arrays, count=len(tensor.places), length=width)


def _constant(lowering: _Lowering, step: integer.Constant) -> None:
    codes = lowering.network.array(step, "value").reshape(-1)
    places = layouts.channels_last(lowering.value(step.output).shape)
    lowering.tensors[step.output] = replace(lowering.tensor(step.output, places), data=codes[places])


_HANDLERS: dict[type[Operation], Callable[[_Lowering, Any], None]] = {
    integer.Convolution: _convolution,
    integer.Linear: _linear,
    integer.Add: _pointwise,
    integer.Multiply: _pointwise,
    integer.MaxPool: _max_pool,
    integer.AveragePool: _average_pool,
    integer.Mean: _mean,
    integer.Table: _table,
    integer.Pad: _pad,
    integer.Concatenate: _concatenate,
    integer.Slice: _slice,
    integer.Reshape: _reshape,
    integer.Transpose: _transpose,
    integer.MatrixProduct: _matrix_product,
    integer.Softmax: _softmax,
    integer.LayerNorm: _layer_norm,
    integer.Embedding: _embedding,
    integer.Constant: _constant,
}
