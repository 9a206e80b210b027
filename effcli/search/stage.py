"""A search as a stage of a run: what it is refused, what it is planned as, and how it finds what to carry out.

It works on the checkpoint that the passes before it left. Costs of layers and figures of carried-out choices go into a
journal in the run's working folder, so that the same command finds them there after a crash.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import DataError, RecipeError, UnfinishedError, behind, writing
from effcli.files.checkpoint import weight_files
from effcli.layers.contract import Change, SearchPass
from effcli.layers.returned import Asked
from effcli.layers.selection import matches, options_of
from effcli.options import Record
from effcli.platform.rehearsal import cannot_tell
from effcli.reports.report import Quality, Stage
from effcli.reports.sensitivity import Search, Sensitivity, Varied
from effcli.reports.units import count, size
from effcli.run.listener import phases, told
from effcli.run.plan import Plan, Row
from effcli.run.recipe import PassStep
from effcli.search.budget import Figure
from effcli.search.journal import SearchJournal
from effcli.search.sensitivity import SMALL, sensitivity
from effcli.search.values import check_average, check_size

if TYPE_CHECKING:
    from effcli.layers.result import Phases, Progress
    from effcli.run.listener import Listener
    from effcli.run.network import RunNetwork

# Bytes that a header of a weight file spends on a tensor besides its name, and on itself.
_HEADER = 120
_HEADERS = 256


@dataclass(frozen=True)
class Position:
    """Where a search stands in a run.

    before: the passes before it, as they were carried out; behind: those after it. source: the checkpoint that they
    left; reference: the last one before any weight was compressed; original: the stage of the network that came in.
    """

    step: PassStep
    before: Sequence[PassStep]
    behind: Sequence[PassStep]
    source: Path
    reference: Path
    original: Stage


def check(network: RunNetwork) -> None:
    """Refuse a budget that no choice could keep or that nothing measures, before any work is done.

    Raises `RecipeError`, and `DataError` for a figure that the recipe does not have measured.
    """
    passes = network.recipe.passes
    for number, step in enumerate(passes):
        if not isinstance(step.config, SearchPass):
            continue
        quantity = step.config.budget.quantity
        option = step.config.option
        key, why = f"{step.name}.{quantity}", network.unlimited(quantity, option)
        if why:
            raise RecipeError(
                f"{key}: of {network.recipe.model} {why}", f"give another budget, such as average_{option} or size"
            )
        if quantity == "latency" and not network.recipe.evaluate.latency:
            raise DataError(f"{key}: latency is not measured", "leave evaluate.latency on")
        if quantity in ("ram", "flash"):
            _integer(key, passes[number + 1 :])
        evaluate = network.recipe.evaluate
        measured = evaluate.perplexity if network.quality == "perplexity" else evaluate.images
        if step.config.measures_quality and not measured:
            raise DataError(
                f"{step.name}: {network.quality} is not measured", "leave out --no-eval, or evaluate: false"
            )


def check_measured(network: RunNetwork, original: Stage) -> None:
    """Raise `DataError` where a search needs a quality that was not measured of the network that came in."""
    for step in network.recipe.passes:
        if isinstance(step.config, SearchPass) and step.config.measures_quality:
            _quality(step.name, network, original.quality)


def plan(network: RunNetwork) -> Plan:
    """The plan of a recipe; what a search decides stands there from the first to the last of its alternatives.

    Bytes are those of the larger end. Raises what `check` raises, and `SelectionError` for a size or an average that no
    choice keeps.
    """
    passes = network.recipe.passes
    searches = [step for step in passes if isinstance(step.config, SearchPass)]
    if not searches:
        return network.plan()
    check(network)
    ends = [[network.with_defaults((step.candidates or (step,))[at]) for step in passes] for at in (0, -1)]
    first, last = map(network.plan, ends)
    for number, step in enumerate(passes, start=1):
        if not isinstance(step.config, SearchPass):
            continue
        if step.config.exhaustive and first.weights >= SMALL:
            raise RecipeError(
                f"{step.name} carries out one layer after the other, again and again, and {network.recipe.model} has "
                f"{count(first.weights, 'weight')}",
                f"take a network of fewer than {SMALL:,}, or let costs decide: strategy=knapsack",
            )
        whole = number == len(passes)
        _check_limit(step, *((first, last) if whole else (network.plan(steps[:number]) for steps in ends)))
    low, high = sorted((first, last), key=lambda found: found.output_bytes)
    weights = high.remarks[0]
    if low.output_bytes < high.output_bytes:
        sizes = f"{size(low.output_bytes)} to {size(high.output_bytes)}"
        weights = f"weights: {size(high.input_bytes)} before, {sizes} after"
    chosen = [
        f"{step.name} measures the layers before it can say what it does to each; it chooses {_alternatives(step)}"
        for step in searches
    ]
    rows = high.rows
    if len(low.rows) == len(rows):
        rows = tuple(_between(*ends) for ends in zip(first.rows, last.rows, rows, strict=True))
    return high.model_copy(update={"rows": rows, "remarks": (weights, *high.remarks[1:], *chosen)})


def _alternatives(step: PassStep) -> str:
    """What a search chooses among, and its budget, in words."""
    options: SearchPass = step.config  # type: ignore[assignment]
    known = ", ".join(f"{getattr(candidate.config, options.option):g}" for candidate in step.candidates)
    each = "group of channels" if options.option == "ratio" else "layer"
    return f"{options.option} {known} of {step.candidates[0].name} for each {each}; budget: {options.budget}"


def _between(first: Row, last: Row, larger: Row) -> Row:
    """A layer that a search may leave in one format or another: `int2 to int8 g64 asym`."""
    if first.format == last.format:
        return larger
    (start, *how), (end, *others) = first.format.split(), last.format.split()
    format = " ".join((start, "to", end, *how)) if how == others else f"{first.format} to {last.format}"
    return larger.model_copy(update={"format": format})


def _check_limit(step: PassStep, first: Plan, last: Plan) -> None:
    """Raise `SelectionError` for a size or an average that the search `step` cannot keep.

    first, last: the plans of all steps up to it, with the first and the last of its alternatives.
    """
    options: SearchPass = step.config  # type: ignore[assignment]
    limit, own = options.budget.limit, [_rows(plan) for plan in (first, last)]
    option = options.option
    match options.budget.quantity:
        case "average_bits" | "average_sparsity" | "average_ratio":
            check_average(step.name, option, limit, _choosable(step.candidates, option, own[0]))
        case "size" if option == "bits":
            # What remains of other weights is known once it is found which go.
            found = [
                plan.output_bytes + _headers(plan, (row.name for row in rows if row.status == "compress"))
                for plan, rows in zip((first, last), own, strict=True)
            ]
            check_size(step.name, option, int(limit), min(found), max(found))


def _choosable(candidates: Sequence[PassStep], option: Varied, rows: Iterable[Row]) -> list[tuple[int, set[float]]]:
    """How many weights each layer has, and the values of `option` that it may be given; rows: of the layers."""
    if option == "ratio":
        # Which layers belong together, and how many weights go with them, is not known yet: as if all could be had.
        every = {getattr(own, option) for candidate in candidates for own in candidate.configs}
        return [(1, every)]
    return [
        (math.prod(row.shape), {getattr(options_of(row.name, candidate), option) for candidate in candidates})
        for row in rows
        if row.status != "keep"
    ]


def _rows(plan: Plan) -> list[Row]:
    """The layers in the last step of a plan."""
    return [row for row in plan.rows if row.step == plan.rows[-1].step]


def _headers(plan: Plan, layers: Iterable[str]) -> int:
    """Bytes that the headers of the weight files take at most; layers: those that are compressed."""
    tensors = sum(4 * (len(name) + _HEADER) for name in layers)
    return tensors + sum(len(row.name) + _HEADER for row in plan.rows) + _HEADERS


def carry_out(network: RunNetwork, position: Position, folder: Path, listener: Listener) -> tuple[PassStep, Search]:
    """The step that a search chooses, and what it found; folder: of its own, for its journal and what it tries.

    Raises `SelectionError` for a budget that no choice keeps.
    """
    journal = SearchJournal(folder)
    search = _Running(network, position, journal, listener)
    try:
        return search.carry_out()
    except UnfinishedError as error:
        failure = behind(error)
        if failure is not None:
            # The journal may be whole: the same command reads it once the machine does.
            raise failure from error
        listener.say(f"beginning the search of {position.step.name} anew, for its journal is damaged: {error.cause}")
        search.begin_anew()
        return search.carry_out()


class _Found(Record):
    """A figure of one choice that was carried out."""

    value: float


class _Running:
    """A search that is carried out; see `effcli.layers.contract.Evaluator`."""

    def __init__(self, network: RunNetwork, position: Position, journal: SearchJournal, listener: Listener) -> None:
        assert isinstance(position.step.config, SearchPass)
        self.options: SearchPass = position.step.config
        self.network = network
        self.position = position
        self.journal = journal
        self.listener = listener
        self.steps = tuple(map(network.with_defaults, position.step.candidates))
        self._costs: Sensitivity | None = None
        # The last choice that was carried out, and where it stands.
        self._trial: tuple[Mapping[str, float], Path] | None = None

    def carry_out(self) -> tuple[PassStep, Search]:
        found = self.journal.recall(Search, "found")
        if found is None:
            found = self.options.choose(self.costs, self)
            Asked(self.options, "choose").expect(found, Search, "a `Search`")
            # What two groups share counts in both: nothing is known of the rest.
            fixed = None if self.options.option == "ratio" else self.fixed_bytes
            found = found.model_copy(update={"name": self.name, "fixed_bytes": fixed})
            self.journal.record("found", found)
        return with_values(self.steps[0], found.sensitivity.option, found.values), found

    def begin_anew(self) -> None:
        """Throw away what the journal's folder holds."""
        self.journal.begin()
        self._trial = None

    @property
    def costs(self) -> Sensitivity:
        """What each layer costs with each alternative."""
        if self._costs is None:
            states = self.journal.folder / "states"
            with writing(states):
                states.mkdir(exist_ok=True)
            source, way = self.position.source, self.options.way
            with told(self.listener, f"{self.name}: sensitivity", "step") as progress:
                self._costs = sensitivity(
                    self.network, self.steps, self.options.option, source, states, way, progress, self.journal
                )
            shutil.rmtree(states)
        return self._costs

    @property
    def name(self) -> str:
        return self.position.step.name

    @property
    def quality(self) -> Figure:
        return self.network.quality

    @property
    def fixed_bytes(self) -> int:
        plan = self.network.plan((*self.position.before, self.steps[0]))
        names = {layer.name for layer in self.costs.layers}
        layers = sum(row.nbytes for row in _rows(plan) if row.name in names)
        return plan.output_bytes - layers + _headers(plan, names)

    def original(self) -> float:
        return _quality(self.name, self.network, self.position.original.quality)

    def say(self, text: str) -> None:
        self.listener.say(f"{self.name}: {text}")

    def measure(self, figure: Figure, values: Mapping[str, float]) -> float:
        key = hashlib.sha256(json.dumps([figure, dict(values)], sort_keys=True).encode()).hexdigest()[:16]
        known = self.journal.recall(_Found, f"{figure}-{key}")
        if known is None:
            known = _Found(value=self._measured(figure, self._carried_out(values)))
            self.journal.record(f"{figure}-{key}", known)
        return known.value

    def _carried_out(self, values: Mapping[str, float]) -> Path:
        """The checkpoint that a choice leaves; it stands until another one is carried out."""
        if self._trial is None or self._trial[0] != values:
            self._trial = None
            step = with_values(self.steps[0], self.options.option, values)
            self._trial = dict(values), self._sweep(step, self.position.source, "trial")
        return self._trial[1]

    def _measured(self, figure: Figure, checkpoint: Path) -> float:
        """A figure of the network whose layers have the values of a choice."""
        if figure == "size":
            return sum(file.stat().st_size for file in weight_files(checkpoint))
        if figure == "macs":
            macs = self.network.count(checkpoint).macs
            if macs is None:
                raise RecipeError(f"{self.name}.macs: those of experts are not counted", "give another budget")
            return macs
        tell = _as_often_as_found(phases(self.listener, self.name))
        if figure == "latency":
            found = self.network.measure(checkpoint, False, quality=False, phases=tell).milliseconds
            if found is None:
                raise DataError(f"{self.name}: latency is not measured", "leave evaluate.latency on")
            return found
        if figure in ("ram", "flash"):
            return self._footprint(figure, checkpoint)
        measured = self.network.measure(checkpoint, False, speed=False, phases=tell)
        return _quality(self.name, self.network, measured.quality)

    def _footprint(self, figure: Figure, checkpoint: Path) -> int:
        """The RAM or the flash of the network once the passes behind have made it integer."""
        key = f"{self.name}.{figure}"
        for at, step in enumerate(_integer(key, self.position.behind)):
            checkpoint = self._sweep(step, checkpoint, f"trial-{at}")
        found = self.network.footprint(checkpoint)
        if found is None:
            raise RecipeError(f"{key}: no C code is made of {self.network.recipe.model}", "give another budget")
        return found.ram if figure == "ram" else found.flash

    def _sweep(self, step: PassStep, source: Path, name: str) -> Path:
        """Carry out a step; the checkpoint that it left."""
        target = self.journal.folder / name
        with writing(target):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        work, reference = self.journal.folder / "pass", self.position.reference
        tell = _as_often_as_found(phases(self.listener, self.name))
        with tell(step.name, step.config.unit) as progress:
            self.network.sweep(step, source, target, reference, work, progress)
        return target


def _as_often_as_found(tell: Phases) -> Phases:
    """The phases of a choice that is carried out, of which a rehearsal cannot know how many there will be."""

    @contextmanager
    def begin(name: str, unit: str = "step") -> Iterator[Progress]:
        with tell(name, unit) as progress:
            cannot_tell("how many choices are carried out depends on what is found")
            yield progress

    return begin


def _quality(name: str, network: RunNetwork, found: Quality | None) -> float:
    """The perplexity or the accuracy of a network; `DataError` where it was not measured."""
    value = None
    if found is not None:
        value = found.perplexity if found.classification is None else found.classification.top1
    if value is None:
        raise DataError(
            f"{name}: {network.quality} is not measured",
            "give a text for perplexity or labelled images for accuracy with --eval",
        )
    return value


def _integer(key: str, passes: Sequence[PassStep]) -> Sequence[PassStep]:
    """The first passes up to the one that makes the network integer; `RecipeError` without one."""
    for number, step in enumerate(passes, start=1):
        if isinstance(step.config, SearchPass):
            raise RecipeError(f"{key}: {step.name} follows, whose choice is not known yet", "let it come first")
        if Change.INTEGER in step.config.changes:
            return passes[:number]
    raise RecipeError(f"{key}: no later pass makes the network integer, as C code needs", "let int8 be the last pass")


def with_values(step: PassStep, option: Varied, values: Mapping[str, float]) -> PassStep:
    """The step with these values of an option: the most frequent for all, the others under `layers` by name."""
    config: Any = step.config
    (usual, _), *_ = Counter(values.values()).most_common()
    layers = dict(config.layers)
    for name, own in values.items():
        matching = [options for pattern, options in config.layers.items() if matches(name, pattern)]
        given = matching[-1] if matching else {}
        if given.get(option, usual) != own:
            # Of several patterns that match the last one counts: an entry that stood before another one moves.
            key = glob.escape(name)
            layers.pop(key, None)
            layers[key] = {**given, option: own}
    return PassStep(name=step.name, config=config.model_copy(update={option: usual, "layers": layers}))


__all__ = ["Position", "carry_out", "check", "check_measured", "plan", "with_values"]
