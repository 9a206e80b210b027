"""What a pass sees and returns. The runner reads `needs` and `scope`; it never asks which pass it has.

A pass module `passes/<name>.py` holds

- `Config`, a `PassConfig`: its options, and what it needs;
- `apply(config, layer, seen) -> Outcome`: what becomes of one layer's weight;
- with `Scope.GROUP` also `scale(configs, group, seen) -> (Tensor, notes)`: a factor per input channel of layers that
  share one input. The runner folds its inverse into the module that produces the input and hands `apply` the scaled
  weight and the Gram matrix of the scaled input;
- where more is to be kept of the inputs than a Gram matrix, `observer(config, features) -> Gram`, which keeps it too;
- with `Scope.GRAPH` instead of `apply` `transform(config, graph, seen) -> Transformed`: what becomes of a whole graph.

A convolution is a layer whose inputs are its patches. A grouped one is as many independent layers as it has groups:
where a pass needs inputs, `apply` sees one group at a time, with the Gram matrix of that group's patches, unless the
module also holds `apply_groups(config, layer, seen) -> Outcome`, which takes the whole layer and one Gram per group.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from effcli.formats import Packing, Quantized
from effcli.observers import Gram

if TYPE_CHECKING:
    from effcli.graphs.graph import Graph
    from effcli.graphs.integer import IntegerNetwork
    from effcli.reports.report import ActivationRange

Kind = Literal["linear", "conv1d", "expert", "conv"]


class Needs(enum.Enum):
    """What a pass must be given besides the weights."""

    NOTHING = "nothing"
    INPUTS = "inputs"
    REFERENCE = "reference"  # inputs, and the network as it was before its weights were first compressed


class Scope(enum.Enum):
    """What a pass looks at in one step."""

    LAYER = "layer"
    GROUP = "group"
    GRAPH = "graph"


class Options(BaseModel):
    """Options are frozen and know their keys: a misspelt one is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class PassConfig(Options):
    """Options that every weight pass has."""

    needs: ClassVar[Needs] = Needs.NOTHING
    scope: ClassVar[Scope] = Scope.LAYER
    # Whether no step can follow, because what the pass writes has no floating-point layers any more.
    last: ClassVar[bool] = False
    # How many float32 matrices (in, in) of one layer a pass makes at a time, beside the Gram matrix it is given.
    workspace: ClassVar[int] = 0
    # Defaults that differ in networks read as a graph: their layers are too narrow for groups of weights.
    graph_defaults: ClassVar[Mapping[str, Any]] = {}

    ignore: tuple[str, ...] = Field((), description="Layers to leave alone, as glob patterns of their names.")
    layers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Other options for the layers that match a glob pattern; the last match wins."
    )
    lm_head: bool = Field(False, description="Also take the output head, which stands outside the repeated blocks.")

    @property
    def needed(self) -> Needs:
        """What these options need: what the pass needs, unless some of its options need more."""
        return self.needs

    @property
    def result(self) -> Packing | None:
        """The format of the weights that a step with these options leaves; None where they stay floating."""
        return getattr(self, "format", None)

    def integer(self, graph: Graph) -> Graph | None:
        """A copy of `graph` as it becomes a network of integers; None where a step leaves floating layers."""
        return None

    def for_graph(self) -> Self:
        """These options in a network read as a graph: what was not set takes the defaults for graphs."""
        defaults = {key: value for key, value in self.graph_defaults.items() if key not in self.model_fields_set}
        return self.model_copy(update=defaults)


@dataclass(frozen=True)
class Layer:
    """A weight with inputs, as a pass sees it.

    weight: float32 (out, in); for a convolution in = in_channels / groups · kernel height · kernel width, the inputs
    being its patches. `dtype` is the checkpoint's: what scales and dense results are stored in.
    """

    name: str
    kind: Kind
    weight: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Group:
    """Layers that read one input, so that one scale per channel serves them all.

    channel: int64 (in,), the producer's output channel behind each input channel, None when they are free.
    """

    layers: tuple[Layer, ...]
    channel: Tensor | None = None

    def tied(self, values: Tensor) -> Tensor:
        """Average positive values (in,) geometrically over inputs behind one channel (the repeats of a shared head)."""
        if self.channel is None:
            return values
        size = int(self.channel.max()) + 1
        total = values.new_zeros(size).index_add_(0, self.channel, values.log())
        count = values.new_zeros(size).index_add_(0, self.channel, torch.ones_like(values))
        return (total / count.clamp(min=1)).exp()[self.channel]


@dataclass(frozen=True)
class Outcome:
    """What became of one layer: a quantized weight or a dense one (out, in), and notes for the ledger."""

    weight: Quantized | Tensor
    notes: dict[str, Any] = field(default_factory=dict)


def observer(module: ModuleType, config: PassConfig | None, features: int) -> Gram:
    """What sums up the inputs of a layer for the pass `module`: of its own kind where it has one."""
    make: Callable[[PassConfig | None, int], Gram] | None = getattr(module, "observer", None)
    return Gram(features) if make is None else make(config, features)


@dataclass(frozen=True)
class Observed:
    """What a pass over a whole graph is given, as far as it asked for it.

    batches: the calibration inputs, float32 (n, *shape), anew on each call; empty with `Needs.NOTHING`. reference: the
    network before its weights were first compressed, with the same layers; None unless asked for. chosen: the options
    of every layer that the pass may change, by name.
    """

    batches: Callable[[], Iterator[Tensor]] = lambda: iter(())
    reference: Graph | None = None
    chosen: Mapping[str, PassConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Transformed:
    """What became of a whole graph. notes: for the ledger, by layer; a layer without any was left as it was."""

    network: Graph | IntegerNetwork
    notes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    activations: tuple[ActivationRange, ...] = ()
    remarks: tuple[str, ...] = ()


__all__ = [
    "Gram",
    "Group",
    "Kind",
    "Layer",
    "Needs",
    "Observed",
    "Options",
    "Outcome",
    "PassConfig",
    "Scope",
    "Transformed",
    "observer",
]
