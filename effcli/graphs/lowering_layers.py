"""What `lowering` makes of layers, of arithmetic with two tensors, and of functions of one number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from effcli.errors import NumericsError, UnsupportedError
from effcli.graphs.assembly import REMEDY, Assembly, Numbers, codes_of, multiplier, numbers, origin, pair
from effcli.graphs.fusion import folded_padding, is_constant
from effcli.graphs.graph import operation, where
from effcli.graphs.integer import HIGHEST, LOWEST, Add, Convolution, Linear, Multiply, Table, addition
from effcli.graphs.patches import padding as zeros_around


def convolution(assembly: Assembly, node: fx.Node) -> None:
    """A Conv2d, or a Conv1d as one of height 1; zero padding before it becomes its own."""
    module = assembly.graph.module_of(node)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    name, pad = str(node.target), assembly.fusion.pads.get(node)
    source = assembly.source(pad or node)
    target, _, clamps = assembly.result(node)
    left, right, above, below = zeros_around(module)
    extra = folded_padding(pad) if pad else (0, 0, 0, 0)
    assert extra is not None
    weight, bias = numbers(module.weight), _bias(module)
    rows = assembly.rows(name, weight, bias, source, target, module)
    if isinstance(module, nn.Conv1d):
        rows = rows.reshaped((*weight.shape[:2], 1, weight.shape[2]))
    options = {
        "stride": pair(module.stride),
        "padding": (above + extra[0], below + extra[1], left + extra[2], right + extra[3]),
        "dilation": pair(module.dilation),
        "groups": module.groups,
        **clamps,
    }

    def append(entry: str, output: str) -> None:
        assembly.weighted(node, name, Convolution, rows, bias, {"inputs": (entry,), "output": output, **options})

    assembly.on_image(node, source, target, append)


def linear(assembly: Assembly, node: fx.Node) -> None:
    module, name = assembly.graph.module_of(node), str(node.target)
    assert isinstance(module, nn.Linear)
    source, bias = assembly.source(node), _bias(module)
    target, _, clamps = assembly.result(node)
    rows = assembly.rows(name, numbers(module.weight), bias, source, target, module)
    assembly.weighted(node, name, Linear, rows, bias, {"inputs": (source,), "output": target, **clamps})


def batch_norm(assembly: Assembly, node: fx.Node) -> None:
    """A batch norm that could not be folded, in evaluation: one factor and one offset per channel."""
    norm = assembly.graph.module_of(node)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    factor = 1 / np.sqrt(numbers(norm.running_var) + norm.eps)
    if norm.weight is not None:
        factor = factor * numbers(norm.weight)
    offset = -numbers(norm.running_mean) * factor
    if norm.bias is not None:
        offset = offset + numbers(norm.bias)
    _per_channel(assembly, node, factor, offset, str(node.target))


def _per_channel(
    assembly: Assembly, node: fx.Node, factor: Numbers, offset: Numbers, layer: str, index: int = 0
) -> None:
    """factor · x + offset for each channel, the first axis: a convolution of 1 × 1 per channel, its codes ±127."""
    source = assembly.source(node, index)
    target, _, clamps = assembly.result(node)
    rows = assembly.rows(layer, factor.reshape(-1, 1, 1, 1), offset, source, target)
    options = {"groups": len(factor), **clamps}

    def append(entry: str, output: str) -> None:
        assembly.weighted(node, layer, Convolution, rows, offset, {"inputs": (entry,), "output": output, **options})

    assembly.on_image(node, source, target, append)


def arithmetic(assembly: Assembly, node: fx.Node) -> None:
    """Sum, difference or product of two tensors, of a tensor and a number, of a tensor and a number per channel."""
    terms = node.args[:2]
    if not (isinstance(terms[0], fx.Node) and isinstance(terms[1], fx.Node)):
        table(assembly, node)
        return
    if (is_constant(terms[0]) or is_constant(terms[1])) and _with_constant(assembly, node, terms[0], terms[1]):
        return
    axes = len(assembly.shapes[node.name])
    names = assembly.operand(node, terms[0], axes), assembly.operand(node, terms[1], axes)
    target, value, clamps = assembly.result(node)
    if len({len(assembly.values[name].shape) for name in (*names, target)}) > 1:
        raise UnsupportedError(f"{where(node)} broadcasts over the batch axis", REMEDY)
    first, second = (assembly.values[name] for name in names)
    options: dict[str, Any] = {"name": node.name, "inputs": names, "output": target, "source": origin(node), **clamps}
    if operation(node) == "aten.mul.Tensor":
        factor, shift = multiplier(node, first.scale * second.scale / value.scale)
        assembly.steps.append(Multiply(multiplier=factor, shift=shift, **options))
        return
    sign = 1 if operation(node) == "aten.add.Tensor" else -1
    try:
        multipliers, offset, shift = addition(
            first.scale / value.scale, sign * second.scale / value.scale, (first.zero, second.zero, value.zero)
        )
    except NumericsError as error:
        raise NumericsError(f"{where(node)}: {error.cause}", error.remedy) from error
    assembly.steps.append(Add(multipliers=multipliers, offset=offset, shift=shift, **options))


def _with_constant(assembly: Assembly, node: fx.Node, first: fx.Node, second: fx.Node) -> bool:
    """A tensor and a parameter with one number per channel, or one in all; whether it is that."""
    index = 0 if is_constant(second) else 1
    given, constant = (first, second) if index == 0 else (second, first)
    tensor = assembly.tensor(constant)
    shape = assembly.shapes[given.name]
    extents = (1,) * (len(shape) + 1 - tensor.ndim) + tuple(tensor.shape)
    if extents[1] not in (1, shape[0]) or any(extent != 1 for extent in (extents[0], *extents[2:])):
        return False
    parameter = np.broadcast_to(numbers(tensor).reshape(-1), shape[:1])
    ones, zeros = np.ones(shape[0]), np.zeros(shape[0])
    factor, offset = {
        "aten.mul.Tensor": (parameter, zeros),
        "aten.add.Tensor": (ones, parameter),
        "aten.sub.Tensor": (ones, -parameter) if index == 0 else (-ones, parameter),
    }[operation(node)]
    _per_channel(assembly, node, factor, offset, constant.name, index)
    return True


def table(assembly: Assembly, node: fx.Node) -> None:
    """A function of one number, looked up: computed once in float64 for each of the 256 codes."""
    (given,) = node.all_input_nodes
    source = assembly.source(node, node.args.index(given))
    before, value = assembly.values[source], assembly.declare(node.name, assembly.shapes[node.name])
    inputs = (torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64) - before.zero) * before.scale
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: inputs)
    outputs: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    if bool(outputs.isnan().any()):
        raise NumericsError(f"{where(node)} is not defined on all of its input's range", REMEDY)
    function = operation(node).split(".")[1]
    assembly.steps.append(
        Table(name=node.name, inputs=(source,), output=node.name, function=function, source=origin(node))
    )
    assembly.arrays[f"{node.name}.table"] = codes_of(value, outputs.numpy())


def quotient(assembly: Assembly, node: fx.Node) -> None:
    if isinstance(node.args[1], fx.Node):
        raise UnsupportedError(f"{where(node)} divides tensors", REMEDY)
    table(assembly, node)


def _bias(module: nn.Conv1d | nn.Conv2d | nn.Linear) -> Numbers:
    return np.zeros(len(module.weight)) if module.bias is None else numbers(module.bias)
