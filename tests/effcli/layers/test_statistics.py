"""What is remembered of a layer's inputs, against the inputs themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.errors import NumericsError
from effcli.layers.statistics import GroupedStatistics, Needs, Statistics


def observed(batches: list[Tensor]) -> Statistics:
    gram = Statistics(batches[0].shape[-1])
    for batch in batches:
        gram.add(batch)
    return gram


def test_by_hand() -> None:
    gram = observed([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]])])
    assert gram.matrix.tolist() == [[10, 1], [1, 5]]
    assert gram.magnitude.tolist() == [2, 1.5]
    assert gram.tokens == 2
    # (1, 1) x is -1 and 4: the mean of its squares is 8.5.
    assert gram.output_energy(torch.tensor([[1.0, 1.0]])) == pytest.approx(8.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 41, 64, 65, 200, 401])
def test_sums_are_those_of_the_inputs(columns: int, dtype: torch.dtype) -> None:
    """Weird shapes, several batches, more tokens than one chunk; the inputs are left as they were."""
    generator = torch.Generator().manual_seed(columns)
    shapes = ((3, 7), (2, 1300), (0, 5), (1, 1))
    batches = [torch.randn(*shape, columns, generator=generator).to(dtype) for shape in shapes]
    copies = [batch.clone() for batch in batches]
    gram = observed(batches)
    for batch, copy in zip(batches, copies, strict=True):
        torch.testing.assert_close(batch, copy, rtol=0, atol=0)
    rows = torch.cat([batch.reshape(-1, columns) for batch in batches]).double()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    expected = rows.t() @ rows
    torch.testing.assert_close(gram.matrix.double(), expected, rtol=tolerance, atol=tolerance * float(expected.max()))
    torch.testing.assert_close(gram.magnitude.double(), rows.abs().mean(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(gram.matrix, gram.matrix.t(), rtol=0, atol=0)
    assert gram.tokens == len(rows)


def test_looking_between_two_batches_changes_nothing() -> None:
    batches = list(torch.randn(4, 5, 200, generator=torch.Generator().manual_seed(0)))
    looked = Statistics(200)
    for batch in batches:
        looked.add(batch)
        assert looked.matrix.shape == (200, 200)
    torch.testing.assert_close(looked.matrix, observed(batches).matrix, rtol=0, atol=0)


@given(columns=st.integers(1, 150), rows=st.integers(1, 5), seed=st.integers(0, 2**32), quick=st.booleans())
def test_the_output_energy_is_that_of_the_products(columns: int, rows: int, seed: int, quick: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, difference = torch.randn(60, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    expected = float((inputs.double() @ difference.double().t()).square().sum()) / 60
    actual = observed([inputs]).output_energy(difference, quick)
    whole = float(inputs.square().sum()) * float(difference.square().sum()) / 60
    assert actual == pytest.approx(expected, rel=1e-4, abs=(1e-2 if quick else 1e-6) * whole)


def test_rescaling_is_that_of_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, scale = torch.randn(50, 130, generator=generator), torch.rand(130, generator=generator) + 0.2
    rescaled, direct = observed([inputs]).rescaled(scale), observed([inputs / scale])
    torch.testing.assert_close(rescaled.matrix, direct.matrix, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rescaled.magnitude, direct.magnitude)
    assert rescaled.tokens == 50


def test_squares_beyond_the_range_of_float16() -> None:
    gram = observed([torch.full((100, 3), 300.0, dtype=torch.float16)])
    gram.check_finite("layer")
    assert gram.matrix[0, 1] == 100 * 300.0**2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_no_numbers_name_the_layer(value: float) -> None:
    inputs = torch.ones(4, 130)
    inputs[2, 100] = value
    with pytest.raises(NumericsError, match=r"the inputs of model\.layers\.0\.mlp are NaN or infinite"):
        observed([inputs]).check_finite("model.layers.0.mlp")


def test_nothing_seen() -> None:
    gram = Statistics(3)
    gram.add(torch.empty(0, 3))
    gram.check_finite("layer")
    assert gram.tokens == 0
    assert gram.magnitude.tolist() == [0, 0, 0]
    assert gram.output_energy(torch.ones(2, 3)) == 0


@pytest.mark.parametrize(("groups", "columns"), [(1, 5), (4, 9), (7, 1)])
def test_groups_are_summed_side_by_side(groups: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(groups, tokens, columns, generator=generator) for tokens in (30, 0, 41)]
    grouped = GroupedStatistics(groups, columns)
    for batch in batches:
        grouped.add(batch)
    for k, gram in enumerate(grouped.each()):
        alone = observed([batch[k] for batch in batches])
        torch.testing.assert_close(gram.matrix, alone.matrix, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gram.magnitude, alone.magnitude)
        assert gram.tokens == alone.tokens == 71


@given(columns=st.integers(1, 40), cuts=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 2**32))
def test_what_is_asked_for_does_not_depend_on_the_batches(columns: int, cuts: list[int], seed: int) -> None:
    """Norms, shares of nonzero inputs and extremes against those of all inputs at once in float64."""
    rows = torch.randn(30, columns, generator=torch.Generator().manual_seed(seed)).relu()
    needs = Needs.NORMS | Needs.NONZERO | Needs.EXTREMES
    found = Statistics(columns, needs)
    ends = [0, *sorted(cuts), 30]
    for first, last in itertools.pairwise(ends):
        found.add(rows[first:last].unsqueeze(0))
    torch.testing.assert_close(found.squares.double(), rows.double().square().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nonzero.double(), (rows != 0).double().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.high, rows.amax(0))
    assert found.low.tolist() == [0] * columns and found.tokens == 30
    torch.testing.assert_close(observed([rows]).squares, found.squares)


def test_the_histogram_counts_inputs_and_not_patches() -> None:
    found = Statistics(2, Needs.VALUES)
    found.see(torch.tensor([1.0, -3.0]))
    found.add_patches(torch.tensor([[1.0, -3.0], [-3.0, 100.0]]))
    assert found.values.range_of("minmax") == (-3.0, 1.0) and found.tokens == 2


@pytest.mark.parametrize("name", ["matrix", "magnitude", "squares", "nonzero", "low", "peak", "sample", "values"])
def test_what_was_not_asked_for_is_not_there(name: str) -> None:
    """A pass that forgets to ask for a statistic gets an error, not zeros."""
    with pytest.raises(ValueError, match="does not ask for it in `needs`"):
        getattr(Statistics(3, Needs.NOTHING), name)
    assert getattr(Statistics(3, ~Needs.NOTHING), name) is not None


@pytest.mark.parametrize("needs", [Needs.NORMS, Needs.EXTREMES, Needs.VALUES, Needs.NORMS | Needs.VALUES])
def test_nan_is_noticed_whatever_is_gathered(needs: Needs) -> None:
    found = Statistics(2, needs)
    found.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NumericsError, match="the inputs of fc are NaN"):
        found.check_finite("fc")


@pytest.mark.parametrize("needs", [Needs.NORMS, Needs.GRAM | Needs.EXTREMES])
def test_groups_are_told_apart_whatever_is_gathered(needs: Needs) -> None:
    patches = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    grouped = GroupedStatistics(3, 4, needs)
    grouped.add(patches)
    for own, rows in zip(grouped.each(), patches, strict=True):
        torch.testing.assert_close(own.squares, rows.square().sum(0))
        assert own.tokens == grouped.tokens == 20


def test_everything_but_the_histogram_follows_a_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, scale = torch.randn(300, 5, generator=generator), torch.rand(5, generator=generator) + 0.2
    needs = Needs.NORMS | Needs.NONZERO | Needs.EXTREMES | Needs.SAMPLE
    first, direct = Statistics(5, needs | Needs.VALUES), Statistics(5, needs)
    first.add(inputs)
    direct.add(inputs / scale)
    found = first.rescaled(scale)
    assert found.needs == needs and found.tokens == 300
    for name in ("squares", "nonzero", "low", "high", "sample"):
        torch.testing.assert_close(getattr(found, name), getattr(direct, name))
    again = inputs[:7] / scale
    found.add(again)
    direct.add(again)
    torch.testing.assert_close(found.sample, direct.sample)
