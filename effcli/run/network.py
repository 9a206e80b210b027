"""What a run works on: a language model or a network read as a graph. The pipeline never asks which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from effcli.reports.report import Exported, Latency, Quality, Speed, Stage

if TYPE_CHECKING:
    from effcli.files.exporter import Exporter, Footprint
    from effcli.layers.result import Progress, Swept
    from effcli.reports.card import Layout
    from effcli.run.plan import Plan
    from effcli.run.recipe import PassStep, Recipe
    from effcli.search.budget import Figure, Quantity


@dataclass(frozen=True)
class Counts:
    """What a checkpoint consists of. See `effcli.reports.report.Stage` for what is counted."""

    weights: int
    nonzeros: int
    macs: int | None


@dataclass(frozen=True)
class Measured:
    """What was measured of one checkpoint, and what the user should know of it."""

    quality: Quality | None = None
    speed: Speed | None = None
    latencies: tuple[Latency, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def milliseconds(self) -> float | None:
        """The time of one decoded token of a language model, else of one input; None where it was not taken."""
        if self.speed is not None:
            return 1000 / self.speed.decode_tokens_per_second
        return self.latencies[-1].milliseconds if self.latencies else None


class Subject(Protocol):
    """One network on its way through a run. recipe: with the defaults of its kind filled in.

    source: where the network was found; base: the checkpoint that the first pass reads, which `open` makes if need be.
    """

    recipe: Recipe
    source: Path
    # The figure that tells the network's quality.
    quality: Figure

    @property
    def base(self) -> Path: ...

    @property
    def request(self) -> dict[str, str]:
        """The digest of every file of the network and of the data beside it, by name, or of the network itself."""

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as JSON, with what follows the network filled in: as it is carried out."""

    def with_defaults(self, step: PassStep) -> PassStep:
        """The step with the defaults of the network's kind for what it does not say."""

    def plan(self, passes: Sequence[PassStep] | None = None) -> Plan:
        """What the recipe will do, or would with other passes; raises what a run would raise over patterns and sizes.

        No step may be one that searches.
        """

    def unlimited(self, quantity: Quantity) -> str:
        """Why bits of layers cannot keep a budget of `quantity` in this network, empty where they can."""

    def calibrate(self) -> tuple[str, ...]:
        """Read the calibration data, if a pass wants any; what the user should know of them."""

    def open(self, work: Path) -> None:
        """Make `base`, if need be below the folder `work`."""

    def count(self, checkpoint: Path) -> Counts:
        """How many weights a checkpoint has, how many are not 0, and what an input takes."""

    def measure(self, checkpoint: Path, first: bool, *, quality: bool = True, speed: bool = True) -> Measured:
        """Measure quality and speed as the recipe asks; first: the input itself, before any pass.

        quality, speed: False leaves it out.
        """

    def footprint(self, checkpoint: Path) -> Footprint | None:
        """What the checkpoint takes of a microcontroller; None where it has no C code.

        `UnsupportedError` for an operation of an integer network that has none.
        """

    def sweep(
        self, step: PassStep, source: Path, target: Path, reference: Path, work: Path, progress: Progress
    ) -> Swept:
        """Carry out one pass; reference: the last checkpoint before any weight was compressed."""

    def verify(self, checkpoint: Path, stages: Sequence[Stage]) -> str:
        """Load the finished checkpoint as its users will, and compare it with the input; what was found, in one line.

        stages: of the run, whose ledger says what was to be changed.
        """

    def time_export(self, exporter: Exporter, exported: Exported, folder: Path) -> Exported:
        """The record of an export in `folder`, with its speed where it can be run here and latency is asked for."""

    def layout(self, checkpoint: Path) -> Layout:
        """How the finished checkpoint is loaded."""

    def loaders(self, checkpoint: Path) -> tuple[str, str]:
        """The classes of transformers that load the finished checkpoint and prepare its inputs."""
