"""The `awq` pass: the scale and the clipping never lose to doing nothing, by a float64 count of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import Affine, AffineWeight
from effcli.layers.contract import Group, Layer, Needs, ScalingPass
from effcli.layers.statistics import Statistics
from effcli.passes.quantize import awq
from effcli.passes.quantize._affine import nearest
from effcli.passes.quantize._scales import scaled_error, scales


def factor_of(configs: Any, group: Group, seen: Statistics) -> Any:
    """The factor for a group whose layers have these options, and the notes."""
    return configs[0].scale(dataclasses.replace(group, options=tuple(configs)), seen)


def seen(inputs: Tensor) -> Statistics:
    gram = Statistics(inputs.shape[-1])
    gram.add(inputs)
    return gram


def loud_inputs(tokens: int, columns: int, seed: int, loudness: float = 1.5) -> Tensor:
    """Channels of very different magnitude, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    spread = (torch.randn(columns, generator=generator) * loudness).exp()
    return torch.randn(tokens, columns, generator=generator) * spread


def output_error(weight: Tensor, restored: Tensor, inputs: Tensor) -> float:
    return float(((restored.double() - weight.double()) @ inputs.double().t()).square().sum())


def scaled_and_back(weight: Tensor, factor: Tensor, config: awq.AWQ) -> Tensor:
    return nearest(weight * factor, config.format, torch.float32) / factor


def layers(*weights: Tensor) -> tuple[Layer, ...]:
    return tuple(Layer(f"layer{k}", "linear", weight, torch.float32) for k, weight in enumerate(weights))


def test_scales_by_hand() -> None:
    """√m of (1, 4, 16) is (1, 2, 4), and √(max · min) = 2."""
    magnitude = torch.tensor([1.0, 4.0, 16.0])
    torch.testing.assert_close(scales(magnitude, 0.5), torch.tensor([0.5, 1, 2]))
    torch.testing.assert_close(scales(magnitude, 1.0), torch.tensor([0.25, 1, 4]))
    torch.testing.assert_close(scales(magnitude, 0.0), torch.ones(3))


def test_a_case_worked_by_hand() -> None:
    """Weights (0.4, 1) at one bit, scale 1: 0.4 becomes 0, an error of 0.4 on the loud channel.

    Inputs of magnitude 100 and 1: with α = 1 the weights become (0.4 · 10, 1 / 10), whose levels 0 and 4 keep the loud
    one and lose the quiet one, an error of 1 where 40 was.
    """
    inputs = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    gram = seen(inputs)
    weight = torch.tensor([[0.4, 1.0]])
    error = scaled_error(weight, torch.ones(2), gram.matrix, Affine(1, "channel"), torch.float32)
    assert error == pytest.approx((0.4 * 100) ** 2)
    factor = scales(torch.tensor([100.0, 1.0]), 1.0)
    torch.testing.assert_close(factor, torch.tensor([10.0, 0.1]))
    error = scaled_error(weight, factor, gram.matrix, Affine(1, "channel"), torch.float32)
    assert error == pytest.approx(1.0)
    factor, notes = factor_of((awq.AWQ(bits=2, group_size=None),), Group(layers(weight), ()), gram)
    assert notes["alpha"] > 0
    assert float(factor[0] / factor[1]) > 1


def test_the_error_is_that_of_the_outputs() -> None:
    """tr(D G Dᵀ) against the products themselves, at a weird shape."""
    inputs = loud_inputs(401, 40, 1)
    weight = torch.randn(41, 40, generator=torch.Generator().manual_seed(2))
    factor = scales(seen(inputs).magnitude, 0.4)
    config = awq.AWQ(bits=3, group_size=8)
    restored = scaled_and_back(weight, factor, config)
    actual = scaled_error(weight, factor, seen(inputs).matrix, config.format, torch.float32)
    assert actual == pytest.approx(output_error(weight, restored, inputs), rel=1e-4)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([None, 4, 8]),
    symmetric=st.booleans(),
    members=st.integers(1, 3),
    columns=st.sampled_from([8, 16, 40]),
    tokens=st.integers(1, 60),
    loudness=st.sampled_from([0.0, 0.5, 1.5, 4.0]),
    seed=st.integers(0, 2**32),
)
def test_the_scale_is_never_worse_than_none(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    members: int,
    columns: int,
    tokens: int,
    loudness: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(5 + k, columns, generator=generator) for k in range(members)]
    inputs = loud_inputs(tokens, columns, seed, loudness)
    config = awq.AWQ(bits=bits, group_size=group_size, symmetric=symmetric)
    factor, notes = factor_of((config,) * members, Group(layers(*weights), ()), seen(inputs))
    assert factor.shape == (columns,)
    assert bool(torch.isfinite(factor).all()) and bool((factor > 0).all())
    none = sum(output_error(w, scaled_and_back(w, torch.ones(columns), config), inputs) for w in weights)
    chosen = sum(output_error(w, scaled_and_back(w, factor, config), inputs) for w in weights)
    assert chosen <= none * (1 + 1e-4)
    assert 0 <= notes["alpha"] <= 1
    if notes["alpha"] > 0:
        assert notes["scale_gain"] == pytest.approx(1 - chosen / none, abs=2e-2)
        assert float(factor.max() * factor.min()) == pytest.approx(1, rel=1e-4)


@given(seed=st.integers(0, 2**32), coarse=st.integers(1, 6), fine=st.integers(1, 5))
def test_the_fine_grid_is_no_worse_than_the_coarse_one(seed: int, coarse: int, fine: int) -> None:
    """Candidates are ranked to about three digits, so the refinement may lose a little and no more."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed))
    inputs = loud_inputs(100, 32, seed)

    def error(fine: int) -> float:
        config = awq.AWQ(bits=3, group_size=16, coarse=coarse, fine=fine)
        factor, _ = factor_of((config,), Group(layers(weight), ()), seen(inputs))
        return output_error(weight, scaled_and_back(weight, factor, config), inputs)

    assert error(fine) <= error(1) * 1.02


def test_channels_of_one_producer_share_their_scale() -> None:
    """Four inputs behind two channels, as the repeated heads of grouped attention have them."""
    channel = torch.tensor([0, 0, 1, 1]).repeat_interleave(4)
    inputs = loud_inputs(200, 16, 3) * torch.tensor([1.0, 8.0]).repeat_interleave(8)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    group = Group(layers(weight), (), channel)
    factor, notes = factor_of((awq.AWQ(bits=3, group_size=16),), group, seen(inputs))
    assert notes["alpha"] > 0
    for value in range(2):
        assert factor[channel == value].unique().numel() == 1
    torch.testing.assert_close(group.tied(torch.tensor([1.0, 4] * 8)), torch.full((16,), 2.0))


def test_layers_with_options_of_their_own() -> None:
    inputs = loud_inputs(100, 16, 5)
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(8, 16, generator=generator) for _ in range(2)]
    configs = (awq.AWQ(bits=2, group_size=8), awq.AWQ(bits=8, group_size=16))
    factor, _ = factor_of(configs, Group(layers(*weights), ()), seen(inputs))

    def total(factor: Tensor) -> float:
        pairs = zip(weights, configs, strict=True)
        return sum(output_error(w, scaled_and_back(w, factor, config), inputs) for w, config in pairs)

    assert total(factor) <= total(torch.ones(16))


@pytest.mark.parametrize("columns", ["silent", "huge", "tiny"])
def test_channels_at_the_ends_of_the_range(columns: str) -> None:
    """A channel that no token uses must not get a scale of zero or infinity."""
    inputs = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    inputs[:, 3] *= {"silent": 0.0, "huge": 1e6, "tiny": 1e-12}[columns]
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    config = awq.AWQ(bits=3, group_size=8)
    factor, _ = factor_of((config,), Group(layers(weight), ()), seen(inputs))
    assert bool(torch.isfinite(factor).all())
    assert 1e-5 < float(factor.min()) <= float(factor.max()) < 1e5


def quantized(weight: Tensor, gram: Statistics, **options: Any) -> Tensor:
    outcome = awq.AWQ(**options).apply(Layer("layer", "linear", weight, torch.float32), gram)
    assert isinstance(outcome.weight, AffineWeight)
    return outcome.weight.dequantize()


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([None, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_clipping_is_never_worse_than_none(bits: int, group_size: int | None, symmetric: bool, seed: int) -> None:
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(seed))
    inputs = loud_inputs(60, 24, seed)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    full = output_error(weight, quantized(weight, seen(inputs), clip=False, **options), inputs)
    clipped = output_error(weight, quantized(weight, seen(inputs), **options), inputs)
    assert clipped <= full + 1e-6 * output_error(weight, torch.zeros_like(weight), inputs)


def test_without_a_token_nothing_is_clipped() -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        quantized(weight, Statistics(16), bits=3, group_size=8),
        quantized(weight, Statistics(16), bits=3, group_size=8, clip=False),
    )


def test_the_whole_pays() -> None:
    """Scale and clipping together against rounding to nearest, on loud channels."""
    inputs = loud_inputs(500, 64, 7)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(8))
    config = awq.AWQ(bits=3, group_size=32)
    gram = seen(inputs)
    factor, _ = factor_of((config,), Group(layers(weight), ()), gram)
    restored = quantized(weight * factor, gram.rescaled(factor), bits=3, group_size=32) / factor
    rounded = nearest(weight, config.format, torch.float32)
    assert output_error(weight, restored, inputs) < 0.6 * output_error(weight, rounded, inputs)


def test_without_rounding_the_scaled_weight_is_returned() -> None:
    """The scale is found all the same."""
    inputs = loud_inputs(100, 16, 9)
    (layer,) = layers(torch.randn(8, 16, generator=torch.Generator().manual_seed(10)))
    rounding, folding = awq.AWQ(bits=3, group_size=8), awq.AWQ(bits=3, group_size=8, round=False)
    factors = [factor_of((config,), Group((layer,), ()), seen(inputs))[0] for config in (rounding, folding)]
    assert torch.equal(*factors) and not torch.equal(factors[0], torch.ones(16))
    outcome = folding.apply(layer, seen(inputs))
    assert isinstance(outcome.weight, Tensor) and torch.equal(outcome.weight, layer.weight)


def test_what_the_pass_asks_for() -> None:
    assert isinstance(awq.AWQ(), ScalingPass) and awq.AWQ().needs == Needs.GRAM
    assert awq.AWQ().format == Affine(4, "group", 64, False)
    assert awq.AWQ(group_size=None, bits=3).format == Affine(3, "channel")
