"""Batch norm folding: the affine map of a batch norm becomes part of the layer beside it (arXiv:1712.05877, 3.2)."""

from __future__ import annotations

from typing import ClassVar

from effcli.contract import Observed, PassConfig, Scope, Transformed
from effcli.graphs.graph import Graph
from effcli.passes._batchnorm import batch_norms
from effcli.passes._fold import fold_batch_norms


class Config(PassConfig):
    """Options of a `fold` step."""

    scope: ClassVar[Scope] = Scope.GRAPH


def transform(config: Config, graph: Graph, seen: Observed) -> Transformed:
    """Fold every batch norm of `graph` that can be folded, in place; the remarks name those that stay, and why."""
    if not batch_norms(graph):
        return Transformed(graph, remarks=("there is no batch norm to fold",))
    folded, remarks = fold_batch_norms(graph, seen.chosen)
    return Transformed(graph, {layer: {"folded": names} for layer, names in folded.items()}, remarks=remarks)


__all__ = ["Config", "transform"]
