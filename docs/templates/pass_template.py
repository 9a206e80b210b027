"""Magnitude pruning: what is smallest matters least (arXiv:1506.02626, section 3)."""

from __future__ import annotations

from pydantic import Field

from effcli.layers.contract import Layer, LayerPass, Outcome, Statistics


class Magnitude(LayerPass):
    """Set the smallest weights of every output to zero (arXiv:1506.02626)."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="Share of the weights of each output that become zero.")

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Prune one weight (out, in); needs no inputs."""
        count = int(self.sparsity * layer.weight.shape[1])
        smallest = layer.weight.abs().topk(count, dim=1, largest=False).indices
        return Outcome(layer.weight.scatter(1, smallest, 0.0), {"sparsity": count / layer.weight.shape[1]})
