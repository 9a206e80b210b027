"""Taylor pruning: what changes the loss least, to first order, goes (arXiv:1906.10771, equations 7 and 8).

Without the weight w the loss changes by w · ∂L/∂w. Its squares are summed over the samples, each by itself, or it is
taken of the whole gradient, in which what samples say of a weight may cancel.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from effcli.layers.contract import Layer, Needs, Statistics
from effcli.passes.prune._pruning import ComparingPass


class Taylor(ComparingPass):
    """A `taylor` step."""

    gradient: Literal["squares", "sum"] = Field(
        "squares", description="Σ (w · ∂L/∂w)² over the samples, or |w · Σ ∂L/∂w|. Classifiers need labelled data."
    )

    @property
    def needs(self) -> Needs:
        return Needs.SQUARED_GRADIENTS if self.gradient == "squares" else Needs.GRADIENTS

    def scores(self, layer: Layer, seen: Statistics) -> Tensor:
        """√Σ (w · ∂L/∂w)² or |w · Σ ∂L/∂w|, float32 (out, in)."""
        slope = seen.squared_gradient.sqrt() if self.gradient == "squares" else seen.gradient.abs()
        return layer.weight.abs() * slope
