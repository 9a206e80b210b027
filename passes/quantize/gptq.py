"""GPTQ: round column after column while the columns that follow make up for each error (arXiv:2210.17323).

Besides the method itself: channels may first be scaled as `awq` scales them, ranges may be searched, and codes and
scales are improved in turn afterwards. Groups are those of the original order whatever the order of rounding, and their
ranges are found beforehand, so that files have the layout that every loader reads. The output error
tr((Ŵ - W) G (Ŵ - W)ᵀ) of no row is above that of rounding it to the nearest codes of the same ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.formats import AffineWeight
from effcli.layers.contract import Group, Layer, Outcome, Statistics
from effcli.passes._feedback import Feedback, factorize
from effcli.passes.quantize._affine import clipped_range, encode, extremes, parameters
from effcli.passes.quantize._gptq import quantize, weighted_range
from effcli.passes.quantize._scales import Scaled, find_scale

# Below half of the range the error of the clipped weights outweighs every gain.
SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6, 0.56, 0.52)


class GPTQ(Scaled):
    """A `gptq` step."""

    rare: ClassVar[tuple[str, ...]] = ("without_pair", "act_order", "damping", "range", "scales", "sweeps")

    workspace: ClassVar[int] = 3

    act_order: bool = Field(True, description="Round loud channels first, by the falling diagonal of the Gram matrix.")
    damping: float = Field(
        0.1,
        ge=0,
        le=1,
        description="What is added to the Gram matrix's diagonal, as a fraction of its mean. More of it trusts the "
        "calibration inputs less; the paper has 0.01.",
    )
    range: Literal["minmax", "least_squares", "gram", "remaining"] = Field(
        "remaining",
        description="How ranges are chosen: those of the weights, or shrunk to the least squared error; `gram`: to the "
        "least output error of rounding to nearest; `remaining`: to the least output error that columns rounded later "
        "cannot make up for.",
    )
    scales: bool = Field(True, description="First scale the channels as `awq` does.")
    sweeps: int = Field(
        3, ge=0, description="How often codes and scales are improved in turn after the first rounding."
    )

    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, Mapping[str, float | str]]:
        """Factor per input channel, float32 (in,), for the layers of `group` with their options, and notes.

        Ones where `scales` is off, for all of them when it is for one: the factor is of the input that they share.
        """
        wanted = [options.scales for options in group.options]
        if all(wanted):
            return find_scale([options.format for options in group.options], group, seen)
        notes = {"unscaled": "a layer with the same input has scales off"} if any(wanted) else {}
        return torch.ones_like(group.layers[0].weight[0]), notes

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Quantize one weight (out, in), already scaled, under the Gram matrix of its scaled inputs.

        Raises `NumericsError` when the Gram matrix cannot be factored with any damping up to one.
        """
        if not seen.tokens:
            low, high = _range(self, layer, seen, None)
            weight = encode(layer.weight, low, high, self.format, layer.dtype)
            return Outcome(weight, {"rounded": "to nearest: no calibration token reached it"})
        key = "gptq", self.damping, self.act_order
        feedback = seen.remember(key, lambda: factorize(seen.matrix, self.damping, self.act_order, layer.name))
        notes: dict[str, Any] = {"damping": feedback.damping}
        if feedback.damping > self.damping:
            notes["damping_raised_from"] = self.damping
        low, high = _range(self, layer, seen, feedback)
        scale, zero = parameters(low, high, self.format, layer.dtype)
        made = quantize(layer.weight, seen.matrix, feedback, scale, zero, self.format, layer.dtype, self.sweeps)
        notes |= {"error_over_nearest": round(made.ratio, 4), "rows_to_nearest": made.kept}
        stored = None if self.symmetric else zero.to(torch.uint8)
        return Outcome(AffineWeight(self.format, made.codes, made.scale.to(layer.dtype), stored), notes)


def _range(config: GPTQ, layer: Layer, seen: Statistics, feedback: Feedback | None) -> tuple[Tensor, Tensor]:
    """The range behind each scale (low, high), shaped like the scales; without inputs those that need none."""
    weight, format, dtype = layer.weight, config.format, layer.dtype
    if config.range == "least_squares":
        return weighted_range(weight, weight.new_ones(weight.shape[1]), format, dtype, SHRINKS)
    if feedback is None or config.range == "minmax":
        return extremes(weight, format)
    if config.range == "gram":
        return clipped_range(weight, seen.matrix, format, dtype, SHRINKS)
    return weighted_range(weight, feedback.remaining, format, dtype, SHRINKS)
