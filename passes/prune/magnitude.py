"""Magnitude pruning: what is smallest matters least (arXiv:1506.02626, section 3).

Of a convolution whole parts of kernels may go in place of single weights (Mao et al. 2017, arXiv:1705.08922): rows of a
kernel, kernels, or filters, by the mean magnitude of their weights. The coarser the grain, the less memory the places
take, and the more accuracy is lost at one sparsity.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from effcli.formats import Mask
from effcli.layers.contract import Layer, Statistics
from effcli.passes.prune._pruning import ComparingPass, largest, removals


class Magnitude(ComparingPass):
    """A `magnitude` step."""

    grain: Literal["weight", "vector", "kernel", "filter"] = Field(
        "weight",
        description="What goes as a whole: single weights; rows of kernels or kernels of convolutions, single "
        "weights of other layers; outputs.",
    )

    @model_validator(mode="after")
    def _grain_can_be_kept(self) -> Self:
        if self.grain != "weight" and self.pattern is not None:
            raise ValueError(f"a pattern takes single weights, and grain={self.grain} whole parts; set one of them")
        if self.grain == "filter" and self.compare == "row":
            raise ValueError("compare=row has the weights of one output compete, and grain=filter takes all of them")
        return self

    def scores(self, layer: Layer, seen: Statistics) -> Tensor:
        """|w|, float32 (out, in); needs no inputs."""
        return layer.weight.abs()

    def chosen(self, scores: Tensor, layer: Layer, by_row: bool = False) -> Mask:
        size = self._size(layer)
        if size == 1:
            return super().chosen(scores, layer, by_row)
        if layer.mask is not None:
            scores = scores * layer.mask.kept
        whole = scores.reshape(len(scores), -1, size).mean(2)
        groups = whole if by_row else whole.reshape(1, -1)
        kept = largest(groups, removals(self.share, groups)).view_as(whole)
        return Mask(kept.repeat_interleave(size, dim=1))

    def _size(self, layer: Layer) -> int:
        """How many weights of a row of the layer go together."""
        height, width = layer.kernel
        sizes = {"weight": 1, "vector": width, "kernel": height * width, "filter": layer.weight.shape[1]}
        return sizes[self.grain]


__all__ = ["Magnitude"]
