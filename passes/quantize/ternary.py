"""Ternary weights: W ≈ α · {-1, 0, 1} (Ternary Weight Networks, arXiv:1605.04711).

Weights of at most Δ = 0.7 · E|W| become 0; α is the mean magnitude of the others, the best scale for them.
"""

from __future__ import annotations

import torch
from pydantic import Field

from effcli.formats import Codebook
from effcli.layers.contract import UNSEEN, Layer, Outcome, Statistics
from effcli.passes.quantize._tables import Shared, by_block, scaled

_THRESHOLD = 0.7


class Ternary(Shared):
    """A `ternary` step."""

    huffman: bool = Field(False, description="Huffman-code the codes in the file, instead of 2 bits for each.")

    @property
    def format(self) -> Codebook:
        return Codebook("ternary", 2, self.granularity, self.group_size or 0, huffman=self.huffman)

    def apply(self, layer: Layer, seen: Statistics = UNSEEN) -> Outcome:
        """Quantize one weight (out, in); needs no inputs."""
        magnitude = by_block(layer.weight, self.format).abs()
        large = magnitude > _THRESHOLD * magnitude.mean(1, keepdim=True, dtype=torch.float64)
        count = large.sum(1).clamp_(min=1)
        scale = (magnitude * large).sum(1, dtype=torch.float64) / count
        signs = layer.weight.sign() * large.view_as(layer.weight)
        return scaled(self.format, (signs + 1).to(torch.uint8), scale, layer)
