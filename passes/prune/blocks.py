"""Whole transformer blocks are removed, those that turn the hidden states least (ShortGPT, arXiv:2403.03853).

The influence of a block is 1 - cos of the hidden states before and behind it, a mean over the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from effcli.errors import SelectionError
from effcli.layers.contract import CutPass, Members, Needs
from effcli.layers.coupling import Coupled, Cut, Depth
from effcli.options import Share


class Blocks(CutPass):
    """A `blocks` step."""

    depth: ClassVar[bool] = True

    ratio: Share = Field(0.1, gt=0, lt=1, description="Share of the blocks that are removed, rounded to a number.")
    count: int | None = Field(None, ge=1, description="Blocks that are removed, in place of a share.")

    @model_validator(mode="after")
    def _chosen_together(self) -> Self:
        if self.layers:
            raise ValueError("blocks are chosen together and have no options of their own; `ignore` keeps some")
        return self

    @model_validator(mode="after")
    def _either(self) -> Self:
        # A resolved recipe spells out the default beside a count.
        if self.count is not None and self.ratio != type(self).model_fields["ratio"].default:
            raise ValueError("`count` takes the place of `ratio`; give one of them")
        return self

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.INFLUENCE

    def removed(self, blocks: int) -> int:
        """How many of so many blocks go."""
        return round(self.ratio * blocks) if self.count is None else self.count

    def check(self, groups: Sequence[Coupled], chosen: Mapping[str, Blocks]) -> None:
        for group in groups:
            assert isinstance(group, Depth)
            wanted, loose = self.removed(group.count), group.count - len(group.fixed)
            if wanted < 1:
                raise SelectionError(
                    f"a ratio of {self.ratio:g} of {group.count} blocks removes none", "raise `ratio`, or set `count`"
                )
            if wanted >= group.count:
                raise SelectionError(
                    f"blocks would remove {wanted} of {group.count} blocks, and one must stay",
                    "lower `count` or `ratio`",
                )
            if wanted > loose:
                first, why = next(iter(group.fixed.items()))
                raise SelectionError(
                    f"{wanted} blocks are to go and {loose} may: block {first} stays, for {why}",
                    "remove fewer of them, or make `ignore` narrower",
                )

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        """Remove the blocks of least influence."""
        assert seen.influence is not None
        cuts = []
        for group in groups:
            assert isinstance(group, Depth)
            scores = seen.influence.clone()
            scores[list(group.fixed)] = torch.inf
            kept = torch.ones(group.count, dtype=torch.bool)
            kept[scores.topk(self.removed(group.count), largest=False).indices] = False
            cuts.append(Cut(group, kept, seen.influence))
        return cuts


__all__ = ["Blocks"]
