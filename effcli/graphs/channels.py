"""The structure of channels: which layers read exactly the output channels of another, however they are scaled.

Between a producer and its consumers stand only operators f that treat every channel by itself and are positively
homogeneous, f(s · x) = s · f(x) for s > 0: the producer's channels may then be divided by positive scales and the
consumers' input channels multiplied by them, and the network computes the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from effcli.graphs.graph import Graph, calls, operation, where

# Homogeneous whatever their arguments, and the same for every number: the shape stays.
_POINTWISE = {"aten.relu.default", "aten.leaky_relu.default", "aten.abs.default"}
# Over the last two axes of (n, channels, height, width).
_POOLS = {"aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default"}
_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm
_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class Link:
    """A layer or an affine norm, and the layers that read its output channels.

    consumers: by name, int64 (in,) with the producer's channel behind each input channel (of a convolution) or input
    feature (of a linear). clipped: clamps from zero to a bound, such as ReLU6, that stand between; they are not
    homogeneous, but a ReLU in their place would be. reason: why the channels cannot be scaled; empty when they can.
    """

    producer: str
    channels: int
    consumers: Mapping[str, Tensor]
    clipped: tuple[fx.Node, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """A link whose channels may be scaled: producer, and by consumer the channel behind each of its inputs."""

    producer: str
    channels: int
    consumers: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Flow:
    """A value on its way: which axis of it (the batch axis counts) holds channels, and which channel each entry is."""

    node: fx.Node
    axis: int
    channel: Tensor


@dataclass
class _Found:
    consumers: dict[str, Tensor] = field(default_factory=dict)
    clipped: list[fx.Node] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def pairs(graph: Graph) -> list[Pair]:
    """Every producer with consumers whose channels may be scaled, in the order in which the producers run."""
    return [
        Pair(link.producer, link.channels, link.consumers)
        for link in links(graph)
        if not link.reason and not link.clipped
    ]


def links(graph: Graph) -> list[Link]:
    """Every layer or affine norm with layers behind it, and what stands in the way of scaling its channels."""
    shapes = graph.shapes()
    found = []
    for node in graph.nodes:
        flow = _produced(graph, node, shapes)
        if flow is not None:
            link = _follow(graph, str(node.target), flow, shapes)
            if link.consumers:
                found.append(link)
    return found


def divide_outputs(graph: Graph, name: str, factor: Tensor) -> None:
    """Divide the output channels of layer or norm `name` by factor (channels,): its weight's rows and its bias."""
    module = graph.layer(name)
    weight: Tensor = module.weight  # type: ignore[assignment]
    graph.mark_rescaled(name)
    with torch.no_grad():
        weight.div_(factor.view(-1, *(1,) * (weight.ndim - 1)))
        if isinstance(module.bias, Tensor):
            module.bias.div_(factor)


def multiply_inputs(graph: Graph, name: str, factor: Tensor) -> None:
    """Multiply what layer `name` does with its input channels (of a convolution) or features by factor (in,)."""
    weight: Tensor = graph.layer(name).weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.mul_(column_factors(graph, name, factor).view_as(weight))


def column_factors(graph: Graph, name: str, factor: Tensor) -> Tensor:
    """The factor of each weight of layer `name`, (out, in), for factor (in,) of its input channels or features."""
    module = graph.layer(name)
    if isinstance(module, nn.Linear):
        return factor.expand_as(module.weight)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    grouped = factor.view(module.groups, -1).repeat_interleave(math.prod(module.kernel_size), dim=1)
    return grouped.repeat_interleave(module.out_channels // module.groups, dim=0)


def _produced(graph: Graph, node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Flow | None:
    """The channels that a node makes, None where it makes none that a scale could be folded into."""
    module = graph.module_of(node)
    axes = len(shapes.get(node.name, ())) + 1
    if isinstance(module, nn.Linear):
        return _Flow(node, axes - 1, torch.arange(module.out_features))
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.weight is not None:
        return _Flow(node, axes - 1, torch.arange(module.normalized_shape[0]))
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _Flow(node, 1, torch.arange(module.out_channels))
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
        return _Flow(node, 1, torch.arange(shapes[node.name][0]))
    return None


def _follow(graph: Graph, producer: str, start: _Flow, shapes: Mapping[str, tuple[int, ...]]) -> Link:
    """Trace the channels of `start` to everything that reads them."""
    found = _Found()
    if len(list(calls(graph, producer))) > 1:
        found.reasons.append(f"{producer} is called more than once")
    waiting = [start]
    while waiting:
        flow = waiting.pop()
        for user in flow.node.users:
            onward = _through(graph, flow, user, shapes, found)
            if onward is not None:
                waiting.append(onward)
    for name in found.consumers:
        if len(list(calls(graph, name))) > 1:
            found.reasons.append(f"{name} is called more than once")
    # Users are visited depth first: name the consumers in the order in which they run.
    order = [site.name for site in graph.sites() if site.name in found.consumers]
    consumers = {name: found.consumers[name] for name in order}
    reason = found.reasons[0] if found.reasons else ""
    return Link(producer, len(start.channel), consumers, tuple(found.clipped), reason)


def _through(
    graph: Graph, flow: _Flow, user: fx.Node, shapes: Mapping[str, tuple[int, ...]], found: _Found
) -> _Flow | None:
    """The channels behind `user`, which reads `flow`; None at a consumer, and where they cannot be followed."""
    module = graph.module_of(user)
    if isinstance(module, _LAYERS):
        axes = len(shapes[flow.node.name]) + 1
        if flow.axis == (axes - 1 if isinstance(module, nn.Linear) else 1):
            found.consumers[str(user.target)] = flow.channel
        else:
            found.reasons.append(f"{where(user)} mixes other axes than the channels of {flow.node.name}")
        return None
    if isinstance(module, _NORMS):
        found.reasons.append(f"{where(user)} stands between")
        return None
    if user.op == "output":
        found.reasons.append(f"{flow.node.name} is the network's output")
        return None
    name = operation(user)
    if name == "aten.hardtanh.default" and len(user.args) > 1 and user.args[1] == 0:
        found.clipped.append(user)
        return dataclasses.replace(flow, node=user)
    if name in _POINTWISE or _is_scaling(name, user):
        return dataclasses.replace(flow, node=user)
    if name in _POOLS and flow.axis == len(shapes[flow.node.name]) - 2:
        return dataclasses.replace(flow, node=user)
    step = _STEPS.get(name)
    onward = step(flow, user, shapes) if step is not None else None
    if onward is None:
        found.reasons.append(
            f"{where(user)} also reads the channels" if found.consumers else f"{where(user)} reads them"
        )
    return onward


def _is_scaling(name: str, user: fx.Node) -> bool:
    """Whether a node multiplies or divides by a number."""
    numbers = len(user.args) == 2 and isinstance(user.args[1], int | float)
    return numbers and name in {"aten.mul.Tensor", "aten.div.Tensor"}


def _pad(flow: _Flow, user: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Flow | None:
    """Zeros around the other axes; the padding's order is last axis first."""
    padded: list[int] = user.args[1]  # type: ignore[assignment]
    value = user.args[2] if len(user.args) > 2 else 0
    first = len(shapes[user.name]) + 1 - len(padded) // 2
    return dataclasses.replace(flow, node=user) if value == 0 and flow.axis < first else None


def _mean(flow: _Flow, user: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Flow | None:
    axes: list[int] = user.args[1]  # type: ignore[assignment]
    if flow.axis in axes:
        return None
    keep = bool(user.args[2]) if len(user.args) > 2 else bool(user.kwargs.get("keepdim", False))
    lost = 0 if keep else sum(axis < flow.axis for axis in axes)
    return _Flow(user, flow.axis - lost, flow.channel)


def _permute(flow: _Flow, user: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Flow | None:
    order: list[int] = user.args[1]  # type: ignore[assignment]
    return _Flow(user, order.index(flow.axis), flow.channel)


def _slice(flow: _Flow, user: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Flow | None:
    axis, start, stop = user.args[1], user.args[2], user.args[3]
    step = user.args[4] if len(user.args) > 4 else 1
    channel = flow.channel[start:stop:step] if axis == flow.axis else flow.channel
    return _Flow(user, flow.axis, channel)


def _reshape(flow: _Flow, user: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Flow | None:
    """The channel axis alone, or joined with the axes behind it as in a flattening; no axis before it may change."""
    before, after = (1, *shapes[flow.node.name]), (1, *shapes[user.name])
    if len(after) <= flow.axis or before[: flow.axis] != after[: flow.axis]:
        return None
    count, joined = before[flow.axis], after[flow.axis]
    behind = math.prod(before[flow.axis + 1 :])
    if joined == count:
        return _Flow(user, flow.axis, flow.channel)
    if joined == count * behind:
        return _Flow(user, flow.axis, flow.channel.repeat_interleave(behind))
    return None


_STEPS: dict[str, Callable[[_Flow, fx.Node, Mapping[str, tuple[int, ...]]], _Flow | None]] = {
    "aten.constant_pad_nd.default": _pad,
    "aten.mean.dim": _mean,
    "aten.permute.default": _permute,
    "aten.slice.Tensor": _slice,
    "aten.reshape.default": _reshape,
}

__all__ = ["Link", "Pair", "column_factors", "divide_outputs", "links", "multiply_inputs", "pairs"]
