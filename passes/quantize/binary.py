"""Binary weights: W ≈ α · sign(W) with α = mean |W|, the best scale for signs (XNOR-Net, arXiv:1603.05279, eq. 6).

sign(0) is +1, so that every weight takes one bit.
"""

from __future__ import annotations

import torch

from effcli.formats import Codebook
from effcli.layers.contract import UNSEEN, Layer, Outcome, Statistics
from effcli.passes.quantize._tables import Shared, by_block, scaled


class Binary(Shared):
    """A `binary` step."""

    @property
    def format(self) -> Codebook:
        return Codebook("binary", 1, self.granularity, self.group_size or 0)

    def apply(self, layer: Layer, seen: Statistics = UNSEEN) -> Outcome:
        """Quantize one weight (out, in); needs no inputs."""
        scale = by_block(layer.weight, self.format).abs().mean(1, dtype=torch.float64)
        return scaled(self.format, (layer.weight >= 0).to(torch.uint8), scale, layer)
