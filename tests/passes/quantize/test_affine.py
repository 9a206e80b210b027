"""Ranges, rounding and clipping: by hand, against plain float64 loops, and as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import Affine, Strategy
from effcli.passes.quantize._affine import clipped_range, encode, extremes, nearest, parameters

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

formats = st.builds(
    lambda bits, strategy, size, symmetric: Affine(bits, strategy, size if strategy == "group" else 0, symmetric),
    st.integers(1, 8),
    st.sampled_from(STRATEGIES),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
)


def weights(rows: int, groups: int, seed: int, format: Affine, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = format.group_size or 4
    return torch.randn(rows, groups * size, generator=generator) * spread


def energy(difference: Tensor, gram: Tensor | None) -> float:
    wide = difference.double()
    return float((wide if gram is None else wide @ gram.double()).mul(wide).sum())


def gram_of(columns: int, seed: int, tokens: int = 50) -> Tensor:
    """Inputs with some loud channels and some that go together, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    inputs += torch.randn(tokens, 1, generator=generator)
    return inputs.t() @ inputs


def test_parameters_by_hand() -> None:
    """[-1, 2] in 2 bits: scale 1 and zero 1, so the levels are -1, 0, 1, 2."""
    format = Affine(2, "channel")
    scale, zero = parameters(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), format, torch.float32)
    assert (scale.item(), zero.item()) == (1, 1)
    # A range on one side of zero is widened to hold it.
    scale, zero = parameters(torch.tensor([[3.0]]), torch.tensor([[6.0]]), format, torch.float32)
    assert (scale.item(), zero.item()) == (2, 0)
    scale, zero = parameters(torch.tensor([[-6.0]]), torch.tensor([[-3.0]]), format, torch.float32)
    assert (scale.item(), zero.item()) == (2, 3)
    # Symmetric: the larger side counts, three steps over both.
    symmetric = Affine(2, "channel", symmetric=True)
    scale, zero = parameters(torch.tensor([[-3.0]]), torch.tensor([[1.0]]), symmetric, torch.float32)
    assert (scale.item(), zero.item()) == (2, 2)


def test_encoding_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [0.0, 0.0, 0.0, 0.0]])
    format = Affine(2, "channel")
    made = encode(weight, *extremes(weight, format), format, torch.float32)
    assert made.codes.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert made.zero is not None
    assert made.zero.tolist() == [[1], [0]]
    assert made.dequantize().tolist() == [[-1, 0, 1, 2], [0, 0, 0, 0]]


def by_loops(weight: Tensor, format: Affine, dtype: torch.dtype) -> Tensor:
    """Round to nearest, number by number in float64."""
    out = torch.empty_like(weight, dtype=torch.float64)
    size = {"tensor": weight.numel(), "channel": weight.shape[1], "group": format.group_size}[format.strategy]
    flat, restored = weight.double().reshape(-1), out.view(-1)
    for start in range(0, weight.numel(), size):
        values = flat[start : start + size].tolist()
        low, high = min(0.0, *values), max(0.0, *values)
        top = 2**format.bits - 1
        width = 2 * max(-low, high) if format.symmetric else high - low
        tiny = torch.finfo(dtype).tiny
        scale = float(torch.tensor(max(width / top, tiny)).to(dtype))
        zero = 2 ** (format.bits - 1) if format.symmetric else min(max(round(-low / scale), 0), top)
        for k, value in enumerate(values):
            restored[start + k] = (min(max(round(value / scale) + zero, 0), top) - zero) * scale
    return out


@given(
    format=formats,
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_rounding_against_loops(format: Affine, dtype: torch.dtype, rows: int, groups: int, seed: int) -> None:
    weight = weights(rows, groups, seed, format)
    expected = by_loops(weight, format, dtype)
    made = encode(weight, *extremes(weight, format), format, dtype)
    step = made.scale.double().unsqueeze(-1).expand_as(format.grouped(weight)).reshape(weight.shape)
    # A quotient halfway between two levels may fall to either side in float32; all others agree.
    actual = made.dequantize(torch.float32).double()
    quotient = weight.double() / step
    halfway = ((quotient - quotient.floor()) - 0.5).abs() < 1e-4
    torch.testing.assert_close(actual[~halfway], expected[~halfway], rtol=1e-6, atol=1e-30)
    assert bool(((actual - expected).abs() <= step * 1.0001).all())
    torch.testing.assert_close(nearest(weight, format, dtype), made.dequantize(torch.float32), rtol=0, atol=0)


@given(
    format=formats,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
)
def test_values_lie_on_the_grid_and_near(format: Affine, dtype: torch.dtype, seed: int, spread: float) -> None:
    weight = weights(5, 3, seed, format, spread)
    made = encode(weight, *extremes(weight, format), format, dtype)
    assert made.scale.dtype == dtype
    assert bool(torch.isfinite(made.scale).all()) and bool((made.scale > 0).all())
    assert int(made.codes.max()) <= format.levels
    zero = (
        torch.full_like(made.scale, format.fixed_zero, dtype=torch.float64) if made.zero is None else made.zero.double()
    )
    scale, zero = made.scale.double().unsqueeze(-1), zero.unsqueeze(-1)
    values, restored = format.grouped(weight).double(), format.grouped(made.dequantize(torch.float32)).double()
    steps = restored / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    low, high = -zero * scale, (format.levels - zero) * scale
    inside = (values >= low) & (values <= high)
    error = (values - restored).abs()
    assert bool((error <= scale / 2 * (1 + 1e-5) + 1e-30)[inside].all())
    # Outside stands only what the rounding of scale and zero pushed there: less than a step and a scale's rounding.
    slack = scale * (0.5 + format.levels * torch.finfo(dtype).eps) * (1 + 1e-5)
    assert bool((error <= slack + 1e-30).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_that_are_zero_stay_zero(strategy: Strategy, symmetric: bool, dtype: torch.dtype) -> None:
    format = Affine(4, strategy, 4 if strategy == "group" else 0, symmetric)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[0, 3] = 0
    restored = encode(weight, *extremes(weight, format), format, dtype).dequantize()
    assert restored[1].abs().max() == 0
    assert restored[0, 3] == 0
    nothing = torch.zeros(3, 8)
    low, high = clipped_range(nothing, gram_of(8, 0), format, dtype, SHRINKS)
    assert encode(nothing, low, high, format, dtype).dequantize().abs().max() == 0


@pytest.mark.parametrize("value", [-3.0, 0.7, 1e-3, 250.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_constant_row_is_kept(bits: int, value: float) -> None:
    """One end of the range is zero, the other the constant: both are levels."""
    format = Affine(bits, "channel")
    weight = torch.full((1, 8), value)
    restored = encode(weight, *extremes(weight, format), format, torch.float32).dequantize()
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)


def test_one_huge_outlier_costs_only_its_own_group() -> None:
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    weight[0, 5] = 3e4
    format = Affine(4, "group", 8)
    restored = encode(weight, *extremes(weight, format), format, torch.float16).dequantize(torch.float32)
    assert bool(torch.isfinite(restored).all())
    assert abs(float(restored[0, 5]) - 3e4) < 3e4 / 15
    assert restored[0, :5].abs().max() == 0
    ordinary = restored[:, 8:] - weight[:, 8:]
    assert float(ordinary.abs().max()) < 0.5


def test_ranges_too_wide_for_their_dtype_stay_finite() -> None:
    weight = torch.tensor([[-3e38, 3e38, 1.0, 0.0]])
    for symmetric in (False, True):
        format = Affine(4, "channel", 0, symmetric)
        for dtype in DTYPES:
            made = encode(weight, *extremes(weight, format), format, dtype)
            assert bool(torch.isfinite(made.scale).all())


@pytest.mark.parametrize("format", [Affine(4, "channel"), Affine(3, "group", 4, True), Affine(4, "group", 4)], ids=str)
def test_a_weight_without_rows(format: Affine) -> None:
    weight = torch.empty(0, 8)
    for low, high in (extremes(weight, format), clipped_range(weight, gram_of(8, 0), format, torch.float32, SHRINKS)):
        made = encode(weight, low, high, format, torch.bfloat16)
        assert made.dequantize().shape == (0, 8)
        assert made.pack()["weight_packed"].shape[0] == 0


def test_clipping_by_hand() -> None:
    """One bit over (0, 0, 0, 1, 0.6): levels 0 and 1 cost 0.16; the range 0.8 costs 2 · 0.04; 0.6 costs 0.16."""
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.6]])
    low, high = clipped_range(weight, None, Affine(1, "channel"), torch.float32, (1.0, 0.8, 0.6))
    assert low.item() == 0
    assert high.item() == pytest.approx(0.8)
    # An input that makes the fourth weight count a hundredfold takes the range back.
    gram = torch.diag(torch.tensor([1.0, 1, 1, 100, 1]))
    low, high = clipped_range(weight, gram, Affine(1, "channel"), torch.float32, (1.0, 0.8, 0.6))
    assert high.item() == 1


def clipped_by_loops(weight: Tensor, gram: Tensor | None, format: Affine, shrinks: tuple[float, ...]) -> Tensor:
    """Ŵ - W of the same descent: every candidate by the whole error of its row, one row and group after the other."""
    size = format.group_size or weight.shape[1]
    whole = torch.eye(weight.shape[1], dtype=torch.float64) if gram is None else gram.double()
    difference = nearest(weight, format, torch.float32).double() - weight.double()
    for number, row in enumerate(difference):
        for start in range(0, weight.shape[1], size):
            values = weight[number, start : start + size].view(1, -1)
            own = Affine(format.bits, "channel", 0, format.symmetric)
            low, high = extremes(values, own)
            best: tuple[float, Tensor] | None = None
            for shrink in shrinks:
                tried = row.clone()
                made = encode(values, low * shrink, high * shrink, own, torch.float32).dequantize()
                tried[start : start + size] = made[0].double() - values[0].double()
                error = float(tried @ whole @ tried)
                if best is None or error < best[0] * (1 - 1e-9):
                    best = error, tried
            assert best is not None
            row.copy_(best[1])
    return difference


@pytest.mark.parametrize("format", [Affine(3, "channel"), Affine(2, "group", 4), Affine(3, "group", 4, True)], ids=str)
@pytest.mark.parametrize("with_gram", [False, True])
def test_clipping_against_loops(format: Affine, with_gram: bool) -> None:
    weight = weights(41, 3, 7, format)
    gram = gram_of(weight.shape[1], 8) if with_gram else None
    low, high = clipped_range(weight, gram, format, torch.float32, SHRINKS)
    actual = encode(weight, low, high, format, torch.float32).dequantize().double() - weight
    expected = clipped_by_loops(weight, gram, format, SHRINKS)
    assert energy(actual, gram) == pytest.approx(energy(expected, gram), rel=1e-4)


@given(
    format=formats,
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    with_gram=st.booleans(),
)
def test_clipping_is_never_worse_than_the_full_range(
    format: Affine, dtype: torch.dtype, rows: int, groups: int, seed: int, with_gram: bool
) -> None:
    weight = weights(rows, groups, seed, format)
    gram = gram_of(weight.shape[1], seed) if with_gram else None
    full = encode(weight, *extremes(weight, format), format, dtype).dequantize(torch.float32) - weight
    low, high = clipped_range(weight, gram, format, dtype, SHRINKS)
    clipped = encode(weight, low, high, format, dtype).dequantize(torch.float32) - weight
    # Compared in float64; the search itself is float32, hence the small allowance on the scale of the whole.
    allowance = 1e-5 * energy(weight, gram)
    assert energy(clipped, gram) <= energy(full, gram) + allowance
    assert bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())


def test_many_rows_are_taken_in_chunks() -> None:
    format = Affine(3, "group", 8)
    weight = weights(2500, 2, 5, format)
    gram = gram_of(16, 6)
    low, high = clipped_range(weight, gram, format, torch.float32, SHRINKS)
    for start in (0, 511, 1999):
        part = weight[start : start + 1]
        alone = clipped_range(part, gram, format, torch.float32, SHRINKS)
        torch.testing.assert_close(low[start : start + 1], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(high[start : start + 1], alone[1], rtol=0, atol=0)
