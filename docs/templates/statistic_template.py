"""A statistic of one's own, and a pass that reads it: weights count by what usually stands on their inputs.

As Wanda does (arXiv:2306.11695, eq. 1), but with the median of |x|, which a few loud tokens do not move.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from effcli.layers.contract import Layer, LayerPass, Needs, Outcome, Statistics


def typical(seen: Statistics) -> Tensor:
    """Median |x| of each input channel, float32 (in,), over the inputs that `Needs.SAMPLE` keeps.

    `remember` computes it once for all layers that read the same inputs.
    """
    return seen.remember("typical", lambda: seen.sample.abs().median(0).values)


class Usual(LayerPass):
    """Set the weights of every output to zero that contribute least on usual inputs."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="Share of the weights of each output that become zero.")

    @property
    def needs(self) -> Needs:
        """The engine keeps a sample of each layer's inputs."""
        return Needs.SAMPLE

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Prune one weight (out, in)."""
        count = int(self.sparsity * layer.weight.shape[1])
        score = layer.weight.abs() * (typical(seen) if seen.tokens else 1.0)
        least = score.topk(count, dim=1, largest=False).indices
        return Outcome(layer.weight.scatter(1, least, 0.0))
