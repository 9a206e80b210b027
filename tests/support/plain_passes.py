"""Passes as another package might offer them: of one line, and without a word on the format of what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effcli.formats import Mask
from effcli.layers.contract import (
    AttachPass,
    Change,
    CutPass,
    Layer,
    LayerPass,
    Members,
    Needs,
    Outcome,
    Statistics,
    Step,
)
from effcli.layers.coupling import Coupled, Cut
from effcli.run.recipe import PassStep


class Halve(LayerPass):
    """Halves every weight. asks: for what."""

    asks: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(self.asks)

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(layer.weight / 2)


class Prune(LayerPass):
    """Keeps the larger half of each row."""

    changes: ClassVar[Change] = Change.VALUES | Change.MASK

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        weight = layer.weight
        return Outcome(weight, mask=Mask(weight.abs() >= weight.abs().median(1, keepdim=True).values))


class Trim(CutPass):
    """Removes the last channel of every group that has two or more. asks: for what."""

    asks: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(self.asks)

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        return [Cut(group, torch.arange(group.count) < max(1, group.count - 1)) for group in groups]


class Tune(AttachPass):
    """Trains the weights themselves, towards outputs of 1."""

    def attach(self, layer: Layer) -> nn.Module | None:
        return nn.Identity()

    def loss(self, step: Step) -> Tensor:
        return (step.outputs - 1).square().mean()

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        return Outcome(layer.weight)


def asking(needs: Needs, **options: Any) -> PassStep:
    """A step that halves weights and asks for `needs`."""
    return PassStep(name="asking", config=Halve(asks=needs.value, **options))


HALVE, PRUNE = PassStep(name="halve", config=Halve()), PassStep(name="prune", config=Prune())
