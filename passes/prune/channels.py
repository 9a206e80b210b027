"""Structured pruning: channels, heads, feed-forward widths and experts leave with everything that goes with them.

What is left is a smaller network of the same kind: it needs no sparse kernels to be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import SelectionError, UnsupportedError
from effcli.layers.contract import CutPass, Members, Needs
from effcli.layers.coupling import Coupled, Cut, GroupKind
from effcli.options import Share
from effcli.passes.prune import _importance

Criterion = Literal["magnitude", "batchnorm", "apoz", "taylor", "taylor_squared", "lasso", "reconstruction"]

_SCORES: dict[Criterion, Callable[[Coupled, Members], Tensor]] = {
    "magnitude": _importance.magnitude,
    "batchnorm": _importance.batchnorm,
    "apoz": _importance.apoz,
    "taylor": _importance.taylor,
    "taylor_squared": _importance.taylor_squared,
}
# Those whose scores depend on how many are to stay.
_SELECTIONS: dict[Criterion, Callable[[Coupled, Members, int], Tensor]] = {
    "lasso": _importance.lasso,
    "reconstruction": _importance.reconstruction,
}
_NEEDS: dict[Criterion, Needs] = {
    "apoz": Needs.NONZERO,
    "taylor": Needs.GRADIENTS,
    "taylor_squared": Needs.SQUARED_GRADIENTS,
    "lasso": Needs.GRAM,
    "reconstruction": Needs.GRAM | Needs.MEANS,
}
_READ: tuple[Criterion, ...] = ("apoz", "lasso", "reconstruction")
# Positions that are themselves a number of channels.
_WHOLE: tuple[GroupKind, ...] = ("heads", "experts")


class Channels(CutPass):
    """A `channels` step."""

    rare: ClassVar[tuple[str, ...]] = ("ranking", "damping")

    ratio: Share = Field(
        0.25, ge=0, lt=1, description="Share of the channels that are removed: of each group, or of all together."
    )
    criterion: Criterion | None = Field(
        None,
        description="By what the channels that matter least are found; null: reconstruction where `restore` reads "
        "inputs and `ranking` is group, else magnitude.",
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
    def needs(self) -> Needs:
        return super().needs | _NEEDS.get(self.criterion or self._usual, Needs.NOTHING)

    @property
    def restoring(self) -> float | None:
        return self.damping if self.restore else None

    @property
    def ranks_all(self) -> bool:
        return self.ranking == "network"

    @property
    def _usual(self) -> Criterion:
        """The criterion where none is asked for."""
        return "reconstruction" if self.restore and self.ranking == "group" else "magnitude"

    def _criterion(self, group: Coupled) -> Criterion:
        """What tells the channels of a group apart; no layer reads experts one by one."""
        return self.criterion or ("magnitude" if group.kind == "experts" else self._usual)

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
            own = chosen[group.name]
            if own.ranking != self.ranking or (self.ranking == "network" and own.criterion != self.criterion):
                raise SelectionError(
                    f"{group.name} has a ranking or a criterion of its own, and all groups are ranked together",
                    "leave `ranking` out of `layers`, and with ranking=network `criterion`, too",
                )
            if self.ranking == "network" and own.criterion in _SELECTIONS:
                raise SelectionError(
                    f"{chosen[group.name].criterion} compares the channels of one group, not those of a network",
                    "set ranking=group, or choose another `criterion`",
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
        if self.criterion in _READ and group.kind == "experts":
            raise SelectionError(
                f"no layer reads the experts of {group.name} one by one, and {self.criterion} looks at what is read",
                "choose magnitude or taylor, or set `what` to something else",
            )

    def multiple(self, group: Coupled) -> int:
        """What the width of a group must be a multiple of."""
        return 1 if group.kind in _WHOLE else self.multiple_of

    def width(self, group: Coupled, wanted: float) -> int:
        """The nearest width to `wanted` that a group may have, the wider of two; all of it where nothing is to go."""
        if wanted >= group.count:
            return group.count
        multiple = self.multiple(group)
        nearest = max(1, int(wanted / multiple + 0.5)) * multiple
        return nearest if nearest <= group.count else group.count // multiple * multiple

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        """Keep of every group what matters most."""
        chosen: Mapping[str, Channels] = seen.chosen
        if self.ranking == "network":
            found = [chosen[group.name]._scores(group, seen, group.count) for group in groups]
            multiples = [chosen[group.name].multiple(group) for group in groups]
            left = ranked([scores for scores, _ in found], multiples, self.ratio)
            return [
                _keeping(group, *own, chosen[group.name].width(group, count))
                for group, own, count in zip(groups, found, left, strict=True)
            ]
        cuts = []
        for group in groups:
            config = chosen[group.name]
            width = config.width(group, group.count * (1 - config.ratio))
            cuts.append(_keeping(group, *config._scores(group, seen, width), width))
        return cuts

    def _scores(self, group: Coupled, seen: Members, width: int) -> tuple[Tensor, str]:
        """What each position matters, (count,), where `width` of them are to stay, and a remark on how it was found."""
        criterion, remark = self._criterion(group), ""
        try:
            if criterion in _SELECTIONS:
                return _SELECTIONS[criterion](group, seen, width).cpu(), remark
        except UnsupportedError as error:
            # Nobody asked for it where the layers that read the group do not allow it.
            if self.criterion is not None:
                raise
            remark = f"{group.name} is cut by magnitude, not {criterion}: {error.cause}"
            criterion = "magnitude"
        return _SCORES[criterion](group, seen).cpu(), remark


def _keeping(group: Coupled, scores: Tensor, remark: str, width: int) -> Cut:
    """The cut that leaves the `width` highest scores."""
    kept = torch.zeros(group.count, dtype=torch.bool)
    kept[scores.topk(width).indices] = True
    return Cut(group, kept, remark=remark)


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
