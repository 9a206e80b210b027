"""Structured pruning: channels, heads, feed-forward widths and experts leave with everything that goes with them.

What is left is a smaller network of the same kind: it needs no sparse kernels to be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import SelectionError
from effcli.layers.contract import CutPass, Members
from effcli.layers.coupling import Coupled, Cut, GroupKind
from effcli.passes.prune import _importance

Criterion = Literal["magnitude", "batchnorm"]

_SCORES: dict[Criterion, Callable[[Coupled, Members], Tensor]] = {
    "magnitude": _importance.magnitude,
    "batchnorm": _importance.batchnorm,
}
# Positions that are themselves a number of channels.
_WHOLE: tuple[GroupKind, ...] = ("heads", "experts")


class Channels(CutPass):
    """A `channels` step."""

    rare: ClassVar[tuple[str, ...]] = ("ranking", "damping")

    ratio: float = Field(
        0.25, ge=0, lt=1, description="Share of the channels that are removed: of each group, or of all together."
    )
    criterion: Criterion = Field(
        "magnitude",
        description="What is removed first: small weights (arXiv:1608.08710), or small scales of batch norms "
        "(arXiv:1708.06519).",
    )
    what: GroupKind | Literal["all"] = Field(
        "all", description="What is removed: heads go with all queries of their key; graphs have channels alone."
    )
    ranking: Literal["group", "network"] = Field(
        "group",
        description="Whether each group loses its share, or the least of all groups go, whatever they belong to.",
    )
    multiple_of: int = Field(
        1, ge=1, description="Widths that are left are multiples of this, such as 8; heads and experts are not rounded."
    )

    restore: bool = Field(
        True,
        description="Fit the layers that read what is removed to what is left, by least squares on the calibration "
        "inputs (arXiv:1707.06168).",
    )
    damping: float = Field(
        0.01,
        ge=0,
        le=1,
        description="How much `restore` draws weights to what they were, as a share of their inputs' mean square.",
    )

    @property
    def restoring(self) -> float | None:
        return self.damping if self.restore else None

    def takes(self, group: Coupled) -> bool:
        return self.what in ("all", group.kind)

    def check(self, groups: Sequence[Coupled], chosen: Mapping[str, Channels]) -> None:
        for group in groups:
            chosen[group.name]._check_group(group)
            if self.ranking == "network" and chosen[group.name].ratio != self.ratio:
                raise SelectionError(
                    f"{group.name} has a ratio of its own, and one ranking for the network has one ratio",
                    "leave `ratio` out of `layers`, or set ranking=group",
                )

    def _check_group(self, group: Coupled) -> None:
        """Raise `SelectionError` for options that a group cannot keep."""
        if self.multiple(group) > group.count:
            raise SelectionError(
                f"{group.name} has {group.count} channels, fewer than multiple_of={self.multiple_of}",
                "give it a smaller `multiple_of` under `layers`, or `ignore` it",
            )
        if self.ranking == "group" and group.count * (1 - self.ratio) < 0.5:
            raise SelectionError(
                f"a ratio of {self.ratio:g} would leave nothing of the {group.count} {group.kind} of {group.name}",
                "lower `ratio`, or give this one a lower one under `layers`",
            )
        if self.criterion == "batchnorm" and not group.norms:
            raise SelectionError(
                f"the channels of {group.name} pass no batch norm, whose scales are to tell what they matter",
                "choose another `criterion`, for this one alone under `layers`, or put the step before `fold`",
            )

    def multiple(self, group: Coupled) -> int:
        """What the width of a group must be a multiple of."""
        return 1 if group.kind in _WHOLE else self.multiple_of

    def width(self, group: Coupled, wanted: float) -> int:
        """The nearest width to `wanted` that a group may have, the wider of two."""
        multiple = self.multiple(group)
        nearest = max(1, int(wanted / multiple + 0.5)) * multiple
        return nearest if nearest <= group.count else group.count // multiple * multiple

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        """Keep of every group what matters most."""
        chosen: Mapping[str, Channels] = seen.chosen
        scores = [_SCORES[chosen[group.name].criterion](group, seen).cpu() for group in groups]
        wanted = [group.count * (1 - chosen[group.name].ratio) for group in groups]
        if self.ranking == "network":
            least = [chosen[group.name].multiple(group) for group in groups]
            wanted = list(map(float, ranked(scores, least, self.ratio)))
        cuts = []
        for group, own, left in zip(groups, scores, wanted, strict=True):
            # A width that is no multiple stays as it is where nothing is to go.
            width = group.count if left == group.count else chosen[group.name].width(group, left)
            kept = torch.zeros(group.count, dtype=torch.bool).index_fill(0, own.topk(width).indices, True)
            cuts.append(Cut(group, kept))
        return cuts


def ranked(scores: Sequence[Tensor], least: Sequence[int], ratio: float) -> list[int]:
    """How many positions of each group stay when the lowest scores of all groups go.

    scores: (count,) of each group; least: how many of it stay in any case; ratio: the share of all positions to go.
    """
    protected = [
        own.index_fill(0, own.topk(count).indices, torch.inf) for own, count in zip(scores, least, strict=True)
    ]
    every = torch.cat(protected)
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[every.argsort(stable=True)[: round(ratio * len(every))]] = True
    gone &= every.isfinite()
    return [int((~part).sum()) for part in torch.split(gone, [len(own) for own in scores])]


__all__ = ["Channels", "ranked"]
