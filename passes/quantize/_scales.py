"""A factor per input channel that protects what activations make salient (AWQ, arXiv:2306.00978, eq. 4 and 5).

Weights W become Q(W·s) and inputs X / s, with s = m^α normalised to √(max·min) = 1, m the mean magnitude of each
input channel. α is found on a grid by the output error itself: with G = X Xᵀ it is ‖(Q(W·s)/s - W) X‖² = tr(D G Dᵀ),
algebra on sums already taken instead of a forward pass per candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.formats import Affine
from effcli.layers.contract import Group, Needs, ScalingPass, Statistics
from effcli.passes.quantize._affine import nearest

# Steps of the grid of α over [0, 1], and by how many each interval beside the best is divided afterwards.
COARSE = 5
FINE = 4
# Candidates are ranked by this many rows of each layer, evenly spaced; the winner is checked on all of them.
_SAMPLED_ROWS = 256
# A gain many times the rounding error of bf16 products, which is about 0.002 of the error.
_CLEAR = 0.05
# Rows per step: the working set of a step stays in the second-level cache.
_ROWS = 256


class Scaled(ScalingPass):
    """Options of passes that scale the channels of a shared input and round affinely."""

    graph_defaults: ClassVar[Mapping[str, Any]] = {"group_size": None}

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="Bits per weight.")
    group_size: int | None = Field(
        64, ge=1, description="Input channels that share a scale; must divide each layer's. null: the whole channel."
    )
    symmetric: bool = Field(False, description="A range around zero, with no zero point to store.")
    without_pair: Literal["unscaled", "explicit"] = Field(
        "unscaled",
        description="Where no module can take in the scale: leave the layers unscaled, or keep the scale on their "
        "input at run time, in effcli's own layout.",
    )

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def without_scale(self) -> Literal["unscaled", "explicit"]:
        return self.without_pair

    @property
    def format(self) -> Affine:
        return Affine(self.bits, "group" if self.group_size else "channel", self.group_size or 0, self.symmetric)


def find_scale(
    formats: Sequence[Affine], group: Group, seen: Statistics, coarse: int = COARSE, fine: int = FINE
) -> tuple[Tensor, dict[str, float]]:
    """Factor per input channel, float32 (in,), for the layers of `group`, one format for each, and notes.

    The factor is never worse than none: α = 0 is on the grid, and the winner is checked against it on all rows, in
    float32 where the two are close.
    """
    magnitude = group.tied(seen.magnitude.clamp(min=1e-8))
    working = seen.working()
    dtypes = [layer.dtype for layer in group.layers]
    whole = [layer.weight for layer in group.layers]
    sampled = [_sample(weight) for weight in whole]

    def error(alpha: float, weights: list[Tensor], gram: Tensor) -> float:
        return sum(
            weight.shape[0] / rows.shape[0] * scaled_error(rows, scales(magnitude, alpha), gram, format, dtype)
            for format, dtype, weight, rows in zip(formats, dtypes, whole, weights, strict=True)
        )

    errors = {k / coarse: error(k / coarse, sampled, working) for k in range(coarse + 1)}
    best = min(errors, key=errors.__getitem__)
    step = 1 / (coarse * fine)
    for k in range(1 - fine, fine):
        alpha = best + k * step
        if k and 0 <= alpha <= 1:
            errors[alpha] = error(alpha, sampled, working)
    best = min(errors, key=errors.__getitem__)
    none, chosen = error(0.0, whole, working), error(best, whole, working)
    if chosen > (1 - _CLEAR) * none:
        none, chosen = error(0.0, whole, seen.matrix), error(best, whole, seen.matrix)
    if not chosen < none:
        return torch.ones_like(magnitude), {"alpha": 0.0}
    return scales(magnitude, best), {"alpha": round(best, 4), "scale_gain": round(1 - chosen / none, 4)}


def scales(magnitude: Tensor, alpha: float) -> Tensor:
    """m^α with √(max·min) = 1, float32 (in,)."""
    if alpha == 0:
        return torch.ones_like(magnitude)
    factor = magnitude.pow(alpha).clamp(min=1e-4)
    return factor / (factor.max() * factor.min()).sqrt()


def scaled_error(weight: Tensor, factor: Tensor, gram: Tensor, format: Affine, dtype: torch.dtype) -> float:
    """tr(D G Dᵀ) for D = Q(W·s)/s - W, weight (out, in), factor (in,), gram (in, in)."""
    total = 0.0
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS]
        difference = nearest(rows * factor, format, dtype).div_(factor).sub_(rows)
        product = difference.to(gram.dtype) @ gram
        total += float(torch.einsum("oi,oi->", product.float(), difference))
    return total


def _sample(weight: Tensor) -> Tensor:
    """Some rows of weight (out, in), evenly spaced."""
    return weight[:: max(1, weight.shape[0] // _SAMPLED_ROWS)].contiguous()
