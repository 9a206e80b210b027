"""The value of an option in every layer under a budget, from what each value costs each layer.

A budget of bytes follows from the formats alone: the cheapest choice of so many bytes. Any other figure is measured of
choices along the front, the cheapest for each number of bytes, by bisection. What is chosen was measured and keeps the
budget; where a figure does not rise with the bytes all the way, a better choice may have been passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from effcli.errors import RecipeError, SelectionError
from effcli.layers.contract import Evaluator
from effcli.reports.sensitivity import Point, Search, Sensitivity, Value, valued
from effcli.reports.units import significant, size
from effcli.search.budget import Budget, Figure, figure_title
from effcli.search.knapsack import Assignment, Frontier

_POINTS = 33
# Repeated measurements of time differ by so much of it.
_NOISE = 0.05


def choose_values(costs: Sensitivity, budget: Budget, evaluator: Evaluator, measured: int = 0) -> Search:
    """The values that keep `budget` at the least cost, with the front and the uniform choices beside them.

    measured: the quality of so many points along the front is measured, and that of the choice. Raises
    `SelectionError` for a budget that no choice keeps, and for one that every choice keeps or misses alike.
    """
    return _Chooser(costs, budget, evaluator).choose(measured)


def check_size(name: str, limit: int, smallest: int, largest: int) -> None:
    """Raise `SelectionError` for a size in bytes that no choice or every choice of the search `name` keeps."""
    if limit < smallest:
        raise SelectionError(
            f"{name}: the budget is {size(limit)}, and the fewest bits everywhere take {size(smallest)}",
            "raise the budget, offer fewer `bits`, or take larger groups",
        )
    if limit > largest:
        raise SelectionError(
            f"{name}: the budget is {size(limit)}, and the most bits everywhere take only {size(largest)}",
            "lower the budget or offer more `bits`",
        )


def check_average(name: str, bits: float, widths: Collection[float]) -> None:
    """Raise `SelectionError` for an average of bits outside of `widths`, those that the search `name` chooses from."""
    if not min(widths) <= bits <= max(widths):
        raise SelectionError(
            f"{name}.average_bits: {bits:g} is outside of the bits to choose from, {min(widths):g} to {max(widths):g}",
            "choose a number between them, or offer other `bits`",
        )


class _Chooser:
    def __init__(self, costs: Sensitivity, budget: Budget, evaluator: Evaluator) -> None:
        self.costs = costs
        self.budget = budget
        self.evaluator = evaluator
        self.assignments = Assignments(costs)
        self.frontier = self.assignments.frontier
        self.front = self.frontier.points(_POINTS)
        # What was measured of each choice.
        self.found: dict[Figure, dict[tuple[int, ...], float]] = {}

    def choose(self, measured: int) -> Search:
        chosen = self._chosen()
        quality, figure = self.evaluator.quality, self.budget.figure
        for at in range(measured):
            self._measure(quality, self.front[round(at * (len(self.front) - 1) / max(measured - 1, 1))])
        if measured:
            self._measure(quality, chosen)
        shown = {choice.options: choice for choice in (*self.front, chosen)}
        return Search(
            sensitivity=self.costs,
            budget=str(self.budget),
            front=tuple(self._point(choice, "") for choice in sorted(shown.values(), key=lambda c: c.nbytes)),
            uniform=tuple(
                self._point(choice, valued(self.costs.option, value))
                for value, choice in self.assignments.uniform.items()
            ),
            chosen=self._point(chosen, "chosen"),
            values=self.assignments.values(chosen),
            measure=quality if quality in self.found else "",
            limited="" if figure in (None, quality) else figure_title(figure),
        )

    def _chosen(self) -> Assignment:
        """The choice that keeps the budget."""
        figure, limit = self.budget.figure, self.budget.limit
        match self.budget.quantity:
            case "average_bits":
                return self._at(self._average(limit))
            case "size":
                fixed = self.evaluator.fixed_bytes
                return self._at(int(limit) - fixed, fixed)
        if figure is None:
            raise RecipeError(
                f"{self._key}: bits do not change the {self.budget.quantity}", "give another budget, such as size"
            )
        return self._smallest(figure) if self.budget.of_quality else self._largest(figure)

    @property
    def _key(self) -> str:
        return f"{self.evaluator.name}.{self.budget.quantity}"

    def _at(self, nbytes: int, fixed: int = 0) -> Assignment:
        smallest, largest = self.frontier.smallest + fixed, self.frontier.largest + fixed
        check_size(self.evaluator.name, nbytes + fixed, smallest, largest)
        return self.frontier.at(nbytes)

    def _average(self, bits: float) -> int:
        check_average(self.evaluator.name, bits, self.assignments.uniform)
        return self.assignments.nbytes(bits)

    def _smallest(self, figure: Figure) -> Assignment:
        """The smallest choice on the front whose measured quality keeps the budget."""
        original = self.evaluator.original()
        most = self._measure(figure, self.front[-1])
        if not self.budget.keeps(most, original):
            raise SelectionError(
                f"{self.evaluator.name}: even the most bits take {figure} from {significant(original, 4)} to "
                f"{significant(most, 4)}",
                "raise the budget or offer more `bits`",
            )
        return self.front[_first(len(self.front) - 1, lambda at: self._keeps(figure, at, original))]

    def _largest(self, figure: Figure) -> Assignment:
        """The largest choice on the front, whose quality is best, with a measured figure that keeps the budget."""
        fewest, most = (self._measure(figure, self.front[at]) for at in (0, -1))
        shown = f"{_figure(figure, fewest)} with the fewest and {_figure(figure, most)} with the most"
        if abs(most - fewest) <= (_NOISE * max(fewest, most) if figure == "latency" else 0):
            raise SelectionError(
                f"{self._key}: bits do not change it here: it is {shown} bits", "give another budget, such as size"
            )
        if self.budget.keeps(most, most):
            return self.front[-1]
        if not self.budget.keeps(fewest, fewest):
            raise SelectionError(
                f"{self.evaluator.name}: the budget is {self.budget}, and it is {shown} bits",
                "raise the budget, offer fewer `bits`, or take larger groups",
            )
        return self.front[_first(len(self.front) - 1, lambda at: not self._keeps(figure, at, fewest)) - 1]

    def _keeps(self, figure: Figure, at: int, original: float) -> bool:
        return self.budget.keeps(self._measure(figure, self.front[at]), original)

    def _measure(self, figure: Figure, choice: Assignment) -> float:
        """The figure of a choice, really carried out."""
        found = self.found.setdefault(figure, {})
        if choice.options not in found:
            found[choice.options] = self.evaluator.measure(figure, self.assignments.values(choice))
        return found[choice.options]

    def _point(self, choice: Assignment, name: str) -> Point:
        values = self.assignments.values(choice)
        weights = {layer.name: layer.shape[0] * layer.shape[1] for layer in self.costs.layers}
        quality, figure = self.evaluator.quality, self.budget.figure
        return Point(
            name=name,
            nbytes=choice.nbytes,
            average=sum(weights[layer] * own for layer, own in values.items()) / max(sum(weights.values()), 1),
            cost=choice.cost,
            measured=self.found.get(quality, {}).get(choice.options),
            limited=None if figure in (None, quality) else self.found.get(figure, {}).get(choice.options),
        )


class Assignments:
    """The choices that layers leave, by what they cost. frontier: the cheapest ones for every budget."""

    def __init__(self, found: Sensitivity) -> None:
        self._layers = found.layers
        self.frontier = Frontier(
            [[option.nbytes for option in layer.options] for layer in found.layers],
            [[option.cost for option in layer.options] for layer in found.layers],
        )

    @property
    def uniform(self) -> dict[Value, Assignment]:
        """Every layer with the same value; a layer that has one of its own keeps it."""
        found = {}
        places = [[option.value for option in layer.options] for layer in self._layers]
        for value in sorted({each for own in places for each in own}):
            if all(value in own or len(own) == 1 for own in places):
                found[value] = self.frontier.choice([own.index(value) if value in own else 0 for own in places])
        return found

    def nbytes(self, average: float) -> int:
        """The bytes of a value for every layer, between two that were priced interpolated; `ValueError` outside."""
        uniform = self.uniform
        below = max(each for each in uniform if each <= average)
        above = min(each for each in uniform if each >= average)
        share = (average - below) / (above - below) if above > below else 0.0
        return int(uniform[below].nbytes + share * (uniform[above].nbytes - uniform[below].nbytes))

    def values(self, choice: Assignment) -> dict[str, Value]:
        """The value in every layer by name."""
        return {layer.name: layer.options[at].value for layer, at in zip(self._layers, choice.options, strict=True)}


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first of `count` places from which on `holds`, by bisection; `count` where it holds nowhere."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _figure(figure: Figure, value: float) -> str:
    return size(int(value)) if figure in ("ram", "flash") else f"{significant(value)} ms"


__all__ = ["Assignments", "check_average", "check_size", "choose_values"]
