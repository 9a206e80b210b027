"""Rewritings of a graph into operations that have an integer counterpart, before anything is observed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Graph, function, operation, where

_AVERAGES = {"aten.avg_pool1d.default", "aten.avg_pool2d.default"}
_MASKED = "leave the mask out, or quantize the network's weights only, with `linear` or `awq`"


def select_before_permuting(graph: Graph) -> None:
    """Take, in place, an entry of an axis before the axes are reordered, so that none of them is moved to the batch.

    Queries, keys and values of one layer come as (batch, tokens, 3, heads, width), permuted to (3, batch, ...).
    """
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if operation(node) != "aten.select.int" or not isinstance(before, fx.Node):
            continue
        if operation(before) != "aten.permute.default":
            continue
        order: Any = before.args[1]
        axis: Any = node.args[1]
        index, dims = node.args[2], list(order)
        chosen = dims.pop(axis)
        rest = [each - (each > chosen) for each in dims]
        with graph.module.graph.inserting_before(node):
            part = _call(node, "aten.select.int", before.args[0], chosen, index)
            moved = _call(node, "aten.permute.default", part, rest) if rest != sorted(rest) else part
        _replace(graph, node, moved)
    graph.module.graph.eliminate_dead_code()
    graph.module.recompile()


def decompose_attention(graph: Graph) -> None:
    """Write, in place, scaled dot product attention as products: softmax(q kᵀ · scale) v.

    q, k, v (batch, ..., tokens, width). `UnsupportedError` for a mask, for dropout and for shared heads.
    """
    for node in graph.nodes:
        if operation(node) != "aten.scaled_dot_product_attention.default":
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        _check_attention(node, given)
        shape = graph.shapes()[given["query"].name]
        axes, scale = len(shape) + 1, given.get("scale") or 1 / math.sqrt(shape[-1])
        with graph.module.graph.inserting_before(node):
            turned = [*range(axes - 2), axes - 1, axes - 2]
            keys = _call(node, "aten.permute.default", given["key"], turned)
            scores = _call(node, "aten.matmul.default", given["query"], keys)
            scaled = _call(node, "aten.mul.Tensor", scores, float(scale))
            weights = _call(node, "aten.softmax.int", scaled, axes - 1)
            attended = _call(node, "aten.matmul.default", weights, given["value"])
        _replace(graph, node, attended)
    graph.module.recompile()


def count_padding(graph: Graph) -> None:
    """Rewrite, in place, averages with unequal counts as averages of whole windows times a factor per position.

    That is one that leaves out its padding, and one whose last windows reach beyond it (ceil_mode).
    """
    shapes = graph.shapes()
    for node in graph.nodes:
        if operation(node) not in _AVERAGES:
            continue
        x, *given = (_argument(node, index) for index in range(7))
        kernel, stride, beyond, share = _windows(shapes[x.name], shapes[node.name], *given)
        alike = bool((share == 1).all())
        trimmed = given[3] and not any(beyond)
        if not any(beyond) and not trimmed and (given[5] is not None or alike):
            continue
        with graph.module.graph.inserting_before(node):
            if any(beyond):
                x = _call(
                    node, "aten.constant_pad_nd.default", x, [n for end in reversed(beyond) for n in (0, end)], 0.0
                )
            whole = _call(node, operation(node), x, kernel, stride, given[2] or 0, False, True)
            if not alike:
                name = f"{node.name}_share"
                while hasattr(graph.module, name):
                    name += "_"
                graph.module.register_parameter(name, torch.nn.Parameter(share, requires_grad=False))
                held = node.graph.create_node("get_attr", name)
                held.meta["source"] = node.meta.get("source", "")
                whole = _call(node, "aten.mul.Tensor", whole, held)
        _replace(graph, node, whole)
    graph.module.recompile()


def _windows(
    before: Sequence[int],
    after: Sequence[int],
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: Any,
    counted: Any,
    override: Any,
) -> tuple[list[int], list[int], list[int], Tensor]:
    """The window and the stride of an average, how far its last windows reach beyond its padding, and window / count.

    before, after: (channels, *extents) of its input and its output; window / count: float32 (1, *after). A single
    window ends with the padding: a network that pools all it has may name a window of any size.
    """
    axes = len(before) - 1

    def spread(value: Any) -> list[int]:
        values = list(value) if isinstance(value, list | tuple) else [value]
        return values * axes if len(values) == 1 else values

    size, around = spread(kernel), spread(padding or 0)
    step = spread(stride or kernel)
    size = [
        min(k, n + 2 * p) if out == 1 else k for n, out, k, p in zip(before[1:], after[1:], size, around, strict=True)
    ]
    beyond = [
        max((out - 1) * s + k - n - 2 * p, 0)
        for n, out, k, s, p in zip(before[1:], after[1:], size, step, around, strict=True)
    ]
    share = torch.ones(1, 1, *after[1:])
    for axis in range(axes):
        starts = torch.arange(after[axis + 1]) * step[axis] - around[axis]
        # What is divided by ends with the padding, or with the input where that is left out.
        low, high = (-around[axis], before[axis + 1] + around[axis]) if counted is not False else (0, before[axis + 1])
        count = (starts + size[axis]).clamp(max=high) - starts.clamp(min=low)
        share *= (size[axis] / count).reshape([-1 if at == axis else 1 for at in range(axes)])
    share = share[0] if override is None else torch.full_like(share[0], math.prod(size) / override)
    return size, step, beyond, share


def _argument(node: fx.Node, index: int) -> Any:
    """An argument of an average, None for its default."""
    names = ("self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return node.args[index] if len(node.args) > index else node.kwargs.get(names[index])


def _check_attention(node: fx.Node, given: dict[str, Any]) -> None:
    if given.get("attn_mask") is not None or given.get("is_causal"):
        raise UnsupportedError(f"{where(node)} masks its scores, which has no integer operation", _MASKED)
    if given.get("dropout_p"):
        raise UnsupportedError(f"{where(node)} drops values at random", "export the network again after `.eval()`")
    if given.get("enable_gqa"):
        raise UnsupportedError(f"{where(node)} shares keys among heads, which has no integer operation", _MASKED)


def _call(node: fx.Node, name: str, *args: Any) -> fx.Node:
    """A call of an operator that stands in for a part of `node`."""
    made = node.graph.call_function(function(name), args)
    made.meta["source"] = node.meta.get("source", "")
    return made


def _replace(graph: Graph, node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    graph.module.graph.erase_node(node)
