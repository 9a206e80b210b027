"""What a model is to whoever works on it: a language model or a network read as a graph. Nobody here asks which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from effcli.layers.result import unseen
from effcli.reports.report import Check, Continuation, Exported, Latency, Layout, Quality, Speed, Stage

if TYPE_CHECKING:
    import torch

    from effcli.files.exporter import Exporter, Footprint
    from effcli.inputs.options import Evaluate
    from effcli.inputs.preprocess import Preprocess
    from effcli.layers.contract import Members
    from effcli.layers.coupling import Coupled
    from effcli.layers.cutting import Offered
    from effcli.layers.result import PassResult, Phases, Progress
    from effcli.layers.selection import Choice
    from effcli.options import Options
    from effcli.reports.sensitivity import Unit, Varied, Way
    from effcli.run.plan import Inspection, Plan
    from effcli.run.recipe import PassStep, Recipe
    from effcli.search.budget import Figure, Quantity
    from effcli.search.costs import Cost
    from effcli.search.journal import SearchJournal


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
    continuations: tuple[Continuation, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def milliseconds(self) -> float | None:
        """The time of one decoded token of a language model, else of one input; None where it was not taken."""
        if self.speed is not None:
            return 1000 / self.speed.decode_tokens_per_second
        return self.latencies[-1].milliseconds if self.latencies else None


class RunNetwork(Protocol):
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

    def miniature(self, target: Path) -> tuple[str, dict[str, float]]:
        """What a rehearsal reads as its model, if need be written to `target`, a folder that is not there.

        With how many blocks of the network each of its blocks stands for, by name; empty where it is the network
        itself. Raises `UnsupportedError` where no part of the network serves.
        """

    def unlimited(self, quantity: Quantity, option: Varied) -> str:
        """Why no choice of `option` can keep a budget of `quantity` in this network, empty where one can."""

    def calibrate(self) -> tuple[str, ...]:
        """Read the calibration data, if a pass wants any; what the user should know of them."""

    def priced(self, checkpoint: Path) -> Priced:
        """A checkpoint on the way, whose layers are to be priced on the recipe's calibration data."""

    def open(self, work: Path) -> None:
        """Make `base`, if need be below the folder `work`."""

    def count(self, checkpoint: Path) -> Counts:
        """How many weights a checkpoint has, how many are not 0, and what an input takes."""

    def measure(
        self, checkpoint: Path, first: bool, *, quality: bool = True, speed: bool = True, phases: Phases = unseen
    ) -> Measured:
        """Measure quality and speed as the recipe asks; first: the input itself, before any pass.

        quality, speed: False leaves it out.
        """

    def footprint(self, checkpoint: Path) -> Footprint | None:
        """What the checkpoint takes of a microcontroller; None where it has no C code.

        `UnsupportedError` for an operation of an integer network that has none.
        """

    def sweep(
        self, step: PassStep, source: Path, target: Path, reference: Path, work: Path, progress: Progress
    ) -> PassResult:
        """Carry out one pass; reference: the last checkpoint before any weight was compressed."""

    def verify(self, checkpoint: Path, stages: Sequence[Stage], phases: Phases = unseen) -> Verification:
        """Load the finished checkpoint as its users will, and compare it with the input.

        stages: of the run, whose ledger says what was to be changed.
        """

    def time_export(self, exporter: Exporter, exported: Exported, folder: Path) -> Exported:
        """The record of an export in `folder`, with its speed where it can be run here and latency is asked for."""

    def layout(self, checkpoint: Path) -> Layout:
        """How the finished checkpoint is loaded."""

    def loaders(self, checkpoint: Path) -> tuple[str, str]:
        """The classes of transformers that load the finished checkpoint and prepare its inputs."""


class Priced(Protocol):
    """A checkpoint whose layers are priced one by one, on calibration data.

    unit: of what they cost the network; weights: its parameters; samples: of the calibration data; inputs: how many
    tokens those are in a language model; remarks: what the user should know of them; macs: multiplications of each
    layer for one input, or for one token.
    """

    unit: Unit
    weights: int
    samples: int
    inputs: int
    remarks: tuple[str, ...]
    macs: Mapping[str, int]

    def choose(self, step: PassStep) -> dict[str, Choice]:
        """Every layer by name, with the options that `step` has for it."""

    def itemsize(self, choice: Choice) -> int:
        """Bytes of a number of a layer's dense weight."""

    def coupled(self) -> Sequence[Coupled]:
        """What can be cut together."""

    def look_at(self, offered: Offered, folder: Path) -> Members:
        """What a pass asks for of the groups that it is offered; folder: for what is kept as long as that is read."""

    def extent(self, parameter: str) -> tuple[int, int]:
        """How many numbers a parameter or buffer has, and their bytes."""

    def costs(
        self,
        variants: Sequence[Mapping[str, Choice]],
        way: Way,
        work: Path,
        progress: Progress,
        journal: SearchJournal | None,
    ) -> list[dict[str, Cost]]:
        """What the layers cost with each of the variants, by name; work: a folder for hidden states."""


@dataclass(frozen=True)
class Reading:
    """How a model is to be read, besides where it is.

    weights, shape, preprocess: of a network read as a graph, see `effcli.importers.read`; trust_remote_code: whether
    code that came with the model may run.
    """

    weights: Path | None = None
    shape: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None
    trust_remote_code: bool = False


class Verification(Protocol):
    """What loading a finished checkpoint as its users will showed."""

    @property
    def line(self) -> str: ...

    @property
    def checks(self) -> tuple[Check, ...]: ...

    @property
    def passed(self) -> bool: ...

    @property
    def layers(self) -> tuple[Options, ...]:
        """What each layer took on the processor that `target` names; empty where nothing ran on one."""

    def to_json(self) -> str: ...


class Found(Protocol):
    """A model that was found, as the kind of network that it is. name: as the user gave it."""

    name: str

    def refuse(self, given: Mapping[str, Any]) -> None:
        """Raise `RecipeError` for the first option, by flag, that was given and means nothing for this network."""

    def of_run(self, recipe: Recipe) -> RunNetwork:
        """The network as a run of `recipe`, which names it, works on it."""

    def inspect(self, reading: Reading) -> Inspection:
        """What the model consists of."""

    def evaluate(
        self, options: Evaluate, reading: Reading, reference: str | None = None, phases: Phases = unseen
    ) -> Quality:
        """Its quality, and its distance from the model `reference`."""

    def time(
        self,
        reading: Reading,
        prefill: int | None,
        decode: int | None,
        threads: int | None,
        device: str | None,
        phases: Phases = unseen,
    ) -> Speed | tuple[Latency, ...]:
        """How fast it runs: tokens of a language model, one input of any other, with each runtime."""

    def verify(
        self,
        target: str | None = None,
        against: str | None = None,
        trust_remote_code: bool = False,
        phases: Phases = unseen,
    ) -> Verification:
        """What its users will find who load it.

        target: of C code that is compiled as well; against: the model that it was made from.
        """

    def load(self, device: str | torch.device, trust_remote_code: bool, packed: bool) -> Any:
        """The model as a module that runs."""
