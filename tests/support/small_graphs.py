"""Small graphs with random weights, put together node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from effcli.graphs.graph import Builder, Facts, Graph

Step = nn.Module | str | tuple[object, ...]


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """`module` with random weights; batch norms with statistics, scales and shifts as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
    return module


def chain(shape: tuple[int, ...], *steps: Step) -> Graph:
    """One step after the other: a module, called `layer<number>`, or an operator's name with its further arguments."""
    builder = Builder()
    node = builder.input()
    for number, step in enumerate(steps):
        node = append(builder, node, step, number)
    return builder.finish(node, Facts(origin="test", shape=shape))


def append(builder: Builder, node: fx.Node, step: Step, number: int) -> fx.Node:
    if isinstance(step, nn.Module):
        return builder.module(f"layer{number}", seeded(step, number), node, source=f"net.py:{number}")
    name, *rest = (step,) if isinstance(step, str) else step
    return builder.call(f"aten.{name}", node, *rest, source=f"net.py:{number}")


def residual() -> Graph:
    """conv -> relu -> (conv -> relu -> conv) + itself -> mean -> linear, with a batch norm behind every convolution."""
    builder = Builder()
    first = normed(builder, builder.input(), "stem", nn.Conv2d(3, 8, 3, padding=1, bias=False), 0)
    first = builder.call("aten.relu.default", first)
    inner = normed(builder, first, "block.a", nn.Conv2d(8, 8, 3, padding=1, bias=False), 1)
    inner = builder.call("aten.relu.default", inner)
    inner = normed(builder, inner, "block.b", nn.Conv2d(8, 8, 3, padding=1, bias=False), 2)
    total = builder.call("aten.relu.default", builder.call("aten.add.Tensor", inner, first))
    pooled = builder.call("aten.mean.dim", total, [2, 3], False)
    output = builder.module("head", seeded(nn.Linear(8, 5), 3), pooled)
    return builder.finish(output, Facts(origin="test", shape=(3, 9, 7)))


def normed(builder: Builder, node: fx.Node, name: str, layer: nn.Conv2d, seed: int) -> fx.Node:
    node = builder.module(name, seeded(layer, seed), node)
    return builder.module(f"{name}_norm", seeded(nn.BatchNorm2d(layer.out_channels), seed), node)


def separable(clip: bool = False) -> Graph:
    """conv -> relu -> depthwise -> relu -> conv -> relu -> flatten -> linear; with `clip`, ReLU6 in place of ReLU."""
    active: Step = ("hardtanh.default", 0.0, 6.0) if clip else "relu.default"
    return chain(
        (3, 8, 8),
        nn.Conv2d(3, 6, 3, padding=1),
        active,
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        active,
        nn.Conv2d(6, 10, 1, stride=2),
        active,
        ("reshape.default", [-1, 160]),
        nn.Linear(160, 4),
    )


def inputs(graph: Graph, count: int = 12, seed: int = 0) -> Tensor:
    """Random inputs, float32 (count, *shape)."""
    return torch.randn(count, *graph.facts.shape, generator=torch.Generator().manual_seed(seed))


def batches(graph: Graph, count: int = 12, size: int = 5) -> Callable[[], Iterator[Tensor]]:
    """The same inputs in batches, the last one smaller."""
    return lambda: iter(inputs(graph, count).split(size))


@dataclass(frozen=True)
class Held:
    """Inputs in memory, float32 (n, *shape), with labels int64 (n,) or without, for what trains."""

    inputs: Tensor
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        rows = torch.arange(len(self)) if order is None else torch.from_numpy(order)
        for part in rows.split(size) if len(rows) else ():
            yield self.inputs[part], None if self.labels is None else torch.from_numpy(self.labels)[part]
