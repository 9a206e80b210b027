"""NetAdapt's rounds: by hand, in both directions of quality, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from effcli.errors import SelectionError
from effcli.reports.sensitivity import LayerCosts, Option, Sensitivity
from effcli.search.budget import Budget, Figure, Quantity
from effcli.search.netadapt import adapt

RATIOS = (0.0, 0.25, 0.5)
# What is left of each group's multiplications, and the points of accuracy that it costs.
MACS = {"a": (100, 75, 50), "b": (60, 45, 30)}
LOST = {"a": (0, 1, 5), "b": (0, 2, 3)}


def sensitivity() -> Sensitivity:
    layers = [
        LayerCosts(
            name=name,
            kind="channels",
            shape=(4, own[0]),
            options=tuple(
                Option(value=ratio, format="", nbytes=4 * count, macs=count, output_error=0, cost=0)
                for ratio, count in zip(RATIOS, own, strict=True)
            ),
        )
        for name, own in MACS.items()
    ]
    return Sensitivity(
        model="m", step="channels", option="ratio", way="gram", unit="nats", inputs=1, layers=tuple(layers), seconds=0
    )


class Network:
    """An evaluator by the tables. measured: every figure that was asked for, with the ratios of a and b."""

    name = "auto"
    fixed_bytes = 0

    def __init__(self, quality: Figure = "accuracy") -> None:
        self.quality = quality
        self.measured: list[tuple[Figure, float, float]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def original(self) -> float:
        return 90.0

    def measure(self, figure: Figure, values: Mapping[str, float]) -> float:
        self.measured.append((figure, values["a"], values["b"]))
        places = {name: RATIOS.index(value) for name, value in values.items()}
        if figure == self.quality:
            lost = sum(LOST[name][at] for name, at in places.items())
            return 90 - lost if figure == "accuracy" else 10 + lost
        return sum(MACS[name][at] for name, at in places.items()) * (4 if figure == "size" else 1)


@pytest.mark.parametrize("quality", ["accuracy", "perplexity"])
@pytest.mark.parametrize("quantity", ["macs", "size", "latency"])
def test_by_hand(quality: Figure, quantity: Quantity) -> None:
    """From 160 to 110 in two steps of 25.

    135 takes a quarter of a, which loses 1, or half of b, which loses 3. From there 110 takes half of a, which loses 5
    in all, or half of b, which loses 4.
    """
    network = Network(quality)
    found = adapt(sensitivity(), Budget(quantity=quantity, limit=440 if quantity == "size" else 110), network, rounds=2)
    assert found.values == {"a": 0.25, "b": 0.5}
    assert found.chosen.measured == (86 if quality == "accuracy" else 14)
    way = [(point.name, point.limited, point.nbytes) for point in found.front]
    unit = 4 if quantity == "size" else 1
    assert way == [
        ("round 2: b to ratio 0.5", 105 * unit, 420),
        ("round 1: a to ratio 0.25", 135 * unit, 540),
        ("start", 160 * unit, 640),
    ]
    assert found.measure == quality and found.limited.startswith(quantity)
    # Each choice once. Which of them fall short of a step is known beforehand, but not of latency.
    tried = [[0, 0], [0.25, 0], [0, 0.5], [0.5, 0], [0.25, 0.5]]
    short = [[0, 0.25], [0.25, 0.25]] if quantity == "latency" else []
    figures, qualities = ([own for one, *own in network.measured if one == wanted] for wanted in (quantity, quality))
    # The figure of the smallest choice says beforehand whether the budget can be kept.
    assert sorted(figures) == sorted([*tried, *short, [0.5, 0.5]]) and sorted(qualities) == sorted(tried)


def test_rounds_are_told_before_they_begin() -> None:
    network = Network()
    adapt(sensitivity(), Budget(quantity="macs", limit=110), network, rounds=2)
    assert network.said == [
        "round 1 of 2: 160 multiplications, 110 multiplications wanted",
        "round 2 of 2: 135 multiplications, 110 multiplications wanted",
    ]


def test_one_round_may_not_be_enough() -> None:
    """No group alone takes 160 to 85: each goes as far as it can, the one that costs less first."""
    network = Network()
    found = adapt(sensitivity(), Budget(quantity="macs", limit=85), network, rounds=1)
    assert [text.partition(":")[0] for text in network.said] == ["round 1 of 1", "round 2 of 2"]
    assert found.values == {"a": 0.5, "b": 0.5}
    assert [point.name for point in found.front[:2]] == ["round 2: a to ratio 0.5", "round 1: b to ratio 0.5"]


def test_a_budget_that_is_kept_already_changes_nothing() -> None:
    found = adapt(sensitivity(), Budget(quantity="macs", limit=160), Network(), rounds=8)
    assert found.values == {"a": 0.0, "b": 0.0} and [point.name for point in found.front] == ["start"]


def test_a_budget_that_no_choice_keeps() -> None:
    network = Network()
    with pytest.raises(SelectionError, match="the budget is 79 multiplications, and the smallest choice takes 80"):
        adapt(sensitivity(), Budget(quantity="macs", limit=79), network, rounds=8)
    assert len(network.measured) <= 3
