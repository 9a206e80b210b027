"""Batch norms and the layers that they can be folded into: an affine map per channel, y = a · x + b."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from effcli.graphs.graph import Graph, calls, where
from effcli.graphs.patches import padding
from effcli.layers.contract import Pass

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
_Weighted = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class Place:
    """Where a batch norm can go: into the layer before it, or into every layer behind it, or nowhere (`reason`)."""

    before: str = ""
    behind: tuple[str, ...] = ()
    reason: str = ""


def batch_norms(graph: Graph) -> list[fx.Node]:
    """The nodes that call a batch norm."""
    return [node for node in graph.nodes if isinstance(graph.module_of(node), BatchNorm)]


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """a and b of a batch norm, float64 (channels,): a = γ / √(σ² + ε), b = β - a · μ (arXiv:1712.05877, eq. 14)."""
    assert isinstance(norm, BatchNorm)
    assert norm.running_var is not None and norm.running_mean is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -factor * norm.running_mean.double()
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def place(
    graph: Graph, node: fx.Node, shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, Pass] | None = None
) -> Place:
    """Where the batch norm that `node` calls can be folded, the layer before it if possible.

    shapes: as `Graph.shapes` says; chosen: the layers that may be changed, None for all.
    """
    if len(list(calls(graph, str(node.target)))) > 1:
        return Place(reason="it is called more than once")
    (source,) = node.all_input_nodes
    obstacle = _obstacle_before(graph, source, shapes, chosen)
    if not obstacle:
        return Place(before=str(source.target))
    readers = list(node.users)
    if readers and not any(_obstacle_behind(graph, user, shapes, chosen) for user in readers):
        return Place(behind=tuple(str(user.target) for user in readers))
    return Place(reason=obstacle)


def _obstacle_before(
    graph: Graph,
    source: fx.Node,
    shapes: Mapping[str, tuple[int, ...]],
    chosen: Mapping[str, Pass] | None,
) -> str:
    module, name = graph.module_of(source), str(source.target)
    if not isinstance(module, _Weighted):
        return f"no layer stands before it, but {where(source)}"
    if isinstance(module, nn.Linear) and len(shapes[source.name]) > 1:
        return f"{name} has its channels on another axis"
    if len(source.users) > 1:
        other = next(user for user in source.users if not isinstance(graph.module_of(user), BatchNorm))
        return f"{where(other)} also reads the output of {name}"
    return _obstacle(graph, name, chosen)


def _obstacle_behind(
    graph: Graph, user: fx.Node, shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, Pass] | None
) -> str:
    module, name = graph.module_of(user), str(user.target)
    if not isinstance(module, _Weighted):
        return f"{where(user)} reads it"
    if isinstance(module, nn.Linear) and len(shapes[user.name]) > 1:
        return f"{name} has its channels on another axis"
    if not isinstance(module, nn.Linear) and any(padding(module)):
        return f"{name} pads with zeros, which the batch norm would have shifted"
    return _obstacle(graph, name, chosen)


def _obstacle(graph: Graph, name: str, chosen: Mapping[str, Pass] | None) -> str:
    if len(list(calls(graph, name))) > 1:
        return f"{name} is called more than once"
    if name in graph.stored:
        return f"{name} is compressed already; fold before compressing"
    if chosen is not None and name not in chosen:
        return f"{name} is ignored"
    return ""


def remove(graph: Graph, node: fx.Node) -> None:
    """Take a module's node out of the graph: whatever read it reads what it read."""
    (source,) = node.all_input_nodes
    node.replace_all_uses_with(source)
    graph.module.graph.erase_node(node)
    graph.module.delete_submodule(str(node.target))
    graph.module.recompile()


def bias_of(module: nn.Module, channels: int) -> Tensor:
    """The bias of a layer, float64 (channels,), zeros where it has none."""
    bias = module.bias
    return bias.double() if isinstance(bias, Tensor) else torch.zeros(channels, dtype=torch.float64)
