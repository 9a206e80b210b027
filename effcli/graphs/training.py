"""A pass that trains, carried out on a network read as a graph: layers attached, the loop run, the outcome written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effcli.errors import DataError
from effcli.formats import Mask, Quantized, SparseWeight
from effcli.graphs.backward import check_labels, classes_for
from effcli.graphs.graph import Graph
from effcli.graphs.ledger import dense, whole_rows
from effcli.layers.attaching import AttachedLayers, anew_if_damaged, told, training_key
from effcli.layers.contract import AttachPass, Layer, Needs, Observed, Pass, Transformed, finished
from effcli.layers.layer import LayerSite
from effcli.layers.result import PassResult, Progress, check_tensor, worst
from effcli.layers.returned import Asked
from effcli.layers.selection import choose
from effcli.reports.units import count
from effcli.training.loop import Batch, Examples

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


@dataclass(frozen=True)
class _Request:
    """A step that trains; see `train_graph`."""

    source: Path
    target: Path
    step: PassStep
    data: Examples | None
    batch_size: int
    reference: Path | None
    original: Path | None
    work: Path | None
    seed: int
    device: str
    progress: Progress

    def carry_out(self) -> PassResult:
        """Raises `UnfinishedError` for a snapshot in `work` that is damaged."""
        step, options = self.step, self.step.config
        assert isinstance(options, AttachPass)
        if options.seed is None:
            options = options.model_copy(update={"seed": self.seed})
        graph = Graph.read(self.source)
        for name, tensor in graph.module.state_dict().items():
            check_tensor(tensor, name)
        choices = choose(graph, step)
        if self.data is None:
            raise DataError(f"{step.name} trains on inputs of the network", "give calibration data")
        before = {name: dense(graph, choice.site).clone() for name, choice in choices.items()}
        compressed = set(graph.stored)
        made = train(
            graph,
            step.name,
            options,
            self.data,
            {name: choice.config for name, choice in choices.items() if choice.config is not None},
            batch_size=self.batch_size,
            dense=None if self.reference == self.source else self._teacher(Needs.DENSE, self.reference),
            original=self._teacher(Needs.ORIGINAL, self.original),
            work=self.work,
            key=training_key(self.source, step, [len(self.data), self.batch_size, options.seed]),
            device=self.device,
            progress=self.progress,
        )
        graph.save(self.target)
        remarks = [*made.remarks, *_undone(graph, step.name, before, compressed)]
        result = PassResult(remarks=remarks, training=made.training)
        result.ledger = whole_rows(graph, choices, before, compressed, made.notes, result)
        result.histograms = worst(result)
        return result

    def _teacher(self, need: Needs, checkpoint: Path | None) -> Graph | None:
        """The network in `checkpoint`, where the step asks for it."""
        return Graph.read(checkpoint) if need in self.step.needs and checkpoint is not None else None


def train_graph(
    source: Path,
    target: Path,
    step: PassStep,
    data: Examples | None,
    *,
    batch_size: int,
    reference: Path | None = None,
    original: Path | None = None,
    work: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> PassResult:
    """Carry out a step that trains on the graph in `source` and write a checkpoint into `target`, which exists.

    data: the calibration inputs; batch_size: of the recipe; reference: the checkpoint before weights were first
    compressed, `source` itself where none were; original: the one before the first pass; work: a folder for
    snapshots, from which an unfinished training of the same request goes on; a damaged one is thrown away, and a remark
    says so; seed: where the options have none.
    """
    request = _Request(source, target, step, data, batch_size, reference, original, work, seed, device, progress)
    return anew_if_damaged(step.name, work, request.carry_out)


def train(
    graph: Graph,
    name: str,
    options: AttachPass,
    data: Examples,
    chosen: Mapping[str, Pass],
    *,
    batch_size: int,
    dense: Graph | None = None,
    original: Graph | None = None,
    work: Path | None = None,
    key: str = "",
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Transformed:
    """Train the `chosen` layers of `graph`, in place, with the pass called `name`; the others stay as they are.

    dense, original: the networks that `Needs.DENSE` and `Needs.ORIGINAL` name. device: as in `loop.train`; networks
    whose nodes name a device stay on the CPU. Raises `UserError` where no layer can be trained and where a network that
    the pass compares with is missing, `UnsupportedError` without classes and `DataError` without labels that it learns
    from, and what `loop.train` raises.
    """
    teachers: dict[str, Graph] = {}
    if Needs.DENSE in options.needs:
        teachers["dense"] = Observed(dense=dense).before_compression(name)
    if Needs.ORIGINAL in options.needs:
        # Before the first pass the network is the original.
        teachers["original"] = original or graph.copy()
    if Needs.LABELS in options.needs:
        _check_labels(name, graph, data)
    attached = AttachedLayers(
        name, _TrainedGraph(graph), options, {own: _TrainedGraph(each) for own, each in teachers.items()}
    )
    training = attached.train(
        {site.name: site for site in graph.sites() if site.name in chosen},
        chosen,
        data,
        batch_size=batch_size,
        device="cpu" if any(each.names_device for each in (graph, *teachers.values())) else device,
        folder=work,
        key=key,
        progress=progress,
    )
    notes: dict[str, dict[str, Any]] = {}
    for each, (site, own, module) in attached.layers.items():
        if not own.trains_weights and not any(True for _ in module.parameters()):
            # Its bias alone was trained, in place.
            notes |= {each: {}} if training.kept else {}
            continue
        layer = _layer(graph, site)
        with torch.no_grad():
            same = training.kept == 0 and torch.equal(module(layer.weight), layer.weight)
        if not same:
            outcome = finished(own, layer, module)
            weight = outcome.weight if outcome.mask is None else outcome.mask.over(outcome.weight)
            Asked(own, "finish", each).check_finite(
                weight.dequantize(torch.float32) if isinstance(weight, Quantized) else weight
            )
            graph.set_weight(each, weight)
            notes[each] = dict(outcome.notes)
    said = told(training, options, changed=bool(notes))
    return Transformed(graph, notes, remarks=(*attached.remarks, said), training=training)


def _undone(graph: Graph, name: str, before: Mapping[str, Tensor], compressed: Collection[str]) -> Iterator[str]:
    """What the pass `name` took back of the passes before it. before: the weights (out, in) that were, by layer."""
    loosened = [layer for layer in before if layer in compressed and layer not in graph.stored]
    if loosened:
        yield f"{name} made compressed layers dense again: {', '.join(loosened)}"
    sites = {site.name: site for site in graph.sites()}
    filled = {layer: int(((weight == 0) & (dense(graph, sites[layer]) != 0)).sum()) for layer, weight in before.items()}
    filled = {layer: count for layer, count in filled.items() if count}
    if filled:
        yield f"{name} filled {count(sum(filled.values()), 'weight')} of value zero, in {', '.join(filled)}"


class _TrainedGraph:
    """See `effcli.layers.attaching.Trainable`."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.module: nn.Module = graph.module

    def layer(self, name: str) -> Any:
        return self._graph.layer(name)

    def mask(self, name: str) -> Mask | None:
        return self._graph.mask(name)

    def read(self, site: LayerSite) -> Layer:
        return _layer(self._graph, site)

    def run(self, batch: Batch) -> Tensor:
        outputs: Tensor = self.module(batch.inputs)
        return outputs.float()

    def labels(self, batch: Batch) -> Tensor | None:
        return batch.labels


def _layer(graph: Graph, site: LayerSite) -> Layer:
    stored, mask = graph.stored.get(site.name), graph.mask(site.name)
    if isinstance(stored, SparseWeight):
        numbers = stored.values
        stored = numbers if stored.input_scale is None else numbers.with_input_scale(stored.input_scale)
    biased = graph.layer(site.name).bias is not None
    return Layer(site.name, site.kind, dense(graph, site).clone(), torch.float32, stored, mask, has_bias=biased)


def _check_labels(name: str, graph: Graph, data: Examples) -> None:
    """Raise `UnsupportedError` for a network without classes, `DataError` unless the labels are classes of it."""
    use = f"{name} learns from labels"
    classes = classes_for(use, graph, "train towards the outputs of the original network")
    check_labels(use, None if data.labels is None else torch.from_numpy(data.labels), classes)


__all__ = ["train", "train_graph"]
