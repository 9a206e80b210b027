"""Bits per layer: what each number of bits costs each layer, and the cheapest choice that keeps a budget.

`resolve` replaces every step of a recipe that chooses bits (`auto`) by the pass that it chooses them for, with the bits
of every layer: a recipe as anyone could have written it. The steps before it are carried out on the way, in a temporary
folder, so that the layers are measured as the pass will find them.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from effcli import importers, samples
from effcli.budget import Choice as Chosen
from effcli.budget import Frontier
from effcli.errors import DataError, RecipeError, SelectionError
from effcli.formats import Packing
from effcli.probe import Cost
from effcli.recipe import Evaluate, PassStep, Recipe
from effcli.reports.human import significant, size
from effcli.reports.sensitivity import LayerCosts, Option, Point, Search, Sensitivity, Unit, Way
from effcli.selection import Choice, choose, choose_graph, matches
from effcli.swept import Progress

if TYPE_CHECKING:
    from effcli.pipeline import Listener
    from effcli.reports.report import Report
    from effcli.subject import Subject

# Weights below which putting every layer into the network by itself is a matter of a minute.
SMALL = 20_000_000
_POINTS = 33
# Bytes that a header of a weight file spends on a tensor besides its name, and on itself.
_HEADER = 120
_HEADERS = 256


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
    found = network.costs(steps[0], variants, way, progress)
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
        remarks=network.remarks,
    )


class _Language:
    """A language model as a search sees it. inputs: calibration tokens."""

    unit: Unit = "nats"

    def __init__(self, recipe: Recipe, source: Path) -> None:
        from effcli.inputs import text
        from effcli.language.weights import open_weights
        from effcli.plan import count_weights

        self.recipe, self.source = recipe, source
        opened = open_weights(source, recipe.trust_remote_code)
        self.skeleton, self._dtype_of = opened.skeleton, opened.dtype_of
        self.weights = count_weights(self.skeleton)
        self._windows, remarks = text.calibration_windows(recipe, source)
        self.inputs = sum(batch.numel() for batch in self._windows.batches)
        self.remarks = tuple(remarks)

    def choose(self, step: PassStep) -> dict[str, Choice]:
        return choose(self.skeleton, step)

    def itemsize(self, choice: Choice) -> int:
        return self._dtype_of(choice.site.parameter).itemsize

    def costs(
        self, step: PassStep, variants: Sequence[Mapping[str, Choice]], way: Way, progress: Progress
    ) -> list[dict[str, Cost]]:
        from effcli.language.sensitivity import layer_costs

        with tempfile.TemporaryDirectory(prefix="effcli-") as folder:
            return layer_costs(
                self.source,
                step.module,
                variants,
                self._windows,
                Path(folder),
                way,
                progress,
                self.recipe.trust_remote_code,
            )


class _Graph:
    """A network read as a graph as a search sees it. inputs: how many calibration inputs."""

    def __init__(self, recipe: Recipe, source: Path) -> None:
        from effcli.graphs.graph import Graph, class_count
        from effcli.graphs.network import calibration_inputs

        self.recipe, self.source = recipe, source
        self._graph = Graph.read(source)
        self.unit: Unit = "nats" if class_count(self._graph) is not None else "relative squared error"
        self.weights = self._graph.weights()
        found = Path(samples.locate(recipe.model, recipe.revision))
        self._data = calibration_inputs(recipe, found, self._graph.facts)
        self.inputs = len(self._data)
        self.remarks = self._data.remarks

    def choose(self, step: PassStep) -> dict[str, Choice]:
        return choose_graph(self._graph, step)

    def itemsize(self, choice: Choice) -> int:
        return 4

    def costs(
        self, step: PassStep, variants: Sequence[Mapping[str, Choice]], way: Way, progress: Progress
    ) -> list[dict[str, Cost]]:
        from effcli.graphs.sensitivity import layer_costs

        def batches() -> Iterator[Tensor]:
            return (inputs for inputs, _ in self._data.batches(self.recipe.calibration.batch_size))

        return layer_costs(self.source, step.module, variants, batches, way, progress)


class Widths:
    """The choices of bits that layers leave, by what they cost. frontier: the cheapest ones for every budget."""

    def __init__(self, found: Sensitivity) -> None:
        self._layers = found.layers
        self.frontier = Frontier(
            [[option.nbytes for option in layer.options] for layer in found.layers],
            [[option.cost for option in layer.options] for layer in found.layers],
        )

    @property
    def uniform(self) -> dict[int, Chosen]:
        """Every layer with the same bits; a layer that has bits of its own keeps them."""
        found = {}
        places = [[option.bits for option in layer.options] for layer in self._layers]
        for bits in sorted({width for own in places for width in own}):
            if all(bits in own or len(own) == 1 for own in places):
                found[bits] = self.frontier.choice([own.index(bits) if bits in own else 0 for own in places])
        return found

    def nbytes(self, bits: float) -> int | None:
        """The bytes of `bits` for every layer, between two whole numbers interpolated; None outside of them."""
        uniform = self.uniform
        below = max((each for each in uniform if each <= bits), default=None)
        above = min((each for each in uniform if each >= bits), default=None)
        if below is None or above is None:
            return None
        share = (bits - below) / (above - below) if above > below else 0.0
        return int(uniform[below].nbytes + share * (uniform[above].nbytes - uniform[below].nbytes))

    def bits(self, choice: Chosen) -> dict[str, int]:
        """The bits of every layer by name."""
        return {layer.name: layer.options[at].bits for layer, at in zip(self._layers, choice.options, strict=True)}


def inspect(recipes: Sequence[Recipe], way: Way | None = None, listener: Listener | None = None) -> Sensitivity:
    """What quantizing each layer alone costs with the only step of each recipe; they differ in its bits alone."""
    from effcli.pipeline import Silent, subject_of

    with tempfile.TemporaryDirectory(prefix="effcli-") as folder:
        steps = tuple(recipe.passes[0] for recipe in recipes)
        subject = subject_of(_unmeasured(recipes[0], steps[:1]))
        subject.plan()
        subject.open(Path(folder))
        shown = _shown(listener or Silent(), "sensitivity")
        return sensitivity(subject.recipe, _for_network(subject, steps), subject.base, way, shown)


def resolve(recipe: Recipe, listener: Listener | None = None) -> tuple[Recipe, tuple[Search, ...]]:
    """The recipe with the bits of every layer written out, and what each search found; any other recipe as it is.

    Raises `SelectionError` for a budget that no choice keeps, and `DataError` for one that cannot be measured.
    """
    from effcli.pipeline import Silent

    steps, searches = list(recipe.passes), []
    for number, step in enumerate(steps):
        if step.chosen:
            with tempfile.TemporaryDirectory(prefix="effcli-") as folder:
                search = _Search(recipe, steps[:number], step, Path(folder), listener or Silent())
                steps[number], found = search.carry_out()
                searches.append(found)
    return recipe.model_copy(update={"passes": tuple(steps)}), tuple(searches)


def run(recipe: Recipe, overwrite: bool = False, listener: Listener | None = None) -> tuple[Report, tuple[Search, ...]]:
    """Carry out `recipe`, its searches first; what each of them found stands beside the report."""
    from effcli import pipeline
    from effcli.reports.html_sensitivity import write

    # Before a long search, what would fail after it.
    pipeline.check_output(recipe.target.absolute(), overwrite)
    resolved, searches = resolve(recipe, listener)
    report = pipeline.run(resolved, overwrite=overwrite, listener=listener)
    for number, found in enumerate(searches, start=1):
        stem = "search" if len(searches) == 1 else f"search-{number}"
        for suffix in (".json", ".html"):
            write(found, recipe.target / f"{stem}{suffix}")
    return report, searches


class _Search:
    """One step that chooses bits. before: the steps that are carried out first."""

    def __init__(
        self, recipe: Recipe, before: Sequence[PassStep], step: PassStep, folder: Path, listener: Listener
    ) -> None:
        from effcli.pipeline import subject_of

        self.options = cast(Any, step.config)
        self.folder = folder
        self.listener = listener
        self.name = step.name
        measured = self.options.measured or self.options.budget in ("perplexity_increase", "accuracy_drop")
        trial = _unmeasured(recipe, (*before, step.chosen[0]), recipe.evaluate if measured else None)
        self.subject: Subject = subject_of(trial)
        self.recipe = self.subject.recipe
        self.before = self.recipe.passes[: len(before)]
        self.steps = _for_network(self.subject, step.chosen)
        self.measured: dict[tuple[int, ...], float] = {}
        needed = {"perplexity_increase": "perplexity", "accuracy_drop": "accuracy"}.get(self.options.budget)
        if needed not in (None, self._measure_name):
            raise RecipeError(
                f"{self.name}.{self.options.budget}: of {recipe.model} {self._measure_name} is measured, not {needed}",
                "give the other of the two, or average_bits or size",
            )

    def carry_out(self) -> tuple[PassStep, Search]:
        self.subject.plan()
        self.subject.calibrate()
        self.subject.open(self.folder)
        source = self.subject.base
        for number, step in enumerate(self.before):
            source = self._sweep(step, source, self.folder / f"before-{number}")
        self.source = source
        self.found = sensitivity(
            self.recipe, self.steps, source, self.options.by, _shown(self.listener, f"{self.name}: sensitivity")
        )
        self.widths = Widths(self.found)
        self.frontier = self.widths.frontier
        front = self.frontier.points(_POINTS)
        chosen, asked = self._chosen(front)
        for at in range(self.options.measured):
            self._measure(front[round(at * (len(front) - 1) / max(self.options.measured - 1, 1))])
        if self.options.measured:
            self._measure(chosen)
        shown = {choice.options: choice for choice in (*front, chosen)}
        bits = self.widths.bits(chosen)
        search = Search(
            sensitivity=self.found,
            budget=asked,
            front=tuple(self._point(choice, "") for choice in sorted(shown.values(), key=lambda c: c.nbytes)),
            uniform=tuple(self._point(choice, f"{width} bits") for width, choice in self.widths.uniform.items()),
            chosen=self._point(chosen, "chosen"),
            bits=bits,
            measure=self._measure_name if self.measured else "",
        )
        return with_bits(self.steps[0], bits), search

    def _chosen(self, front: Sequence[Chosen]) -> tuple[Chosen, str]:
        """The choice that keeps the budget, and the budget in words."""
        wanted = self.options
        if wanted.average_bits is not None:
            return self._at(self._average(wanted.average_bits)), f"{wanted.average_bits:g} bits on average"
        if wanted.size is not None:
            return self._at(wanted.size - self._fixed(), self._fixed()), f"{size(wanted.size)} of weight files"
        if wanted.perplexity_increase is not None:
            return self._smallest(front, lambda found, base: found <= base * (1 + wanted.perplexity_increase)), (
                f"perplexity up by at most {100 * wanted.perplexity_increase:g}%"
            )
        return self._smallest(front, lambda found, base: found >= base - wanted.accuracy_drop), (
            f"accuracy down by at most {100 * wanted.accuracy_drop:g} points"
        )

    def _at(self, nbytes: int, fixed: int = 0) -> Chosen:
        smallest, largest = self.frontier.smallest, self.frontier.largest
        if nbytes < smallest:
            raise SelectionError(
                f"{self.name}: the budget is {size(nbytes + fixed)}, and the fewest bits everywhere take "
                f"{size(smallest + fixed)}",
                "raise the budget, offer fewer `bits`, or take larger groups",
            )
        if nbytes > largest:
            raise SelectionError(
                f"{self.name}: the budget is {size(nbytes + fixed)}, and the most bits everywhere take only "
                f"{size(largest + fixed)}",
                "lower the budget or offer more `bits`",
            )
        return self.frontier.at(nbytes)

    def _average(self, bits: float) -> int:
        nbytes = self.widths.nbytes(bits)
        if nbytes is None:
            uniform = self.widths.uniform
            raise SelectionError(
                f"{self.name}.average_bits: {bits:g} is outside of the bits to choose from, {min(uniform)} to "
                f"{max(uniform)}",
                "choose a number between them, or offer other `bits`",
            )
        return nbytes

    def _fixed(self) -> int:
        """Bytes of the weight files besides the layers' weights, their headers included.

        Of a plan with the fewest bits everywhere, which are also each layer's first option.
        """
        plan = self.subject.plan()
        names = [layer.name for layer in self.found.layers]
        first = [layer.options[0] for layer in self.found.layers]
        layers = sum(option.nbytes for option in first)
        tensors = sum(4 * (len(name) + _HEADER) for name in names)
        others = sum(len(row.name) + _HEADER for row in plan.rows)
        return plan.output_bytes - layers + tensors + others + _HEADERS

    def _smallest(self, front: Sequence[Chosen], keeps: Callable[[float, float], bool]) -> Chosen:
        """The smallest choice on the front whose measured quality keeps the budget, by bisection."""
        base = self._quality(self.subject.base, True)
        low, high = 0, len(front) - 1
        if not keeps(self._measure(front[high]), base):
            raise SelectionError(
                f"{self.name}: even the most bits take {self._measure_name} from {significant(base, 4)} to "
                f"{significant(self._measure(front[high]), 4)}",
                "raise the budget or offer more `bits`",
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(self._measure(front[middle]), base) else (middle + 1, high)
        return front[high]

    def _measure(self, choice: Chosen) -> float:
        """The quality of a choice, really carried out."""
        if choice.options not in self.measured:
            step = with_bits(self.steps[0], self.widths.bits(choice))
            target = self._sweep(step, self.source, self.folder / "measured")
            self.measured[choice.options] = self._quality(target)
        return self.measured[choice.options]

    def _quality(self, checkpoint: Path, first: bool = False) -> float:
        found = self.subject.measure(checkpoint, first).quality
        value = None
        if found is not None:
            value = found.perplexity if found.classification is None else found.classification.top1
        if value is None:
            raise DataError(
                f"{self.name}: {self._measure_name} is not measured",
                "give a text for perplexity or labelled images for accuracy with --eval",
            )
        return value

    @property
    def _measure_name(self) -> str:
        return "accuracy" if importers.recognises(self.subject.source) else "perplexity"

    def _sweep(self, step: PassStep, source: Path, target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        progress = _shown(self.listener, f"{self.name}: {step.name}")
        self.subject.sweep(step, source, target, self.subject.base, self.folder / "work", progress)
        return target

    def _point(self, choice: Chosen, name: str) -> Point:
        bits = self.widths.bits(choice)
        weights = {layer.name: layer.shape[0] * layer.shape[1] for layer in self.found.layers}
        return Point(
            name=name,
            nbytes=choice.nbytes,
            average_bits=sum(weights[layer] * own for layer, own in bits.items()) / max(sum(weights.values()), 1),
            cost=choice.cost,
            measured=self.measured.get(choice.options),
        )


def with_bits(step: PassStep, bits: Mapping[str, int]) -> PassStep:
    """The step with these bits for these layers: the most frequent for all, the others under `layers` by name."""
    config: Any = step.config
    (usual, _), *_ = Counter(bits.values()).most_common()
    layers = dict(config.layers)
    for name, own in bits.items():
        matching = [options for pattern, options in config.layers.items() if matches(name, pattern)]
        told = matching[-1] if matching else {}
        if told.get("bits", usual) != own:
            layers[glob.escape(name)] = {**told, "bits": own}
    return PassStep(name=step.name, config=config.model_copy(update={"bits": usual, "layers": layers}))


def _unmeasured(recipe: Recipe, steps: Sequence[PassStep], evaluate: Evaluate | None = None) -> Recipe:
    """The recipe with other steps, that measures quality alone as `evaluate` says, or nothing."""
    measured = Evaluate.nothing() if evaluate is None else evaluate.model_copy(update={"latency": False})
    return recipe.model_copy(update={"passes": tuple(steps), "evaluate": measured, "export": ()})


def _for_network(subject: Subject, steps: Sequence[PassStep]) -> tuple[PassStep, ...]:
    """The steps with the defaults of the subject's kind of network."""
    return tuple(step.for_graph() for step in steps) if importers.recognises(subject.source) else tuple(steps)


def _shown(listener: Listener, name: str) -> Progress:
    """Progress as a listener is told of it."""
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            listener.progress_start(name, total)
            started = True
        listener.progress(done)
        if done == total:
            listener.progress_end()

    return progress


__all__ = ["Widths", "inspect", "resolve", "sensitivity", "with_bits"]
