"""SparseGPT: remove weights column after column while the columns that follow make up for each (arXiv:2301.00774).

In every block of 128 columns the cheapest weights of all rows go, in the share that is wanted; with a pattern the
cheapest of M neighbours, when the first of them comes. The output error tr((Ŵ - W) G (Ŵ - W)ᵀ) is never above that of
removing the smallest weights of the layer.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from effcli.layers.contract import Layer, Needs, Outcome, Statistics
from effcli.passes.prune._pruning import UNREACHED, Pruning, pruned
from effcli.passes.prune._sparsegpt import sparsegpt


class SparseGPT(Pruning):
    """A `sparsegpt` step."""

    rare: ClassVar[tuple[str, ...]] = ("damping",)
    workspace: ClassVar[int] = 3

    damping: float = Field(
        0.01, ge=0, le=1, description="What is added to the Gram matrix's diagonal, as a fraction of its mean."
    )

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """Prune one weight (out, in) under the Gram matrix of its inputs.

        Raises `NumericsError` when the Gram matrix cannot be factored with any damping up to one.
        """
        if not seen.tokens:
            return pruned(layer.weight, self.chosen(layer.weight.abs(), layer), layer, **UNREACHED)
        (weight, mask), notes = sparsegpt(self, layer, seen, self.damping)
        return pruned(weight, mask, layer, **notes)
