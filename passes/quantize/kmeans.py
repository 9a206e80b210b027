"""K-means: weights share the entries of a table, found by clustering (Deep Compression, arXiv:1510.00149, section 3).

A weight is stored as the number of the entry nearest to it, and since the entries are not used equally often, Huffman
coding (section 4 of the paper, lossless) saves further bits. Clusters minimise Σ (w - ŵ)², or with `weighted` each
square times the mean square E[x_j²] of its input; with `refit` codes and entries are then moved to where the output
error tr((Ŵ - W) G (Ŵ - W)ᵀ), G = X Xᵀ, is less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from effcli.formats import Codebook, CodebookWeight
from effcli.layers.contract import UNSEEN, Layer, Needs, Outcome, Statistics
from effcli.passes.quantize._kmeans import Start, assign, cluster
from effcli.passes.quantize._refit import refit
from effcli.passes.quantize._tables import Shared, by_block, described

# Inputs that are hardly ever there count at least this share of the mean, so that their weights stay in the range.
_LEAST = 1e-4


class KMeans(Shared):
    """A `kmeans` step."""

    rare: ClassVar[tuple[str, ...]] = ("init", "seed", "iterations", "weighted", "refit")

    graph_defaults: ClassVar[Mapping[str, Any]] = {"granularity": "tensor"}

    bits: int = Field(4, ge=1, le=8, description="Bits per weight before Huffman coding: a table has 2^bits entries.")
    init: Start = Field(
        "density",
        description="The first entries: as dense as the cube root of the weights' density, evenly spaced over the "
        "range of the weights, or drawn from them.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the draws of kmeans++.")
    iterations: int = Field(1000, ge=1, description="Most iterations of Lloyd's; it ends when nothing moves.")
    weighted: bool = Field(False, description="Weights count as much as the mean square of their input.")
    keep_zeros: bool = Field(True, description="Where weights are exactly 0, as after pruning, they stay 0.")
    refit: int = Field(
        0, ge=0, description="Rounds in which codes and entries are moved, in turn, to where the outputs err least."
    )
    huffman: bool = Field(True, description="Huffman-code the codes in the file.")

    @property
    def needs(self) -> Needs:
        return Needs.GRAM if self.weighted or self.refit else Needs.NOTHING

    @property
    def format(self) -> Codebook:
        return Codebook("kmeans", self.bits, self.granularity, self.group_size or 0, huffman=self.huffman)

    def apply(self, layer: Layer, seen: Statistics = UNSEEN) -> Outcome:
        """Quantize one weight (out, in); `seen` of its inputs where the options need it."""
        return self.apply_groups(layer, (seen,))

    def apply_groups(self, layer: Layer, seen: Sequence[Statistics]) -> Outcome:
        """Quantize the weight (out, in) of a layer whose rows fall into as many equal groups as `seen` has entries."""
        format, weight = dataclasses.replace(self.format, dtype=layer.dtype), layer.weight
        seen = seen if any(gram.tokens for gram in seen) else ()
        values = by_block(weight, format)
        importance = by_block(_importance(weight, seen), format) if self.weighted and seen else None
        draws = None
        if self.init == "kmeans++":
            generator = torch.Generator().manual_seed(self.seed)
            draws = torch.rand(len(values), 1 << self.bits, generator=generator, dtype=torch.float64).to(weight.device)
        table = cluster(
            values,
            importance,
            self.bits,
            layer.dtype,
            start=self.init,
            draws=draws,
            zeros=self.keep_zeros,
            rounds=self.iterations,
        )
        codes = assign(values, table).view_as(weight)
        notes: dict[str, Any] = {}
        if self.refit and seen and weight.numel():
            table, codes, gain = refit(weight, table, codes, seen, self.refit, self.keep_zeros)
            notes["refit_gain"] = round(gain, 4)
        made = CodebookWeight(format, codes, table)
        return Outcome(made, {**notes, **described(made, layer.dtype)})


def _importance(weight: Tensor, seen: Sequence[Statistics]) -> Tensor:
    """The mean square of each weight's input, as a multiple of their mean, float32 (out, in)."""
    squares = torch.stack([gram.squares for gram in seen])
    mean = squares.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (squares / mean).clamp_(min=_LEAST).repeat_interleave(len(weight) // len(seen), 0)
