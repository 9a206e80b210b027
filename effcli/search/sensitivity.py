"""What other numbers of bits cost each layer of a checkpoint, of either kind of network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from effcli import importers
from effcli.files import locate as samples
from effcli.formats import Packing
from effcli.layers.result import Progress
from effcli.layers.selection import Choice, choose, choose_graph, needs_of
from effcli.reports.sensitivity import LayerCosts, Option, Sensitivity, Unit, Way
from effcli.run.recipe import PassStep, Recipe
from effcli.search.costs import Cost
from effcli.search.journal import Journal

if TYPE_CHECKING:
    from effcli.run.listener import Listener

# Weights below which putting every layer into the network by itself is a matter of a minute.
SMALL = 20_000_000


def told(listener: Listener, name: str, unit: str = "block") -> Progress:
    """Progress as a listener is told of it, under `name`; unit: what is counted."""
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            listener.progress_start(name, total, unit)
            started = True
        listener.progress(done)
        if done == total:
            listener.progress_end()

    return progress


def sensitivity(
    recipe: Recipe,
    steps: Sequence[PassStep],
    source: Path,
    work: Path,
    way: Way | None = None,
    progress: Progress = lambda done, total: None,
    journal: Journal | None = None,
) -> Sensitivity:
    """What quantizing each layer of the checkpoint `source` alone costs with each of `steps`, one pass with other bits.

    recipe: names the calibration data, with the defaults of its kind of network filled in. work: a folder for hidden
    states. way: None takes `loss` for small networks and `fisher` for others. journal: what an earlier try with the
    same folder has found already.
    """
    known = None if journal is None else journal.recall(Sensitivity, "sensitivity")
    if known is not None:
        return known
    started = time.perf_counter()
    network = _Graph(recipe, source) if importers.recognises(source) else _Language(recipe, source)
    variants = [network.choose(step) for step in steps]
    way = way or ("loss" if network.weights < SMALL else "fisher")
    found = network.costs(variants, way, work, progress, journal)
    layers = []
    for name, first in variants[0].items():
        if first.config is None:
            continue
        options: dict[int, Option] = {}
        for choices, costs in zip(variants, found, strict=True):
            config: Any = choices[name].config
            format: Packing = config.format
            options[config.bits] = Option(
                bits=config.bits,
                format=str(format),
                nbytes=format.nbytes(first.site.shape, network.itemsize(choices[name])),
                output_error=costs[name].output_error,
                cost=costs[name].cost,
            )
        ordered = tuple(options[bits] for bits in sorted(options))
        layers.append(LayerCosts(name=name, kind=first.site.kind, shape=first.site.shape, options=ordered))
    remarks = list(network.remarks)
    if way != "gram" and network.samples > 1 and needs_of(variants):
        remarks.append(f"{steps[0].name} was fitted to one half of the calibration data, and measured on the other")
    settings = steps[0].config.model_dump(mode="json", exclude={"bits"}, exclude_defaults=True)
    made = Sensitivity(
        model=recipe.model,
        step=steps[0].name,
        settings=settings,
        way=way,
        unit="relative output error" if way == "gram" else network.unit,
        inputs=network.inputs,
        layers=tuple(layers),
        seconds=time.perf_counter() - started,
        remarks=tuple(remarks),
    )
    if journal is not None:
        journal.record("sensitivity", made)
    return made


class _Language:
    """A language model as a search sees it. samples: calibration windows; inputs: their tokens."""

    unit: Unit = "nats"

    def __init__(self, recipe: Recipe, source: Path) -> None:
        from effcli.inputs import text
        from effcli.language.weights import open_weights
        from effcli.run.plan import count_weights

        self.recipe, self.source = recipe, source
        opened = open_weights(source, recipe.trust_remote_code)
        self.skeleton, self._dtype_of = opened.skeleton, opened.dtype_of
        self.weights = count_weights(self.skeleton)
        self._windows, remarks = text.calibration_windows(recipe.calibration, source, recipe.trust_remote_code)
        self.samples = sum(len(batch) for batch in self._windows.batches)
        self.inputs = sum(batch.numel() for batch in self._windows.batches)
        self.remarks = tuple(remarks)

    def choose(self, step: PassStep) -> dict[str, Choice]:
        return choose(self.skeleton, step)

    def itemsize(self, choice: Choice) -> int:
        return self._dtype_of(choice.site.parameter).itemsize

    def costs(
        self,
        variants: Sequence[Mapping[str, Choice]],
        way: Way,
        work: Path,
        progress: Progress,
        journal: Journal | None,
    ) -> list[dict[str, Cost]]:
        from effcli.language.sensitivity import layer_costs

        trust = self.recipe.trust_remote_code
        return layer_costs(self.source, variants, self._windows, work, way, progress, trust, journal)


class _Graph:
    """A network read as a graph as a search sees it. samples, inputs: how many calibration inputs."""

    def __init__(self, recipe: Recipe, source: Path) -> None:
        from effcli.graphs.graph import Graph, class_count
        from effcli.graphs.network import calibration_inputs

        self.recipe, self.source = recipe, source
        self._graph = Graph.read(source)
        self.unit: Unit = "nats" if class_count(self._graph) is not None else "relative squared error"
        self.weights = self._graph.weights()
        found = Path(samples.locate(recipe.model, recipe.revision))
        self._data = calibration_inputs(recipe, found, self._graph.facts)
        self.samples = self.inputs = len(self._data)
        self.remarks = self._data.remarks

    def choose(self, step: PassStep) -> dict[str, Choice]:
        return choose_graph(self._graph, step)

    def itemsize(self, choice: Choice) -> int:
        return 4

    def costs(
        self,
        variants: Sequence[Mapping[str, Choice]],
        way: Way,
        work: Path,
        progress: Progress,
        journal: Journal | None,
    ) -> list[dict[str, Cost]]:
        from effcli.graphs.sensitivity import layer_costs

        def batches() -> Iterator[Tensor]:
            return (inputs for inputs, _ in self._data.batches(self.recipe.calibration.batch_size))

        return layer_costs(self.source, variants, batches, way, progress, journal)


__all__ = ["SMALL", "sensitivity", "told"]
