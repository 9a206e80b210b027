"""Bits per layer: what each number of bits costs each layer, and the cheapest choice that keeps a budget.

`resolve` replaces every step of a recipe that chooses bits (`auto`) by the pass that it chooses them for, with the bits
of every layer: a recipe as anyone could have written it. The steps before it are carried out on the way, in a temporary
folder, so that the layers are measured as the pass will find them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from effcli import importers
from effcli.errors import DataError, RecipeError, SelectionError
from effcli.inputs.options import Evaluate
from effcli.layers.result import Progress
from effcli.reports.human import significant, size
from effcli.reports.sensitivity import Point, Search, Sensitivity, Way
from effcli.run.recipe import PassStep, Recipe
from effcli.search.bits import Widths, with_bits
from effcli.search.knapsack import Choice
from effcli.search.sensitivity import sensitivity

if TYPE_CHECKING:
    from effcli.reports.report import Report
    from effcli.run.network import Subject
    from effcli.run.pipeline import Listener

_POINTS = 33
# Bytes that a header of a weight file spends on a tensor besides its name, and on itself.
_HEADER = 120
_HEADERS = 256


def inspect(recipes: Sequence[Recipe], way: Way | None = None, listener: Listener | None = None) -> Sensitivity:
    """What quantizing each layer alone costs with the only step of each recipe; they differ in its bits alone."""
    from effcli.run.pipeline import Silent, subject_of

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
    from effcli.run.pipeline import Silent

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
    from effcli.reports.html_sensitivity import write
    from effcli.run import pipeline
    from effcli.run.workplace import check_output

    if any(step.chosen for step in recipe.passes):
        # Before a long search, what would fail after it.
        check_output(recipe.target.absolute(), overwrite, recipe.inputs)
    resolved, searches = resolve(recipe, listener)
    if not searches:
        return pipeline.run(resolved, overwrite=overwrite, listener=listener), ()

    def beside(folder: Path) -> None:
        for number, found in enumerate(searches, start=1):
            stem = "search" if len(searches) == 1 else f"search-{number}"
            for suffix in (".json", ".html"):
                write(found, folder / f"{stem}{suffix}")

    return pipeline.run(resolved, overwrite=overwrite, listener=listener, beside=beside), searches


class _Search:
    """One step that chooses bits. before: the steps that are carried out first."""

    def __init__(
        self, recipe: Recipe, before: Sequence[PassStep], step: PassStep, folder: Path, listener: Listener
    ) -> None:
        from effcli.run.pipeline import subject_of

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

    def _chosen(self, front: Sequence[Choice]) -> tuple[Choice, str]:
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

    def _at(self, nbytes: int, fixed: int = 0) -> Choice:
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

    def _smallest(self, front: Sequence[Choice], keeps: Callable[[float, float], bool]) -> Choice:
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

    def _measure(self, choice: Choice) -> float:
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

    def _point(self, choice: Choice, name: str) -> Point:
        bits = self.widths.bits(choice)
        weights = {layer.name: layer.shape[0] * layer.shape[1] for layer in self.found.layers}
        return Point(
            name=name,
            nbytes=choice.nbytes,
            average_bits=sum(weights[layer] * own for layer, own in bits.items()) / max(sum(weights.values()), 1),
            cost=choice.cost,
            measured=self.measured.get(choice.options),
        )


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


__all__ = ["inspect", "resolve", "run"]
