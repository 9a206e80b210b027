"""NF4: the nearest of 16 quantiles of a normal distribution, times the largest magnitude of a block (arXiv:2305.14314).

Each block of neighbours in the flattened weight is divided by its largest magnitude, so that it lies in [-1, 1], and
each number becomes the nearest of the levels of appendix E (section 3). Double quantization stores those magnitudes in
8 bits: their mean is taken off, and what remains is quantized in blocks of 256 with the dynamic data type of
arXiv:2110.02861, which leaves 8/64 + 32/(64·256) = 0.127 bits of constants per weight instead of 32/64 = 0.5.

Codes and constants are those of `quantize_4bit` in bitsandbytes 0.50 on the CPU, bit for bit, so that networks tuned on
top of its weights fit ours.
"""

from __future__ import annotations

import dataclasses
import math

from pydantic import Field

from effcli.formats import Codebook
from effcli.formats.codebook import DOUBLE_BLOCK
from effcli.layers.contract import UNSEEN, Layer, LayerPass, Outcome, Statistics
from effcli.passes.quantize._nf4 import quantize


class NF4(LayerPass):
    """An `nf4` step."""

    block_size: int = Field(
        64,
        ge=1,
        description="Neighbours in the flattened weight that share a scale; bitsandbytes reads 32, 64 ... 4096.",
    )
    double: bool = Field(False, description="Quantize the scales too, to 8 bits in blocks of 256.")

    @property
    def format(self) -> Codebook:
        return Codebook("nf4", 4, "group", self.block_size, self.double)

    def apply(self, layer: Layer, seen: Statistics = UNSEEN) -> Outcome:
        """Quantize one weight (out, in); needs no inputs."""
        format = dataclasses.replace(self.format, dtype=layer.dtype)
        weight = quantize(layer.weight, format)
        blocks = format.blocks(weight.shape)
        bits = 8 * blocks + 32 * math.ceil(blocks / DOUBLE_BLOCK) if self.double else 32 * blocks
        return Outcome(weight, {"constant_bits": round(bits / max(1, weight.codes.numel()), 4)})
