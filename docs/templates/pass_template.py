"""Magnitude pruning: what is smallest matters least (arXiv:1506.02626, section 3)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from effcli.formats import Mask
from effcli.layers.contract import Change, Layer, LayerPass, Outcome, Statistics


class Magnitude(LayerPass):
    """Remove the smallest weights of every output (arXiv:1506.02626)."""

    changes: ClassVar[Change] = Change.MASK

    sparsity: float = Field(0.5, ge=0, lt=1, description="Share of the weights of each output that are removed.")

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Prune one weight (out, in); needs no inputs."""
        count = int(self.sparsity * layer.weight.shape[1])
        smallest = layer.weight.abs().topk(count, dim=1, largest=False).indices
        kept = layer.weight.new_ones(layer.weight.shape, dtype=bool).scatter(1, smallest, False)
        return Outcome(layer.weight, {"sparsity": count / layer.weight.shape[1]}, Mask(kept))
