"""The value of an option in every layer under a budget, from what each value costs each layer.

A budget of bytes follows from the formats alone where these tell how many there are: the cheapest choice of so many.
How a sparse weight is stored depends on where its zeros are, so that what the trials of single layers took is a guess
which the carried-out choice corrects. Any other figure is measured of choices along the front, the cheapest for each
number of bytes, by bisection. What is chosen was measured and keeps the budget; where a figure does not rise with the
bytes all the way, a better choice may have been passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from effcli.errors import RecipeError, SelectionError
from effcli.layers.contract import Evaluator
from effcli.reports.sensitivity import LayerCosts, Option, Point, Search, Sensitivity, Value, Varied, valued
from effcli.reports.units import significant, size
from effcli.search.budget import Budget, Figure, figure_title
from effcli.search.knapsack import Assignment, Frontier
from effcli.search.space import SPACES, unchanging

_POINTS = 33
# How often it is halved what lies between two points of the front.
_REFINED = 4
# Repeated measurements of time differ by so much of it.
_NOISE = 0.05
_MILLION = 1_000_000


def choose_values(costs: Sensitivity, budget: Budget, evaluator: Evaluator, measured: int = 0) -> Search:
    """The values that keep `budget` at the least cost, with the front and the uniform choices beside them.

    measured: the quality of so many points along the front is measured, and that of the choice. Raises
    `SelectionError` for a budget that no choice keeps, and for one that every choice keeps or misses alike.
    """
    return _Chooser(costs, budget, evaluator).choose(measured)


def check_size(name: str, option: Varied, limit: int, smallest: int, largest: int) -> None:
    """Raise `SelectionError` for a size in bytes that no choice or every choice of the search `name` keeps."""
    if limit < smallest:
        raise SelectionError(
            f"{name}: the budget is {size(limit)}, and {_end(option, True, ' everywhere')} {size(smallest)}",
            _smaller(option),
        )
    if limit > largest:
        raise SelectionError(
            f"{name}: the budget is {size(limit)}, and {_end(option, False, ' everywhere')} only {size(largest)}",
            f"lower the budget or {_larger(option)}",
        )


def outside(option: Varied, average: float, values: Collection[float]) -> str:
    """What is wrong with an average of layers that all choose from `values`; empty where a choice has it."""
    if min(values) <= average <= max(values):
        return ""
    return f"{average:g} is outside of the {option} to choose from, {min(values):g} to {max(values):g}"


def check_average(name: str, option: Varied, average: float, layers: Sequence[tuple[int, Collection[float]]]) -> None:
    """Raise `SelectionError` for an average that no choice of the search `name` has.

    layers: of each how many weights it has, and the values that it may have: one where it keeps a value of its own.
    """
    values = common([own for _, own in layers])
    cause, remedy = outside(option, average, values), f"choose a number between them, or offer other `{option}`"
    if option != "bits":
        # What is averaged are weights that stay, whichever layers they are in.
        weights = sum(count for count, _ in layers)
        most, least = (sum(count * _left(end(own)) for count, own in layers) for end in (min, max))
        if least <= _left(average) * weights <= most:
            return
        if any(set(own) != set(values) for _, own in layers):
            low, high = (1 - end / (_MILLION * weights) for end in (most, least))
            found = f"{low:.4g} to {high:.4g}, for some keep a {option} of their own"
            cause = f"{average:g} is outside of what the layers together can have, {found}"
            remedy = f"choose a number between them, or leave `{option}` out of `layers`"
    if cause:
        raise SelectionError(f"{name}.average_{option}: {cause}", remedy)


def common(layers: Sequence[Collection[float]]) -> list[float]:
    """The values that all layers may have, ascending; a layer with one of its own is passed over."""
    every = {value for own in layers for value in own}
    return sorted(value for value in every if all(value in own or len(own) == 1 for own in layers))


def _end(option: Varied, least: bool, where: str = "") -> str:
    """`the fewest bits take`, of the choice of the fewest or of the most bytes; where: stands before the verb."""
    space = SPACES[option]
    return f"the {space.least if least else space.most} {option}{where} {'take' if space.many else 'takes'}"


def _smaller(option: Varied) -> str:
    """What to do where every choice is too large."""
    offer = "offer fewer `bits`, or take larger groups" if option == "bits" else f"or offer a higher `{option}`"
    return f"raise the budget, {offer}"


def _larger(option: Varied) -> str:
    """How to have a choice that is larger, and so better."""
    return "offer more `bits`" if option == "bits" else f"offer a lower `{option}`"


class Strategy:
    """A way to choose under a budget, with what it measured of the choices that it had carried out.

    figure: what the budget limits, None where costs alone tell it.
    """

    def __init__(self, costs: Sensitivity, budget: Budget, evaluator: Evaluator) -> None:
        self.costs = costs
        self.budget = budget
        self.evaluator = evaluator
        self.option = costs.option
        self.figure: Figure | None = budget.figure
        if budget.quantity == "size" and self.option != "bits":
            self.figure = "size"
        self.assignments = Assignments(costs)
        self._found: dict[Figure, dict[tuple[int, ...], float]] = {}

    def measure(self, figure: Figure, choice: Assignment) -> float:
        """The figure of a choice, really carried out."""
        found = self._found.setdefault(figure, {})
        if choice.options not in found:
            found[choice.options] = self.evaluator.measure(figure, self.assignments.values(choice))
        return found[choice.options]

    def search(self, along: str, shown: Iterable[tuple[Assignment, str]], chosen: Assignment) -> Search:
        """What was found; along: what is shown, in words; shown: choices and how each came about."""
        quality = self.evaluator.quality
        return Search(
            sensitivity=self.costs,
            budget=str(self.budget),
            along=along,
            front=tuple(self._point(*one) for one in sorted(shown, key=lambda one: one[0].nbytes)),
            uniform=tuple(
                self._point(choice, valued(self.option, value)) for value, choice in self.assignments.uniform.items()
            ),
            chosen=self._point(chosen, "chosen"),
            values=self.assignments.values(chosen),
            measure=quality if quality in self._found else "",
            limited="" if self.figure in (None, quality) else figure_title(self.figure),
        )

    def _point(self, choice: Assignment, name: str) -> Point:
        values = self.assignments.values(choice)
        weights = {layer.name: _entries(layer) for layer in self.costs.layers}
        quality, figure = self.evaluator.quality, self.figure
        return Point(
            name=name,
            nbytes=choice.nbytes,
            average=sum(weights[layer] * own for layer, own in values.items()) / max(sum(weights.values()), 1),
            cost=choice.cost,
            measured=self._found.get(quality, {}).get(choice.options),
            limited=None if figure in (None, quality) else self._found.get(figure, {}).get(choice.options),
        )


class _Chooser(Strategy):
    def __init__(self, costs: Sensitivity, budget: Budget, evaluator: Evaluator) -> None:
        super().__init__(costs, budget, evaluator)
        self.frontier = self.assignments.frontier
        # What choices along the front are cheapest for, in place of bytes.
        counted = self.figure in ("macs", "latency") and self.option == "ratio"
        self.sized = Assignments(costs, _multiplied).frontier if counted else self.frontier
        self.front = [self.frontier.choice(choice.options) for choice in self.sized.points(_POINTS)]

    def choose(self, measured: int) -> Search:
        chosen = self._chosen()
        quality = self.evaluator.quality
        for at in range(measured):
            self.measure(quality, self.front[round(at * (len(self.front) - 1) / max(measured - 1, 1))])
        if measured:
            self.measure(quality, chosen)
        shown = {choice.options: choice for choice in (*self.front, chosen)}
        return self.search("cheapest choices", ((choice, "") for choice in shown.values()), chosen)

    def _chosen(self) -> Assignment:
        """The choice that keeps the budget."""
        quantity, limit = self.budget.quantity, self.budget.limit
        if quantity == f"average_{self.option}":
            return self._average(limit)
        if quantity == "size" and self.option != "ratio":
            return self._sized(int(limit))
        if self.figure is None or (self.figure == "macs" and self.option != "ratio"):
            raise RecipeError(
                f"{self._key}: {unchanging(self.option)} the {quantity}",
                "give another budget, such as size",
            )
        return self._smallest(self.figure) if self.budget.of_quality else self._largest(self.figure)

    @property
    def _key(self) -> str:
        return f"{self.evaluator.name}.{self.budget.quantity}"

    def _sized(self, limit: int) -> Assignment:
        """The cheapest choice whose weight files take `limit` bytes at most."""
        name, fixed = self.evaluator.name, self.evaluator.fixed_bytes
        if self.figure is not None and limit < self.frontier.smallest + fixed:
            # Headers may take less than was counted for them: so much that the files tell.
            fixed = int(self.measure(self.figure, self.front[0])) - self.front[0].nbytes
        smallest, largest = self.frontier.smallest + fixed, self.frontier.largest + fixed
        check_size(name, self.option, limit, smallest, largest)
        if self.figure is None:
            return self.frontier.at(limit - fixed)
        allowed = limit - fixed
        while allowed >= self.frontier.smallest:
            choice = self.frontier.at(allowed)
            over = int(self.measure(self.figure, choice)) - limit
            if over <= 0:
                return choice
            # What was guessed too low here is so by about as much of the choices beside it.
            allowed = choice.nbytes - over
        check_size(name, self.option, limit, int(self.measure(self.figure, self.front[0])), largest)
        return self.front[0]

    def _average(self, average: float) -> Assignment:
        layers = self.costs.layers
        check_average(
            self.evaluator.name,
            self.option,
            average,
            [(_entries(layer), [option.value for option in layer.options]) for layer in layers],
        )
        if self.option == "bits":
            return self.frontier.at(self.assignments.nbytes(average))
        kept = Assignments(self.costs, _kept).frontier
        limit = _left(average) * sum(map(_entries, layers))
        return self.frontier.choice(kept.at(limit).options)

    def _smallest(self, figure: Figure) -> Assignment:
        """The smallest choice on the front whose measured quality keeps the budget."""
        original = self.evaluator.original()
        most = self.measure(figure, self.front[-1])
        if not self.budget.keeps(most, original):
            best, change = _end(self.option, least=False), f"{significant(original, 4)} to {significant(most, 4)}"
            raise SelectionError(
                f"{self.evaluator.name}: even {best} {figure} from {change}",
                f"raise the budget or {_larger(self.option)}",
            )
        return self.front[_first(len(self.front) - 1, lambda at: self._keeps(figure, at, original))]

    def _largest(self, figure: Figure) -> Assignment:
        """The largest choice on the front, whose quality is best, with a measured figure that keeps the budget."""
        fewest, most = (self.measure(figure, self.front[at]) for at in (0, -1))
        space = SPACES[self.option]
        ends = f"{figured(figure, fewest)} with the {space.least} and {figured(figure, most)} with the {space.most}"
        shown = f"{ends} {self.option}"
        if abs(most - fewest) <= (_NOISE * max(fewest, most) if figure == "latency" else 0):
            raise SelectionError(
                f"{self._key}: {unchanging(self.option)} it here: it is {shown}",
                "give another budget, such as size",
            )
        if self.budget.keeps(most, most):
            return self.front[-1]
        if not self.budget.keeps(fewest, fewest):
            raise SelectionError(
                f"{self.evaluator.name}: the budget is {self.budget}, and it is {shown}",
                _smaller(self.option),
            )
        at = _first(len(self.front) - 1, lambda at: not self._keeps(figure, at, fewest)) - 1
        return self._between(figure, self.front[at], self.front[at + 1]) if self.option == "ratio" else self.front[at]

    def _between(self, figure: Figure, kept: Assignment, missed: Assignment) -> Assignment:
        """A larger choice than one that keeps the budget, smaller than one that does not, by further bisection.

        Products of widths leave so much between two points of the front that it pays to look once more.
        """
        low, high = (self.sized.choice(choice.options).nbytes for choice in (kept, missed))
        for _ in range(_REFINED):
            middle = (low + high) // 2
            choice = self.frontier.choice(self.sized.at(middle).options)
            if self.budget.keeps(self.measure(figure, choice), 0):
                kept, low = choice, middle
            else:
                high = middle
        return kept

    def _keeps(self, figure: Figure, at: int, original: float) -> bool:
        return self.budget.keeps(self.measure(figure, self.front[at]), original)


def _entries(layer: LayerCosts) -> int:
    return layer.shape[0] * layer.shape[1]


def _stored(layer: LayerCosts, option: Option) -> int:
    return option.nbytes


def _multiplied(layer: LayerCosts, option: Option) -> int:
    """How many multiplications are left, to first order: those between two groups count in both."""
    return option.nbytes if option.macs is None else option.macs


def _kept(layer: LayerCosts, option: Option) -> int:
    """How many millionths of weights a share leaves: whole numbers with a large common divisor."""
    return _left(option.value) * _entries(layer)


def _left(share: float) -> int:
    """How many millionths are left where a share goes."""
    return round((1 - share) * _MILLION)


class Assignments:
    """The choices that layers leave, by what they cost. frontier: the cheapest ones for every budget.

    size: of a layer with an option, of which a budget limits the sum; bytes unless given.
    """

    def __init__(self, found: Sensitivity, size: Callable[[LayerCosts, Option], int] = _stored) -> None:
        self._layers = found.layers
        self.frontier = Frontier(
            [[size(layer, option) for option in layer.options] for layer in found.layers],
            [[option.cost for option in layer.options] for layer in found.layers],
        )

    @property
    def uniform(self) -> dict[Value, Assignment]:
        """Every layer with the same value; a layer that has one of its own keeps it."""
        places = [[option.value for option in layer.options] for layer in self._layers]
        return {
            value: self.frontier.choice([own.index(value) if value in own else 0 for own in places])
            for value in common(places)
        }

    def nbytes(self, average: float) -> int:
        """The size of a value for every layer, between two that were priced interpolated; `ValueError` outside."""
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


def figured(figure: Figure, value: float) -> str:
    """A measured figure with its unit, in words."""
    if figure == "latency":
        return f"{significant(value)} ms"
    return f"{value:,.0f} multiplications" if figure == "macs" else size(int(value))


__all__ = [
    "Assignments",
    "Strategy",
    "check_average",
    "check_size",
    "choose_values",
    "common",
    "figured",
    "outside",
]
