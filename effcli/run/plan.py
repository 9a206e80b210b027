"""What a recipe would do, from headers, names and shapes alone: nothing is computed, nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import Field

from effcli.errors import naming
from effcli.layers.contract import Change, CutPass, Needs, TrainPass
from effcli.layers.layer import LayerSite
from effcli.layers.selection import Choice, Layered, choose, needs_of
from effcli.layers.survey import Survey
from effcli.options import Options
from effcli.reports.report import LedgerRow
from effcli.reports.units import size
from effcli.run.forecast import Forecast
from effcli.run.recipe import PassStep, Recipe


class Row(Options):
    """One layer of a network, and what a pass would make of it."""

    step: str = ""
    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    nbytes: int
    macs: int | None = Field(default=None, description="multiplications for one input; None for language models")
    status: str = ""
    reason: str = ""

    @staticmethod
    def of(site: LayerSite, format: str, nbytes: int, **more: Any) -> Row:
        """A layer that takes `nbytes` in `format`; more: any other field."""
        bits = 8 * nbytes / max(site.rows * site.columns, 1)
        known = {"name": site.name, "kind": site.kind, "shape": site.shape}
        return Row(**known, format=format, bits_per_weight=bits, nbytes=nbytes, **more)

    @staticmethod
    def other(row: LedgerRow) -> Row:
        """What is no layer and stays as it is, such as an embedding; row: the ledger's line for it."""
        fields = row.model_dump(include={"name", "kind", "shape", "format", "bits_per_weight", "nbytes", "reason"})
        return Row(status="keep", **fields)


class Layers(Options):
    """Layers of all blocks that are alike, as one line for a person."""

    step: str = ""
    layers: str
    count: int
    shape: tuple[int, ...]
    format: str
    nbytes: int
    macs: int | None = None
    status: str = ""


def summary(rows: Iterable[Row]) -> list[Layers]:
    """Rows whose names differ in numbers alone, taken together: `model.layers.*.mlp.up_proj`, 30 times."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        alike.setdefault((row.step, pattern, row.shape, row.format, row.status), []).append(row)
    return [
        Layers(
            step=step,
            layers=pattern if len(found) > 1 else found[0].name,
            count=len(found),
            shape=shape,
            format=format,
            nbytes=sum(row.nbytes for row in found),
            macs=sum(row.macs or 0 for row in found) or None,
            status=status,
        )
        for (step, pattern, shape, format, status), found in alike.items()
    ]


class Plan(Options):
    """What each step of a recipe would do. `input_bytes` and `output_bytes` are those of the weight files."""

    model: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    weights: int = Field(description="number of parameters, tied ones counted once")
    input_bytes: int
    output_bytes: int = Field(description="as planned, file headers left out")
    memory_bytes: int = Field(description="estimated peak of the process")
    disk_bytes: int = Field(
        description="estimated peak of what lies on the disk beside the weights: hidden states, gradients, snapshots"
    )
    operations: float = Field(description="floating-point operations of forwards, backwards and Gram matrices")
    layout: str = Field(
        default="", description="why transformers will not read the output, and what would keep it so, in a few lines"
    )

    forecast: Forecast | None = Field(default=None, description="how long a run would take here; None: not asked for")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


class Inspection(Options):
    """What a checkpoint consists of."""

    model: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    nbytes: int
    weights: int
    bits_per_weight: float

    @staticmethod
    def of(model: str, rows: Iterable[Row], remarks: Iterable[str], nbytes: int, weights: int) -> Inspection:
        """A network of `weights` parameters in `nbytes`; rows: whatever they say of a step is left out."""
        unmarked = tuple(row.model_copy(update={"status": "", "reason": ""}) for row in rows)
        bits = 8 * nbytes / max(weights, 1)
        return Inspection(
            model=model, rows=unmarked, remarks=tuple(remarks), nbytes=nbytes, weights=weights, bits_per_weight=bits
        )

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


# What the interpreter with torch and transformers takes before any weight is read.
BASE_MEMORY = 450_000_000
# Numbers that are computed with, and what gradients and snapshots hold, are float32.
FLOAT = 4


@dataclass(frozen=True)
class Effort:
    """What a step takes. operations: on floating-point numbers.

    memory, disk: bytes at the peak, of memory besides `BASE_MEMORY`, on the disk besides the weight files.
    """

    operations: float
    memory: int
    disk: int = 0


class Planned(Protocol):
    """A network of either kind as the steps planned so far leave it."""

    # By what operations are counted, for a person; what is in memory at the peak, where that is not all.
    counted: ClassVar[tuple[str, float]]

    @property
    def at_a_time(self) -> str:
        """For what the memory is at a time, as a clause; empty where it is for the whole network."""

    @property
    def weights(self) -> int:
        """Number of parameters, tied ones counted once."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the weight files."""

    def layered(self, step: PassStep) -> Layered:
        """The layers that a step chooses from."""

    def take(self, step: PassStep, choices: Mapping[str, Choice]) -> None:
        """Note what a step leaves."""

    def rows(self, choices: Iterable[Choice]) -> list[Row]:
        """Every layer, then what is no layer, as the last step leaves it; `step` is left empty."""

    def remarks(self, step: PassStep, name: str) -> list[str]:
        """What is to be known of the step that was taken last, besides which layers it keeps; name: what to call it."""

    @property
    def layout(self) -> str:
        """Why transformers will not read what the steps leave, and what would keep it so that it does.

        Empty where it will, and where it does not read the input either.
        """

    def effort(self, step: PassStep, choices: Mapping[str, Choice]) -> Effort:
        """What a step takes, whatever came before it."""


def make(recipe: Recipe, network: Planned) -> Plan:
    """The plan of a recipe, the defaults of the network's kind filled in.

    Raises what a run would raise over patterns, sizes and the steps of trainings.
    """
    check_trainings(recipe, recipe.calibration.samples)
    before = network.nbytes
    rows: list[Row] = []
    remarks: list[str] = []
    efforts: list[Effort] = []
    backward = bounded = False
    for number, step in enumerate(recipe.passes, start=1):
        name = f"{number}. {step.name}" if len(recipe.passes) > 1 else ""
        choices = choose(network.layered(step), step)
        network.take(step, choices)
        rows += [row.model_copy(update={"step": name}) for row in network.rows(choices.values())]
        label = name or step.name
        remarks += _kept(label, choices.values()) + network.remarks(step, label)
        if step.config.changes & (Change.MASK | Change.SHAPE):
            bounded = True
            remarks.append(f"{label}: the bytes are an upper bound: what goes is decided on the weights")
        if Survey(choices):
            remarks.append(f"{label}: looks at every layer before it changes the first")
        efforts.append(network.effort(step, choices))
        backward |= isinstance(step.config, TrainPass) or bool(needs_of([choices]).gradients)
    after, operations = network.nbytes, sum(effort.operations for effort in efforts)
    memory = BASE_MEMORY + max(effort.memory for effort in efforts)
    disk = max(effort.disk for effort in efforts)
    if bounded:
        first = [f"weights: {size(before)} before, at most {size(after)} after"]
    else:
        times = (
            f"{before / max(after, 1):.2f} times smaller" if after <= before else f"{after / before:.2f} times larger"
        )
        first = [f"weights: {size(before)} before, {size(after)} after ({times})"]
    first.append(f"memory: about {size(memory)} at the peak{network.at_a_time}")
    if operations:
        unit, many = network.counted
        what = "forwards, gradients" if backward else "forwards"
        first.append(
            f"arithmetic: {operations / many:.1f} {unit} for {what} and Gram matrices, besides what the pass tries out"
        )
    if backward and disk:
        first.append(f"disk: about {size(disk)} beside the weights, until the step that needs them is done")
    return Plan(
        model=recipe.model,
        rows=tuple(rows),
        remarks=(*first, *remarks),
        weights=network.weights,
        input_bytes=before,
        output_bytes=after,
        memory_bytes=memory,
        disk_bytes=disk,
        operations=operations,
        layout=network.layout,
    )


def check_trainings(recipe: Recipe, inputs: int) -> None:
    """Raise `UserError` for a step that trains which so many calibration inputs give too few steps."""
    for step in recipe.passes:
        options = step.config
        if isinstance(options, TrainPass):
            with naming(step.name):
                options.check_steps(options.total(options.per_epoch(inputs, recipe.calibration.batch_size)))


def forwards(step: PassStep, choices: Mapping[str, Choice]) -> int:
    """How often the calibration data run through the network for a step that looks at layers, besides its gradients.

    A pass that cuts looks at them to decide, and once more to restore what reads the removed channels; a pass over
    layers may look at all of them before the first.
    """
    if not isinstance(step.config, CutPass):
        surveys = Survey(choices).needs.observes
        return surveys + bool(needs_of([choices]) if surveys else step.needs)
    decides = bool(step.needs.statistics) or Needs.INFLUENCE in step.needs
    return decides + (step.config.restoring is not None)


def _kept(step: str, choices: Iterable[Choice]) -> list[str]:
    """Which layers `step` leaves alone, one line for each reason."""
    kept: dict[str, list[str]] = {}
    for choice in choices:
        if choice.reason:
            kept.setdefault(choice.reason, []).append(choice.site.name)
    more = {reason: f" and {len(names) - 1} more" if len(names) > 1 else "" for reason, names in kept.items()}
    return [f"{step} keeps {names[0]}{more[reason]}: {reason}" for reason, names in kept.items()]


__all__ = [
    "FLOAT",
    "Effort",
    "Inspection",
    "Layers",
    "Plan",
    "Planned",
    "Row",
    "check_trainings",
    "forwards",
    "make",
    "summary",
]
