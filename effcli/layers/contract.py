"""What a pass is, what it is given, and what it returns. The runner never asks which pass it has.

A pass is one class with its options and its mathematics:

- a `LayerPass` turns one layer's weight into another, a `ScalingPass` also finds a factor for the channels of an input
  that several layers share;
- a `NetworkPass` takes a network read as a graph as a whole;
- a `CutPass` removes channels, heads or experts, with everything that goes with them;
- a `TrainPass` trains, step by step, towards less of a loss: an `AttachPass` the layers of a network, an `AdapterPass`
  a few numbers beside them;
- a `SearchPass` chooses options of another pass, layer by layer, and is carried out as that pass;
- a `ParameterPass` gives parameters new values, whatever they belong to: layers, embeddings, norms, biases.

`needs` names what the engine gathers for it, `changes` what plan and recipe must expect of the result.

A convolution is a layer whose inputs are its patches. A grouped one is as many independent layers as it has groups.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from effcli.errors import UserError
from effcli.formats import Mask, Packing, Quantized
from effcli.layers.coupling import Coupled, Cut, Member
from effcli.layers.edits import Edit, Place
from effcli.layers.layer import Kind
from effcli.layers.returned import Asked
from effcli.layers.statistics import Needs, Statistics
from effcli.options import Options
from effcli.platform.installed import require
from effcli.platform.rehearsal import once
from effcli.training import tracking
from effcli.training.options import TrainingOptions

if TYPE_CHECKING:
    from effcli.graphs.graph import Graph
    from effcli.graphs.integer import IntegerNetwork
    from effcli.reports.report import ActivationRange, Training
    from effcli.reports.sensitivity import Search, Sensitivity, Varied, Way
    from effcli.search.budget import Budget, Figure


class Change(enum.Flag):
    """What a pass does to a network."""

    NOTHING = 0  # weights stay as they are
    VALUES = enum.auto()  # weights take other values, or other formats
    MASK = enum.auto()  # weights are removed one by one: they stay 0 in every pass that follows
    SHAPE = enum.auto()  # channels are removed: weights take other shapes
    INTEGER = enum.auto()  # the network becomes one of integers, which no pass can follow


class Pass(Options, ABC):
    """The options that every pass has, and what the engine asks of each."""

    changes: ClassVar[Change] = Change.VALUES
    # What its progress is counted in.
    unit: ClassVar[str] = "block"
    # How many float32 matrices (in, in) of one layer a pass makes at a time, beside the Gram matrix it is given.
    workspace: ClassVar[int] = 0
    # Defaults that differ in networks read as a graph: their layers are too narrow for groups of weights.
    graph_defaults: ClassVar[Mapping[str, Any]] = {}
    # Options that few runs need to change: they are listed behind the others.
    rare: ClassVar[tuple[str, ...]] = ()

    ignore: tuple[str, ...] = Field((), description="Layers to leave alone, as glob patterns of their names.")
    layers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Other options for the layers that match a glob pattern; the last match wins."
    )
    lm_head: bool = Field(False, description="Also take the output head, which stands outside the repeated blocks.")

    @property
    def needs(self) -> Needs:
        """What must be gathered for a step with these options."""
        return Needs.NOTHING

    @property
    def gathers(self) -> Needs:
        """All that must be gathered for a step with these options."""
        return self.needs

    @property
    def format(self) -> Packing | None:
        """The format of the weights that these options lead to; None of a pass that leaves them floating."""
        return None

    @property
    def result(self) -> Packing | None:
        """The format of the weights that a step with these options leaves; None where they stay floating."""
        return self.format

    @property
    def files(self) -> tuple[Path, ...]:
        """Files and folders that a step with these options reads, besides the model and the data."""
        return ()

    def require(self) -> None:
        """Raise `UnsupportedError` where a package that these options need is not installed; asked before any work."""

    def for_graph(self) -> Self:
        """These options in a network read as a graph: what was not set takes the defaults for graphs."""
        defaults = {key: value for key, value in self.graph_defaults.items() if key not in self.model_fields_set}
        return self.model_copy(update=defaults)


class LayerPass(Pass):
    """A pass that takes one layer at a time. It may look at all of them first, to divide among them what it does."""

    @property
    def surveys(self) -> Needs | None:
        """What `summarize` must be given of a layer's inputs; None where the pass looks at no layer beforehand."""
        return None

    @property
    def gathers(self) -> Needs:
        return self.needs | (self.surveys or Needs.NOTHING)

    def summarize(self, layer: Layer, seen: Sequence[Statistics]) -> Any:
        """What `survey` is to know of a layer as it is before the step, small, for that of all layers is kept.

        seen: of the inputs of each of its groups in the network before the step; empty where nothing is gathered.
        """
        raise NotImplementedError

    def survey(self, layers: Sequence[Surveyed]) -> Mapping[str, Self]:
        """The options that layers have from then on, by name; one that is not named keeps its own.

        layers: those whose options survey, in the network's order; called on the options of the first.
        """
        raise NotImplementedError

    @abstractmethod
    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """What becomes of one layer; seen: of its inputs, with what `needs` asks for."""

    def apply_groups(self, layer: Layer, seen: Sequence[Statistics]) -> Outcome:
        """What becomes of a grouped convolution; seen: of each group's inputs. Each group is a layer unless overridden.

        The rows of `layer.weight` fall into as many equal parts as there are groups.
        """
        return Outcome.joined(
            [
                _outcome(self, "apply", part, self.apply(part, own))
                for part, own in zip(layer.parts(len(seen)), seen, strict=True)
            ]
        )


class ScalingPass(LayerPass):
    """A layer pass that first finds a factor per input channel of layers that share one input.

    The engine folds its inverse into the module that produces the input and hands `apply` the scaled weight and the
    statistics of the scaled input.
    """

    @property
    def without_scale(self) -> Literal["unscaled", "explicit"]:
        """Where no module can take in the factor: no factor, or one that stays on the input at run time."""
        return "unscaled"

    @abstractmethod
    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, Mapping[str, Any]]:
        """Factor per input channel, float32 (in,), for the layers of `group`, and notes for the ledger."""


class NetworkPass(Pass):
    """A pass that takes a network read as a graph as a whole."""

    @abstractmethod
    def transform(self, graph: Graph, seen: Observed) -> Transformed:
        """What becomes of `graph`, which may be changed in place."""

    def planned(self, graph: Graph, chosen: Mapping[str, Pass]) -> Graph:
        """`graph` with the modules that a step leaves, as a plan needs it; itself, unchanged, where none go or come.

        chosen: the options of every layer that the pass may change, by name. A layer in `graph.stored` is compressed,
        whatever stands there.
        """
        return graph

    def integer(self, graph: Graph) -> Graph | None:
        """A copy of `graph` as it becomes a network of integers; None where a step leaves floating layers."""
        return None


class CutPass(Pass):
    """A pass that removes whole channels, heads or experts: of channels that are coupled it says which stay.

    The engine finds the groups, in language models and in networks read as a graph, and cuts every member of those that
    the pass names. What is left computes what the network did with the removed channels set to zero.
    """

    changes: ClassVar[Change] = Change.SHAPE
    unit: ClassVar[str] = "group"
    # Whether it removes whole blocks of a language model, in place of positions of their widths.
    depth: ClassVar[bool] = False
    # Restoring a layer takes copies of its Gram matrix, in double precision.
    workspace: ClassVar[int] = 6

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING if self.restoring is None else Needs.INPUTS

    @property
    def restoring(self) -> float | None:
        """Whether the layers that read what was removed are fitted to what is left, and with how much damping.

        The damping is a share of the mean diagonal of the Gram matrix, as in `effcli.layers.restoring`; None leaves
        these layers as they are. It takes the calibration inputs, which `needs` must ask for.
        """
        return None

    @property
    def ranks_all(self) -> bool:
        """Whether all groups are ranked together, so that no group has a share of its own."""
        return False

    def takes(self, group: Coupled) -> bool:
        """Whether a group is of the kind that the pass removes from; others are not offered to it."""
        return True

    def check(self, groups: Sequence[Coupled], chosen: Mapping[str, Any]) -> None:
        """Raise `UserError` for options that these groups cannot keep. A plan asks, and no weight is known yet.

        chosen: the options of every group, by its name.
        """

    @abstractmethod
    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        """What stays of the groups, all of which may be cut; a group that is not named stays whole."""


class TrainPass(TrainingOptions, Pass):
    """A pass that trains. What is trained, an `AttachPass` or an `AdapterPass` says.

    The engine runs the loop (`effcli.training.loop`). Batch norms keep their statistics, and what belongs to no layer
    stays as it is.
    """

    unit: ClassVar[str] = "step"
    # What a layer must have to be trained, and what to do where none has it.
    takes: ClassVar[str] = "weight"
    remedy: ClassVar[str] = "make `ignore` narrower"
    # What `measure` measures.
    measured: ClassVar[str] = "loss on the calibration inputs"
    # Whether it trains language models, too: then `loss` is given a row of outputs for each token that is learned.
    takes_language: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS

    @property
    def learns_answers(self) -> bool:
        """Whether it learns, of documents with prompts or messages, the answers alone."""
        return False

    @property
    def recomputes(self) -> bool:
        """Whether a language model's blocks are computed again on the way back, in place of keeping what is in them."""
        return False

    @property
    def fast_forwards(self) -> int:
        """Steps between two line searches along the last one; 0 without any."""
        return 0

    @property
    def moment_bytes(self) -> float:
        """Bytes of the optimizer's moments for each number that is trained, for the plan."""
        return 8.0

    def require(self) -> None:
        tracking.require(self.track)

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """What is to become less, a scalar; best a mean over the outputs of the batch."""

    def measure(self, step: Step) -> tuple[float, float]:
        """Two numbers whose sums over all inputs are divided: the error by which the best weights are kept."""
        loss = Asked(self, "loss").check_loss(self.loss(step), trains=False)
        return float(loss) * len(step.outputs), float(len(step.outputs))

    def optimizer(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> Optimizer:
        """The optimizer of the parameters of each layer; the schedule multiplies its learning rates."""
        return Adam([own for layer in parameters.values() for own in layer], lr=self.learning_rate)


class AttachPass(TrainPass):
    """A pass that trains the weights of layers, or what it makes them of."""

    # Whether the weights themselves are trained, beside the parameters of what `attach` returns, and the biases. Where
    # neither they nor what is attached are, a compressed layer stays as it is.
    trains_weights: ClassVar[bool] = True
    trains_biases: ClassVar[bool] = False

    @abstractmethod
    def attach(self, layer: Layer) -> nn.Module | None:
        """What makes the weight that runs, float32 (out, in), of the layer's own; None leaves the layer as it is.

        It runs before every forward. `nn.Identity()` trains the weight as it is.
        """

    def advance(self, attached: Mapping[str, Attached], progress: float) -> bool:
        """Change the layers that are trained, after a step; returns whether the optimizer begins anew.

        progress: the share of all steps that are done, in (0, 1].
        """
        return False

    def counts(self, progress: float) -> bool:
        """Whether the weights may be kept as they are now; progress: the share of all steps that are done."""
        return True

    @abstractmethod
    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """What becomes of one layer; trained: what `attach` returned. `layer.weight` is trained, too, where that is."""


class AdapterPass(TrainPass):
    """A pass that trains an adapter beside the layers of a language model, which stay as they are.

    The adapter is one of PEFT, and so are the modules that run; `merge` adds it to the weights.
    """

    changes: ClassVar[Change] = Change.NOTHING
    takes_language: ClassVar[bool] = True

    def require(self) -> None:
        super().require()
        require("peft", "train")

    @abstractmethod
    def numbers(self, name: str, shape: tuple[int, int]) -> int:
        """How many numbers are trained beside a layer (out, in); `SelectionError` for options it cannot have."""

    @property
    def alive(self) -> float:
        """Numbers that a token leaves beside a layer for the way back, as a share of those that it leaves there."""
        return 0.0

    @abstractmethod
    def adapter(self, layers: Mapping[str, Self]) -> Any:
        """The PEFT config of one adapter beside all layers; layers: the options of each by its name."""

    def begin(self, beside: Mapping[str, Beside]) -> None:
        """Change what training begins with, in place; beside: of each layer by its name."""

    def finish(self, beside: Mapping[str, Beside], config: Any) -> tuple[Any, Mapping[str, Mapping[str, Tensor]]]:
        """The config of the trained adapter, and what its tensors are where they are not those of the modules.

        config: as `adapter` made it; returned tensors: by the layer's name, and then by PEFT's, such as `lora_A`.
        """
        return config, {}


class SearchPass(Pass):
    """A pass that chooses one option of another one for every layer: its bits, its sparsity, or its ratio.

    What is carried out is that other pass; a ratio is chosen for every group of channels.

    The engine finds what each alternative of `space` costs each layer, `choose` decides, and may have whole choices
    carried out and measured on the way.
    """

    @property
    @abstractmethod
    def base(self) -> tuple[str, Mapping[str, Any]]:
        """The name of the pass whose option is chosen, and its other options."""

    @property
    @abstractmethod
    def space(self) -> Sequence[Mapping[str, Any]]:
        """What each layer may get, in any order: one value for each alternative, such as `{"bits": 4}`.

        All alternatives are of one option: `bits`, `sparsity` or `ratio`.
        """

    @property
    def option(self) -> Varied:
        """The option that is chosen."""
        option: Varied
        (option,) = self.space[0]  # type: ignore[assignment]
        return option

    @property
    @abstractmethod
    def budget(self) -> Budget:
        """What limits the choice."""

    @property
    def way(self) -> Way | None:
        """How the costs of layers are found; None leaves it to the engine."""
        return None

    @property
    def measures_quality(self) -> bool:
        """Whether the quality of carried-out choices is measured."""
        return self.budget.of_quality

    @property
    def exhaustive(self) -> bool:
        """Whether single layers are carried out again and again, for which there is time in small networks alone."""
        return False

    @abstractmethod
    def choose(self, costs: Sensitivity, evaluator: Evaluator) -> Search:
        """The values that keep the budget at the least cost, with what was tried on the way.

        costs: of each layer with each alternative, in bytes and in lost quality. Raises `SelectionError` for a budget
        that no choice keeps.
        """


class ParameterPass(Pass):
    """A pass that gives parameters of a network new values, whatever they belong to.

    It is given no inputs. `layers` and `lm_head` mean nothing to it: it takes what it names.
    """

    # Why it leaves a layer alone that it does not name.
    untouched: ClassVar[str] = "it is given no new value"

    @abstractmethod
    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        """What becomes of the parameters that change, by the names of `places`; nothing is written before.

        places: all of the network. Raises `UserError` for what does not fit them.
        """

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that earlier passes removed stay 0."""
        return False

    @property
    def keeps_format(self) -> bool:
        """Whether the new weight of a layer that is compressed is compressed, too."""
        return False

    @property
    def checks(self) -> bool:
        """Whether what is written is compared with the network whose new values stand beside the old, unrounded."""
        return False

    @property
    def takes_adapter(self) -> bool:
        """Whether it takes the adapter that stands beside the weights of the checkpoint."""
        return False

    def with_adapter(self, folder: Path) -> Self:
        """These options, with the adapter that stands beside the weights; folder: where it is."""
        return self

    def store(self, weight: Tensor, before: Quantized) -> Quantized | Tensor:
        """How the new weight of a layer that was stored as `before` is stored; dense unless `keeps_format`.

        weight: float32 (out, in). A pattern of zeros is the engine's affair.
        """
        return weight


class Evaluator(Protocol):
    """What a search may ask of the network at hand. Every figure is computed or measured, once for each choice."""

    @property
    def name(self) -> str:
        """The step, for messages."""

    @property
    def quality(self) -> Figure:
        """By which figure the quality of this network is told: perplexity or accuracy."""

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the weight files besides the weights of the layers that are chosen for, at most; with headers."""

    def original(self) -> float:
        """The quality of the network that came in; `DataError` where it was not measured."""

    def say(self, text: str) -> None:
        """Tell whoever waits how far the search is, in one line."""

    def measure(self, figure: Figure, values: Mapping[str, float]) -> float:
        """The figure of a choice that is really carried out; values: of the option, for every layer by name."""


@dataclass(frozen=True)
class Layer:
    """A weight with inputs, as a pass sees it.

    weight: float32 (out, in); for a convolution in = in_channels / groups · kernel height · kernel width, the inputs
    being its patches. `dtype` is the checkpoint's: what scales and dense results are stored in. stored: the numbers as
    an earlier pass compressed them, for a pass that trains; None where they are dense. mask: what an earlier pass
    kept, None where it removed nothing; the other weights are 0, and stay 0 whatever a pass returns. biased: whether it
    has a bias or may be given one; has_bias: whether it has one, for a pass that trains. kernel: height and width of a
    convolution's kernel, (1, 1) of any other layer.
    """

    name: str
    kind: Kind
    weight: Tensor
    dtype: torch.dtype
    stored: Quantized | None = None
    mask: Mask | None = None
    biased: bool = False
    has_bias: bool = False
    kernel: tuple[int, int] = (1, 1)

    def parts(self, groups: int) -> list[Layer]:
        """The groups of a convolution as layers, each with its equal part of the rows."""
        masks = [None] * groups if self.mask is None else self.mask.chunk(groups)
        weights = self.weight.chunk(groups)
        return [
            dataclasses.replace(self, weight=weight, mask=mask) for weight, mask in zip(weights, masks, strict=True)
        ]


@dataclass(frozen=True)
class Surveyed:
    """A layer as a survey finds it. options: its pass, with the options of that layer; summary: from `summarize`."""

    name: str
    options: Any
    summary: Any


@dataclass(frozen=True)
class Group:
    """Layers that read one input, so that one scale per channel serves them all.

    options: the pass of each layer, with the options of that layer; channel: int64 (in,), the producer's output channel
    behind each input channel, None when they are free.
    """

    layers: tuple[Layer, ...]
    options: tuple[Any, ...]
    channel: Tensor | None = None

    def tied(self, values: Tensor) -> Tensor:
        """Average positive values (in,) geometrically over inputs behind one channel (the repeats of a shared head)."""
        return values if self.channel is None else tied(values, self.channel)


def tied(values: Tensor, channel: Tensor) -> Tensor:
    """Average positive values (in,) geometrically over the inputs behind one channel, int64 (in,)."""
    size = int(channel.max()) + 1
    total = values.new_zeros(size).index_add_(0, channel, values.log())
    count = values.new_zeros(size).index_add_(0, channel, torch.ones_like(values))
    return (total / count.clamp(min=1)).exp()[channel]


@dataclass(frozen=True)
class Outcome:
    """What became of one layer: a quantized weight or a dense one (out, in), and notes for the ledger.

    mask: which weights are kept, None where the pass removes none. The engine sets the others to 0, stores the weight
    sparse, and keeps them at 0 in every pass that follows. shift: float32 (out,), what is added to the bias of a layer
    that is `biased`; None adds nothing.
    """

    weight: Quantized | Tensor
    notes: dict[str, Any] = field(default_factory=dict)
    mask: Mask | None = None
    shift: Tensor | None = None

    def kept(self, layer: Layer) -> Mask | None:
        """What this pass and those before it keep of `layer`; None where nothing was removed."""
        kept = layer.mask if self.mask is None else self.mask & layer.mask
        return None if kept is None or bool(kept.kept.all()) else kept

    @staticmethod
    def joined(outcomes: Sequence[Outcome]) -> Outcome:
        """One outcome of the groups of a convolution, whose rows follow one another.

        A scale per tensor becomes one per channel, since each group has its own. Notes that are numbers are averaged,
        of the others those are kept that all groups agree on. Masks of several patterns become a bitmask.
        """
        notes: dict[str, Any] = {}
        for key in outcomes[0].notes:
            values = [outcome.notes.get(key) for outcome in outcomes]
            numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
            if len(numbers) == len(values):
                notes[key] = sum(numbers) / len(numbers)
            elif all(value == values[0] for value in values):
                notes[key] = values[0]
        weights = [outcome.weight for outcome in outcomes]
        packed = [weight for weight in weights if isinstance(weight, Quantized)]
        if len(packed) < len(weights):
            dense = [
                weight.dequantize(torch.float32) if isinstance(weight, Quantized) else weight for weight in weights
            ]
            return Outcome(torch.cat(dense), notes, _joined(outcomes), _shifts(outcomes))
        return Outcome(packed[0].join(packed[1:]), notes, _joined(outcomes), _shifts(outcomes))


def _joined(outcomes: Sequence[Outcome]) -> Mask | None:
    """The mask of all rows together; None where no outcome has one."""
    masks = [outcome.mask for outcome in outcomes if outcome.mask is not None]
    if not masks:
        return None
    shapes = [outcome.weight.shape for outcome in outcomes]
    kept = torch.cat(
        [
            torch.ones(shape, dtype=torch.bool, device=masks[0].kept.device) if own.mask is None else own.mask.kept
            for own, shape in zip(outcomes, shapes, strict=True)
        ]
    )
    same = len(masks) == len(outcomes) and all(mask.pattern == masks[0].pattern for mask in masks)
    return Mask(kept, masks[0].pattern) if same else Mask(kept)


def _shifts(outcomes: Sequence[Outcome]) -> Tensor | None:
    """What is added to the bias of all rows together; None where no outcome adds anything."""
    if all(outcome.shift is None for outcome in outcomes):
        return None
    parts = [torch.zeros(own.weight.shape[0]) if own.shift is None else own.shift for own in outcomes]
    return torch.cat([part.to(parts[0].device) for part in parts])


@dataclass(frozen=True)
class Observed:
    """What a pass over a whole graph is given, as far as it asked for it.

    batches: the calibration inputs, float32 (n, *shape), anew on each call; empty without `Needs.INPUTS`. dense: the
    network before its weights were first compressed, with the same layers; None without `Needs.DENSE`, and where
    none are compressed. chosen: the options of every layer that the pass may change, by name.
    """

    batches: Callable[[], Iterator[Tensor]] = lambda: iter(())
    dense: Graph | None = None
    chosen: Mapping[str, Pass] = field(default_factory=dict)

    def before_compression(self, name: str) -> Graph:
        """The network that the pass `name` compares with; `UserError` where no weights were compressed."""
        if self.dense is None:
            raise UserError(
                f"{name} compares with the network before its weights were compressed, and none were",
                "put it after the step that compresses the weights",
            )
        return self.dense


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels of a group; of a grouped convolution one of its parts.

    weight: float32 (out, in); position: int64 (in,), the position of the group behind each column, -1 behind those that
    the group leaves alone; seen: of its inputs, as they are before the cut, what `needs` asks for; biased: whether it
    has a bias or may be given one.
    """

    name: str
    weight: Tensor
    position: Tensor
    seen: Statistics
    biased: bool = False

    def per_position(self, values: Tensor, count: int) -> Tensor:
        """Sums of values (in,) over the columns behind each of `count` positions: float32 (count,)."""
        return Member("", 0, self.position).per_position(values, count)


# What batch norms measured of their inputs.
_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True)
class Members:
    """What a pass that cuts may look at of the members of its groups.

    read: a parameter by its state-dict key, float32 of its own shape; a language model reads it from the disk at each
    call. chosen: the options of every group, by its name. gradients: of a layer's parameter, in its shape, what `needs`
    asks for; empty of what belongs to no layer. samples: how many these are sums over. readers: the layers that read a
    group's channels, read at each call as well. influence: 1 - cos of the hidden states before and behind each block, a
    mean over tokens, float64 (blocks,), where `needs` asks for it.
    """

    read: Callable[[str], Tensor]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    gradients: Callable[[str], Mapping[Needs, Tensor]] = lambda parameter: {}
    samples: int = 0
    readers: Callable[[Coupled], Sequence[Reader]] = lambda group: ()
    influence: Tensor | None = None

    def sums(self, group: Coupled, measure: Callable[[Tensor], Tensor] = torch.square) -> Tensor:
        """Σ measure(w) over all weights that go with each position of a group, float32 (count,).

        measure: of each number of a parameter by itself. The statistics of batch norms are no weights.
        """
        found = (
            member.per_position(measure(self.read(member.parameter)), group.count)
            for member in group.members
            if not member.parameter.endswith(_STATISTICS)
        )
        return torch.stack(list(found)).sum(0)

    def products(self, group: Coupled, need: Needs) -> Tensor:
        """Σ w · g of each position, g = Σ ∂L/∂w, or Σ w² · g, g = Σ (∂L/∂w)²: float32 (count,).

        need: GRADIENTS or SQUARED_GRADIENTS. What belongs to no layer counts as 0.
        """
        total = torch.zeros(group.count)
        for member in group.members:
            slopes = self.gradients(member.parameter)
            if need in slopes:
                weight = self.read(member.parameter)
                weight = weight.square() if need is Needs.SQUARED_GRADIENTS else weight
                total += member.per_position(weight * slopes[need], group.count).to(total.device)
        return total


@dataclass(frozen=True)
class Step:
    """A batch on its way through a network in training, as a loss sees it.

    inputs: float32 (n, *shape); outputs: of the network, float32 (n, ...); dense, original: those of the networks that
    `Needs.DENSE` and `Needs.ORIGINAL` name, None unless asked for; labels: int64 (n,), None without `Needs.LABELS`;
    progress: the share of all steps that are done, in [0, 1); scale: the sum of the second numbers of
    `TrainPass.measure` before training, as a mean over the batches. `TrainPass.measure` is given 0 and 1.
    """

    inputs: Tensor
    outputs: Tensor
    dense: Tensor | None = None
    original: Tensor | None = None
    labels: Tensor | None = None
    progress: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Attached:
    """A layer in training. Tensors may be changed in place.

    module: what `AttachPass.attach` returned, whose buffers are kept in snapshots; weight: float32 (out, in) and bias
    (out,) as they are trained; None of a layer without a bias.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Beside:
    """A layer with an adapter beside it. module: PEFT's, around it; options: the pass, with those of that layer.

    packed: whether it is stored in codes; weight: reads it, float32 (out, in), where it is dense a view of what runs;
    original: reads that of the original network, float32 (out, in).
    """

    module: Any
    options: Any
    packed: bool
    weight: Callable[[], Tensor]
    original: Callable[[], Tensor]


@dataclass(frozen=True)
class Transformed:
    """What became of a whole graph. notes: for the ledger, by layer; a layer without any was left as it was."""

    network: Graph | IntegerNetwork
    notes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    activations: tuple[ActivationRange, ...] = ()
    remarks: tuple[str, ...] = ()
    training: Training | None = None


# Hands a layer to its pass, as `carry_out` does.
Apply = Callable[[LayerPass, Layer, Sequence[Statistics]], Outcome]
# What a pass is given that asks for nothing.
UNSEEN = Statistics(0, Needs.NOTHING)


def carry_out(options: LayerPass, layer: Layer, seen: Sequence[Statistics] = ()) -> Outcome:
    """What becomes of one layer; seen: of the inputs of each of its groups, empty where nothing was gathered.

    Raises `PluginError` for what is no outcome of this layer; whether its numbers are finite is not looked at.
    """

    def kind() -> str:
        # What an earlier pass kept of a layer is that layer's alone.
        own = layer.name if layer.mask is not None else ""
        return f"{options!r} {layer.kind} {tuple(layer.weight.shape)} {layer.biased} {len(seen)} {own}"

    if len(seen) > 1:
        return _outcome(options, "apply_groups", layer, once(kind, lambda: options.apply_groups(layer, seen)))
    return _outcome(options, "apply", layer, once(kind, lambda: options.apply(layer, seen[0] if seen else UNSEEN)))


def finished(options: AttachPass, layer: Layer, trained: nn.Module) -> Outcome:
    """What becomes of one layer that was trained; trained: what the pass attached to it."""
    return _outcome(options, "finish", layer, options.finish(layer, trained))


def _outcome(options: Pass, method: str, layer: Layer, made: Any) -> Outcome:
    """What a pass made of a layer; `PluginError` unless it is an outcome of this layer."""
    asked = Asked(options, method, layer.name)
    outcome: Outcome = asked.expect(made, Outcome, "an `Outcome`")
    asked.check_weight(outcome.weight, tuple(layer.weight.shape))
    asked.check_mask(outcome.mask, layer.mask, outcome.weight)
    asked.check_shift(outcome.shift, layer.weight.shape[0] if layer.biased else None)
    asked.check_notes(outcome.notes)
    return outcome


__all__ = [
    "UNSEEN",
    "AdapterPass",
    "Apply",
    "AttachPass",
    "Attached",
    "Beside",
    "Change",
    "CutPass",
    "Evaluator",
    "Group",
    "Layer",
    "LayerPass",
    "Members",
    "Needs",
    "NetworkPass",
    "Observed",
    "Outcome",
    "ParameterPass",
    "Pass",
    "Reader",
    "ScalingPass",
    "SearchPass",
    "Statistics",
    "Step",
    "Surveyed",
    "TrainPass",
    "Transformed",
    "carry_out",
    "finished",
    "tied",
]
