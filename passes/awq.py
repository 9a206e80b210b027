"""AWQ: protect the channels that activations make salient by scaling them up before rounding (arXiv:2306.00978).

Weights W become Q(W·s) and inputs X / s, with s = m^α normalised to √(max·min) = 1, m the mean magnitude of each
input channel (eq. 4 and 5). α is found on a grid by the output error itself: with G = X Xᵀ it is
‖(Q(W·s)/s - W) X‖² = tr(D G Dᵀ), algebra on sums already taken instead of a forward pass per candidate. Then each
range is clipped under the same error, which the paper does per group and we do with the errors of all other groups
in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.contract import Gram, Group, Layer, Needs, Outcome, PassConfig, Scope
from effcli.formats import Affine
from effcli.passes._affine import clipped_range, encode, extremes, nearest

# Few bits leave few levels, and then giving up more of the range pays.
SHRINKS = {
    True: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
    False: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64),
}
# Candidates are ranked by this many rows of each layer, evenly spaced; the winner is checked on all of them.
_SAMPLED_ROWS = 256
# A gain many times the rounding error of bf16 products, which is about 0.002 of the error.
_CLEAR = 0.05
# Rows per step: the working set of a step stays in the second-level cache.
_ROWS = 256


class Config(PassConfig):
    """Options of an `awq` step."""

    needs: ClassVar[Needs] = Needs.INPUTS
    scope: ClassVar[Scope] = Scope.GROUP
    graph_defaults: ClassVar[Mapping[str, Any]] = {"group_size": None}

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="Bits per weight.")
    group_size: int | None = Field(
        64, ge=1, description="Input channels that share a scale; must divide each layer's. null: the whole channel."
    )
    symmetric: bool = Field(False, description="A range around zero, with no zero point to store.")
    clip: bool = Field(True, description="Also search for a smaller range of each group.")
    coarse: int = Field(5, ge=1, description="Steps of the first grid of α over [0, 1].")
    fine: int = Field(4, ge=1, description="Steps by which each interval beside the best is divided afterwards.")
    without_pair: Literal["unscaled", "explicit"] = Field(
        "unscaled",
        description="Where no module can take in the scale: leave the layers unscaled, or keep the scale on their "
        "input at run time, in effcli's own layout.",
    )

    @property
    def format(self) -> Affine:
        return Affine(self.bits, "group" if self.group_size else "channel", self.group_size or 0, self.symmetric)


def scale(configs: tuple[Config, ...], group: Group, seen: Gram) -> tuple[Tensor, dict[str, float]]:
    """Factor per input channel, float32 (in,), for the layers of `group` with their options, and notes.

    The factor is never worse than none: α = 0 is on the grid, and the winner is checked against it on all rows, in
    float32 where the two are close.
    """
    magnitude = group.tied(seen.magnitude.clamp(min=1e-8))
    first = configs[0]
    working = seen.working()
    dtypes = [layer.dtype for layer in group.layers]
    whole = [layer.weight for layer in group.layers]
    sampled = [_sample(weight) for weight in whole]

    def error(alpha: float, weights: list[Tensor], gram: Tensor) -> float:
        return sum(
            weight.shape[0] / rows.shape[0] * _scaled_error(rows, scales(magnitude, alpha), gram, config.format, dtype)
            for config, dtype, weight, rows in zip(configs, dtypes, whole, weights, strict=True)
        )

    errors = {k / first.coarse: error(k / first.coarse, sampled, working) for k in range(first.coarse + 1)}
    best = min(errors, key=errors.__getitem__)
    step = 1 / (first.coarse * first.fine)
    for k in range(1 - first.fine, first.fine):
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


def apply(config: Config, layer: Layer, seen: Gram) -> Outcome:
    """Quantize one weight (out, in), already scaled, under the Gram matrix of its scaled inputs."""
    format = config.format
    if config.clip and seen.tokens:
        low, high = clipped_range(layer.weight, seen.matrix, format, layer.dtype, SHRINKS[config.bits <= 3])
    else:
        low, high = extremes(layer.weight, format)
    return Outcome(encode(layer.weight, low, high, format, layer.dtype))


def _sample(weight: Tensor) -> Tensor:
    """Some rows of weight (out, in), evenly spaced."""
    return weight[:: max(1, weight.shape[0] // _SAMPLED_ROWS)].contiguous()


def _scaled_error(weight: Tensor, factor: Tensor, gram: Tensor, format: Affine, dtype: torch.dtype) -> float:
    """tr(D G Dᵀ) for D = Q(W·s)/s - W."""
    total = 0.0
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS]
        difference = nearest(rows * factor, format, dtype).div_(factor).sub_(rows)
        product = difference.to(gram.dtype) @ gram
        total += float(torch.einsum("oi,oi->", product.float(), difference))
    return total
