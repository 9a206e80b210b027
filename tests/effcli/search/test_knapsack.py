"""The knapsack over layers: by hand, against every choice there is, and what must hold for any input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effcli.search.knapsack import Frontier


def items(sizes: st.SearchStrategy[int], most: int = 5) -> st.SearchStrategy[list[list[tuple[int, float]]]]:
    """Items with one to four options, each a size and a cost."""
    option = st.tuples(sizes, st.floats(0, 10, allow_nan=False))
    return st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=most)


def frontier(given: list[list[tuple[int, float]]], **more: Any) -> Frontier:
    return Frontier(
        [[size for size, _ in item] for item in given], [[cost for _, cost in item] for item in given], **more
    )


def cheapest(given: list[list[tuple[int, float]]], budget: int) -> float:
    """The least cost of all choices that keep the budget, by trying each."""
    return min(
        sum(cost for _, cost in choice)
        for choice in itertools.product(*given)
        if sum(size for size, _ in choice) <= budget
    )


def test_by_hand() -> None:
    # Two layers of 2, 3 or 4 units. The first gains 5 and then 1 by a unit more, the second 3 and then 2.
    found = Frontier([[2, 3, 4], [2, 3, 4]], [[7.0, 2.0, 1.0], [6.0, 3.0, 1.0]])

    assert (found.smallest, found.largest, found.exact) == (4, 8, True)
    assert [found.at(budget).options for budget in range(4, 9)] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)]
    assert [found.at(budget).cost for budget in range(4, 9)] == [13.0, 8.0, 5.0, 3.0, 2.0]
    assert [found.at(budget).nbytes for budget in range(4, 9)] == [4, 5, 6, 7, 8]
    assert found.at(1000) == found.at(8)


def test_greed_would_be_wrong() -> None:
    # Per byte the first item's step is the better one, but it does not fit together with the budget that remains.
    found = Frontier([[0, 6], [0, 5], [0, 5]], [[7.0, 0.0], [5.0, 0.0], [5.0, 0.0]])

    assert found.at(10).options == (0, 1, 1)
    assert found.at(10).cost == 7.0


def test_of_equal_costs_the_smaller_is_taken() -> None:
    assert Frontier([[1, 2, 3]], [[4.0, 4.0, 4.0]]).at(3).options == (0,)


@settings(max_examples=150, deadline=None)
@given(items(st.integers(0, 40)), st.integers(0, 200))
def test_no_choice_is_cheaper(given: list[list[tuple[int, float]]], extra: int) -> None:
    found = frontier(given)
    budget = found.smallest + extra
    choice = found.at(budget)

    assert found.exact
    assert choice.nbytes <= budget
    assert choice == found.choice(choice.options)
    assert choice.cost == pytest.approx(cheapest(given, budget), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(items(st.integers(0, 10**7).map(lambda size: 2 * size + 1), most=8), st.sampled_from([7, 64]))
def test_a_larger_budget_never_costs_more(given: list[list[tuple[int, float]]], most_units: int) -> None:
    """Also where sizes are rounded up to coarser units, and where the choice only nearly is the best one."""
    found = frontier(given, most_units=most_units)
    span = found.largest - found.smallest
    choices = [found.at(found.smallest + span * step // 16) for step in range(17)]

    assert all(choice.nbytes <= found.smallest + span * step // 16 for step, choice in enumerate(choices))
    assert all(later.cost <= earlier.cost for earlier, later in itertools.pairwise(choices))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_never_worse_than_uniform(costs: list[list[float]], data: st.DataObject) -> None:
    layers = len(costs)
    sizes = [sorted(data.draw(st.lists(st.integers(1, 10**6), min_size=3, max_size=3))) for _ in range(layers)]
    found = Frontier(sizes, costs, most_units=16)
    for option in range(3):
        uniform = found.choice([option] * layers)
        assert found.at(uniform.nbytes).cost <= uniform.cost


def test_layers_with_one_option_take_part_in_uniform_choices() -> None:
    found = Frontier([[1, 3], [5], [1, 3]], [[4.0, 1.0], [2.0], [4.0, 1.0]], most_units=1)

    assert found.at(11).options == (1, 0, 1)
    assert found.at(7).options == (0, 0, 0)


def test_points_rise_in_size_and_fall_in_cost() -> None:
    found = Frontier([[2, 3, 4, 8]] * 6, [[1 / bits**k for bits in (2, 3, 4, 8)] for k in range(1, 7)])
    points = found.points(20)

    assert points[0].nbytes == found.smallest == 12
    assert points[-1].nbytes == found.largest == 48
    for earlier, later in itertools.pairwise(points):
        assert earlier.nbytes < later.nbytes
        assert earlier.cost > later.cost


def test_the_sizes_of_a_large_model_are_exact() -> None:
    # 32 blocks of a 7B Llama at 2, 3, 4 and 8 bits, groups of 128 with zero points.
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    sizes = [
        [rows * columns * (bits * 128 + 16 + bits) // (128 * 8) for bits in (2, 3, 4, 8)] for rows, columns in shapes
    ]
    costs = [[(1 + place) ** 3 * 4.0**-bits for bits in (2, 3, 4, 8)] for place in range(len(shapes))]
    found = Frontier(sizes * 32, costs * 32)

    assert found.exact
    uniform = found.choice([1] * 224)
    assert found.at(uniform.nbytes).cost < uniform.cost


@pytest.mark.parametrize(
    ("sizes", "costs"),
    [
        ([[]], [[]]),
        ([[1, 2]], [[1.0]]),
        ([[1]], [[1.0], [2.0]]),
        ([[1]], [[float("nan")]]),
        ([[1]], [[float("inf")]]),
        ([[1]], [[-1.0]]),
    ],
)
def test_bad_input(sizes: list[list[int]], costs: list[list[float]]) -> None:
    with pytest.raises(ValueError):
        Frontier(sizes, costs)


def test_a_budget_below_the_smallest_choice() -> None:
    with pytest.raises(ValueError, match="9 bytes are fewer than the 10"):
        Frontier([[4, 8], [6, 7]], [[1.0, 0.0], [1.0, 0.0]]).at(9)


def test_nothing_to_choose() -> None:
    assert Frontier([], []).at(0).options == ()
    assert Frontier([[5], [5]], [[1.0], [2.0]]).at(10).cost == 3.0
