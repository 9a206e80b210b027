"""A network read as a graph on its way through a run: result whole, measured on images or other inputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effcli import exporters, importers
from effcli.errors import CheckpointError, DataError, writing
from effcli.files import locate as samples
from effcli.files.digest import of_file
from effcli.files.exporter import Exporter, Footprint
from effcli.graphs import executor, timing
from effcli.graphs import verify as graphverify
from effcli.graphs.graph import Facts, Graph, class_count, macs
from effcli.graphs.integer import IntegerNetwork, is_integer
from effcli.graphs.plan import PlannedGraph
from effcli.graphs.sensitivity import PricedGraph
from effcli.graphs.sweep import CPU, graph_sweep
from effcli.graphs.training import train_graph
from effcli.graphs.verify import GraphVerification
from effcli.inputs.classify import Scores
from effcli.inputs.images import Inputs, open_inputs
from effcli.inputs.options import Evaluate
from effcli.inputs.preprocess import Preprocess
from effcli.layers.contract import Needs, NetworkPass, TrainPass
from effcli.layers.result import PassResult, Phases, Progress, unseen
from effcli.platform.machine import pick_device
from effcli.platform.rehearsal import few
from effcli.reports import card
from effcli.reports.report import Exported, Latency, Layout, Quality, Stage
from effcli.reports.sensitivity import Varied
from effcli.run.network import Counts, Measured
from effcli.run.plan import Plan, check_trainings, make
from effcli.run.recipe import PassStep, Recipe
from effcli.search.budget import Figure, Quantity
from effcli.search.space import unchanging

# Files beside a model that are its own data.
CALIBRATION = "calibration.npz"
EVALUATION = "evaluation.npz"

_BATCH = 64
# Seconds for which a rehearsal measures.
_REHEARSED = 0.5


class GraphNetwork:
    """See `effcli.run.network.RunNetwork`."""

    quality: Figure = "accuracy"

    def __init__(self, recipe: Recipe, source: str | Path) -> None:
        self.recipe = recipe.for_graph()
        self.source = Path(source)
        self.graph = importers.read(
            source,
            weights=Path(recipe.weights).expanduser() if recipe.weights is not None else None,
            shape=recipe.shape,
            preprocess=recipe.preprocess,
            trust_remote_code=recipe.trust_remote_code,
        )
        self._device = pick_device(self.recipe.device)
        self._calibration: Inputs | None = None
        self._evaluation: Evaluation | None = None
        self._work: Path | None = None

    @property
    def base(self) -> Path:
        assert self._work is not None
        return self._work / "checkpoint-0"

    @property
    def request(self) -> dict[str, str]:
        # A function has no file: what was read speaks for every source alike.
        beside = (_beside(self.source, name) for name in (CALIBRATION, EVALUATION))
        data = {str(file): of_file(file) for file in beside if file is not None}
        return {"network": self.graph.digest(), **data}

    @property
    def settings(self) -> dict[str, Any]:
        return self.recipe.model_dump(mode="json")

    def with_defaults(self, step: PassStep) -> PassStep:
        return step.for_graph()

    def plan(self, passes: Sequence[PassStep] | None = None) -> Plan:
        recipe = self.recipe if passes is None else self.recipe.model_copy(update={"passes": tuple(passes)})
        if _asks_for_labels(recipe):
            # It refuses data without labels, as a run would.
            self._inputs(recipe)
        return make(recipe, PlannedGraph(self.graph, recipe.calibration))

    def _inputs(self, recipe: Recipe) -> Inputs:
        labelled = _asks_for_labels(recipe)
        classes = class_count(self.graph) if labelled else None
        return calibration_inputs(recipe, self.source, self.graph.facts, classes=classes, labelled=labelled)

    def miniature(self, target: Path) -> tuple[str, dict[str, float]]:
        return self.recipe.model, {}

    def unlimited(self, quantity: Quantity, option: Varied) -> str:
        match quantity:
            case "perplexity_increase":
                return "accuracy is measured, not perplexity"
            case "macs" if option != "ratio":
                count = sum(macs(self.graph).values())
                return f"{unchanging(option)} how many multiplications a network takes, {count:,} here"
            case "latency" if option != "ratio":
                return (
                    f"its weights are multiplied as floating-point numbers, which takes as long whatever their {option}"
                )
        return ""

    def calibrate(self) -> tuple[str, ...]:
        if not any(step.needs for step in self.recipe.passes):
            return ()
        self._calibration = self._inputs(self.recipe)
        # There may be fewer than a plan takes for granted.
        check_trainings(self.recipe, len(self._calibration))
        return self._calibration.remarks

    def priced(self, checkpoint: Path) -> PricedGraph:
        return PricedGraph(checkpoint, self._inputs(self.recipe), self.recipe.calibration.batch_size)

    def open(self, work: Path) -> None:
        self._work = work
        if not (self.base / "config.json").is_file():
            with writing(self.base):
                shutil.rmtree(self.base, ignore_errors=True)
                self.base.mkdir()
            self.graph.save(self.base)
        original = self.graph if self._device.type == "cpu" else Graph.read(self.base).to(self._device)
        self._evaluation = Evaluation.open(
            original, self.recipe.evaluate, self.source, self._calibration, self.recipe.calibration.data
        )

    def count(self, checkpoint: Path) -> Counts:
        if is_integer(checkpoint):
            integer = IntegerNetwork.read(checkpoint)
            numbers = integer.parameters()
            nonzeros = sum(int(np.count_nonzero(array)) for array in numbers)
            return Counts(sum(array.size for array in numbers), nonzeros, integer.macs)
        graph = Graph.read(checkpoint)
        nonzeros = sum(int(torch.count_nonzero(parameter)) for parameter in graph.module.parameters())
        return Counts(graph.weights(), nonzeros, sum(macs(graph).values()))

    def measure(
        self, checkpoint: Path, first: bool, *, quality: bool = True, speed: bool = True, phases: Phases = unseen
    ) -> Measured:
        evaluation, known = self._evaluation, None
        if quality and evaluation is not None:
            with phases("accuracy", "batch") as progress:
                known = evaluation.of(outputs_of(checkpoint, self._device), compare=not first, progress=progress)
        remarks = evaluation.remarks if evaluation is not None and first else ()
        latencies: tuple[Latency, ...] = ()
        if first:
            remarks = (*self.graph.facts.remarks, *remarks)
        if speed and self.recipe.evaluate.latency:
            # Between the input and an integer network only an export that is asked for is timed.
            with phases("latency"):
                latencies = timing.of_checkpoint(checkpoint, self.recipe.threads, onnx=first)
            if first:
                remarks += timing.remarks()
        return Measured(known, latencies=latencies, remarks=remarks)

    def footprint(self, checkpoint: Path) -> Footprint | None:
        return exporters.load("c")().footprint(checkpoint) if is_integer(checkpoint) else None

    def sweep(
        self, step: PassStep, source: Path, target: Path, reference: Path, work: Path, progress: Progress
    ) -> PassResult:
        if is_integer(source):
            raise CheckpointError(
                f"{step.name} follows a pass that made the network integer", "make that pass the last one"
            )
        if isinstance(step.config, TrainPass):
            return train_graph(
                source,
                target,
                step,
                self._calibration,
                batch_size=self.recipe.calibration.batch_size,
                reference=reference,
                original=self.base,
                work=work,
                seed=self.recipe.seed,
                device=self.recipe.device,
                progress=progress,
            )
        inputs = self.recipe.calibration.inputs
        # What keeps all batches at once does more with them later than while they are read.
        read = self._labelled if isinstance(step.config, NetworkPass) or inputs == "compressed" else self._few_labelled
        batches = (lambda: (each for each, _ in read())) if step.needs else None
        labelled = read if step.needs.gradients else None
        return graph_sweep(source, target, step, batches, inputs, reference, progress, labelled, self._device)

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        assert self._calibration is not None
        return self._calibration.batches(self.recipe.calibration.batch_size)

    def _few_labelled(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        assert self._calibration is not None
        return few(self._labelled(), -(-len(self._calibration) // self.recipe.calibration.batch_size))

    def verify(self, checkpoint: Path, stages: Sequence[Stage], phases: Phases = unseen) -> GraphVerification:
        return graphverify.verify(checkpoint, against=self.graph, stages=stages, phases=phases)

    def time_export(self, exporter: Exporter, exported: Exported, folder: Path) -> Exported:
        found = exporter.latency(folder, self.recipe.threads) if self.recipe.evaluate.latency else None
        return exported if found is None else exported.model_copy(update={"latencies": (found,)})

    def layout(self, checkpoint: Path) -> Layout:
        return "graph"

    def loaders(self, checkpoint: Path) -> tuple[str, str]:
        return card.IMAGES


class Evaluation:
    """What the checkpoints of one run are held against: the same inputs for all, and the original's outputs."""

    def __init__(
        self, original: Callable[[Tensor], Tensor] | None, inputs: Inputs, facts: Facts, *, labelled: bool = True
    ) -> None:
        """labelled: whether the labels of `inputs` count."""
        self._original = original
        self._labelled = labelled
        self._inputs = inputs
        self._names = inputs.names or facts.classes
        self._shape = facts.shape
        self._outputs: list[Tensor] = []
        self.remarks = inputs.remarks

    @staticmethod
    def open(
        graph: Graph, options: Evaluate, source: Path, calibration: Inputs | None, data: str | None
    ) -> Evaluation | None:
        """The inputs that `options` ask for; None where nothing is to be measured or there is nothing to measure on."""
        facts = graph.facts
        if options.images is False:
            return None
        wanted = options.images if isinstance(options.images, str) else _beside(source, EVALUATION)
        if wanted is not None:
            classes = class_count(graph)
            inputs = open_inputs(wanted, facts.shape, facts.preprocess, classes=classes, samples=options.samples)
            evaluation = Evaluation(graph.run, inputs, facts)
            if classes is not None and inputs.labels is None:
                why = f"{wanted} has no labels: accuracy is not measured, outputs are only compared with the original's"
                evaluation.remarks += (f"{why}; give one folder per class, or an array or a column of class numbers",)
            return evaluation
        if calibration is None and data is not None:
            calibration = open_inputs(data, facts.shape, facts.preprocess, samples=options.samples)
        if calibration is None:
            return None
        # Accuracy on what a pass was calibrated on would flatter it.
        evaluation = Evaluation(graph.run, calibration, facts, labelled=False)
        evaluation.remarks = ("no evaluation data: only compared with the original, on the calibration inputs",)
        return evaluation

    def of(
        self,
        network: Callable[[Tensor], Tensor],
        compare: bool = True,
        progress: Progress = lambda done, total: None,
    ) -> Quality:
        """The quality of a network given as a function of a batch of inputs (n, *shape), next to the original's."""
        scores: Scores | None = None
        total = -(-len(self._inputs) // _BATCH)
        progress(0, total)
        for number, (inputs, labels) in enumerate(few(self._inputs.batches(_BATCH), total, lasting=_REHEARSED)):
            if self._original is not None and number == len(self._outputs):
                self._outputs.append(self._original(inputs))
            outputs = network(inputs)
            scores = scores or Scores(outputs.ndim == 2 and tuple(outputs.shape[1:]) != self._shape)
            original = self._outputs[number] if self._original is not None and compare else None
            scores.add(outputs, labels if self._labelled else None, original)
            progress(number + 1, total)
        return Quality(classification=scores.result(self._names) if scores is not None else None)


def evaluate(
    model: str,
    options: Evaluate,
    *,
    reference: str | None = None,
    weights: Path | None = None,
    shape: tuple[int, ...] | None = None,
    preprocess: Preprocess | None = None,
    trust_remote_code: bool = False,
    phases: Phases = unseen,
) -> Quality:
    """Measure `model` on labelled inputs, all unless `options` say how many, and its agreement with `reference`."""
    source = Path(samples.locate(model))
    with phases("reading the network"):
        facts, network = _open(model, weights, trust_remote_code, shape)
        original = _open(reference, None, trust_remote_code, shape)[1] if reference is not None else None
    data = options.images if isinstance(options.images, str) else _beside(source, EVALUATION)
    if data is None:
        raise DataError(f"{model} brings no images to be measured on", "give labelled images with --images DATA")
    count = options.samples if "samples" in options.model_fields_set else None
    with phases("reading the images"):
        inputs = open_inputs(
            data, facts.shape, preprocess or facts.preprocess, samples=count, labelled=original is None
        )
    with phases("accuracy", "batch") as progress:
        return Evaluation(original, inputs, facts).of(network, progress=progress)


def outputs_of(checkpoint: Path, device: torch.device = CPU) -> Callable[[Tensor], Tensor]:
    """A graph or an integer network as a function of a batch of inputs float32 (n, *shape).

    device: where a graph runs; integers are computed on the CPU.
    """
    if is_integer(checkpoint):
        integer = IntegerNetwork.read(checkpoint)
        return lambda inputs: torch.from_numpy(executor.run_float(integer, inputs.numpy()))
    return Graph.read(checkpoint).to(device).run


def _open(
    model: str, weights: Path | None, trust_remote_code: bool, shape: tuple[int, ...] | None
) -> tuple[Facts, Callable[[Tensor], Tensor]]:
    source = samples.locate(model)
    if isinstance(source, Path) and is_integer(source):
        return IntegerNetwork.read(source).facts, outputs_of(source)
    graph = importers.read(source, weights=weights, shape=shape, trust_remote_code=trust_remote_code)
    return graph.facts, graph.run


def calibration_inputs(
    recipe: Recipe, source: Path, facts: Facts, *, classes: int | None = None, labelled: bool = False
) -> Inputs:
    """The calibration inputs of a recipe, those beside the model where it names none; `DataError` without any.

    source: where the model was found; facts: of its graph; classes, labelled: see `open_inputs`.
    """
    wanted = recipe.calibration
    data = wanted.data or _beside(source, CALIBRATION)
    if data is None:
        raise DataError(
            f"{recipe.model} brings no calibration inputs", "give them: --calib DATA (npz, folder, parquet)"
        )
    return open_inputs(data, facts.shape, facts.preprocess, classes=classes, samples=wanted.samples, labelled=labelled)


def _asks_for_labels(recipe: Recipe) -> bool:
    return any(Needs.LABELS in step.needs or step.needs.gradients for step in recipe.passes)


def _beside(source: Path, name: str) -> Path | None:
    """The file `name` in the model's own directory, None when there is none."""
    folder = source if source.is_dir() else source.parent
    return folder / name if (folder / name).is_file() else None


__all__ = ["Evaluation", "GraphNetwork", "evaluate", "outputs_of"]
