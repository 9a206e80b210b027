"""The ledger of a graph: one line for every layer, with what it costs and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effcli.formats import Quantized
from effcli.graphs.graph import Graph, calls, macs
from effcli.graphs.integer import IntegerNetwork, Weighted
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.result import PassResult, dense_row, histogram, layer_row, ratio
from effcli.layers.selection import Choice
from effcli.reports.report import LedgerRow


class GraphCosts:
    """What the layers of a graph cost. macs: multiplications per input, by layer, over all its calls."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.macs = macs(graph)

    def parameters(self, name: str) -> int:
        return sum(parameter.numel() for parameter in self.graph.layer(name).parameters())

    def held(self, name: str, weight: Quantized | Tensor) -> Held:
        """How layer `name` is stored with `weight`."""
        return Held.of(weight, self.macs[name], self.parameters(name))


def integer_rows(
    network: IntegerNetwork,
    before: Mapping[str, Tensor | None],
    choices: Mapping[str, Choice],
    costs: GraphCosts,
    notes: Mapping[str, dict[str, Any]],
    result: PassResult,
) -> list[LedgerRow]:
    """The ledger of an integer network: the layers with what they are stored as, and their error.

    before: the weights (out, in) that were rounded, None where a batch norm was folded into them on the way.
    """
    steps = {step.layer: step for step in reversed(network.program.steps) if isinstance(step, Weighted)}
    rows = []
    for name, choice in choices.items():
        if name not in steps:
            continue
        step, site, weight = steps[name], choice.site, before[name]
        nbytes = site.rows * (
            math.ceil(site.columns * step.weight_bits / 32) * 4 if step.weight_bits < 8 else site.columns
        )
        nbytes += network.array(step, "multiplier").nbytes + network.array(step, "shift").nbytes
        table = network.codebook(step)
        nbytes += 0 if table is None else table.nbytes
        format = f"int{step.weight_bits} channel sym"
        if table is not None:
            format = f"kmeans{step.weight_bits} {'tensor' if len(table) == 1 else 'channel'} int8"
        error = None
        if weight is not None:
            restored = _restored(network, step)
            error = ratio(float((restored - weight).square().sum()), float(weight.square().sum()))
            result.histograms.append(histogram(name, weight, restored))
        rows.append(
            layer_row(
                site,
                format,
                nbytes,
                "compressed",
                weight_error=error,
                macs=costs.macs[name],
                parameters=costs.parameters(name),
                notes=dict(notes.get(name, {})),
            )
        )
    return rows


def beside_batch_norm(graph: Graph, name: str) -> bool:
    """Whether a batch norm reads layer `name` or is read by it."""
    beside = [other for node in calls(graph, name) for other in (*node.users, *node.all_input_nodes)]
    return any(isinstance(graph.module_of(node), nn.BatchNorm1d | nn.BatchNorm2d) for node in beside)


def _restored(network: IntegerNetwork, step: Weighted) -> Tensor:
    """The weight (out, in) of a step's integers: code · multiplier / 2^shift · output scale / input scale."""
    codes = torch.from_numpy(network.array(step, "weight").reshape(len(network.array(step, "bias")), -1))
    ratio = network.array(step, "multiplier").astype("float64") / 2.0 ** network.array(step, "shift")
    values = network.program.values
    scale = torch.from_numpy(ratio) * values[step.output].scale / values[step.inputs[0]].scale
    return (codes.double() * scale.unsqueeze(1)).float()


def dense(graph: Graph, site: LayerSite) -> Tensor:
    weight: Tensor = graph.layer(site.name).weight  # type: ignore[assignment]
    return weight.detach().reshape(site.shape)


def kept_row(graph: Graph, site: LayerSite, costs: GraphCosts, reason: str) -> LedgerRow:
    """The ledger's line for a layer as it stands in the graph."""
    return costs.held(site.name, graph.held(site)).row(site, "kept", reason=reason)


def whole_rows(
    graph: Graph,
    choices: Mapping[str, Choice],
    before: Mapping[str, Tensor],
    compressed: Collection[str],
    notes: Mapping[str, dict[str, Any]],
    result: PassResult,
) -> list[LedgerRow]:
    """The ledger of a graph that a pass took as a whole; the histograms of what changed go to `result`.

    before: the weights (out, in) that were; compressed: the layers whose weights were compressed already; notes: by
    layer, of those that changed.
    """
    costs, rows = GraphCosts(graph), []
    for name, choice in choices.items():
        row = kept_row(graph, choice.site, costs, choice.reason or f"{name} had nothing to change here")
        if name in notes:
            status = "compressed" if name in graph.stored and name not in compressed else "changed"
            row = row.model_copy(update={"status": status, "reason": "", "notes": dict(notes[name])})
            result.histograms.append(histogram(name, before[name], dense(graph, choice.site)))
        rows.append(row)
    return [*rows, *table_rows(graph)]


def table_rows(graph: Graph) -> list[LedgerRow]:
    """Matrices that are no layer: embeddings, and parameters that operators read."""
    layers = {site.parameter for site in graph.sites()}
    reason = "an embedding or a matrix that is no layer"
    return [
        dense_row(key, "embedding", tuple(value.shape), value.dtype, reason)
        for key, value in graph.module.named_parameters()
        if key not in layers and value.ndim > 1
    ]


__all__ = ["GraphCosts", "beside_batch_norm", "dense", "integer_rows", "kept_row", "table_rows", "whole_rows"]
