"""Magnitude pruning: what is smallest matters least (arXiv:1506.02626, section 3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from effcli.layers.contract import Layer, Statistics
from effcli.passes.prune._pruning import ScoringPass


class Magnitude(ScoringPass):
    """A `magnitude` step."""

    compare: Literal["layer", "row"] = Field(
        "layer", description="Which weights compete: all of a layer, or those of one output."
    )

    @property
    def by_row(self) -> bool:
        return self.compare == "row"

    def scores(self, layer: Layer, seen: Statistics) -> Tensor:
        """|w|, float32 (out, in); needs no inputs."""
        return layer.weight.abs()
