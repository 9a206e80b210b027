"""Clustering of numbers on a line, for many tables at once (arXiv:1510.00149, section 3).

On a line clusters are intervals of the sorted numbers. With prefix sums of their mass, first and second moment an
iteration of Lloyd's needs for each table of k entries over n numbers k binary searches, and no look at the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from effcli.formats import Affine
from effcli.passes.quantize._affine import parameters

# Where the entries start: as the density of the numbers asks, evenly spaced over their range, or drawn from them.
Start = Literal["density", "linear", "kmeans++"]

# Numbers of all tables that are sorted at once: three prefix sums in float64 are kept of each.
_STEP = 1 << 20
# Ranks between two entries at which the density of the numbers is looked at.
_RANKS = 4
# The largest step of an entry that is none any more, as a share of the range of the numbers.
_STILL = 1e-6


def cluster(
    values: Tensor,
    importance: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    *,
    start: Start = "density",
    draws: Tensor | None = None,
    zeros: bool = True,
    rounds: int = 1000,
) -> Tensor:
    """Tables of 2**bits ascending entries with a small squared error Σ m (v - entry)², in `dtype` (tables, 2**bits).

    values: float32 (tables, n), finite; importance: m, positive (tables, n), None for 1 everywhere; draws: float64 in
    [0, 1), (tables, 2**bits), for a start by k-means++ (Arthur and Vassilvitskii, 2007), None for one evenly spaced
    over the range. zeros: a table of which some numbers are exactly 0 has an entry that is exactly 0; rounds: most
    iterations. Where there are no more different numbers than entries, the table holds them all.

    A table that ends above the error of linear quantization with as many bits starts again from that grid, and no
    iteration raises the error: before the entries are rounded to `dtype` it is never above that of `linear`, symmetric
    or not.
    """
    tables, numbers = values.shape
    found = torch.zeros(tables, 1 << bits, dtype=dtype, device=values.device)
    for part in _parts(tables, max(1, _STEP // max(numbers, 1))) if numbers else ():
        line = _Line(values[part], None if importance is None else importance[part], zeros)
        table = line.start(start, bits, None if draws is None else draws[part])
        table = line.settled(line.with_zero(table), rounds)
        grid = line.grid(bits, dtype)
        worse = line.errors(table) > line.errors(grid)
        if bool(worse.any()):
            table[worse] = line.rows(worse).settled(grid[worse], rounds)
        found[part] = line.exact(table).to(dtype)
    return found


def assign(values: Tensor, tables: Tensor) -> Tensor:
    """The number of the entry nearest to each value, uint8 (tables, n); tables: ascending (tables, entries)."""
    middles = _middles(tables.double())
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    if len(tables) == 1:
        # In pieces, since float64 and int64 take many times the memory of the codes.
        for part in _parts(values.shape[1], _STEP):
            codes[:, part] = torch.bucketize(values[:, part].double(), middles[0]).to(torch.uint8)
        return codes
    for part in _parts(len(values), max(1, _STEP // max(values.shape[1], 1))):
        codes[part] = torch.searchsorted(middles[part], values[part].double()).to(torch.uint8)
    return codes


class _Line:
    """Sorted numbers of some tables: values float64 (tables, n), moments: prefix sums float64 (3, tables, n + 1)."""

    def __init__(self, values: Tensor, importance: Tensor | None, zeros: bool) -> None:
        self.values, order = values.double().sort(1)
        # Tables with an entry that stays at 0, (tables, 1).
        self.held = (self.values == 0).any(1, keepdim=True) & zeros
        mass = torch.ones_like(self.values) if importance is None else importance.double().gather(1, order)
        self.moments = self.values.new_zeros(3, values.shape[0], values.shape[1] + 1)
        for power in range(3):
            torch.cumsum(mass, 1, out=self.moments[power, :, 1:])
            mass = mass * self.values

    def rows(self, chosen: Tensor) -> _Line:
        """The tables of which `chosen` bool (tables,) is true."""
        line = _Line.__new__(_Line)
        line.values, line.moments, line.held = self.values[chosen], self.moments[:, chosen], self.held[chosen]
        return line

    def start(self, how: Start, bits: int, draws: Tensor | None) -> Tensor:
        """The first entries, ascending float64 (tables, 2**bits)."""
        if how == "kmeans++":
            assert draws is not None
            return self.scattered(draws)
        return self.dense(bits) if how == "density" and self.values.shape[1] > 1 else self.even(bits)

    def dense(self, bits: int) -> Tensor:
        """Entries as dense as the cube root of the numbers' density, optimal for many entries (Panter and Dite, 1951).

        The density is that between evenly spaced ranks, some for each entry.
        """
        count, entries = self.values.shape[1], 1 << bits
        taken = min(_RANKS * entries, count - 1) + 1
        # On the CPU, for another device may round the middle between two ranks otherwise.
        ranks = torch.linspace(0, count - 1, taken, dtype=torch.float64).round().long().to(self.values.device)
        known = self.values[:, ranks]
        share = (self.moments[0, :, ranks].diff(dim=1) * known.diff(dim=1).square()).pow(1 / 3)
        places = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(1)], 1)
        steps = (torch.arange(entries, dtype=torch.float64, device=known.device) + 0.5) / entries
        wanted = places[:, -1:] * steps
        right = torch.searchsorted(places, wanted, right=True).clamp_(1, len(ranks) - 1)
        before, after = places.gather(1, right - 1), places.gather(1, right)
        way = ((wanted - before) / (after - before).clamp(min=torch.finfo(torch.float64).tiny)).clamp_(0, 1)
        return known.gather(1, right - 1).lerp(known.gather(1, right), way)

    def even(self, bits: int) -> Tensor:
        """Entries evenly spaced from the smallest to the largest number."""
        low, high = self.values[:, :1], self.values[:, -1:]
        steps = torch.linspace(0, 1, 1 << bits, dtype=torch.float64, device=low.device)
        return low * (1 - steps) + high * steps

    def grid(self, bits: int, dtype: torch.dtype) -> Tensor:
        """The better one of the grids that linear quantization takes: symmetric, or with a zero point."""
        low, high = self.values[:, :1].float(), self.values[:, -1:].float()
        levels = torch.arange(1 << bits, dtype=torch.float64, device=low.device)

        def grid(symmetric: bool) -> Tensor:
            scale, zero = parameters(low, high, Affine(bits, "channel", 0, symmetric), dtype)
            return (levels - zero) * scale

        shifted, symmetric = grid(False), grid(True)
        return torch.where((self.errors(shifted) <= self.errors(symmetric)).unsqueeze(1), shifted, symmetric)

    def scattered(self, draws: Tensor) -> Tensor:
        """Entries drawn from the numbers, one by one, in proportion to the squared distance from those drawn before."""
        count = self.values.shape[1]
        mass = self.moments[0, :, 1:].contiguous()
        first = torch.searchsorted(mass, draws[:, :1] * mass[:, -1:], right=True)
        table = self.values.gather(1, first.clamp(max=count - 1))
        for k in range(1, draws.shape[1]):
            bounds = self._bounds(table)
            costs = self._costs(table, bounds).cumsum(1)
            wanted = draws[:, k : k + 1] * costs[:, -1:]
            chosen = torch.searchsorted(costs, wanted, right=True).clamp(max=k - 1)
            wanted = wanted - costs.gather(1, (chosen - 1).clamp(min=0)) * (chosen > 0)
            entry, start = table.gather(1, chosen), bounds.gather(1, chosen)
            low, high = start, bounds.gather(1, chosen + 1)
            # The first number up to which the cluster costs more than wanted: in [low, high).
            for _ in range(count.bit_length()):
                middle = (low + high) // 2
                enough = self._cost(entry, start, (middle + 1).clamp(max=count)) > wanted
                low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
                low = torch.minimum(low, high)
            drawn = self.values.gather(1, low.clamp(max=count - 1))
            table = torch.cat([table, drawn], 1).sort(1).values
        return table

    def with_zero(self, table: Tensor) -> Tensor:
        """The table with its entry nearest to 0 exactly there, where one is to stay at 0."""
        nearest = table.abs().argmin(1, keepdim=True)
        return table.scatter(1, nearest, table.gather(1, nearest) * ~self.held)

    def settled(self, table: Tensor, rounds: int) -> Tensor:
        """The table after Lloyd's iterations, each of which lowers the error or leaves it as it is."""
        still = (self.values[:, -1:] - self.values[:, :1]) * _STILL
        for done in range(1, rounds + 1):
            before, table = table, self._moved(table)
            moving = ((table - before).abs() > still).any(1)
            count = int(moving.sum())
            if count == 0:
                break
            if 2 * count < len(table):
                # The others are done: go on with those that move.
                table[moving] = self.rows(moving).settled(table[moving], rounds - done)
                break
        return table

    def _moved(self, table: Tensor) -> Tensor:
        """Every entry at the mean of the numbers nearest to it."""
        bounds = self._bounds(table)
        mass, first, _ = self._sums(bounds)
        fixed = (table == 0) & self.held
        # Of several entries at 0 the others take no number and may go elsewhere.
        fixed &= fixed.cumsum(1) == 1
        empty = (bounds.diff(dim=1) == 0) & ~fixed
        moved = torch.where(fixed | empty, table, first / mass)
        return self._refilled(moved, bounds, empty) if bool(empty.any()) else moved

    def _refilled(self, table: Tensor, bounds: Tensor, empty: Tensor) -> Tensor:
        """Send entries that no number is nearest to into the clusters that cost most, to the end farther off."""
        last = self.values.shape[1] - 1
        low = self.values.gather(1, bounds[:, :-1].clamp(max=last))
        high = self.values.gather(1, (bounds[:, 1:] - 1).clamp(min=0))
        costs = torch.where(high > low, self._costs(table, bounds), -1.0)
        worst = costs.argsort(1, descending=True)
        target = worst.gather(1, (empty.cumsum(1) - 1).clamp(min=0))
        end = torch.where(table - low > high - table, low, high).gather(1, target)
        moves = empty & (costs.gather(1, target) >= 0)
        return torch.where(moves, end, table).sort(1).values

    def exact(self, table: Tensor) -> Tensor:
        """The different numbers themselves, the largest one repeated, where the table has room for all."""
        entries = table.shape[1]
        new = torch.ones_like(self.values, dtype=torch.bool)
        new[:, 1:] = self.values.diff(dim=1) != 0
        place = new.cumsum(1).sub_(1)
        few = place[:, -1:] < entries
        all_of_them = self.values[:, -1:].repeat(1, entries)
        all_of_them.scatter_(1, place.clamp_(max=entries - 1), self.values)
        return torch.where(few, all_of_them, table)

    def errors(self, table: Tensor) -> Tensor:
        """Σ m (v - nearest entry)² of each table, float64 (tables,)."""
        return self._costs(table, self._bounds(table)).sum(1)

    def _bounds(self, table: Tensor) -> Tensor:
        """Where the cluster of each entry starts and the last one ends, int64 (tables, entries + 1)."""
        count, rows = self.values.shape[1], len(table)
        inner = torch.searchsorted(self.values, _middles(table), right=True)
        ends = inner.new_zeros(rows, 1), inner.new_full((rows, 1), count)
        return torch.cat([ends[0], inner, ends[1]], 1)

    def _sums(self, bounds: Tensor) -> Tensor:
        """Mass, first and second moment of each cluster, float64 (3, tables, entries)."""
        return self.moments.gather(2, bounds.expand(3, -1, -1)).diff(dim=2)

    def _costs(self, table: Tensor, bounds: Tensor) -> Tensor:
        """Σ m (v - entry)² of each cluster, float64 (tables, entries)."""
        mass, first, second = self._sums(bounds)
        costs: Tensor = second - 2 * table * first + table.square() * mass
        return costs.clamp_(min=0)

    def _cost(self, entry: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Σ m (v - entry)² over the numbers [start, end) of each table, (tables, 1)."""
        return self._costs(entry, torch.cat([start, end], 1))


def _middles(table: Tensor) -> Tensor:
    """Half-way between neighbouring entries: a number there belongs to the lower one."""
    return (table[:, 1:] + table[:, :-1]).div_(2)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
