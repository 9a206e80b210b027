"""The range of an activation, from calibration inputs seen once: what its 8 bits are to cover.

`Observer` keeps a histogram whose range grows as needed, so that every way of choosing a range is served by one pass
over the data:

- `minmax`: everything that was seen;
- `moving_average`: extremes of each batch, averaged exponentially (arXiv:1712.05877, section 3.1);
- `percentile`: all but a fraction at each end;
- `kl`: the clipping with the least KL(original ‖ quantized) of the distribution of |x| (S. Migacz, "8-bit inference
  with TensorRT", GTC 2017);
- `least_squares`: both ends chosen to make the mean squared error least, clipping and rounding together.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effcli.errors import NumericsError
from effcli.reports.report import ActivationRange

Method = Literal["minmax", "moving_average", "percentile", "kl", "least_squares"]
Range = tuple[float, float]

# Bins on either side of the one in the middle, which is centred on zero: even after the range has just tripled, ten
# bins fall to each of 255 levels.
_SIDE = 8192
# Numbers counted at once: histc counts in float32, which holds every integer up to 2^24.
_COUNTED = 1 << 24
# A largest magnitude below this is as good as zero: bins of its size would leave float32.
_NOTHING = 1e-30
# Weight of a new batch in the moving average, as in PyTorch's own observers.
_MOMENTUM = 0.01
# Candidates for each end of a range.
_CANDIDATES = 256
# Bins of |x| for KL, and how many of them the narrowest candidate keeps.
_KL_BINS = 2048
_KL_FEWEST = 128
# Bins of a histogram that is drawn.
_DRAWN = 64

Numbers = NDArray[np.float64]


class Observer:
    """What is remembered of one activation. low, high: the extremes of all batches; both 0 before the first.

    counts: int64 (2 · _SIDE + 1,), how many values are nearest to (k - _SIDE) · width.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0
        self.averaged: Range | None = None
        self.width = 0.0
        self.counts = np.zeros(2 * _SIDE + 1, dtype=np.int64)

    def add(self, values: Tensor) -> None:
        """Take in a batch of any shape. `NumericsError` for NaN or infinity."""
        if not values.numel():
            return
        low, high = (float(extreme) for extreme in torch.aminmax(values))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NumericsError(
                f"{self.name} is NaN or infinite on the calibration data",
                "check the inputs and their preprocessing; the network itself may overflow",
            )
        if self.averaged is None:
            self.low, self.high, self.averaged = low, high, (low, high)
        else:
            self.low, self.high = min(self.low, low), max(self.high, high)
            before = self.averaged
            self.averaged = before[0] + _MOMENTUM * (low - before[0]), before[1] + _MOMENTUM * (high - before[1])
        self._fit(max(-low, high))
        # Bins outward from (-_SIDE - ½) · width to (_SIDE + ½) · width; all zeros need no width.
        bound = (_SIDE + 0.5) * (self.width or 1.0)
        for part in torch.split(values.detach().float().flatten(), _COUNTED):
            self.counts += torch.histc(part, len(self.counts), -bound, bound).long().cpu().numpy()

    def _fit(self, largest: float) -> None:
        """Widen the bins until `largest` falls into one: three bins become one, so that zero stays in the middle."""
        if self.width == 0:
            self.width = largest / _SIDE if largest > _NOTHING else 0.0
        while largest > _NOTHING and largest > (_SIDE + 0.25) * self.width:
            target = _SIDE + np.rint((np.arange(len(self.counts)) - _SIDE) / 3).astype(np.int64)
            self.counts = np.bincount(target, self.counts, len(self.counts)).astype(np.int64)
            self.width *= 3

    def range_of(self, method: Method, percentile: float = 99.99) -> Range:
        """(low, high) by `method`, low ≤ 0 ≤ high, both 0 for an activation that is always 0.

        percentile: of the values that lie below `high`, and as many above `low`; for `percentile` only.
        """
        whole = min(self.low, 0.0), max(self.high, 0.0)
        if method == "minmax" or self.width == 0:
            return whole
        if method == "moving_average":
            assert self.averaged is not None
            low, high = self.averaged
        elif method == "percentile":
            low, high = self._quantiles(percentile)
        elif method == "kl":
            low, high = self._least_divergence(whole)
        else:
            low, high = self._least_error(whole)
        return max(min(low, 0.0), whole[0]), min(max(high, 0.0), whole[1])

    @property
    def centres(self) -> Numbers:
        """What each bin stands for, within what was seen."""
        return np.clip(np.arange(-_SIDE, _SIDE + 1) * self.width, self.low, self.high)

    def _quantiles(self, percentile: float) -> Range:
        allowed = self.counts.sum() * (1 - percentile / 100)
        below, above = np.cumsum(self.counts), np.cumsum(self.counts[::-1])
        return (
            float(self.centres[np.searchsorted(below, allowed, side="right")]),
            float(self.centres[::-1][np.searchsorted(above, allowed, side="right")]),
        )

    def _least_divergence(self, whole: Range) -> Range:
        """Clip |x| at the threshold of least divergence; 128 levels for |x| when x has both signs, else 256."""
        sides = self.counts[_SIDE:].copy()
        sides[1:] += self.counts[:_SIDE][::-1]
        # Zeros lose nothing by any threshold, and after a ReLU they would hide all else.
        sides[0] = 0
        largest = max(-whole[0], whole[1])
        bins = np.minimum(np.arange(len(sides)) * self.width / largest * _KL_BINS, _KL_BINS - 1).astype(np.int64)
        counts: Numbers = np.bincount(bins, sides, _KL_BINS).astype(np.float64)
        levels = 128 if whole[0] < 0 < whole[1] else 256
        candidates = np.arange(max(_KL_FEWEST, levels), _KL_BINS + 1, 8)
        divergences = [_divergence(counts, int(kept), levels) for kept in candidates]
        threshold = float(candidates[int(np.argmin(divergences))]) / _KL_BINS * largest
        return -threshold, threshold

    def _least_error(self, whole: Range) -> Range:
        """Minimise Σ_{x < low} (x - low)² + Σ_{x > high} (x - high)² + Δ²/12 · (number of others but zeros).

        Δ = (high - low) / 255; zero itself is always a level.
        """
        steps = np.linspace(1, 0, _CANDIDATES, endpoint=False)
        lows = whole[0] * steps if whole[0] else np.zeros(1)
        highs = whole[1] * steps if whole[1] else np.zeros(1)
        centres, counts = self.centres, self.counts.astype(np.float64)
        counts[_SIDE] = 0
        low_error, low_count = _clipping(centres, counts, lows)
        high_error, high_count = _clipping(-centres[::-1], counts[::-1], -highs)
        inside = counts.sum() - low_count[:, None] - high_count
        delta = (highs - lows[:, None]) / 255
        error = low_error[:, None] + high_error + inside * delta**2 / 12
        # The first of equal ones, which is the widest.
        low, high = np.unravel_index(int(error.argmin()), error.shape)
        return float(lows[low]), float(highs[high])

    def row(self, chosen: Range, method: str) -> ActivationRange:
        """The record of this activation with the range `chosen` by `method`."""
        counts, edges = np.histogram(
            self.centres,
            bins=_DRAWN,
            range=(self.low, self.high) if self.low < self.high else (self.low - 0.5, self.low + 0.5),
            weights=self.counts,
        )
        return ActivationRange(
            name=self.name,
            edges=tuple(float(edge) for edge in edges),
            counts=tuple(int(count) for count in counts),
            low=chosen[0],
            high=chosen[1],
            observer=method,
        )


def _clipping(centres: Numbers, counts: Numbers, lows: Numbers) -> tuple[Numbers, Numbers]:
    """Σ (x - low)² over x < low, and their number, for each of `lows`; centres ascending."""
    index = np.searchsorted(centres, lows, side="left")
    sums = [np.concatenate(([0.0], np.cumsum(counts * centres**power)))[index] for power in range(3)]
    # Cancellation may leave a tiny negative number.
    return np.maximum(sums[2] - 2 * lows * sums[1] + lows**2 * sums[0], 0), sums[0]


def _divergence(counts: Numbers, kept: int, levels: int) -> float:
    """KL(P ‖ Q) of the first `kept` bins: P with all beyond added to the last, Q these bins merged to `levels`.

    Q spreads each merged sum evenly over those of its bins that P does not leave empty.
    """
    reference = counts[:kept].copy()
    filled = reference > 0
    merged = np.arange(kept) * levels // kept
    sums = np.bincount(merged, reference, levels)
    sizes = np.bincount(merged, filled, levels)
    approximated = np.where(filled, sums[merged] / np.maximum(sizes[merged], 1), 0)
    reference[-1] += counts[kept:].sum()
    total = approximated.sum()
    if total == 0:
        return np.inf
    # An outlier in a bin that Q leaves empty: a probability next to nothing instead of an infinite divergence.
    p, q = reference / reference.sum(), np.maximum(approximated / total, 1e-12)
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())
