"""What `lowering` makes of the operations of a transformer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from effcli.exporters.firmware import attention
from effcli.exporters.firmware import layout as layouts
from effcli.exporters.firmware.building import Building
from effcli.exporters.firmware.program import Constant
from effcli.graphs import integer


def matrix_product(building: Building, step: integer.MatrixProduct) -> None:
    shape = building.value(step.output).shape
    rows, columns = shape[-2:]
    batch = math.prod(shape[:-2])
    tensors, steps = [], []
    for name in step.inputs:
        tensor = building.tensors[name]
        extents = (batch, *tensor.shape[-2:])
        found = layouts.strides(layouts.inverse(tensor.places).reshape(extents))
        if found is None:
            tensor = building.placed(name, layouts.natural(tensor.places.shape))
            found = layouts.strides(layouts.inverse(tensor.places).reshape(extents))
        assert found is not None
        tensors.append(tensor)
        steps.append(found)
    inner = building.value(step.inputs[0]).shape[-1]
    building.add(
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


def softmax(building: Building, step: integer.Softmax) -> None:
    tensor, order, columns = building.in_rows(step.inputs[0])
    arrays = {"table": Constant("uint32_t", building.network.array(step, "table"))}
    options: dict[str, Any] = {"count": len(order), "length": len(columns), "bits": step.bits}
    building.add(attention.Softmax, step, (tensor,), tensor.places, arrays, **options)


def layer_norm(building: Building, step: integer.LayerNorm) -> None:
    tensor, order, columns = building.in_rows(step.inputs[0])
    factors = np.stack([building.network.array(step, suffix)[columns] for suffix in ("multiplier", "bias")], 1)
    options: dict[str, Any] = {"count": len(order), "length": len(columns), "bounds": (step.low, step.high)}
    options |= {"epsilon": step.epsilon, "shift": step.shift}
    arrays = {"factors": Constant("int32_t", factors)}
    building.add(attention.LayerNorm, step, (tensor,), tensor.places, arrays, **options)


def embedding(building: Building, step: integer.Embedding) -> None:
    tensor = building.tensors[step.inputs[0]]
    width = building.value(step.output).shape[-1]
    places = (tensor.places[:, None] * width + np.arange(width)).reshape(-1)
    arrays = {"table": Constant("int8_t", building.network.array(step, "table"))}
    building.add(attention.Embedding, step, (tensor,), places, arrays, count=len(tensor.places), length=width)


def constant(building: Building, step: integer.Constant) -> None:
    codes = building.network.array(step, "value").reshape(-1)
    places = layouts.channels_last(building.value(step.output).shape)
    building.tensors[step.output] = replace(building.tensor(step.output, places), data=codes[places])
