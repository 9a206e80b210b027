"""ALPS: choose which weights stay by the alternating direction method of multipliers, then fit them (arXiv:2406.07831).

Weights of a whole layer compete; with a pattern those of M neighbours. The output error tr((Ŵ - W) G (Ŵ - W)ᵀ) is never
above that of `sparsegpt`, which is tried too.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from effcli.layers.contract import Layer, Needs, Outcome, Statistics
from effcli.passes.prune._alps import PENALTIES, refit, scaled, support
from effcli.passes.prune._pruning import UNREACHED, Pruning, better, pruned
from effcli.passes.prune._sparsegpt import sparsegpt

# Magnitudes of which a threshold is found while the support still moves.
_SAMPLED = 1 << 16


class ALPS(Pruning):
    """An `alps` step."""

    rare: ClassVar[tuple[str, ...]] = ("damping", "steps", "refits")
    # Of each penalty a matrix, in bfloat16 where that is fast, and a factor for `sparsegpt`.
    workspace: ClassVar[int] = len(PENALTIES) + 4

    damping: float = Field(
        0.01, ge=0, le=1, description="What is added to the Gram matrix's diagonal, as a fraction of each entry."
    )
    steps: int = Field(8, ge=1, description="Steps with each of five growing penalties, which choose what stays.")
    refits: int = Field(6, ge=0, description="Steps of conjugate gradients for the weights that stay.")

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Prune one weight (out, in) under the Gram matrix of its inputs.

        Raises `NumericsError` when the Gram matrix cannot be factored.
        """
        if not seen.tokens:
            return pruned(layer.weight, self.chosen(layer.weight.abs(), layer), layer, **UNREACHED)
        problem = seen.remember(("alps", self.damping), lambda: scaled(seen.matrix, self.damping, layer.name))
        weight = layer.weight * problem.scale
        found = support(weight, problem, self.steps, lambda magnitudes: self._largest(magnitudes, layer))
        mask = self.chosen(found.abs(), layer)
        kept = (mask & layer.mask).kept
        fitted = refit(found, weight, problem.hessian, kept, self.refits) / problem.scale
        first, _ = sparsegpt(self, layer, seen, self.damping)
        (made, mask), ratio = better(layer, seen, first, (fitted, mask))
        return pruned(made, mask, layer, error_over_sparsegpt=ratio)

    def _largest(self, magnitudes: Tensor, layer: Layer) -> Tensor:
        """About what `chosen` keeps, without the time that exactness takes."""
        if layer.mask is not None:
            magnitudes = magnitudes.masked_fill(~layer.mask.kept, 0)
        if self.n_of_m is not None:
            groups = magnitudes.view(-1, self.n_of_m.of)
            least = groups.kthvalue(self.n_of_m.of - self.n_of_m.kept + 1, dim=1, keepdim=True).values
            kept = (groups >= least).view_as(magnitudes)
        else:
            # A stride that meets every column.
            first = max(magnitudes.numel() // _SAMPLED, 1)
            stride = next(each for each in itertools.count(first) if math.gcd(each, magnitudes.shape[1]) == 1)
            sample = magnitudes.view(-1)[::stride]
            count = round(self.share * sample.numel())
            kept = (
                magnitudes > sample.kthvalue(count).values if count else torch.ones_like(magnitudes, dtype=torch.bool)
            )
        return kept if layer.mask is None else kept & layer.mask.kept
