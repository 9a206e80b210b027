"""AWQ: protect the channels that activations make salient by scaling them up before rounding (arXiv:2306.00978).

Weights W become Q(W·s) and inputs X / s, with s = m^α normalised to √(max·min) = 1, m the mean magnitude of each
input channel (eq. 4 and 5). α is found on a grid by the output error itself: with G = X Xᵀ it is
‖(Q(W·s)/s - W) X‖² = tr(D G Dᵀ), algebra on sums already taken instead of a forward pass per candidate. Then each
range is clipped under the same error, which the paper does per group and we do with the errors of all other groups
in place.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from effcli.formats import Affine
from effcli.layers.contract import Group, Layer, Outcome, Statistics
from effcli.passes.quantize._affine import clipped_range, encode, extremes
from effcli.passes.quantize._scales import COARSE, FINE, Scaled, find_scale

# Few bits leave few levels, and then giving up more of the range pays.
SHRINKS = {
    True: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
    False: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64),
}


class AWQ(Scaled):
    """An `awq` step."""

    rare: ClassVar[tuple[str, ...]] = ("without_pair", "clip", "round", "coarse", "fine")

    clip: bool = Field(True, description="Also search for a smaller range of each group.")
    round: bool = Field(True, description="false: only fold the scales in; a later pass rounds.")
    coarse: int = Field(COARSE, ge=1, description="Steps of the first grid of α over [0, 1].")
    fine: int = Field(FINE, ge=1, description="Steps by which each interval beside the best is divided afterwards.")

    @property
    def result(self) -> Affine | None:
        return self.format if self.round else None

    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, dict[str, float]]:
        """Factor per input channel, float32 (in,), for the layers of `group` with their options, and notes."""
        return find_scale([options.format for options in group.options], group, seen, self.coarse, self.fine)

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Quantize one weight (out, in), already scaled, under the Gram matrix of its scaled inputs."""
        if not self.round:
            return Outcome(layer.weight)
        format = self.format
        if self.clip and seen.tokens:
            low, high = clipped_range(layer.weight, seen.matrix, format, layer.dtype, SHRINKS[self.bits <= 3])
        else:
            low, high = extremes(layer.weight, format)
        return Outcome(encode(layer.weight, low, high, format, layer.dtype))
