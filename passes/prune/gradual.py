"""Gradual pruning: remove the smallest weights in rounds, and train what is left in between.

The removed share rises along a cubic curve (Zhu and Gupta, arXiv:1710.01878, equation 1), s (1 - (1 - t)³): fast while
many weights are superfluous, slowly towards the end. With `rewind` each round begins again from the weights of early
training, in search of a subnetwork that learns as well from there: a lottery ticket (arXiv:1803.03635; early weights in
place of the first: arXiv:1912.05671).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from effcli.errors import RecipeError
from effcli.formats import Mask
from effcli.layers.contract import Attached, AttachPass, Change, Layer, Outcome
from effcli.options import Share
from effcli.passes.prune._pruning import largest, pruned, removals
from effcli.passes.train._tuning import Tuning
from effcli.reports.units import count

# Rounds unless asked for.
_ROUNDS = 20


class Gradual(Tuning, AttachPass):
    """A `gradual` step."""

    takes: ClassVar[str] = "floating weight"
    remedy: ClassVar[str] = "put it before the step that compresses the weights"
    trains_biases: ClassVar[bool] = True
    per_layer: ClassVar[frozenset[str]] = frozenset({"sparsity"})

    changes: ClassVar[Change] = Change.VALUES | Change.MASK
    rare: ClassVar[tuple[str, ...]] = (*Tuning.rare, "until", "rewind")

    sparsity: Share = Field(0.8, ge=0, lt=1, description="Share of the weights that is removed in the end.")
    compare: Literal["layer", "network"] = Field(
        "layer",
        description="Which weights compete: those of a layer, or those of all layers, each in units of the root mean "
        "square of its layer's.",
    )
    rounds: int | None = Field(
        None,
        ge=1,
        description="How often weights are removed; null: 20 times, or after every step where these are fewer.",
    )
    until: Share = Field(
        0.75,
        gt=0,
        le=1,
        description="Share of the training at which the last are removed, 0.75 or 75%; then it is trained further.",
    )
    rewind: Share | None = Field(
        None,
        gt=0,
        lt=1,
        description="When the weights are remembered, as a share of the first round, 0.5 or 50%. Every later "
        "round begins with them. Without it, training goes on from where it is.",
    )

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        own = {key for options in self.layers.values() for key in options}
        if own and self.compare == "network":
            raise ValueError("no layer has a sparsity of its own where the weights of all layers compete")
        if self.steps is not None and self._crowded(self.steps):
            raise ValueError(f"{self._crowded(self.steps)}; set rounds lower, or steps higher")
        if self.rewind is not None and self.until == 1:
            raise ValueError("with rewind the last round needs steps to train in: set until below 1")
        if self.rewind is not None and self.schedule != "constant":
            raise ValueError("with rewind every round trains alike: set schedule to constant")
        return self

    def check_steps(self, steps: int) -> None:
        if self._crowded(steps):
            raise RecipeError(
                f"{self._crowded(steps)}, those of {count(self.epochs, 'epoch')}",
                "set rounds lower or epochs higher, or take smaller batches or more calibration inputs",
            )

    def _crowded(self, steps: int) -> str:
        """Says so where not every round that was asked for has a step of its own; else empty."""
        # 0.29 of 100 is 28.999999999999996 in floating point.
        if self.rounds is None or steps * self.until >= self.rounds - 1e-9:
            return ""
        verb = "does" if self.rounds == 1 else "do"
        return f"{count(self.rounds, 'round')} {verb} not fit into {self.until:g} of {count(steps, 'step')}"

    @property
    def _rounds(self) -> int:
        return _ROUNDS if self.rounds is None else self.rounds

    def counts(self, progress: float) -> bool:
        """Whether all rounds are done."""
        return self._due(progress) == self._rounds

    def attach(self, layer: Layer) -> nn.Module | None:
        """A floating weight under a mask; a compressed one stays, for it would come out dense."""
        return None if layer.stored is not None else _Masked(layer, self.sparsity, self.rewind is not None)

    def advance(self, attached: Mapping[str, Attached], progress: float) -> bool:
        """Remove the weights that are due, and with `rewind` go back to early ones; true where it went back."""
        layers = [(own, own.module) for own in attached.values() if isinstance(own.module, _Masked)]
        if self.rewind is not None:
            for own, module in layers:
                module.remember(own, progress >= self.rewind * self.until / self._rounds)
        due = self._due(progress)
        if not any(module.done < due for _, module in layers):
            return False
        rise = 1 - (1 - due / self._rounds) ** 3
        scores = [own.weight.abs().masked_fill(~module.kept, -torch.inf) for own, module in layers]
        if self.compare == "layer":
            shares = [module.sparsity * rise for _, module in layers]
            masks = [_least_removed(score, share) for score, share in zip(scores, shares, strict=True)]
        else:
            every = torch.cat([_in_own_units(score) for score in scores])
            flat = torch.split(_least_removed(every, self.sparsity * rise), [score.numel() for score in scores])
            masks = [part.view_as(score) for part, score in zip(flat, scores, strict=True)]
        for (own, module), mask in zip(layers, masks, strict=True):
            module.kept &= mask
            module.done.fill_(due)
            if self.rewind is not None:
                module.recall(own)
        return self.rewind is not None

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The trained weight under its mask."""
        assert isinstance(trained, _Masked)
        return pruned(layer.weight, Mask(trained.kept), layer)

    def _due(self, progress: float) -> int:
        """How many rounds are due."""
        return min(int(progress / self.until * self._rounds), self._rounds)


def _least_removed(scores: Tensor, share: float) -> Tensor:
    """Keep all scores but this share of them, bool of their shape."""
    flat = scores.reshape(1, -1)
    return largest(flat, removals(share, flat)).view(scores.shape)


def _in_own_units(scores: Tensor) -> Tensor:
    """Scores of one layer over their root mean square, flat; the largest is infinite, so that no layer is emptied."""
    flat = scores.flatten()
    left = flat[flat >= 0]
    if not left.numel():
        return flat
    made = flat / left.square().mean().sqrt().clamp(min=torch.finfo(flat.dtype).tiny)
    return made.index_fill(0, flat.argmax(), torch.inf)


class _Masked(nn.Module):
    """A weight (out, in) under a mask.

    kept: bool (out, in); done: int64 (), the rounds that are done; early, early_bias: the weight and the bias that
    rounds begin with, known: bool (), whether they are remembered. Buffers, so that snapshots hold them.
    """

    kept: Tensor
    done: Tensor
    known: Tensor
    early: Tensor
    early_bias: Tensor

    def __init__(self, layer: Layer, sparsity: float, rewinds: bool) -> None:
        super().__init__()
        self.sparsity = sparsity
        weight = layer.weight
        whole = torch.ones_like(weight, dtype=torch.bool)
        self.register_buffer("kept", whole if layer.mask is None else layer.mask.kept.clone())
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))
        self.register_buffer("early", weight.clone() if rewinds else weight.new_empty(0))
        self.register_buffer("early_bias", weight.new_zeros(len(weight) if rewinds else 0))

    def remember(self, own: Attached, due: bool) -> None:
        """Remember weight and bias once they are due."""
        if due and not self.known:
            self.early.copy_(own.weight)
            if own.bias is not None:
                self.early_bias.copy_(own.bias)
            self.known.fill_(True)

    def recall(self, own: Attached) -> None:
        """Go back to the weight and the bias that are remembered."""
        own.weight.copy_(self.early)
        if own.bias is not None:
            own.bias.copy_(self.early_bias)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(~self.kept, 0)


__all__ = ["Gradual"]
