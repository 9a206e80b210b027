"""Which option of each item to take under a budget of bytes: the multiple-choice knapsack, for all budgets at once.

Minimise Σ_i cost_i(x_i) subject to Σ_i nbytes_i(x_i) ≤ budget. Sizes of layers have a large common divisor, so that
totals take few values, and a table over them is exact: after item i, best[s] is the least cost of items 1 to i with s
units or fewer. Where totals would be too many, sizes are rounded up to a coarser unit: every choice still keeps the
budget, and the uniform choices stand beside the table, so that none of them beats what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_UNITS = 1 << 17


@dataclass(frozen=True)
class Assignment:
    """An option for every item. options: its index for each item; nbytes and cost: the sums."""

    options: tuple[int, ...]
    nbytes: int
    cost: float


class Frontier:
    """The cheapest choice for every budget.

    nbytes, costs: of each option of each item; costs are finite and 0 or more. `ValueError` for an item without
    options.
    """

    def __init__(
        self, nbytes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], most_units: int = _MOST_UNITS
    ) -> None:
        if any(len(sizes) == 0 or len(sizes) != len(own) for sizes, own in zip(nbytes, costs, strict=True)):
            raise ValueError("every item needs an option, and every option a size and a cost")
        if not all(math.isfinite(cost) and cost >= 0 for own in costs for cost in own):
            raise ValueError("costs must be finite and 0 or more")
        self._nbytes = [list(sizes) for sizes in nbytes]
        self._costs = [list(own) for own in costs]
        self.smallest = sum(min(sizes) for sizes in self._nbytes)
        self.largest = sum(max(sizes) for sizes in self._nbytes)
        above = [[size - min(sizes) for size in sizes] for sizes in self._nbytes]
        span = self.largest - self.smallest
        divisor = math.gcd(*(size for sizes in above for size in sizes)) or 1
        self._unit = divisor * max(1, math.ceil(span / divisor / most_units))
        self.exact = self._unit == divisor
        self._units = [[-(-size // self._unit) for size in sizes] for sizes in above]
        self._best, self._taken = self._table()
        self._uniform = self._uniform_choices()

    def _table(self) -> tuple[Tensor, list[Tensor]]:
        """Least cost by units, float64 (units,), and the option of each item that leads there, uint8 (units,) each."""
        width = sum(max(sizes) for sizes in self._units) + 1
        best = torch.zeros(width, dtype=torch.float64)
        taken = []
        for sizes, costs in zip(self._units, self._costs, strict=True):
            following = torch.full_like(best, torch.inf)
            option = torch.zeros(width, dtype=torch.uint8)
            # Fewest bytes first: of equal costs the smaller option stays.
            for index in sorted(range(len(sizes)), key=lambda at: (sizes[at], costs[at])):
                reached = torch.full_like(best, torch.inf)
                reached[sizes[index] :] = best[: width - sizes[index]] + costs[index]
                better = reached < following
                following = torch.where(better, reached, following)
                option[better] = index
            best = following
            taken.append(option)
        return best, taken

    def at(self, budget: int) -> Assignment:
        """The cheapest choice of at most `budget` bytes; `ValueError` when there is none."""
        if budget < self.smallest:
            raise ValueError(f"{budget} bytes are fewer than the {self.smallest} of the smallest choice")
        units = min((budget - self.smallest) // self._unit, len(self._best) - 1)
        found = self.choice(self._traced(units))
        fitting = [choice for choice in self._uniform if choice.nbytes <= budget]
        return min([found, *fitting], key=lambda choice: (choice.cost, choice.nbytes))

    def points(self, most: int = 64) -> list[Assignment]:
        """Choices along the frontier, fewest bytes first, each cheaper than the one before; about evenly spaced."""
        found: list[Assignment] = []
        for step in range(most):
            choice = self.at(self.smallest + (self.largest - self.smallest) * step // max(most - 1, 1))
            if not found or choice.cost < found[-1].cost:
                found.append(choice)
        return found

    def choice(self, options: Sequence[int]) -> Assignment:
        """The sums of a choice."""
        nbytes = sum(sizes[at] for sizes, at in zip(self._nbytes, options, strict=True))
        return Assignment(
            tuple(options), nbytes, math.fsum(own[at] for own, at in zip(self._costs, options, strict=True))
        )

    def _traced(self, units: int) -> list[int]:
        """The options behind an entry of the table, from the last item to the first."""
        options = []
        for sizes, taken in zip(reversed(self._units), reversed(self._taken), strict=True):
            index = int(taken[units])
            options.append(index)
            units -= sizes[index]
        return options[::-1]

    def _uniform_choices(self) -> list[Assignment]:
        """The k-th option everywhere, where all items that leave a choice have as many."""
        counts = {len(sizes) for sizes in self._nbytes if len(sizes) > 1}
        if len(counts) != 1:
            return []
        return [self.choice([k if len(sizes) > 1 else 0 for sizes in self._nbytes]) for k in range(counts.pop())]


__all__ = ["Assignment", "Frontier"]
