"""What other numbers of bits cost each layer of a checkpoint, of either kind of network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from effcli import importers
from effcli.files import locate as samples
from effcli.formats import Packing
from effcli.layers.result import Progress
from effcli.layers.selection import Choice, choose, choose_graph, needs_of
from effcli.reports.sensitivity import LayerCosts, Option, Sensitivity, Unit, Way
from effcli.run.recipe import PassStep, Recipe
from effcli.search.costs import Cost

# Weights below which putting every layer into the network by itself is a matter of a minute.
SMALL = 20_000_000


def sensitivity(
    recipe: Recipe,
    steps: Sequence[PassStep],
    source: Path,
    way: Way | None = None,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """What quantizing each layer of the checkpoint `source` alone costs with each of `steps`, one pass with other bits.

    recipe: names the calibration data, with the defaults of its kind of network filled in. way: None takes `loss` for
    small networks and `fisher` for others.
    """
    started = time.perf_counter()
    network = _Graph(recipe, source) if importers.recognises(source) else _Language(recipe, source)
    variants = [network.choose(step) for step in steps]
    way = way or ("loss" if network.weights < SMALL else "fisher")
    found = network.costs(variants, way, progress)
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
    return Sensitivity(
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

    def costs(self, variants: Sequence[Mapping[str, Choice]], way: Way, progress: Progress) -> list[dict[str, Cost]]:
        from effcli.language.sensitivity import layer_costs

        with tempfile.TemporaryDirectory(prefix="effcli-") as folder:
            return layer_costs(
                self.source,
                variants,
                self._windows,
                Path(folder),
                way,
                progress,
                self.recipe.trust_remote_code,
            )


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

    def costs(self, variants: Sequence[Mapping[str, Choice]], way: Way, progress: Progress) -> list[dict[str, Cost]]:
        from effcli.graphs.sensitivity import layer_costs

        def batches() -> Iterator[Tensor]:
            return (inputs for inputs, _ in self._data.batches(self.recipe.calibration.batch_size))

        return layer_costs(self.source, variants, batches, way, progress)


__all__ = ["SMALL", "sensitivity"]
