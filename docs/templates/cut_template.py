"""Narrower layers: channels with small weights matter least (arXiv:1608.08710)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from effcli.layers.contract import CutPass, Members, Needs
from effcli.layers.coupling import Coupled, Cut


class Narrow(CutPass):
    """Remove the channels, heads and experts with the smallest weights (arXiv:1608.08710)."""

    ratio: float = Field(0.25, ge=0, lt=1, description="Share of the channels of each group that are removed.")
    taylor: bool = Field(False, description="Rank by (w · ∂L/∂w)² instead of w² (arXiv:1906.10771).")

    @property
    def needs(self) -> Needs:
        return Needs.SQUARED_GRADIENTS if self.taylor else Needs.NOTHING

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        """Keep the same share of every group: those whose weights, with all that go with them, sum up to most."""
        cuts = []
        for group in groups:
            scores = seen.products(group, Needs.SQUARED_GRADIENTS) if self.taylor else seen.sums(group)
            count = max(1, round(group.count * (1 - self.ratio)))
            kept = scores.new_zeros(group.count, dtype=bool).index_fill(0, scores.topk(count).indices, True)
            cuts.append(Cut(group, kept))
        return cuts
