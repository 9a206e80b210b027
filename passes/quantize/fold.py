"""Batch norm folding: the affine map of a batch norm becomes part of the layer beside it (arXiv:1712.05877, 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

from effcli.graphs.graph import Graph
from effcli.layers.contract import NetworkPass, Observed, Pass, Transformed
from effcli.passes.quantize._batchnorm import batch_norms
from effcli.passes.quantize._fold import fold_batch_norms


class Fold(NetworkPass):
    """A `fold` step."""

    def planned(self, graph: Graph, chosen: Mapping[str, Pass]) -> Graph:
        """A copy of `graph` without the batch norms that are folded."""
        folded = graph.copy()
        fold_batch_norms(folded, chosen)
        return folded

    def transform(self, graph: Graph, seen: Observed) -> Transformed:
        """Fold every batch norm of `graph` that can be folded, in place; the remarks name those that stay, and why."""
        if not batch_norms(graph):
            return Transformed(graph, remarks=("there is no batch norm to fold",))
        folded, remarks = fold_batch_norms(graph, seen.chosen)
        return Transformed(graph, {layer: {"folded": names} for layer, names in folded.items()}, remarks=remarks)


__all__ = ["Fold"]
