"""A network read as a graph as the engine of passes over layers works on it, and what its layers see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcli.errors import DataError
from effcli.formats import Quantized
from effcli.graphs.channels import Link, column_factors, divide_outputs, links
from effcli.graphs.graph import Graph, calls, where
from effcli.graphs.ledger import GraphCosts
from effcli.graphs.patches import geometry, patches
from effcli.graphs.walk import Walk, stream
from effcli.layers.contract import Layer, Needs
from effcli.layers.engine import Seen
from effcli.layers.layer import LayerSite
from effcli.layers.network import Factors, Held, Readers, among
from effcli.layers.statistics import GroupedStatistics


class OpenGraph:
    """See `effcli.layers.network.Network`. Factors are written into the weights, so that the graph computes as before.

    needs: what is gathered of the inputs of layers.
    """

    def __init__(self, graph: Graph, needs: Needs) -> None:
        self.factors = Factors()
        self.graph = graph
        self.needs = needs
        self._costs = GraphCosts(graph)
        self._sites = {site.name: site for site in graph.sites()}
        # Layers that see the same patches, in the order in which they run.
        self._sharing: dict[tuple[object, ...], list[str]] = {}
        for name in self._sites:
            self._sharing.setdefault(self._view(name), []).append(name)
        self._links: list[Link | None] = []

    def _view(self, name: str) -> tuple[object, ...]:
        """What a layer sees: the node that it reads and the patches it takes; a layer called twice sees its own."""
        nodes = list(calls(self.graph, name))
        return (nodes[0].args[0], *geometry(self.graph.layer(name))) if len(nodes) == 1 else (name,)

    def observe(self, taken: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Seen]:
        """Sum up the inputs of the layers `taken` in one forward over the batches."""
        taken = set(taken)
        shared = ([name for name in names if name in taken] for names in self._sharing.values())
        members = [names for names in shared if names]
        sums = {names[0]: self._sums(names[0]) for names in members}

        def look(node: fx.Node, inputs: Any, value: Any) -> None:
            name = str(node.target)
            if node.op == "call_module" and name in sums:
                self._add(sums[name], name, inputs)

        stream(self.graph, (batch.to(self.graph.device) for batch in batches), look)
        each = {name: self._checked(found, name) for name, found in sums.items()}
        return {name: each[names[0]] for names in members for name in names}

    def walk(self, taken: Iterable[str], batches: Iterable[Tensor]) -> Iterator[tuple[str, Seen]]:
        """The layers `taken` as they run, each with the inputs that the layers before it, as they are by then, lead to.

        A layer that is called more than once is seen at its first call.
        """
        latest: tuple[object, Seen] | None = None
        left = set(taken)
        walk = Walk(self.graph, (batch.to(self.graph.device) for batch in batches))
        for node in walk:
            name = str(node.target)
            if node.op != "call_module" or name not in left:
                continue
            left.remove(name)
            view = self._view(name)
            if latest is None or latest[0] != view:
                sums = self._sums(name)
                for value in walk.inputs(node):
                    self._add(sums, name, value)
                latest = view, self._checked(sums, name)
            yield name, latest[1]

    def repeated(self, name: str) -> bool:
        """Whether a layer is called more than once."""
        return len(list(calls(self.graph, name))) > 1

    def _sums(self, name: str) -> GroupedStatistics:
        site = self._sites[name]
        return GroupedStatistics(site.groups, site.columns, self.needs, self.graph.device)

    def _add(self, sums: GroupedStatistics, name: str, inputs: Tensor) -> None:
        sums.see(inputs)
        for part in patches(self.graph.layer(name), inputs):
            sums.add(part)

    def _checked(self, sums: GroupedStatistics, name: str) -> Seen:
        if not sums.tokens:
            raise DataError(f"no calibration input reached {name}", "give calibration data that is not empty")
        found = sums.each()
        for gram in found:
            gram.check_finite(name)
        return found

    def readers(self) -> list[Readers]:
        behind = {name: link for link in links(self.graph) for name in link.consumers}
        members = list(self._sharing.values())
        self._links = [behind.get(names[0]) for names in members]
        return [
            self._readers(number, tuple(names), link)
            for number, (names, link) in enumerate(zip(members, self._links, strict=True))
        ]

    def _readers(self, number: int, names: tuple[str, ...], link: Link | None) -> Readers:
        first = names[0]
        columns = self._columns(first, torch.arange(self._inputs(first)))
        reason = self._reason(names, link)
        if reason or link is None:
            return Readers(number, names, None, reason, columns=columns)
        produces = link.producer if link.producer in self._sites else ""
        channel = self._columns(first, link.consumers[first])
        return Readers(number, names, link.producer, produces=produces, channel=channel, columns=columns)

    def _columns(self, name: str, channel: Tensor) -> Tensor:
        """What stands behind each column of a layer's weight, for int64 (channels,) of its inputs."""
        return column_factors(self.graph, name, channel)[0].to(self.graph.device)

    def _reason(self, names: tuple[str, ...], link: Link | None) -> str:
        """Why no module can take in a factor of the input of `names`; empty when one can."""
        if link is None:
            (node,) = list(calls(self.graph, names[0]))[:1]
            return f"no layer's output channels are its inputs, which come from {where(node.all_input_nodes[0])}"
        if link.reason or link.clipped:
            return link.reason or f"{where(link.clipped[0])} stands between and clips"
        other = next((name for name in link.consumers if name not in names), None)
        return "" if other is None else f"{other} reads the same channels in another way"

    def _inputs(self, name: str) -> int:
        module = self.graph.layer(name)
        return module.in_features if isinstance(module, nn.Linear) else int(module.in_channels)  # type: ignore[arg-type]

    def read(self, site: LayerSite) -> Layer:
        weight, mask = site.view(self._weight(site)).clone(), self.graph.mask(site.name)
        shape = self._weight(site).shape[2:]
        kernel = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        return Layer(site.name, site.kind, weight, torch.float32, mask=mask, biased=True, kernel=kernel)

    def _weight(self, site: LayerSite) -> Tensor:
        weight: Tensor = self.graph.layer(site.name).weight  # type: ignore[assignment]
        return weight.detach()

    def divide(self, readers: Readers, factor: Tensor) -> Tensor:
        link = self._links[readers.number]
        assert link is not None and readers.columns is not None
        channel = link.consumers[readers.layers[0]].to(factor.device)
        outputs = factor.new_ones(link.channels).index_copy_(0, channel, among(readers.columns, factor))
        divide_outputs(self.graph, link.producer, outputs)
        self.factors.divide(link.producer, outputs)
        return factor

    def multiply(self, site: LayerSite, factor: Tensor) -> None:
        site.view(self._weight(site)).mul_(factor)
        self.factors.columns[site.name] = factor

    def write(self, site: LayerSite, weight: Quantized | Tensor, effective: Tensor) -> Held:
        self.graph.set_weight(site.name, weight, effective)
        return self._costs.held(site.name, weight)

    def shift(self, site: LayerSite, shift: Tensor) -> None:
        bias = self.graph.layer(site.name).bias
        self.graph.set_bias(site.name, bias + shift if isinstance(bias, Tensor) else shift)

    def held(self, site: LayerSite) -> Held:
        return self._costs.held(site.name, self.graph.held(site))


__all__ = ["OpenGraph"]
