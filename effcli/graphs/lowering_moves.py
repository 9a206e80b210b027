"""What `lowering` makes of pools and of operators that move or select numbers."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from effcli.errors import UnsupportedError
from effcli.graphs.assembly import REMEDY, Assembly, argument, code, image, multiplier, origin, pair
from effcli.graphs.fusion import Padding, filled, folded_padding
from effcli.graphs.graph import operation, where
from effcli.graphs.integer import (
    HIGHEST,
    LOWEST,
    AveragePool,
    Concatenate,
    MaxPool,
    Mean,
    Pad,
    Pair,
    Reshape,
    Slice,
    Transpose,
)


def max_pool(assembly: Assembly, node: fx.Node) -> None:
    kernel, stride, around = _window(node)
    dilation = _extent(node, argument(node, 4, "dilation", 1), 1)
    pad = assembly.fusion.pads.get(node)
    extra = folded_padding(pad) if pad else (0, 0, 0, 0)
    assert extra is not None
    source, target = assembly.source(pad or node), node.name
    above, left = around[0] + extra[0], around[1] + extra[2]
    shape = image(assembly.shapes[source])
    height, width = image(assembly.declare(target, assembly.shapes[target]).shape)[1:]
    # With ceil_mode the last window may reach beyond what is padded on the other side.
    below = (height - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1 - shape[1] - above
    right = (width - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1 - shape[2] - left
    padding = above, max(below, 0), left, max(right, 0)

    def append(entry: str, output: str) -> None:
        options = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        assembly.steps.append(MaxPool(name=node.name, inputs=(entry,), output=output, source=origin(node), **options))

    assembly.on_image(node, source, target, append)


def average_pool(assembly: Assembly, node: fx.Node) -> None:
    kernel, stride, around = _window(node)
    shape, out = image(assembly.shapes[assembly.source(node)]), image(assembly.shapes[node.name])
    if any(around) and not argument(node, 5, "count_include_pad", True):
        raise UnsupportedError(f"{where(node)} leaves its padding out of the average", REMEDY)
    full = tuple((shape[axis + 1] + 2 * around[axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1))
    if full != out[1:]:
        raise UnsupportedError(f"{where(node)} has windows that reach beyond the padding (ceil_mode)", REMEDY)
    divisor = argument(node, 6, "divisor_override", None) or math.prod(kernel)
    _average(assembly, node, kernel, stride, (around[0], around[0], around[1], around[1]), divisor)


def adaptive_pool(assembly: Assembly, node: fx.Node) -> None:
    shape, out = image(assembly.shapes[assembly.source(node)]), image(assembly.shapes[node.name])
    if shape[1] % out[1] or shape[2] % out[2]:
        raise UnsupportedError(f"{where(node)} pools {shape[1:]} to {out[1:]} in windows of different sizes", REMEDY)
    kernel = shape[1] // out[1], shape[2] // out[2]
    _average(assembly, node, kernel, kernel, (0, 0, 0, 0), math.prod(kernel))


def _average(assembly: Assembly, node: fx.Node, kernel: Pair, stride: Pair, padding: Padding, divisor: int) -> None:
    source = assembly.source(node)
    target, value, clamps = assembly.result(node)
    factor, shift = multiplier(node, assembly.values[source].scale / value.scale / divisor)

    def append(entry: str, output: str) -> None:
        options: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, **clamps}
        options |= {"multiplier": factor, "shift": shift, "source": origin(node)}
        assembly.steps.append(AveragePool(name=node.name, inputs=(entry,), output=output, **options))

    assembly.on_image(node, source, target, append)


def mean(assembly: Assembly, node: fx.Node) -> None:
    source = assembly.source(node)
    axes = argument(node, 1, "dim", None)
    axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
    if not axes or min(axes) < 1:
        raise UnsupportedError(f"{where(node)} averages over the batch", REMEDY)
    target, value, clamps = assembly.result(node)
    size = math.prod(assembly.shapes[source][axis - 1] for axis in axes)
    factor, shift = multiplier(node, assembly.values[source].scale / value.scale / size)
    options: dict[str, Any] = {"keep": bool(argument(node, 2, "keepdim", False)), "source": origin(node), **clamps}
    options |= {"axes": tuple(axis - 1 for axis in axes), "multiplier": factor, "shift": shift}
    assembly.steps.append(Mean(name=node.name, inputs=(source,), output=target, **options))


def pad(assembly: Assembly, node: fx.Node) -> None:
    amounts = list(argument(node, 1, "pad", ()))
    source, value = assembly.source(node), assembly.declare(node.name, assembly.shapes[node.name])
    fill = filled(node)
    # Where only a max pooling reads it, the lowest code never wins over a number.
    filler = LOWEST if assembly.fusion.fills.get(node) == -math.inf else code(value, fill)
    if min(amounts, default=0) < 0 or len(amounts) > 2 * len(value.shape):
        raise UnsupportedError(f"{where(node)} pads by {amounts}", "pad by amounts that are not negative")
    if not LOWEST <= filler <= HIGHEST:
        raise UnsupportedError(
            f"{where(node)} fills in {fill:g}, which no code of its tensor stands for",
            "pad with a number of the size of the tensor's own, or with -inf in front of a max pooling",
        )
    amounts += [0] * (2 * len(value.shape) - len(amounts))
    padding = tuple(zip(amounts[-2::-2], amounts[-1::-2], strict=True))
    assembly.steps.append(
        Pad(name=node.name, inputs=(source,), output=node.name, padding=padding, value=filler, source=origin(node))
    )


def concatenate(assembly: Assembly, node: fx.Node) -> None:
    parts: list[fx.Node] = list(argument(node, 0, "tensors", ()))
    axis = int(argument(node, 1, "dim", 0))
    if axis < 1:
        raise UnsupportedError(f"{where(node)} joins batches", REMEDY)
    value = assembly.declare(node.name, assembly.shapes[node.name])
    inputs = tuple(assembly.operand(node, part, len(value.shape)) for part in parts)
    assembly.steps.append(
        Concatenate(name=node.name, inputs=inputs, output=node.name, axis=axis - 1, source=origin(node))
    )


def take(assembly: Assembly, node: fx.Node) -> None:
    """A slice of one axis."""
    source, axis = assembly.source(node), int(argument(node, 1, "dim", 0))
    if axis < 1:
        raise UnsupportedError(f"{where(node)} takes a part of the batch", REMEDY)
    wanted = slice(*(argument(node, index, name, None) for index, name in ((2, "start"), (3, "end"), (4, "step"))))
    start, stop, step = wanted.indices(assembly.shapes[source][axis - 1])
    assembly.declare(node.name, assembly.shapes[node.name])
    options: dict[str, Any] = {"axis": axis - 1, "start": start, "stop": stop, "step": step, "source": origin(node)}
    assembly.steps.append(Slice(name=node.name, inputs=(source,), output=node.name, **options))


def select(assembly: Assembly, node: fx.Node) -> None:
    """One entry of an axis, and the axis goes."""
    source, axis, index = assembly.source(node), int(argument(node, 1, "dim", 0)), int(argument(node, 2, "index", 0))
    if axis < 1:
        raise UnsupportedError(f"{where(node)} takes a part of the batch", REMEDY)
    shape = list(assembly.values[source].shape)
    start, shape[axis - 1] = index % shape[axis - 1], 1
    part = f"{node.name}.part"
    assembly.declare(part, tuple(shape), like=source)
    options: dict[str, Any] = {"axis": axis - 1, "start": start, "stop": start + 1, "source": origin(node)}
    assembly.steps.append(Slice(name=part, inputs=(source,), output=part, **options))
    assembly.declare(node.name, assembly.shapes[node.name])
    assembly.steps.append(Reshape(name=node.name, inputs=(part,), output=node.name, source=origin(node)))


def reshape(assembly: Assembly, node: fx.Node) -> None:
    source, shape = assembly.source(node), assembly.shapes[node.name]
    if math.prod(shape) != math.prod(assembly.shapes[source]):
        raise UnsupportedError(f"{where(node)} moves numbers between the batch and other axes", REMEDY)
    assembly.declare(node.name, shape)
    assembly.steps.append(Reshape(name=node.name, inputs=(source,), output=node.name, source=origin(node)))


def transpose(assembly: Assembly, node: fx.Node) -> None:
    source, dims = assembly.source(node), list(argument(node, 1, "dims", ()))
    if dims[0] != 0:
        raise UnsupportedError(f"{where(node)} moves the batch axis", REMEDY)
    assembly.declare(node.name, assembly.shapes[node.name])
    axes = tuple(axis - 1 for axis in dims[1:])
    assembly.steps.append(Transpose(name=node.name, inputs=(source,), output=node.name, axes=axes, source=origin(node)))


def _window(node: fx.Node) -> tuple[Pair, Pair, Pair]:
    """Kernel, stride and zeros on each side of a pooling."""
    kernel = argument(node, 1, "kernel_size", 1)
    stride = argument(node, 2, "stride", None) or kernel
    return _extent(node, kernel, 1), _extent(node, stride, 1), _extent(node, argument(node, 3, "padding", 0), 0)


def _extent(node: fx.Node, number: Any, alone: int) -> Pair:
    """(vertical, horizontal); a 1-D pooling lies along one line, with `alone` across."""
    if "1d" not in operation(node):
        return pair(number[0] if not isinstance(number, int) and len(number) == 1 else number)
    return alone, int(number if isinstance(number, int) else number[0])
