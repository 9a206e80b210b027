"""A pass that trains, carried out on a network read as a graph: layers attached, the loop run, the outcome written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from effcli.errors import DataError, UnfinishedError, UserError, behind, writing
from effcli.files.digest import of_folder
from effcli.formats import Quantized, SparseWeight
from effcli.graphs.backward import check_labels, classes_for
from effcli.graphs.graph import Graph
from effcli.graphs.ledger import dense, whole_rows
from effcli.layers.contract import Attached, Layer, Needs, Observed, Pass, Step, TrainPass, Transformed, finished
from effcli.layers.input_rounding import straight_through
from effcli.layers.layer import LayerSite
from effcli.layers.result import PassResult, Progress, check_tensor, worst
from effcli.layers.returned import Asked, described
from effcli.layers.selection import choose
from effcli.reports.units import count
from effcli.training import loop
from effcli.training.loop import Batch, Examples, Objective

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


# An error that changes by less than this share between two measurements has settled.
_SETTLED = 0.01


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
        assert isinstance(options, TrainPass)
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
            key=_key(self.source, step, [len(self.data), self.batch_size, options.seed]),
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
    try:
        return request.carry_out()
    except UnfinishedError as error:
        failure = behind(error)
        if failure is not None:
            # The snapshot may be whole: the same command reads it once the machine does.
            raise failure from error
        assert work is not None
        damage = error.cause
    with writing(work):
        shutil.rmtree(work)
    result = request.carry_out()
    result.remarks.append(f"{step.name} trained anew, for unfinished training cannot be continued: {damage}")
    return result


def train(
    graph: Graph,
    name: str,
    options: TrainPass,
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
    attached = _Attached(graph, options, teachers)
    with (
        loop.seeded(options.seed or 0),
        attached.to({site.name: site for site in graph.sites() if site.name in chosen}, chosen),
    ):
        if not attached.layers:
            raise UserError(f"{name} finds no layer with a {options.takes} to train", options.remedy)
        training = loop.train(
            attached.objective(),
            data,
            options,
            batch_size=batch_size,
            device="cpu" if any(each.names_device for each in (graph, *teachers.values())) else device,
            folder=work,
            key=key,
            progress=progress,
        )
    notes: dict[str, dict[str, Any]] = {}
    attached.set_training(False)
    for each, (site, own, module) in attached.layers.items():
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
    (_, first), *_, (_, last) = training.errors
    # A rehearsal does not come to its last step.
    least = dict(training.errors).get(training.kept, last)
    told = f"{options.measured}: {first:.3g} before training, {least:.3g} after"
    if not notes:
        lost = f"{count(training.steps, 'step')} at a learning rate of {options.learning_rate} made no error smaller"
        told = f"the weights stay as they are: {lost}"
    if options.counts(0.0):
        told += _advice(training.errors, options)
    return Transformed(graph, notes, remarks=(*attached.remarks, told), training=training)


def _advice(errors: Sequence[tuple[int, float]], options: TrainPass) -> str:
    """What to change where the training ended too soon or lowered no error, as a clause; empty where it settled.

    errors: at each step that was measured, the first before training.
    """
    longer = f"`epochs` (now {options.epochs})" if options.steps is None else f"`steps` (now {options.steps})"
    rate = f"`learning_rate` (now {options.learning_rate:g})"
    (_, first), *_, (_, last) = errors
    least, before_last = min(error for _, error in errors), errors[-2][1]
    if least == first == 0:
        return ""
    if least == first:
        worse = last > first * (1 + _SETTLED)
        return f"; lower {rate}" if worse else f"; raise {rate} or {longer}"
    if last == least and last < before_last * (1 - _SETTLED):
        return f", and it still fell: raise {longer}, or {rate}"
    return ""


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


class _Attached:
    """A graph whose layers run with the weights that a pass makes of their own.

    layers: by name the site, the options, and what they attach; remarks: why other chosen layers stay as they are.
    """

    def __init__(self, graph: Graph, options: TrainPass, teachers: Mapping[str, Graph]) -> None:
        self.graph = graph
        self.options = options
        self.teachers = teachers
        self.layers: dict[str, tuple[LayerSite, TrainPass, nn.Module]] = {}
        self.remarks: list[str] = []

    @contextmanager
    def to(self, sites: Mapping[str, LayerSite], chosen: Mapping[str, Pass]) -> Iterator[None]:
        """Attach to the layers; afterwards they are as they were, but for what was trained of them."""
        try:
            for name, site in sites.items():
                own = chosen[name]
                assert isinstance(own, TrainPass)
                asked = Asked(own, "attach", name)
                module = asked.expect(own.attach(_layer(self.graph, site)), nn.Module | None, "a module, or None")
                if module is None:
                    self.remarks.append(f"{name} stays as it is: it has no {self.options.takes}")
                    continue
                layer = self.graph.layer(name)
                mask = self.graph.mask(name)
                kept = None if mask is None else mask.kept
                parametrize.register_parametrization(layer, "weight", _Matrix(module, site.shape, kept, asked))
                layer.parametrizations.weight.original.requires_grad_(own.trains_weights)  # type: ignore[union-attr]
                if layer.bias is not None:
                    layer.bias.requires_grad_(own.trains_biases)
                self.layers[name] = site, own, module
            with straight_through(self.graph.module):
                yield
        finally:
            for name in self.layers:
                layer = self.graph.layer(name)
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)

    def objective(self) -> Objective:
        """What the loop trains."""
        parameters = {
            name: [own for own in self.graph.layer(name).parameters() if own.requires_grad] for name in self.layers
        }
        made = self.options.optimizer(parameters)
        optimizer = Asked(self.options, "optimizer").expect(made, Optimizer, "an optimizer of torch")
        return Objective(
            module=self.graph.module,
            optimizer=optimizer,
            loss=self._loss,
            error=self._error,
            measured=self.options.measured,
            beside=tuple(teacher.module for teacher in self.teachers.values()),
            advance=self._advance,
            counts=self.options.counts,
        )

    def _advance(self, progress: float) -> bool:
        attached = {}
        for name, (site, _, module) in self.layers.items():
            layer: Any = self.graph.layer(name)
            weight = layer.parametrizations.weight.original.detach().view(site.shape)
            attached[name] = Attached(module, weight, None if layer.bias is None else layer.bias.detach())
        with torch.no_grad():
            made = self.options.advance(attached, progress)
        return Asked(self.options, "advance").expect(made, bool, "True or False")

    def _loss(self, batch: Batch) -> Tensor:
        loss = self.options.loss(self._step(batch, training=True))
        return Asked(self.options, "loss").check_loss(loss, trains=True)

    def _error(self, batch: Batch) -> tuple[float, float]:
        found = self.options.measure(self._step(batch, training=False))
        return Asked(self.options, "measure").check_measured(found)

    def set_training(self, training: bool) -> None:
        """Whether what is attached runs as in training, with its dropout say; the network itself never does."""
        for _, _, module in self.layers.values():
            module.train(training)

    def _step(self, batch: Batch, *, training: bool) -> Step:
        self.set_training(training)
        with torch.no_grad():
            taught = {name: teacher.module(batch.inputs).float() for name, teacher in self.teachers.items()}
        # A layer that runs more than once has one weight.
        with parametrize.cached():
            outputs = self.graph.module(batch.inputs).float()
        labels = batch.labels if Needs.LABELS in self.options.needs else None
        return Step(batch.inputs, outputs, labels=labels, progress=batch.progress, scale=batch.scale, **taught)


class _Matrix(nn.Module):
    """The weight that runs, in the shape of the layer's parameter, made by a module that takes matrices (out, in).

    kept: bool (out, in), which weights an earlier pass kept; the others stay 0. None where it removed nothing. asked:
    whose module it is.
    """

    kept: Tensor | None

    def __init__(self, inner: nn.Module, shape: tuple[int, int], kept: Tensor | None, asked: Asked) -> None:
        super().__init__()
        self.inner = inner
        self.shape = shape
        self.asked = asked
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        made: Any = self.inner(weight.view(self.shape))
        if not isinstance(made, Tensor) or not made.is_floating_point() or tuple(made.shape) != self.shape:
            self.asked.refuse(
                f"a module that gives {described(made)}", f"one that gives a floating weight {self.shape}"
            )
        if self.kept is not None:
            made = made.masked_fill(~self.kept, 0)
        return made.view_as(weight)  # type: ignore[no-any-return]


def _layer(graph: Graph, site: LayerSite) -> Layer:
    stored, mask = graph.stored.get(site.name), graph.mask(site.name)
    if isinstance(stored, SparseWeight):
        numbers = stored.values
        stored = numbers if stored.input_scale is None else numbers.with_input_scale(stored.input_scale)
    return Layer(site.name, site.kind, dense(graph, site).clone(), torch.float32, stored, mask)


def _check_labels(name: str, graph: Graph, data: Examples) -> None:
    """Raise `UnsupportedError` for a network without classes, `DataError` unless the labels are classes of it."""
    use = f"{name} learns from labels"
    classes = classes_for(use, graph, "train towards the outputs of the original network")
    check_labels(use, None if data.labels is None else torch.from_numpy(data.labels), classes)


def _key(source: Path, step: PassStep, numbers: list[int | None]) -> str:
    """What decides how a training goes, as far as one folder of snapshots may see it change."""
    request = {
        "step": step.model_dump(mode="json"),
        "source": of_folder(source),
        "numbers": numbers,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


__all__ = ["train", "train_graph"]
