"""How a share of all weights is divided among the layers, from a small summary of the scores in each.

What is removed is the lowest part of a layer's scores, so that a summary counts them by size. Those are taken for equal
whose exponents and first seven bits behind the point agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Allocation = Literal["uniform", "global", "error", "outliers"]

# Bits of a float32 that are left out: the sign stays, which is 0, eight of the exponent and seven of the mantissa.
_LEFT_OUT = 16
# How many times the mean of a layer's scores an outlier is.
_OUTLIER = 5.0


@dataclass(frozen=True)
class Summary:
    """The scores of a layer.

    size: how many there are; values: float32 (bins,), ascending; counts: int64 (bins,), of each value; outliers: the
    share of scores that are far above their mean.
    """

    size: int
    values: Tensor
    counts: Tensor
    outliers: float

    @staticmethod
    def of(scores: Tensor) -> Summary:
        """Scores of any shape, float32 from 0 on."""
        bits, counts = torch.unique(scores.reshape(-1).view(torch.int32) >> _LEFT_OUT, return_counts=True)
        far = (scores > _OUTLIER * scores.mean()).sum()
        values = (bits << _LEFT_OUT).to(torch.int32).view(torch.float32)
        return Summary(scores.numel(), values.cpu(), counts.cpu(), int(far) / max(scores.numel(), 1))


def allotted(way: Allocation, layers: Sequence[Summary], shares: Sequence[float], spread: float) -> list[int]:
    """How many weights go of each layer; shares: of each, as they would be without the others.

    global: the lowest scores of all layers go. error: those go that add least to the sum of the layers' relative
    output errors, a score being the root of its weight's own part, and a layer's share differs from its own in `shares`
    by `spread` at most. outliers: layers with more of them keep more, the shares having a range of twice the `spread`
    (OWL, arXiv:2310.05175, section 3.2, a layer being one matrix). No layer loses all of its weights.
    """
    sizes = torch.tensor([each.size for each in layers], dtype=torch.float64)
    wanted = torch.tensor(shares, dtype=torch.float64)
    total = int((wanted * sizes).sum().round())
    most = (sizes - 1).clamp(min=0)
    if way == "uniform":
        return [round(each) for each in (wanted * sizes).tolist()]
    if way == "outliers":
        return _exact(_by_outliers(layers, wanted, sizes, spread), total, most)
    least = torch.zeros_like(sizes)
    if way == "error":
        least = ((wanted - spread).clamp(min=0) * sizes).ceil()
        most = torch.minimum(most, ((wanted + spread) * sizes).floor())
        least = torch.minimum(least, most)
    return _by_threshold(layers, total, least.long(), most.long(), relative=way == "error")


def _by_outliers(layers: Sequence[Summary], shares: Tensor, sizes: Tensor, spread: float) -> Tensor:
    """How many weights go of each layer, float64 (layers,), before they are rounded."""
    outliers = torch.tensor([each.outliers for each in layers], dtype=torch.float64)
    width = float(outliers.max() - outliers.min())
    if width == 0:
        return shares * sizes
    # From 0 to twice the spread; around their mean, so that as many go of all as without.
    more = (outliers - outliers.min()) / width * 2 * spread
    return (shares - more + (more * sizes).sum() / sizes.sum()) * sizes


def _exact(counts: Tensor, total: int, most: Tensor) -> list[int]:
    """Whole numbers near `counts`, float64 (layers,), from 0 to `most`, that add up to `total`."""
    found = torch.minimum(counts.clamp(min=0), most)
    for _ in range(len(found)):
        rest = total - float(found.sum())
        room = most - found if rest > 0 else found
        if abs(rest) < 1e-6 or float(room.sum()) == 0:
            break
        found = torch.minimum((found + rest * room / room.sum()).clamp(min=0), most)
    ends = found.cumsum(0).round()
    whole: list[int] = ends.diff(prepend=ends.new_zeros(1)).long().tolist()
    return whole


def _by_threshold(layers: Sequence[Summary], total: int, least: Tensor, most: Tensor, relative: bool) -> list[int]:
    """How many go of each layer when the lowest scores of all do, within so many of each: int64 (layers,).

    Of equal scores those of the first layers go. relative: squares of scores, as a fraction of their layer's sum.
    """
    scores, counts, owners = [], [], []
    for number, each in enumerate(layers):
        values = each.values.double()
        if relative:
            values = values.square()
            values /= (values * each.counts).sum().clamp(min=torch.finfo(torch.float64).tiny)
        # What goes in any case, and what stays in any case, does not compete.
        ends = each.counts.cumsum(0).clamp(int(least[number]), int(most[number]))
        scores.append(values)
        counts.append(ends.diff(prepend=least[number : number + 1]))
        owners.append(torch.full_like(each.counts, number))
    order = torch.cat(scores).argsort(stable=True)
    competing, owner = torch.cat(counts)[order], torch.cat(owners)[order]
    left = max(total - int(least.sum()), 0)
    before = competing.cumsum(0) - competing
    taken = torch.minimum(competing, (left - before).clamp(min=0))
    return (least + torch.zeros_like(least).index_add_(0, owner, taken)).tolist()
