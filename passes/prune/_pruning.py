"""What passes that remove single weights share: how many go, in which pattern, and which."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from effcli.formats import Dense, Mask, NOfM, Sparse
from effcli.layers.contract import UNSEEN, Change, Layer, LayerPass, Needs, Outcome, Statistics, Surveyed
from effcli.options import Share
from effcli.passes._feedback import row_errors
from effcli.passes.prune._allocation import Allocation, Summary, allotted

# The share that is removed where neither a share nor a pattern is given.
_HALF = 0.5


class Pruning(LayerPass):
    """Options that say how many weights are removed, and in which pattern."""

    changes: ClassVar[Change] = Change.MASK

    sparsity: Share | None = Field(
        None, ge=0, lt=1, description="Share of each layer's weights that is removed; 0.5 unless `pattern` is given."
    )
    pattern: str | None = Field(
        None, description="N:M, such as `2:4`: of every M neighbours of a row N are kept. In place of `sparsity`."
    )

    allocation: Allocation = Field(
        "uniform",
        description="How the share is divided among the layers: the same for all; by one threshold on the scores of "
        "all weights; to the least sum of relative output errors; or less where there are more outliers (OWL).",
    )
    spread: float = Field(
        0.08,
        ge=0,
        le=0.5,
        description="How far layers may be from the share, with allocation `error`; with `outliers` half the range of "
        "their shares, OWL's λ.",
    )

    @field_validator("pattern")
    @classmethod
    def _can_be_kept(cls, value: str | None) -> str | None:
        if value is not None:
            _n_of_m(value)
        return value

    @model_validator(mode="after")
    def _sparsity_or_pattern(self) -> Self:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(
                f"sparsity {self.sparsity:g} and pattern {self.pattern} exclude each other; set one to null"
            )
        if self.pattern is not None and self.allocation != "uniform":
            raise ValueError(f"pattern {self.pattern} leaves nothing to divide; leave allocation {self.allocation} out")
        return self

    @property
    def n_of_m(self) -> NOfM | None:
        """The pattern of what is kept; None where any weight may go."""
        return None if self.pattern is None else _n_of_m(self.pattern)

    @property
    def share(self) -> float:
        """The share of the weights that is removed."""
        if self.n_of_m is not None:
            return 1 - self.n_of_m.kept / self.n_of_m.of
        return _HALF if self.sparsity is None else self.sparsity

    @property
    def format(self) -> Sparse | None:
        return None if self.n_of_m is None else Sparse(self.n_of_m, Dense(torch.float32))

    @property
    def surveys(self) -> Needs | None:
        return None if self.allocation == "uniform" else Needs.NORMS

    def summarize(self, layer: Layer, seen: Sequence[Statistics]) -> Summary:
        """The scores of a layer by size, those of `by_inputs`."""
        return Summary.of(by_inputs(layer, seen))

    def survey(self, layers: Sequence[Surveyed]) -> Mapping[str, Self]:
        """The sparsity of every layer."""
        summaries, shares = [each.summary for each in layers], [each.options.share for each in layers]
        removed = allotted(self.allocation, summaries, shares, self.spread)
        return {
            each.name: each.options.model_copy(update={"sparsity": count / max(each.summary.size, 1)})
            for each, count in zip(layers, removed, strict=True)
        }

    def masked(self, kept: Tensor) -> Mask:
        """What is kept of a layer, bool (out, in), in the pattern that was asked for."""
        return Mask(kept) if self.n_of_m is None else Mask(kept, self.n_of_m)

    def chosen(self, scores: Tensor, layer: Layer, by_row: bool = False) -> Mask:
        """Keep the weights of a layer with the highest scores, float32 (out, in).

        by_row: whether weights compete with those of their row alone. What earlier passes removed goes first.
        """
        if layer.mask is not None:
            scores = scores.masked_fill(~layer.mask.kept, -torch.inf)
        if self.n_of_m is not None:
            return self.masked(largest_of(scores, self.n_of_m))
        groups = scores if by_row else scores.reshape(1, -1)
        return self.masked(largest(groups, removals(self.share, groups)).view_as(scores))

    def apply_groups(self, layer: Layer, seen: Sequence[Statistics]) -> Outcome:
        """Prune a grouped convolution: each group is a layer, and what goes of all is the share of all."""
        groups = layer.parts(len(seen))
        sizes = torch.tensor([part.weight.numel() for part in groups])
        gone = torch.tensor([0 if part.mask is None else int((~part.mask.kept).sum()) for part in groups])
        removed = (gone + divided(self.share, layer.weight.numel(), sizes - gone)).tolist()
        outcomes = []
        for part, own, count in zip(groups, seen, removed, strict=True):
            update = {} if self.n_of_m is not None else {"sparsity": count / max(part.weight.numel(), 1)}
            outcomes.append(self.model_copy(update=update).apply(part, own))
        return Outcome.joined(outcomes)


class ScoringPass(Pruning):
    """A pass that removes the weights of the least scores and leaves the others as they are."""

    @property
    def by_row(self) -> bool:
        """Whether weights compete with those of their row alone."""
        return True

    @property
    def surveys(self) -> Needs | None:
        return self.needs if self.allocation == "global" else super().surveys

    @abstractmethod
    def scores(self, layer: Layer, seen: Statistics) -> Tensor:
        """The score of each weight, float32 (out, in); seen: of inputs that reached it."""

    def summarize(self, layer: Layer, seen: Sequence[Statistics]) -> Summary:
        """The scores of a layer by size: for one threshold on all of them its own, else those of `by_inputs`."""
        if self.allocation == "global":
            return Summary.of(self._scores(layer, seen or (UNSEEN,)))
        return super().summarize(layer, seen)

    def _scores(self, layer: Layer, seen: Sequence[Statistics]) -> Tensor:
        """The scores of all groups, one below the other; magnitudes where inputs are asked for and none came."""
        if self._unreached(seen):
            return layer.weight.abs()
        return torch.cat([self.scores(part, own) for part, own in zip(layer.parts(len(seen)), seen, strict=True)])

    def _unreached(self, seen: Sequence[Statistics]) -> bool:
        return bool(self.needs) and not all(own.tokens for own in seen)

    def apply(self, layer: Layer, seen: Statistics = UNSEEN) -> Outcome:
        """Prune one weight (out, in), by magnitude where its inputs are asked for and none reached it."""
        return self.apply_groups(layer, (seen,))

    def apply_groups(self, layer: Layer, seen: Sequence[Statistics]) -> Outcome:
        """Prune a grouped convolution: weights compete across its groups as across its rows."""
        notes = UNREACHED if self._unreached(seen) else {}
        return pruned(layer.weight, self.chosen(self._scores(layer, seen), layer, self.by_row), layer, **notes)


class ComparingPass(ScoringPass):
    """A pass whose options say which weights compete."""

    compare: Literal["layer", "row"] = Field(
        "layer", description="Which weights compete: all of a layer, or those of one output."
    )

    @property
    def by_row(self) -> bool:
        return self.compare == "row"


# What the ledger says of a layer that no input reached.
UNREACHED = {"scored": "by magnitude: no calibration token reached it"}


def pruned(weight: Tensor, mask: Mask, layer: Layer, **notes: Any) -> Outcome:
    """The outcome of a weight (out, in) under a mask, with the share that is removed by now, and further notes."""
    removed = (~(mask & layer.mask).kept).sum()
    return Outcome(weight, {"sparsity": round(int(removed) / max(weight.numel(), 1), 6), **notes}, mask)


# A weight (out, in) and which of its entries are kept.
Candidate = tuple[Tensor, Mask]


def better(layer: Layer, seen: Statistics, first: Candidate, second: Candidate) -> tuple[Candidate, float]:
    """Of two weights the one of less output error, the first of equal ones.

    And the error of the better one as a fraction of the first's; 1 where that has none.
    """
    errors = []
    for weight, mask in (first, second):
        difference = weight.masked_fill(~(mask & layer.mask).kept, 0).sub_(layer.weight)
        errors.append(float(row_errors(difference.t(), seen.matrix).sum(dtype=torch.float64)))
    # A comparison that also takes what is not a number to the first.
    chosen = second if errors[1] < errors[0] else first
    return chosen, round(min(1.0, errors[1] / errors[0]), 4) if errors[0] > 0 else 1.0


def by_inputs(layer: Layer, seen: Sequence[Statistics]) -> Tensor:
    """|w_ij| · ‖x_j‖ of each weight, the norm over all tokens, float32 (out, in); |w_ij| where none came."""
    if not all(own.tokens for own in seen):
        return layer.weight.abs()
    return torch.cat(
        [part.weight.abs() * own.squares.sqrt() for part, own in zip(layer.parts(len(seen)), seen, strict=True)]
    )


def removals(share: float, scores: Tensor) -> Tensor:
    """How many weights of each row of scores (groups, size) go, int64 (groups,).

    Their sum is the share of all, rounded, but one stays; those of two rows differ by one at most.
    """
    ends = torch.arange(len(scores) + 1, dtype=torch.float64) * scores.shape[1] * share
    return ends.round().clamp(max=max(scores.numel() - 1, 0)).diff().long().to(scores.device)


def divided(share: float, size: int, free: Tensor) -> Tensor:
    """How many weights go of each part of a layer of those that are free to: int64 (parts,), like `free`.

    With those of all `size` that are gone already they are the share, rounded, but one stays; of each part goes as
    large a share.
    """
    total = int(free.sum())
    goes = max(min(round(share * size), size - 1) - size + total, 0)
    ends = (free.cumsum(0).double() * (goes / max(total, 1))).round().long()
    return ends.diff(prepend=ends.new_zeros(1))


def largest(scores: Tensor, removed: Tensor) -> Tensor:
    """Keep all but so many of each row of scores (groups, size), bool (groups, size); removed: int64 (groups,).

    The least scores go; of equal ones the first.
    """
    bound = scores.new_full((len(scores),), -torch.inf)
    for count in set(removed.tolist()):
        if count:
            rows = removed == count
            bound[rows] = scores[rows].kthvalue(count, dim=1).values
    kept, equal = scores > bound.unsqueeze(1), scores == bound.unsqueeze(1)
    # How many of those at the bound still go.
    left = removed - scores.shape[1] + kept.sum(1) + equal.sum(1)
    tied = equal.sum(1) > left
    if bool(tied.any()):
        kept[tied] |= equal[tied] & (equal[tied].cumsum(1) > left[tied].unsqueeze(1))
    return kept


def largest_of(scores: Tensor, pattern: NOfM) -> Tensor:
    """Keep the largest of all neighbours of scores (out, in) that belong together, bool (out, in)."""
    groups = scores.reshape(-1, pattern.of)
    removed = torch.full((len(groups),), pattern.of - pattern.kept, device=scores.device)
    return largest(groups, removed).view(scores.shape)


def _n_of_m(pattern: str) -> NOfM:
    """The pattern N:M; `ValueError` for what is none."""
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    if found is None:
        raise ValueError(f"{pattern!r} is no pattern N:M of at most three digits each, such as 2:4")
    made = NOfM(int(found[1]), int(found[2]))
    if made.kept == made.of:
        raise ValueError(f"pattern {pattern} keeps every weight; N of N:M must be less than M, as in 2:4")
    return made
