"""Observers: one histogram that grows without losing a count, and ranges that a search over the numbers confirms."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.errors import NumericsError
from effcli.layers import ranges
from effcli.layers.ranges import Method, Observer

METHODS: tuple[Method, ...] = get_args(Method)


def observed(*batches: Tensor) -> Observer:
    observer = Observer("relu")
    for batch in batches:
        observer.add(batch)
    return observer


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def squared_error(values: Tensor, low: float, high: float) -> float:
    """Mean squared error of 8 bits over [low, high], by rounding the numbers themselves."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    rounded = ((values.double() / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
    return float((rounded - values.double()).square().mean())


def test_extremes_and_averages_by_hand() -> None:
    observer = observed(torch.tensor([-1.0, 2.0]), torch.tensor([[-3.0], [1.0]]))
    assert observer.range_of("minmax") == (-3.0, 2.0)
    assert observer.range_of("moving_average") == pytest.approx((-1.02, 1.99))


def test_percentiles_by_hand() -> None:
    """Of 1000 numbers one percent at each end is ten: the eleventh stays."""
    observer = observed(torch.arange(-499, 501).float())
    low, high = observer.range_of("percentile", 99.0)
    assert low == pytest.approx(-489, abs=observer.width) and high == pytest.approx(490, abs=observer.width)
    assert observer.range_of("percentile", 100.0) == observer.range_of("minmax")


def test_the_histogram_by_hand() -> None:
    """Bins of width 1, then of width 3, both centred on zero: 4 goes to the bin around 3, 5 to the one around 6."""
    observer = observed(torch.tensor([float(ranges._SIDE), 4.0, 5.0, -4.0, 0.0, 0.0]))
    assert observer.width == 1
    middle = ranges._SIDE
    assert [int(observer.counts[middle + k]) for k in (-4, 0, 4, 5, middle)] == [1, 2, 1, 1, 1]
    observer.add(torch.tensor([3.0 * ranges._SIDE]))
    assert observer.width == 3
    assert [int(observer.counts[middle + k]) for k in (-1, 0, 1, 2)] == [1, 2, 1, 1]
    assert int(observer.counts.sum()) == 7


@given(
    scales=st.lists(st.floats(1e-20, 1e20), min_size=1, max_size=6),
    sizes=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_growing_keeps_every_count(scales: list[float], sizes: list[int], seed: int) -> None:
    batches = [normal(size, seed + k) * scale for k, (scale, size) in enumerate(zip(scales, sizes, strict=False))]
    observer = observed(*batches)
    numbers = torch.cat(batches)
    assert int(observer.counts.sum()) == len(numbers)
    if len(numbers):
        largest = float(numbers.abs().max())
        # Every number is where its bin says, and the bins are never too wide.
        assert largest <= (ranges._SIDE + 0.5) * observer.width
        assert (largest == 0) == (observer.width == 0)
        assert float(observer.counts @ np.abs(observer.centres)) == pytest.approx(
            float(numbers.double().abs().sum()), abs=observer.width * len(numbers) / 2 * 1.001
        )


@pytest.mark.parametrize("method", METHODS)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_every_range_holds_zero_and_lies_within_what_was_seen(method: Method, values: list[float]) -> None:
    low, high = observed(torch.tensor(values)).range_of(method)
    assert min(*values, 0.0) <= low <= 0 <= high <= max(*values, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_inputs(method: Method) -> None:
    assert Observer("never").range_of(method) == (0.0, 0.0)
    assert observed(torch.zeros(0, 3)).range_of(method) == (0.0, 0.0)
    assert observed(torch.zeros(5), torch.zeros(2)).range_of(method) == (0.0, 0.0)
    low, high = observed(torch.full((9,), 3.5)).range_of(method)
    assert low == 0 and high == pytest.approx(3.5, rel=2e-2)
    low, high = observed(torch.full((9,), -3.5)).range_of(method)
    assert high == 0 and low == pytest.approx(-3.5, rel=2e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(value: float) -> None:
    with pytest.raises(NumericsError, match="relu is NaN or infinite"):
        observed(torch.ones(3), torch.tensor([1.0, value]))


DISTRIBUTIONS = {
    "normal": lambda: normal(20000),
    "relu": lambda: normal(20000).relu(),
    "heavy": lambda: normal(20000) * normal(20000, 1).abs().pow(3),
    "lopsided": lambda: normal(20000).exp() - 0.5,
    "outlier": lambda: torch.cat([normal(20000).relu(), torch.tensor([60.0])]),
    "uniform": lambda: torch.rand(20000, generator=torch.Generator().manual_seed(2)) - 0.3,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_least_squares_is_about_the_best_there_is(name: str) -> None:
    """Against rounding the numbers themselves over a grid of both ends; Δ²/12 is right to a few percent."""
    values = DISTRIBUTIONS[name]()
    observer = observed(*values.split(3000))
    found = squared_error(values, *observer.range_of("least_squares"))
    low, high = observer.range_of("minmax")
    lows = [low * step for step in np.linspace(0.02, 1, 30)] if low < 0 else [0.0]
    best = min(squared_error(values, a, high * step) for a in lows for step in np.linspace(0.02, 1, 30))
    assert found <= 1.05 * min(best, squared_error(values, low, high))


def test_divergence_by_hand() -> None:
    """Four bins on two levels: P = (1, 3, 0, 4) / 8, Q = (2, 2, 0, 4) / 8."""
    counts = np.array([1.0, 3.0, 0.0, 4.0])
    expected = (1 * np.log(1 / 2) + 3 * np.log(3 / 2)) / 8
    assert ranges._divergence(counts, 4, 2) == pytest.approx(expected)
    # Kept as they are, on as many levels as bins, nothing diverges but what is clipped.
    assert ranges._divergence(counts, 4, 4) == pytest.approx(0)
    clipped = 1 / 8 * np.log((1 / 8) / (1 / 4)) + 7 / 8 * np.log((7 / 8) / (3 / 4))
    assert ranges._divergence(counts, 2, 2) == pytest.approx(clipped)


def test_kl_clips_an_outlier_and_no_uniform_distribution() -> None:
    assert observed(DISTRIBUTIONS["outlier"]()).range_of("kl")[1] < 20
    low, high = observed(DISTRIBUTIONS["uniform"]()).range_of("kl")
    assert low == pytest.approx(-0.3, abs=0.01) and high == pytest.approx(0.7, abs=0.02)


@given(values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200))
def test_the_drawn_histogram_counts_everything(values: list[float]) -> None:
    row = observed(torch.tensor(values)).row((-1.0, 2.0), "minmax")
    assert sum(row.counts) == len(values)
    assert len(row.edges) == len(row.counts) + 1 <= 65
    assert row.edges[0] <= min(values) and row.edges[-1] >= max(values)
    assert (row.name, row.low, row.high, row.observer) == ("relu", -1.0, 2.0, "minmax")
