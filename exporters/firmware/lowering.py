"""From an integer network to the tasks of its C program.

Images lie with channels last; what comes before and after a reshape or a transpose is the same memory, read in another
order. Numbers move only where an operation asks for another order than they lie in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from effcli.errors import UnsupportedError
from effcli.exporters.firmware import (
    convolution,
    elementwise,
    linear,
    lowering_attention,
    lowering_moves,
    pooling,
    tables,
)
from effcli.exporters.firmware import layout as layouts
from effcli.exporters.firmware.building import Building
from effcli.exporters.firmware.layout import Places
from effcli.exporters.firmware.program import Constant, Program, Spatial, Tensor, Window
from effcli.exporters.firmware.requantize import constants
from effcli.graphs import integer
from effcli.graphs.integer import IntegerNetwork, Operation


def lower(network: IntegerNetwork) -> Program:
    """The program of `network`. Raises `UnsupportedError` for an operation or a shape that has no C, by its name."""
    building = Building(network)
    program = network.program
    value = program.values[program.input]
    entry = building.tensors[program.input] = building.tensor(program.input, layouts.channels_last(value.shape))
    for step in program.steps:
        building.layer, building.source = step.name, step.source
        handler = _HANDLERS.get(type(step))
        if handler is None:
            raise UnsupportedError(
                f"{building.where} ({type(step).__name__.lower()}) has no C code", "leave it out of the network"
            )
        handler(building, step)
    building.layer, building.source = "output", ""
    value = program.values[program.output]
    output = building.placed(program.output, layouts.channels_last(value.shape))
    if output.name == entry.name or output.data is not None:
        output = building.moved(program.output, output, output.places)
    return Program(tuple(building.tasks), entry, output)


def _convolution(building: Building, step: integer.Convolution) -> None:
    network = building.network
    weight = network.array(step, "weight")
    tensor = building.image(step.inputs[0])
    spatial = building.spatial(step, tensor, step.dilation, (weight.shape[2], weight.shape[3]))
    places = layouts.channels_last(building.value(step.output).shape)
    whole = spatial.out_height == spatial.out_width == 1 and spatial.kernel == (spatial.height, spatial.width)
    if whole and step.groups == 1 and not any(step.padding):
        weights = tables.weights(network, step)
        rows = weights.stored.transpose(0, 2, 3, 1).reshape(len(weight), -1)
        _add_linear(building, step, tensor, weights.arranged(rows), places)
        return
    arrays = {suffix: network.array(step, suffix) for suffix in ("bias", "multiplier", "shift")}
    options: dict[str, Any] = {"spatial": spatial, "bounds": (step.low, step.high), "windows": (spatial.window,)}
    options["macs"] = math.prod(building.value(step.output).shape) * math.prod(weight.shape[1:])
    requantized = constants(arrays["bias"], arrays["multiplier"], arrays["shift"])
    if step.groups == spatial.channels == spatial.out_channels > 1:
        # Bytes whatever the bits of the weights: a filter is small, and looking up its weights is not.
        stored = {"weights": convolution.packed_filters(weight), "blank": convolution.blank(spatial, tensor.zero)}
        building.add(convolution.Depthwise, step, (tensor,), places, stored | requantized, **options)
        return
    weights = tables.weights(network, step)
    stored = convolution.packed(weights, step.groups)
    options |= {"groups": step.groups, **convolution.options(weights, spatial, step.groups)}
    building.add(convolution.Convolution, step, (tensor,), places, stored | requantized, **options)


def _linear(building: Building, step: integer.Linear) -> None:
    network = building.network
    weights, shape = tables.weights(network, step), building.value(step.output).shape
    tensor, order, columns = building.in_rows(step.inputs[0])
    count = len(order)
    places = (order[:, None] * shape[-1] + np.arange(shape[-1])).reshape(-1)
    weight = weights.stored[:, columns]
    if count == 1:
        _add_linear(building, step, tensor, weights.arranged(weight), places)
        return
    # Rows of a matrix are pixels of an image of one row.
    spatial = Spatial(1, count, weight.shape[1], 1, count, len(weight), (1, 1), (1, 1), (0, 0, 0, 0))
    arrays = {suffix: network.array(step, suffix) for suffix in ("bias", "multiplier", "shift")}
    stored = convolution.packed(weights.arranged(weight[:, :, None, None]), 1)
    stored |= constants(arrays["bias"], arrays["multiplier"], arrays["shift"])
    building.add(
        convolution.Convolution,
        step,
        (tensor.as_row(),),
        places,
        stored,
        spatial=spatial,
        bounds=(step.low, step.high),
        windows=(spatial.window,),
        macs=count * weight.size,
        **convolution.options(weights, spatial, 1),
    )


def _add_linear(
    building: Building, step: integer.Weighted, tensor: Tensor, weights: tables.Weights, places: Places
) -> None:
    outputs, inputs = weights.stored.shape
    if inputs > linear.MOST_INPUTS:
        raise UnsupportedError(f"{building.where} has {inputs} inputs", f"at most {linear.MOST_INPUTS} have C code")
    arrays = {suffix: building.network.array(step, suffix) for suffix in ("bias", "multiplier", "shift")}
    size = linear.chunk(inputs, outputs)
    building.add(
        linear.Linear,
        step,
        (tensor,),
        places,
        linear.packed(weights, size, arrays),
        bounds=(step.low, step.high),
        chunk=size,
        bits=weights.bits,
        size=(inputs, outputs),
        table_step=weights.step,
        paired=weights.paired(inputs * outputs),
        scratch=linear.scratch(inputs, outputs, size) + weights.scratch(inputs * outputs),
        macs=inputs * outputs,
    )


def _max_pool(building: Building, step: integer.MaxPool) -> None:
    tensor = building.image(step.inputs[0])
    spatial = building.spatial(step, tensor, step.dilation, step.kernel)
    places = layouts.channels_last(building.value(step.output).shape)
    building.add(pooling.MaxPool, step, (tensor,), places, spatial=spatial, windows=(spatial.window,))


def _average_pool(building: Building, step: integer.AveragePool) -> None:
    tensor = building.image(step.inputs[0])
    spatial = building.spatial(step, tensor, (1, 1), step.kernel)
    places = layouts.channels_last(building.value(step.output).shape)
    options: dict[str, Any] = {"bounds": (step.low, step.high), "rescaling": (step.multiplier, step.shift)}
    building.add(pooling.AveragePool, step, (tensor,), places, spatial=spatial, windows=(spatial.window,), **options)


def _pointwise(building: Building, step: integer.Add | integer.Multiply) -> None:
    shape = building.value(step.output).shape
    first, second = (building.tensors[name] for name in step.inputs)
    names = step.inputs
    swapped = first.shape != shape
    if swapped:
        first, second, names = second, first, (names[1], names[0])
    if first.shape != shape:
        raise UnsupportedError(f"{building.where} broadcasts both of its inputs", "expand one of them first")
    places, strides = first.places, None
    if second.shape != shape:
        # Where each number of the output finds its partner.
        flat = np.broadcast_to(layouts.natural(second.shape).reshape(second.shape), shape).reshape(-1)
        strides = building.copy(layouts.natural(places.shape), layouts.inverse(second.places)[flat[places]])
    elif not np.array_equal(second.places, places):
        second = building.placed(names[1], places)
    options: dict[str, Any] = {"bounds": (step.low, step.high), "strides": strides}
    if strides is None and first.rows > 1:
        options["windows"] = (Window(), Window())
    if isinstance(step, integer.Add):
        multipliers = (step.multipliers[1], step.multipliers[0]) if swapped else step.multipliers
        offset = step.offset + (1 << (step.shift - 1))
        options |= {"multipliers": multipliers, "offset": offset, "shift": step.shift}
        building.add(elementwise.Add, step, (first, second), places, **options)
    else:
        options["rescaling"] = step.multiplier, step.shift
        building.add(elementwise.Multiply, step, (first, second), places, **options)


def _table(building: Building, step: integer.Table) -> None:
    tensor = building.tensors[step.inputs[0]]
    arrays = {"table": Constant("int8_t", building.network.array(step, "table"))}
    windows = (Window(),) if tensor.rows > 1 else None
    building.add(elementwise.Table, step, (tensor,), tensor.places, arrays, windows=windows)


_HANDLERS: dict[type[Operation], Callable[[Building, Any], None]] = {
    integer.Convolution: _convolution,
    integer.Linear: _linear,
    integer.Add: _pointwise,
    integer.Multiply: _pointwise,
    integer.MaxPool: _max_pool,
    integer.AveragePool: _average_pool,
    integer.Mean: lowering_moves.mean,
    integer.Table: _table,
    integer.Pad: lowering_moves.pad,
    integer.Concatenate: lowering_moves.concatenate,
    integer.Slice: lowering_moves.take,
    integer.Reshape: lowering_moves.reshape,
    integer.Transpose: lowering_moves.transpose,
    integer.MatrixProduct: lowering_attention.matrix_product,
    integer.Softmax: lowering_attention.softmax,
    integer.LayerNorm: lowering_attention.layer_norm,
    integer.Embedding: lowering_attention.embedding,
    integer.Constant: lowering_attention.constant,
}
