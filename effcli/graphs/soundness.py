"""Whether a program from a file can run: every shape follows from the step that makes it, every constant fits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from effcli.graphs.operations import (
    Add,
    Array,
    AveragePool,
    Concatenate,
    Constant,
    Convolution,
    Embedding,
    LayerNorm,
    Linear,
    MatrixProduct,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Table,
    Transpose,
    Weighted,
)

Shape = tuple[int, ...]
_MOST_NUMBERS = 1 << 28
_MOST_PADDING = 256
_TYPES = {"weight": "int8", "bias": "int32", "multiplier": "int32", "shift": "uint8", "value": "int8"}


def check(step: Operation, inputs: list[Shape], output: Shape, arrays: Mapping[str, Array]) -> None:
    """`ValueError` unless `step` makes values of shape `output` of `inputs`; arrays: its constants by suffix."""
    for suffix in step.arrays:
        wanted = _TYPES.get(suffix, "uint32" if isinstance(step, Softmax) else "int8")
        if suffix not in arrays:
            raise ValueError(f"the constant {step.name}.{suffix} is missing")
        if arrays[suffix].dtype != wanted:
            raise ValueError(f"{step.name}.{suffix} is {arrays[suffix].dtype}, not {wanted}")
    number = 0 if isinstance(step, Constant) else 2 if isinstance(step, Add | Multiply | MatrixProduct) else 1
    if len(inputs) != number and not (isinstance(step, Concatenate) and inputs):
        raise ValueError(f"{step.name} has {len(inputs)} inputs, not {number}")
    for name in ("shift", "multiplier"):
        value = getattr(step, name, None)
        if value is not None and not (0 <= value < 2**31 if name == "multiplier" else 1 <= value <= 62):
            raise ValueError(f"{step.name} has the {name} {value}")
    if isinstance(step, Add) and max(map(abs, (*step.multipliers, step.offset))) >= 2**40:
        raise ValueError(f"{step.name} adds beyond 64 bits")
    made = _shape(step, inputs, output, arrays)
    if made != output:
        raise ValueError(f"{step.name} makes values of shape {made}, not {output}")
    if math.prod(made) > _MOST_NUMBERS:
        raise ValueError(f"{step.name} makes {math.prod(made):,} numbers of one input")


def _shape(step: Operation, inputs: list[Shape], output: Shape, arrays: Mapping[str, Array]) -> Shape | None:
    """The shape of what `step` makes; None where its inputs or constants do not fit it."""
    first: Shape = inputs[0] if inputs else ()
    rank = len(first)
    match step:
        case Weighted():
            return _weighted(step, first, arrays)
        case MaxPool():
            return _windows(step.name, first, step.kernel, step.stride, step.padding, step.dilation)
        case AveragePool():
            return _windows(step.name, first, step.kernel, step.stride, step.padding, (1, 1))
        case Add() | Multiply():
            # Both have a batch axis of their own in front.
            return np.broadcast_shapes((2, *inputs[0]), (2, *inputs[1]))[1:]
        case Mean():
            _axes(step.name, step.axes, rank)
            return tuple(
                1 if k in step.axes else extent for k, extent in enumerate(first) if step.keep or k not in step.axes
            )
        case Pad():
            if len(step.padding) != rank or min((end for pair in step.padding for end in pair), default=0) < 0:
                return None
            if not -128 <= step.value <= 127:
                raise ValueError(f"{step.name} fills in {step.value}")
            return tuple(before + extent + after for extent, (before, after) in zip(first, step.padding, strict=True))
        case Concatenate():
            _axes(step.name, (step.axis,), rank)
            rests = {(*shape[: step.axis], *shape[step.axis + 1 :]) for shape in inputs}
            if len(rests) != 1 or any(len(shape) != rank for shape in inputs):
                return None
            return (*first[: step.axis], sum(shape[step.axis] for shape in inputs), *first[step.axis + 1 :])
        case Slice():
            _axes(step.name, (step.axis,), rank)
            left = len(range(*slice(step.start, step.stop, step.step).indices(first[step.axis])))
            return (*first[: step.axis], left, *first[step.axis + 1 :])
        case Reshape():
            return output if math.prod(first) == math.prod(output) else None
        case Transpose():
            _axes(step.name, step.axes, rank)
            return tuple(first[axis] for axis in step.axes) if len(step.axes) == rank else None
        case MatrixProduct():
            a, b = inputs
            fits = len(a) == len(b) >= 2 and a[:-2] == b[:-2] and a[-1] == b[-2]
            return (*a[:-1], b[-1]) if fits else None
        case Table():
            return first if arrays["table"].shape == (256,) else None
        case Softmax():
            return first if rank and arrays["table"].shape == (256,) and arrays["table"][0] > 0 else None
        case LayerNorm():
            return first if rank and all(arrays[name].shape == first[-1:] for name in ("multiplier", "bias")) else None
        case Embedding():
            table = arrays["table"]
            return (*first, table.shape[1]) if table.ndim == 2 and len(table) == 256 else None
        case Constant():
            return arrays["value"].shape
        case _:
            return output


def _weighted(step: Weighted, first: Shape, arrays: Mapping[str, Array]) -> Shape | None:
    weight = arrays["weight"]
    out = len(weight) if weight.ndim else 0
    if any(arrays[name].shape != (out,) for name in ("bias", "multiplier", "shift")):
        return None
    if isinstance(step, Linear):
        return (*first[:-1], out) if weight.ndim == 2 and first and first[-1] == weight.shape[1] else None
    assert isinstance(step, Convolution)
    if weight.ndim != 4 or len(first) != 3 or out % step.groups or first[0] != weight.shape[1] * step.groups:
        return None
    kernel = weight.shape[2], weight.shape[3]
    made = _windows(step.name, first, kernel, step.stride, step.padding, step.dilation)
    return (out, *made[1:])


def _windows(
    name: str,
    first: Shape,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Shape:
    """The shape that windows over (channels, height, width) leave."""
    if len(first) != 3 or min(*kernel, *stride, *dilation) < 1:
        raise ValueError(f"{name} has a kernel, stride or dilation below 1, or no plane to move over")
    if min(padding) < 0 or max(padding) > _MOST_PADDING:
        raise ValueError(f"{name} has the padding {padding}")
    extents = []
    for axis in (0, 1):
        whole = first[1 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        span = (kernel[axis] - 1) * dilation[axis] + 1
        if span > whole:
            raise ValueError(f"{name} has a window of {span} over {whole}")
        extents.append((whole - span) // stride[axis] + 1)
    return (first[0], *extents)


def _axes(name: str, axes: tuple[int, ...], rank: int) -> None:
    if len(set(axes)) != len(axes) or any(not 0 <= axis < rank for axis in axes):
        raise ValueError(f"{name} has the axes {axes} of {rank}")
