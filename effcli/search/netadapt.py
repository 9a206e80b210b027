"""NetAdapt (Yang et al. 2018, arXiv:1804.03230): shrink a little, repair, measure, repeat.

A measured figure is brought down to its budget in rounds. In each, every layer by itself, or every group of channels,
shrinks until the figure has fallen by the round's step. All of these candidates are carried out, with whatever repair
the pass does, and the one of the best quality is kept (Algorithm 1). The next round goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from effcli.errors import SelectionError
from effcli.layers.contract import Evaluator
from effcli.reports.sensitivity import LayerCosts, Option, Search, Sensitivity, valued
from effcli.search.budget import Budget, Figure
from effcli.search.knapsack import Assignment
from effcli.search.values import Strategy, figured


def adapt(costs: Sensitivity, budget: Budget, evaluator: Evaluator, rounds: int) -> Search:
    """The values with which a figure has come down to `budget`, in `rounds` equal steps or fewer.

    costs: what every layer may become; budget: one for which `lowers` holds. The front of what is returned is the way
    there, one point for each round. Raises `SelectionError` where the smallest choice does not keep the budget.
    """
    return _Adapting(costs, budget, evaluator).adapt(budget.figure or "size", rounds)


def lowers(budget: Budget) -> bool:
    """Whether a budget limits a figure that falls as layers shrink."""
    return budget.quantity == "size" or (budget.figure is not None and not budget.of_quality)


class _Adapting(Strategy):
    def adapt(self, figure: Figure, rounds: int) -> Search:
        self.figure = figure
        ladders = [_ladder(layer) for layer in self.costs.layers]
        now = self._choice([ladder[0] for ladder in ladders])
        self.measure(self.evaluator.quality, now)
        way = [(now, "start")]
        limit, left = self.budget.limit, self.measure(figure, now)
        if left > limit:
            least = self.measure(figure, self._choice([ladder[-1] for ladder in ladders]))
            if least > limit:
                raise self._unkept(figure, least)
        step = (left - limit) / rounds
        while left > limit:
            # Further rounds take a step each, but for those in which no layer goes that far.
            total = len(way) + math.ceil((left - limit) / step - 1e-9) - 1
            self.evaluator.say(f"round {len(way)} of {total}: {figured(figure, left)}, {self.budget} wanted")
            target = max(limit, left - step)
            reaching, others = self._candidates(figure, now, ladders, target)
            if not reaching and not others:
                raise self._unkept(figure, left)
            # Where no layer by itself brings the figure down, one goes as far as it can.
            at, now = max((reaching or others).items(), key=lambda item: self._worth(figure, item[1]))
            left = self.measure(figure, now)
            layer = self.costs.layers[at]
            value = valued(self.option, layer.options[now.options[at]].value)
            way.append((now, f"round {len(way)}: {layer.name} to {value}"))
        return self.search("choices of the rounds", way, now)

    def _unkept(self, figure: Figure, least: float) -> SelectionError:
        taken = figured(figure, least)
        return SelectionError(
            f"{self.evaluator.name}: the budget is {self.budget}, and the smallest choice takes {taken}",
            f"raise the budget or offer other values of `{self.option}`",
        )

    def _candidates(
        self, figure: Figure, now: Assignment, ladders: Sequence[Sequence[int]], target: float
    ) -> tuple[dict[int, Assignment], dict[int, Assignment]]:
        """`now` with one layer shrunk until the figure is down to `target`, and with one that never brings it there.

        Both by the number of the layer. The latter is as small as it can be; a layer that is so already has neither.
        """
        reaching, others = {}, {}
        least = self.measure(figure, now) - target
        for at, ladder in enumerate(ladders):
            options, place = self.costs.layers[at].options, now.options[at]
            for smaller in ladder[ladder.index(place) + 1 :]:
                choice = self._choice([*now.options[:at], smaller, *now.options[at + 1 :]])
                short = _saved(figure, options[place], options[smaller]) < least
                if not short and self.measure(figure, choice) <= target:
                    # While it stands there: only one choice does.
                    self.measure(self.evaluator.quality, choice)
                    reaching[at] = choice
                    break
                others[at] = choice
        return reaching, others

    def _worth(self, figure: Figure, choice: Assignment) -> tuple[float, float]:
        """More for a better quality, of equal ones for less of the figure."""
        quality = self.evaluator.quality
        found = self.measure(quality, choice)
        return -found if quality == "perplexity" else found, -self.measure(figure, choice)

    def _choice(self, places: Sequence[int]) -> Assignment:
        return self.assignments.frontier.choice(places)


def _saved(figure: Figure, larger: Option, smaller: Option) -> float:
    """How much of a figure one option saves at most in place of another, as far as costs tell it.

    Of what two groups share a cut saves the less, the more the other has lost.
    """
    if figure == "macs" and larger.macs is not None and smaller.macs is not None:
        return larger.macs - smaller.macs
    return larger.nbytes - smaller.nbytes if figure == "size" else math.inf


def _ladder(layer: LayerCosts) -> list[int]:
    """The options of a layer by their places, each of fewer bytes than the one before."""
    places = sorted(range(len(layer.options)), key=lambda at: (-layer.options[at].nbytes, layer.options[at].cost))
    sizes = [layer.options[at].nbytes for at in places]
    return [at for number, at in enumerate(places) if number == 0 or sizes[number] < sizes[number - 1]]


__all__ = ["adapt", "lowers"]
