"""Rewritings of a graph into operations that have an integer counterpart, before anything is observed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.nn import functional

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
    """Write, in place, an average that leaves its padding out as one that counts it, times what was left out."""
    shapes = graph.shapes()
    arguments: list[Any]
    for node in graph.nodes:
        if operation(node) not in _AVERAGES or not _leaves_out(node):
            continue
        arguments = [_argument(node, index) for index in range(4)]
        x, kernel, stride, padding = arguments
        ones = torch.ones(1, 1, *shapes[x.name][1:])
        pool = functional.avg_pool1d if ones.ndim == 3 else functional.avg_pool2d
        share: Any = pool(ones, kernel, stride or kernel, padding)
        name = f"{node.name}_share"
        while hasattr(graph.module, name):
            name += "_"
        graph.module.register_parameter(name, torch.nn.Parameter(1 / share[0], requires_grad=False))
        with graph.module.graph.inserting_before(node):
            counted = _call(node, operation(node), x, kernel, stride or [], padding, False, True)
            held = node.graph.create_node("get_attr", name)
            held.meta["source"] = node.meta.get("source", "")
            whole = _call(node, "aten.mul.Tensor", counted, held)
        _replace(graph, node, whole)
    graph.module.recompile()


def _leaves_out(node: fx.Node) -> bool:
    """Whether an average leaves out zeros around its input, in windows of one size."""
    padding, ceil, counted = _argument(node, 3), _argument(node, 4), _argument(node, 5)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded and counted is False and not ceil and _argument(node, 6) is None


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
