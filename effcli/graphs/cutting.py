"""What a pass that cuts may look at of a network read as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from effcli.graphs.backward import gradients
from effcli.graphs.graph import Graph
from effcli.graphs.open_graph import OpenGraph
from effcli.layers.contract import Members
from effcli.layers.cutting import Offered, look
from effcli.layers.engine import Seen
from effcli.layers.layer import LayerSite
from effcli.layers.statistics import Gradients


def look_at(
    graph: Graph,
    offered: Offered,
    batches: Callable[[], Iterable[Tensor]],
    labelled: Callable[[], Iterable[tuple[Tensor, Tensor | None]]],
    gathered: dict[str, Seen] | None = None,
) -> Members:
    """What a pass asks for of the groups of a graph that it is offered.

    batches: the calibration inputs, float32 (n, *shape), anew on each call; labelled: the same with labels int64 (n,);
    gathered: takes in the statistics of the layers' inputs, by name, for whoever needs them again.
    """

    def slopes(sites: Sequence[LayerSite]) -> Mapping[str, Gradients]:
        return gradients(graph, sites, labelled(), offered.needs)

    def statistics(sites: Sequence[LayerSite]) -> Mapping[str, Seen]:
        found = OpenGraph(graph, offered.needs.statistics).observe((site.name for site in sites), batches())
        if gathered is not None:
            gathered.update(found)
        return found

    return look(offered, graph.module.state_dict().__getitem__, slopes, statistics, lambda site: True)


__all__ = ["look_at"]
