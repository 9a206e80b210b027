"""Batch norms taken into the layers beside them, for every pass that wants a network without (arXiv:1712.05877, 3.2).

A batch norm y = a · x + b behind a layer makes its weight a · W and its bias a · bias + b, per output channel. In front
of a layer that pads nothing it makes its weight W · a, per input channel, and its bias bias + W b. Either way the
network computes what it computed, to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from effcli.graphs.channels import column_factors
from effcli.graphs.graph import Graph
from effcli.layers.contract import Pass
from effcli.passes.quantize._batchnorm import affine, batch_norms, bias_of, place, remove


def fold_batch_norms(
    graph: Graph, chosen: Mapping[str, Pass] | None = None
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Fold, in place, what can be folded: (the batch norms that each layer took in, remarks on those that stay).

    chosen: the layers that may be changed, None for all.
    """
    shapes = graph.shapes()
    folded: dict[str, list[str]] = {}
    remarks = []
    for node in batch_norms(graph):
        name = str(node.target)
        found = place(graph, node, shapes, chosen)
        if found.reason:
            remarks.append(f"{name} stays: {found.reason}")
            continue
        factor, shift = affine(graph.layer(name))
        if found.before:
            fold_outputs(graph, found.before, factor, shift)
        for layer in found.behind:
            fold_inputs(graph, layer, factor, shift)
        for layer in (found.before,) if found.before else found.behind:
            folded.setdefault(layer, []).append(name)
        remove(graph, node)
    return folded, tuple(remarks)


def fold_outputs(graph: Graph, name: str, factor: Tensor, shift: Tensor) -> None:
    """Let layer `name` return factor · y + shift, each float64 (out,), where it returned y."""
    module = graph.layer(name)
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows = weight.double().flatten(1)
    graph.set_bias(name, (bias_of(module, len(factor)) * factor + shift).float())
    graph.set_weight(name, (rows * factor.unsqueeze(1)).float())


def fold_inputs(graph: Graph, name: str, factor: Tensor, shift: Tensor) -> None:
    """Let layer `name`, which pads nothing, take factor · x + shift, each float64 (in,), where it took x."""
    module = graph.layer(name)
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows = weight.double().flatten(1)
    offset = (rows * column_factors(graph, name, shift)).sum(1)
    graph.set_bias(name, (bias_of(module, len(rows)) + offset).float())
    graph.set_weight(name, (rows * column_factors(graph, name, factor)).float())


__all__ = ["fold_batch_norms", "fold_inputs", "fold_outputs"]
