"""AdaRound: learn for each weight whether it is rounded up or down (arXiv:2004.10568).

The nearest level is not the best one: errors of weights that see correlated inputs should cancel. A weight becomes
W̃ = s · clamp(⌊W/s⌋ + h(V), n, p) with the rectified sigmoid h(V) = clamp(σ(V)(ζ - γ) + γ, 0, 1) (eq. 22 and 23), and V
minimises ‖(W̃ - W) X‖² + λ Σ (1 - |2h(V) - 1|^β) (eq. 21 and 24), where β falls so that every h(V) ends at 0 or 1. With
G = X Xᵀ the first term is tr((W̃ - W) G (W̃ - W)ᵀ): no forward pass is needed, and its gradient is a product with G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.formats import Affine, AffineWeight
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome, Statistics
from effcli.passes.quantize._affine import clipped_range, encode, extremes, parameters
from effcli.platform.rehearsal import few

# ζ and γ stretch the sigmoid, so that h reaches 0 and 1 at finite V.
_STRETCH, _OFFSET = 1.2, -0.1
# β falls from the first to the second, after a share of the iterations without the regulariser.
_BETAS = (8.0, 2.0)
_WARM_UP = 0.1
# λ, in units of what rounding a row to nearest costs per weight. Too little of it and weights end between two levels.
_REGULARISER = 10.0
# A row that rounding hardly harms is not measured in its own unit: as a share of what a whole step everywhere costs.
_SMALLEST_UNIT = 1e-6
_DECAYS = (0.9, 0.999)
# Weights per step: rows are independent, and few at a time stay in the cache.
_STEP = 1 << 20
_FEWEST_ROWS = 64
# Seconds for which a rehearsal takes steps.
_REHEARSED = 0.05
SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6, 0.56, 0.52, 0.48)


class AdaRound(LayerPass):
    """An `adaround` step."""

    rare: ClassVar[tuple[str, ...]] = ("range", "learning_rate")

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="Bits per weight.")
    group_size: int | None = Field(
        None, ge=1, description="Inputs that share a scale; must divide each layer's. null: the whole output channel."
    )
    symmetric: bool = Field(True, description="A range around zero, with no zero point to store.")
    range: Literal["minmax", "least_squares"] = Field(
        "least_squares", description="The range of the weights, or the smaller one with the least error of the outputs."
    )
    iterations: int = Field(1000, ge=1, description="Steps of gradient descent.")
    learning_rate: float = Field(0.05, gt=0, le=1000, description="Of Adam (arXiv:1412.6980).")

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def format(self) -> Affine:
        return Affine(self.bits, "group" if self.group_size else "channel", self.group_size or 0, self.symmetric)

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Quantize one weight (out, in) under the Gram matrix of its inputs."""
        return self.apply_groups(layer, (seen,))

    def apply_groups(self, layer: Layer, seen: Sequence[Statistics]) -> Outcome:
        """Quantize the weight (out, in) of a layer whose rows fall into as many equal groups as `seen` has entries."""
        format = self.format
        weight = layer.weight
        parts = weight.view(len(seen), -1, weight.shape[1])
        if self.range == "least_squares":
            ranges = [
                clipped_range(rows, gram.matrix, format, layer.dtype, SHRINKS)
                for rows, gram in zip(parts, seen, strict=True)
            ]
            low, high = (torch.cat(bounds) for bounds in zip(*ranges, strict=True))
        else:
            low, high = extremes(weight, format)
        if not any(gram.tokens for gram in seen):
            return Outcome(encode(weight, low, high, format, layer.dtype))
        scale, zero = parameters(low, high, format, layer.dtype)
        codes, notes = learn(weight, torch.stack([gram.matrix for gram in seen]), scale, zero, format, self)
        stored_zero = None if format.symmetric else zero.to(torch.uint8)
        return Outcome(AffineWeight(format, codes, scale.to(layer.dtype), stored_zero), notes)


@dataclass(frozen=True)
class Rows:
    """Weights, the grid that each is rounded to, and what their inputs are.

    target, step (the scale) and origin (the zero point) of each weight: float32 (groups, rows, in); grams: float32
    (groups, in, in); levels: the largest code.
    """

    target: Tensor
    step: Tensor
    origin: Tensor
    grams: Tensor
    levels: int

    def part(self, rows: slice) -> Rows:
        return Rows(self.target[:, rows], self.step[:, rows], self.origin[:, rows], self.grams, self.levels)

    def difference(self, codes: Tensor) -> Tensor:
        """W̃ - W of codes (groups, rows, in), which need not be whole; those out of range are clamped."""
        return (codes.clamp(0, self.levels) - self.origin).mul_(self.step).sub_(self.target)

    def errors(self, codes: Tensor) -> Tensor:
        """The output error of each row, (W̃ - W) G (W̃ - W)ᵀ, float64 (groups, rows)."""
        difference = self.difference(codes).double()
        return (difference @ self.grams.double()).mul_(difference).sum(-1)


def learn(
    weight: Tensor, grams: Tensor, scale: Tensor, zero: Tensor, format: Affine, config: AdaRound
) -> tuple[Tensor, dict[str, Any]]:
    """Codes uint8 (out, in) whose output error is, row for row, no larger than that of the nearest ones, and notes.

    weight: float32 (out, in), its rows in as many equal groups as there are grams, float32 (groups, in, in); scale,
    zero: float32, shaped as the format's scales.
    """
    groups, columns = grams.shape[0], grams.shape[1]
    width = columns // scale.shape[1]
    shape = groups, -1, columns
    step, origin = (values.repeat_interleave(width, 1).view(shape) for values in (scale, zero))
    whole = Rows(weight.view(shape), step, origin, grams, format.levels)
    size = max(_STEP // (groups * columns), _FEWEST_ROWS)
    count = whole.target.shape[1]
    parts = [_learn(whole.part(slice(start, start + size)), config) for start in range(0, count, size)]
    codes = torch.cat([part for part, _ in parts], dim=1)
    nearest = torch.cat([part for _, part in parts], dim=1)
    before, after = whole.errors(nearest), whole.errors(codes)
    total = float(before.sum())
    notes: dict[str, Any] = {
        "moved": round(float((codes != nearest).float().mean()), 4),
        "rounding_gain": round(1 - float(after.sum()) / total, 4) if total > 0 else 0.0,
    }
    kept = int((after == before).sum())
    if kept:
        notes["rows_rounded_to_nearest"] = kept
    return codes.view_as(weight).to(torch.uint8), notes


def _learn(rows: Rows, config: AdaRound) -> tuple[Tensor, Tensor]:
    """Learned and nearest codes (groups, rows, in); where the nearest ones of a row are as good, they are taken."""
    exact = rows.target / rows.step
    below = exact.floor().add_(rows.origin)
    nearest = exact.round().add_(rows.origin).clamp_(0, rows.levels)
    rounded = rows.errors(nearest)
    up = _descend(rows, below, (exact + rows.origin).sub_(below), rounded, config)
    learned = (below + (up >= 0.5)).clamp_(0, rows.levels)
    better = rows.errors(learned) < rounded
    return torch.where(better.unsqueeze(-1), learned, nearest), nearest


def _descend(rows: Rows, below: Tensor, cut: Tensor, rounded: Tensor, config: AdaRound) -> Tensor:
    """h(V) after training, (groups, rows, in) in [0, 1]: how much of a step each weight is rounded up.

    below: codes rounded down; cut: the fraction that this cut off; rounded: `errors` of the nearest codes. Rows are
    independent, so the loss of each is measured in its own unit: what rounding to nearest costs per weight.
    """
    steps = (rows.step.square() * rows.grams.diagonal(dim1=1, dim2=2).unsqueeze(1)).mean(-1, keepdim=True)
    unit = (rounded.float() / cut.shape[-1]).unsqueeze(-1).maximum(steps * _SMALLEST_UNIT)
    slope = 2 * rows.step / unit.clamp_(min=torch.finfo(torch.float32).tiny)
    # Training starts at W̃ = W.
    values = ((cut.clamp(0.01, 0.99) - _OFFSET) / _STRETCH).logit_()
    mean, square = torch.zeros_like(values), torch.zeros_like(values)
    warm = int(_WARM_UP * config.iterations)
    for k in chain(few(range(warm), lasting=_REHEARSED), few(range(warm, config.iterations), lasting=_REHEARSED)):
        sigmoid = values.sigmoid()
        up = (sigmoid * _STRETCH).add_(_OFFSET)
        free = (up > 0) & (up < 1)
        codes = up.clamp_(0, 1) + below
        gradient = (rows.difference(codes) @ rows.grams).mul_(slope)
        gradient.mul_((codes >= 0) & (codes <= rows.levels))
        if k >= warm:
            progress = (k - warm) / (config.iterations - warm)
            beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * 0.5 * (1 + math.cos(math.pi * progress))
            centred = up.mul_(2).sub_(1)
            gradient.sub_(centred.abs().pow_(beta - 1).mul_(centred.sign()), alpha=2 * beta * _REGULARISER)
        # Through the clamp of h and through the sigmoid, whose slope is σ (1 - σ).
        gradient.mul_(free).mul_(sigmoid).mul_(1 - sigmoid).mul_(_STRETCH)
        mean.lerp_(gradient, 1 - _DECAYS[0])
        square.lerp_(gradient.square_(), 1 - _DECAYS[1])
        spread = (square / (1 - _DECAYS[1] ** (k + 1))).sqrt_().add_(1e-8)
        values.addcdiv_(mean, spread, value=-config.learning_rate / (1 - _DECAYS[0] ** (k + 1)))
    return values.sigmoid_().mul_(_STRETCH).add_(_OFFSET).clamp_(0, 1)


__all__ = ["AdaRound", "Rows", "learn"]
