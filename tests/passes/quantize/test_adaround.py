"""The `adaround` pass: the learned rounding never loses to the nearest, and finds what a search over all finds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import Affine, AffineWeight
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome
from effcli.layers.statistics import Statistics
from effcli.passes.quantize import adaround
from effcli.passes.quantize._affine import clipped_range, extremes, parameters, rounded


def seen(inputs: Tensor) -> Statistics:
    gram = Statistics(inputs.shape[-1])
    gram.add(inputs)
    return gram


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Inputs that vary together, with a mean of their own, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return (torch.randn(tokens, columns, generator=generator) @ mixing).relu()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(weight: Tensor, restored: Tensor, inputs: Tensor) -> Tensor:
    """Σ over the tokens of the squared error of each output, float64 (out,)."""
    return ((restored.double() - weight.double()) @ inputs.double().t()).square().sum(1)


def apply(weight: Tensor, inputs: Tensor, **options: Any) -> Outcome:
    layer = Layer("layer", "linear", weight, torch.float32)
    return adaround.AdaRound(**options).apply(layer, seen(inputs))


def restored(outcome: Outcome) -> Tensor:
    assert isinstance(outcome.weight, AffineWeight)
    return outcome.weight.dequantize()


def test_by_hand() -> None:
    """Scale 1, weights 0.45 and 0.35 on equal inputs: up and down leave 0.2 where nearest leaves 0.8; 7.5 becomes 7."""
    weight = torch.tensor([[0.45, 0.35, 7.5]])
    inputs = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    values = restored(apply(weight, inputs, range="minmax"))
    assert values.tolist() == [[1, 0, 7]]
    torch.testing.assert_close(errors(weight, values, inputs), torch.tensor([0.2**2 + 0.5**2]).double())


@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_a_search_over_all(seed: int) -> None:
    """Every way of rounding 8 weights up or down: the learned one is among the best of 256."""
    weight, inputs = random(1, 8, seed=seed), correlated(40, 8, seed)
    format = Affine(4, "channel", 0, True)
    scale, zero = parameters(*extremes(weight, format), format, torch.float32)
    below = (weight / scale).floor()
    found = []
    for up in itertools.product((0.0, 1.0), repeat=8):
        codes = (below + torch.tensor([up]) + zero).clamp(0, 15)
        found.append(float(errors(weight, (codes - zero) * scale, inputs)))
    learned = float(errors(weight, restored(apply(weight, inputs, range="minmax")), inputs))
    assert learned >= min(found) * (1 - 1e-6)
    assert sum(error < learned * (1 - 1e-6) for error in found) < 10


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([None, 4]),
    symmetric=st.booleans(),
    range=st.sampled_from(["minmax", "least_squares"]),
    rows=st.integers(1, 5),
    columns=st.sampled_from([4, 12, 28]),
    tokens=st.integers(1, 60),
    iterations=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
def test_no_row_is_worse_than_rounded_to_nearest(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    range: str,
    rows: int,
    columns: int,
    tokens: int,
    iterations: int,
    seed: int,
) -> None:
    weight, inputs = random(rows, columns, seed=seed), correlated(tokens, columns, seed)
    config = adaround.AdaRound(
        bits=bits, group_size=group_size, symmetric=symmetric, range=range, iterations=iterations
    )
    outcome = config.apply(Layer("layer", "linear", weight, torch.float32), seen(inputs))
    format = config.format
    if range == "minmax":
        low, high = extremes(weight, format)
    else:
        low, high = clipped_range(weight, seen(inputs).matrix, format, torch.float32, adaround.SHRINKS)
    scale, zero = parameters(low, high, format, torch.float32)
    grouped = format.grouped(weight)
    nearest = rounded(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), format.levels).view_as(weight)
    # The Gram matrix is summed in float32.
    slack = 1e-5 * errors(weight, torch.zeros_like(weight), inputs)
    assert bool((errors(weight, restored(outcome), inputs) <= errors(weight, nearest, inputs) + slack).all())
    assert 0 <= outcome.notes["moved"] <= 1
    assert outcome.notes["rounding_gain"] >= 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_pays(symmetric: bool) -> None:
    """A weird shape with correlated inputs: about half of the error, and no weight moves by more than one step."""
    weight, inputs = random(41, 57, seed=1), correlated(401, 57, 2)
    outcome = apply(weight, inputs, symmetric=symmetric, range="minmax")
    assert outcome.notes["rounding_gain"] > 0.45
    assert "rows_rounded_to_nearest" not in outcome.notes
    packed = outcome.weight
    assert isinstance(packed, AffineWeight)
    zero = 8.0 if packed.zero is None else packed.zero.float()
    nearest = ((weight / packed.scale).round() + zero).clamp(0, 15)
    assert int((packed.codes - nearest).abs().max()) == 1
    moved = float((packed.codes != nearest).float().mean())
    assert outcome.notes["moved"] == pytest.approx(moved, abs=1e-3)


def test_the_same_each_time() -> None:
    weight, inputs = random(5, 12, seed=1), correlated(40, 12, 2)
    torch.testing.assert_close(restored(apply(weight, inputs)), restored(apply(weight, inputs)), rtol=0, atol=0)


def test_groups_of_a_convolution_are_independent() -> None:
    """All at once as one by one."""
    weight, inputs = random(12, 9, seed=3), [correlated(50, 9, seed) for seed in range(4)]
    grams = [seen(rows) for rows in inputs]
    config = adaround.AdaRound(bits=3, iterations=200)
    whole = config.apply_groups(Layer("layer", "conv", weight, torch.float32), grams)
    parts = [
        config.apply(Layer("layer", "conv", part, torch.float32), gram)
        for part, gram in zip(weight.chunk(4), grams, strict=True)
    ]
    torch.testing.assert_close(restored(whole), torch.cat([restored(part) for part in parts]))


def test_large_layers_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = random(150, 6, seed=3), correlated(50, 6, 4)
    whole = restored(apply(weight, inputs, iterations=50))
    monkeypatch.setattr(adaround, "_STEP", 1)
    torch.testing.assert_close(restored(apply(weight, inputs, iterations=50)), whole)


def test_without_a_token_it_rounds_to_nearest() -> None:
    weight = random(4, 8, seed=0)
    outcome = apply(weight, torch.empty(0, 8))
    assert float((restored(outcome) - weight).abs().max()) <= float(weight.abs().max()) / 15 * 1.001
    assert outcome.notes == {}


@pytest.mark.parametrize("case", ["silent", "zero", "on the grid", "tiny", "huge"])
def test_weights_and_inputs_at_the_ends_of_the_range(case: str) -> None:
    weight, inputs = random(3, 8, seed=0), correlated(30, 8, 1)
    inputs = inputs * {"silent": 0.0, "tiny": 1e-12, "huge": 1e12}.get(case, 1.0)
    weight = {"zero": torch.zeros(3, 8), "on the grid": torch.arange(24.0).view(3, 8) % 15 - 7}.get(case, weight)
    values = restored(apply(weight, inputs, iterations=30, range="minmax"))
    assert bool(torch.isfinite(values).all())
    assert float((values - weight).abs().max()) <= 2 * float(weight.abs().max()) / 15 + 1e-6


def test_scales_have_the_dtype_of_the_checkpoint() -> None:
    layer = Layer("layer", "linear", random(4, 16, seed=0), torch.bfloat16)
    config = adaround.AdaRound(group_size=8, symmetric=False, iterations=20)
    packed = config.apply(layer, seen(correlated(30, 16, 1))).weight
    assert isinstance(packed, AffineWeight)
    assert packed.scale.dtype == torch.bfloat16
    assert packed.zero is not None and packed.zero.shape == (4, 2)


def test_what_the_pass_asks_for() -> None:
    assert isinstance(adaround.AdaRound(), LayerPass) and adaround.AdaRound().needs == Needs.GRAM
    assert adaround.AdaRound().format == Affine(4, "channel", 0, True)
    assert adaround.AdaRound(group_size=32, symmetric=False).format == Affine(4, "group", 32, False)
