"""One pass over a network read as a graph: observe in one forward, compress layer by layer, write.

What `sweep` is to language models. A graph is small enough to be in memory whole; its activations are not, so that the
inputs are seen batch by batch, as sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from effcli.errors import DataError
from effcli.formats import Quantized
from effcli.graphs.channels import Link, column_factors, divide_outputs, links, multiply_inputs
from effcli.graphs.graph import Graph, calls, where
from effcli.graphs.integer import IntegerNetwork
from effcli.graphs.ledger import Costs, beside_batch_norm, dense, integer_rows, kept_row, stored, table_rows
from effcli.graphs.patches import geometry, patches
from effcli.graphs.walk import Walk, stream
from effcli.layers.contract import (
    Apply,
    Group,
    Layer,
    LayerPass,
    Needs,
    NetworkPass,
    Observed,
    ScalingPass,
    carry_out,
)
from effcli.layers.result import Progress, Swept, check_tensor, histogram, layer_row, ratio, worst
from effcli.layers.selection import Choice, choose_graph, needs_of
from effcli.layers.statistics import GroupedStatistics, Statistics
from effcli.reports.report import LedgerRow

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep

Batches = Callable[[], Iterator[Tensor]]
# The statistics of a layer's inputs, one for each group of a convolution.
Seen = tuple[Statistics, ...]


def graph_sweep(
    source: Path,
    target: Path,
    step: PassStep,
    batches: Batches | None = None,
    inputs: Literal["original", "compressed"] = "original",
    reference: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Swept:
    """Carry out `step` on the graph in `source` and write a checkpoint into `target`, a directory that exists.

    batches: the calibration inputs, float32 (n, *shape), anew on each call; inputs: whether a layer sees what the
    original layers before it return or, walking all batches through the graph node by node, the compressed ones;
    reference: the checkpoint before weights were first compressed, for passes that compare with it; `source` itself
    where none were. The target is a graph, or an integer network where the pass makes one.
    """
    graph = Graph.read(source)
    for name, tensor in graph.module.state_dict().items():
        check_tensor(tensor, name)
    choices = choose_graph(graph, step)
    if not step.needs:
        batches = None
    elif batches is None:
        raise DataError(f"{step.name} looks at the inputs of the layers", "give calibration data")
    if isinstance(step.config, NetworkPass):
        progress(0, len(choices))
        dense = reference if Needs.DENSE in step.needs and reference != source else None
        swept = _transform(graph, target, step.name, step.config, choices, batches, dense)
        progress(len(choices), len(choices))
        return swept
    work = GraphWork(graph, choices, needs_of([choices]), progress=progress)
    if batches is None:
        for name in work.taken:
            work.compress(name, ())
    else:
        scales = isinstance(step.config, ScalingPass)
        seen = work.observe(batches()) if inputs == "original" or scales else {}
        if scales:
            seen = work.scale(seen)
        if inputs == "original":
            for name in work.taken:
                work.compress(name, seen.pop(name))
        else:
            seen.clear()
            work.walk(batches())
    graph.save(target)
    return work.finish()


class GraphWork:
    """Compresses the layers of one graph, in place, and writes the ledger."""

    def __init__(
        self,
        graph: Graph,
        choices: Mapping[str, Choice],
        needs: Needs,
        apply: Apply = carry_out,
        progress: Progress = lambda *_: None,
    ) -> None:
        """needs: what is gathered of the inputs; apply: hands a layer to its pass."""
        self.graph = graph
        self.needs = needs
        self.apply = apply
        self.choices = choices
        self.progress = progress
        self.costs = Costs(graph)
        self.rows: dict[str, LedgerRow] = {}
        self.swept = Swept()
        # Factors of scaled layers, so that errors are told of the weights as they were: (out,) of rows, (out, in).
        self.divided: dict[str, Tensor] = {}
        self.multiplied: dict[str, Tensor] = {}
        self.explicit: dict[str, Tensor] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, list[str]] = {}
        # Layers that see the same patches, by the first of them that is compressed.
        self.sharing: dict[tuple[object, ...], list[str]] = {}
        for name in choices:
            self.sharing.setdefault(self._view(name), []).append(name)

    @property
    def taken(self) -> list[str]:
        return [name for name, choice in self.choices.items() if choice.config is not None]

    def _view(self, name: str) -> tuple[object, ...]:
        """What a layer sees: the node that it reads and the patches it takes; a layer called twice sees its own."""
        nodes = list(calls(self.graph, name))
        return (nodes[0].args[0], *geometry(self.graph.layer(name))) if len(nodes) == 1 else (name,)

    def observe(self, batches: Iterable[Tensor]) -> dict[str, Seen]:
        """Sum up the inputs of every chosen layer in one forward over the batches."""
        taken = set(self.taken)
        shared = ([name for name in names if name in taken] for names in self.sharing.values())
        members = [names for names in shared if names]
        sums = {names[0]: self._sums(names[0]) for names in members}

        def look(node: fx.Node, inputs: Any, value: Any) -> None:
            name = str(node.target)
            if node.op == "call_module" and name in sums:
                self._add(sums[name], name, inputs)

        stream(self.graph, batches, look)
        each = {name: self._checked(found, name) for name, found in sums.items()}
        return {name: each[names[0]] for names in members for name in names}

    def walk(self, batches: Iterable[Tensor]) -> None:
        """Compress each layer with the inputs that the compressed layers before it lead to."""
        latest: tuple[object, Seen] | None = None
        done: set[str] = set()
        taken = set(self.taken)
        walk = Walk(self.graph, batches)
        for node in walk:
            name = str(node.target)
            if node.op != "call_module" or name not in taken or name in done:
                continue
            view = self._view(name)
            if latest is None or latest[0] != view:
                sums = self._sums(name)
                for value in walk.inputs(node):
                    self._add(sums, name, value)
                latest = view, self._checked(sums, name)
            if len(list(calls(self.graph, name))) > 1:
                self.reasons.setdefault(name, []).append("it runs more than once; its inputs were those of the first")
            self.compress(name, latest[1])
            done.add(name)

    def _sums(self, name: str) -> GroupedStatistics:
        site = self.choices[name].site
        return GroupedStatistics(site.groups, site.columns, self.needs)

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

    def scale(self, seen: Mapping[str, Seen]) -> dict[str, Seen]:
        """Find a scale for every shared input and fold it, or say why not; returns what the scaled layers see."""
        behind = {name: link for link in links(self.graph) for name in link.consumers}
        scaled = dict(seen)
        for members in self.sharing.values():
            chosen = [n for n in members if n in seen and isinstance(self.choices[n].config, ScalingPass)]
            if chosen:
                self._scale_group(chosen, members, behind.get(chosen[0]), scaled)
        return scaled

    def _scale_group(self, chosen: list[str], members: list[str], link: Link | None, seen: dict[str, Seen]) -> None:
        options: tuple[Any, ...] = tuple(self.choices[name].config for name in chosen)
        reason = self._obstacle(chosen, members, link)
        grouped = any(self.choices[name].site.groups > 1 for name in chosen)
        explicit = bool(reason) and not grouped and any(own.without_scale == "explicit" for own in options)
        if reason and not explicit:
            self._explain(chosen, f"unscaled: {reason}")
            return
        layers = tuple(self._layer(name) for name in chosen)
        channel = None if reason or link is None else link.consumers[chosen[0]]
        channel = torch.arange(self._inputs(chosen[0])) if channel is None else channel
        group = Group(layers, options, column_factors(self.graph, chosen[0], channel)[0])
        scale, notes = options[0].scale(group, seen[chosen[0]][0])
        if bool((scale == 1).all()):
            self._note(chosen, notes)
            return
        factor = _first_of_each(scale, column_factors(self.graph, chosen[0], torch.arange(len(channel)))[0])
        # One for all: what a pass remembers of shared inputs is worked out once.
        rescaled = tuple(gram.rescaled(scale) for gram in seen[chosen[0]])
        for name in chosen:
            multiply_inputs(self.graph, name, factor)
            self.multiplied[name] = column_factors(self.graph, name, factor)
            seen[name] = rescaled
        if explicit or link is None:
            self.explicit.update(dict.fromkeys(chosen, scale))
            self._explain(chosen, f"its scale stays explicit on its input: {reason}")
            self._note(chosen, notes)
            return
        outputs = torch.ones(link.channels).index_copy_(0, channel, factor)
        divide_outputs(self.graph, link.producer, outputs)
        self.divided[link.producer] = outputs
        self._note(chosen, {**notes, "folded_into": link.producer})

    def _obstacle(self, chosen: Sequence[str], members: Sequence[str], link: Link | None) -> str:
        """Why no module may take in a scale of the inputs of `chosen`; empty when one may."""
        if any(self.choices[name].site.groups > 1 for name in chosen):
            return "it is a grouped convolution"
        left_out = next((name for name in members if name not in chosen), None)
        if left_out is not None:
            return f"{left_out} reads the same input and is left alone"
        if link is None:
            (node,) = list(calls(self.graph, chosen[0]))[:1]
            return f"no layer's output channels are its inputs, which come from {where(node.all_input_nodes[0])}"
        if link.reason or link.clipped:
            return link.reason or f"{where(link.clipped[0])} stands between and clips"
        other = next((name for name in link.consumers if name not in members), None)
        if other is not None:
            return f"{other} reads the same channels in another way"
        if link.producer in self.choices and self.choices[link.producer].config is None:
            return f"{link.producer}, which produces its input, is left alone"
        return ""

    def _inputs(self, name: str) -> int:
        module = self.graph.layer(name)
        return module.in_features if isinstance(module, nn.Linear) else int(module.in_channels)  # type: ignore[arg-type]

    def _explain(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.reasons.setdefault(name, []).append(reason)

    def _note(self, names: Iterable[str], notes: Mapping[str, Any]) -> None:
        for name in names:
            self.notes.setdefault(name, {}).update(notes)

    def _layer(self, name: str) -> Layer:
        site = self.choices[name].site
        weight: Tensor = self.graph.layer(name).weight  # type: ignore[assignment]
        return Layer(name, site.kind, site.view(weight.detach()).clone(), torch.float32)

    def compress(self, name: str, seen: Seen) -> None:
        """Hand one layer to the pass and put the outcome into the graph and the ledger."""
        self.progress(len(self.rows), len(self.taken))
        config = self.choices[name].config
        assert isinstance(config, LayerPass)
        layer = self._layer(name)
        outcome = self.apply(config, layer, seen)
        weight = outcome.weight
        restored = weight.dequantize(torch.float32) if isinstance(weight, Quantized) else weight.float()
        if name in self.explicit:
            scale = self.explicit[name]
            weight = weight.with_input_scale(scale) if isinstance(weight, Quantized) else restored / scale
        self.graph.set_weight(name, weight)
        site = self.choices[name].site
        rows = self.divided.get(name, torch.ones(site.rows)).unsqueeze(1)
        columns = self.multiplied.get(name, torch.ones(1, 1))
        # Seen from the layer as it was: its rows undivided; its columns are scaled in `seen` as they are here.
        difference, original = (restored - layer.weight) * rows, layer.weight * rows
        nbytes, format = stored(weight)
        self.rows[name] = layer_row(
            site,
            format,
            nbytes,
            "compressed" if isinstance(weight, Quantized) else "changed",
            reason="; ".join(self.reasons.get(name, ())),
            weight_error=ratio(
                float((difference / columns).square().sum()), float((original / columns).square().sum())
            ),
            output_error=None
            if not seen or Needs.GRAM not in self.needs
            else ratio(_energy(seen, difference), _energy(seen, original)),
            macs=self.costs.macs[name],
            parameters=self.costs.parameters(name),
            notes={**self.notes.get(name, {}), **outcome.notes},
        )
        before = original / columns
        self.swept.histograms.append(histogram(name, before, before + difference / columns))

    def finish(self) -> Swept:
        """The ledger of all layers in their order, then what else holds many numbers."""
        for name, choice in self.choices.items():
            self.swept.ledger.append(
                self.rows.get(name) or kept_row(self.graph, choice.site, self.costs, choice.reason)
            )
        self.swept.ledger += table_rows(self.graph)
        self.swept.histograms = worst(self.swept)
        self.progress(len(self.taken), len(self.taken))
        return self.swept


def _transform(
    graph: Graph,
    target: Path,
    name: str,
    options: NetworkPass,
    choices: Mapping[str, Choice],
    batches: Batches | None,
    original: Path | None,
) -> Swept:
    """Carry out a pass that takes the graph as a whole."""
    before = {name: dense(graph, choice.site).clone() for name, choice in choices.items()}
    chosen = {name: choice.config for name, choice in choices.items() if choice.config is not None}
    observed = Observed(dense=None if original is None else Graph.read(original), chosen=chosen)
    if batches is not None:
        observed = dataclasses.replace(observed, batches=batches)
    costs = Costs(graph)
    normed = {name for name in choices if beside_batch_norm(graph, name)}
    made = options.transform(graph, observed)
    network: Graph | IntegerNetwork = made.network
    network.save(target)
    swept = Swept(remarks=list(made.remarks), activations=list(made.activations))
    if isinstance(network, IntegerNetwork):
        rounded = {name: None if name in normed else weight for name, weight in before.items()}
        swept.ledger = integer_rows(network, rounded, choices, costs, made.notes, swept)
    else:
        costs = Costs(network)
        for name, choice in choices.items():
            reason = choice.reason or f"{name} had nothing to change here"
            row = kept_row(network, choice.site, costs, reason)
            if name in made.notes:
                row = row.model_copy(update={"status": "changed", "reason": "", "notes": dict(made.notes[name])})
                swept.histograms.append(histogram(name, before[name], dense(network, choice.site)))
            swept.ledger.append(row)
        swept.ledger += table_rows(network)
    swept.histograms = worst(swept)
    return swept


def _first_of_each(values: Tensor, index: Tensor) -> Tensor:
    """values (in,) that are equal where index int64 (in,) is, by index."""
    return values.new_ones(int(index.max()) + 1).index_copy_(0, index, values)


def _energy(seen: Seen, difference: Tensor) -> float:
    """Mean squared norm of D x over the calibration tokens, D (out, in) with one group of rows for each of `seen`."""
    return sum(gram.output_energy(part) for gram, part in zip(seen, difference.chunk(len(seen)), strict=True))


__all__ = ["GraphWork", "graph_sweep"]
