"""Cross-layer equalization: even out the weight ranges of channels across neighbouring layers (arXiv:1906.04721).

Channel i of one layer is divided by s_i and the input channel i of the next multiplied by it, with
s_i = √(r⁽¹⁾_i r⁽²⁾_i) / r⁽²⁾_i, r the largest magnitude of a weight (eq. 9 to 11): both ranges become √(r⁽¹⁾_i r⁽²⁾_i),
and through the positively homogeneous operators between the layers the network computes what it computed. Layers with
neighbours on both sides are visited until nothing moves.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from effcli.errors import UserError
from effcli.graphs.channels import Link, column_factors, divide_outputs, links, multiply_inputs
from effcli.graphs.graph import Graph, function
from effcli.layers.contract import NetworkPass, Observed, Transformed
from effcli.passes.quantize._batchnorm import batch_norms, place

# The largest |log s| that still counts as a move.
_STILL = 1e-4


class Equalize(NetworkPass):
    """An `equalize` step."""

    rare: ClassVar[tuple[str, ...]] = ("rounds", "relu6")

    rounds: int = Field(200, ge=1, description="Most visits to each pair of layers; it ends when nothing moves.")
    relu6: Literal["keep", "relu"] = Field(
        "keep",
        description="Where a ReLU6 stands between two layers: leave them as they are, or put a ReLU in its place, "
        "which changes what the network computes where the bound was reached.",
    )

    def transform(self, graph: Graph, seen: Observed) -> Transformed:
        """Equalize the pairs of layers of `graph`, in place."""
        _check_folded(graph, seen)
        remarks: list[str] = []
        pairs: list[Link] = []
        for link in links(graph):
            if isinstance(graph.layer(link.producer), nn.Linear | nn.Conv1d | nn.Conv2d):
                reason = _obstacle(self, graph, link, seen)
                if reason:
                    remarks.append(f"{link.producer} and {', '.join(link.consumers)} stay as they are: {reason}")
                else:
                    pairs.append(link)
        if not pairs:
            remarks.append("there are no neighbouring layers to equalize")
        replaced = [node for link in pairs for node in link.clipped]
        for node in replaced:
            node.target, node.args = function("aten.relu.default"), node.args[:1]
        if replaced:
            graph.module.recompile()
            remarks.append(f"a ReLU stands in the place of {len(replaced)} ReLU6: the network computes something else")
        before = {name: _spread(graph, name) for link in pairs for name in (link.producer, *link.consumers)}
        for _ in range(self.rounds):
            if not pairs or max(equalize(graph, link) for link in pairs) < _STILL:
                break
        notes = {
            name: {"range_ratio": [round(value, 2), round(_spread(graph, name), 2)]} for name, value in before.items()
        }
        return Transformed(graph, notes, remarks=tuple(remarks))


def equalize(graph: Graph, link: Link) -> float:
    """Scale the channels between a producer and its consumers once; returns the largest |log s|."""
    first = _rows(graph, link.producer).abs().amax(1)
    second = torch.zeros(link.channels)
    for name, channel in link.consumers.items():
        second.scatter_reduce_(0, channel, input_ranges(graph, name, len(channel)), "amax")
    # A channel that no weight makes or reads has no range to share.
    scale = torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)
    divide_outputs(graph, link.producer, scale)
    for name, channel in link.consumers.items():
        multiply_inputs(graph, name, scale[channel])
    return float(scale.log().abs().max())


def input_ranges(graph: Graph, name: str, inputs: int) -> Tensor:
    """The largest magnitude of a weight that reads each input channel or feature of layer `name`, (in,)."""
    # Which input each weight of the matrix (out, in) reads.
    reads = column_factors(graph, name, torch.arange(inputs))
    weights = _rows(graph, name).abs()
    return weights.new_zeros(inputs).scatter_reduce_(0, reads.flatten(), weights.flatten(), "amax")


def _rows(graph: Graph, name: str) -> Tensor:
    weight: Tensor = graph.layer(name).weight  # type: ignore[assignment]
    return weight.flatten(1)


def _spread(graph: Graph, name: str) -> float:
    """The widest range of an output channel over the median one."""
    ranges = _rows(graph, name).abs().amax(1)
    return float(ranges.max() / ranges.median().clamp(min=torch.finfo(torch.float32).tiny))


def _check_folded(graph: Graph, seen: Observed) -> None:
    """Raise `UserError` when a batch norm is left that `fold` would take away."""
    shapes = graph.shapes()
    for node in batch_norms(graph):
        if not place(graph, node, shapes, seen.chosen).reason:
            raise UserError(
                f"equalize works on the weights that run, and {node.target} is not folded into its layer",
                "put a `fold` step before it",
            )


def _obstacle(config: Equalize, graph: Graph, link: Link, seen: Observed) -> str:
    members = (link.producer, *link.consumers)
    compressed = next((name for name in members if name in graph.stored), None)
    if link.reason:
        return link.reason
    if link.clipped and config.relu6 == "keep":
        return f"a ReLU6 stands between, {link.clipped[0].name}; with relu6: relu a ReLU takes its place"
    if compressed is not None:
        return f"{compressed} is compressed already; equalize before compressing"
    left_out = next((name for name in members if name not in seen.chosen), None)
    return f"{left_out} is left alone" if left_out is not None else ""


__all__ = ["Equalize", "equalize", "input_ranges"]
