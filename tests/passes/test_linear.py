"""The `linear` pass: by hand, its options, and what least squares promises."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from effcli.contract import Layer, Needs, Scope
from effcli.formats import Affine, AffineWeight
from effcli.passes import linear


def quantized(weight: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> AffineWeight:
    outcome = linear.apply(linear.Config(**options), Layer("layer", "linear", weight, dtype))
    assert isinstance(outcome.weight, AffineWeight)
    return outcome.weight


def test_by_hand() -> None:
    """Two groups of two: [-1, 2] has the levels -1, 0, 1, 2; [0, 6] has 0, 2, 4, 6."""
    made = quantized(torch.tensor([[-1.0, 2.0, 0.0, 6.0], [1.2, -0.3, 5.0, 2.9]]), bits=2, group_size=2)
    assert made.dequantize()[0].tolist() == [-1, 2, 0, 6]
    assert made.scale[0].tolist() == [1, 2]
    assert made.zero is not None
    assert made.zero[0].tolist() == [1, 0]
    # [-0.3, 1.2] has the step 0.5 and the zero round(0.6) = 1; 2.9 lies next to 2 · 5 / 3.
    torch.testing.assert_close(made.dequantize()[1], torch.tensor([1.0, -0.5, 5.0, 10 / 3]))


def test_the_options_say_the_format() -> None:
    assert linear.Config().format == Affine(8, "group", 64, False)
    assert linear.Config(granularity="channel").format == Affine(8, "channel")
    assert linear.Config(granularity="tensor", group_size=None, bits=2, symmetric=True).format == Affine(
        2, "tensor", 0, True
    )
    assert (linear.Config.needs, linear.Config.scope) == (Needs.NOTHING, Scope.LAYER)


@pytest.mark.parametrize("options", [{"bits": 7}, {"bits": 1}, {"group_size": 0}, {"group_size": None}, {"bit": 4}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        linear.Config(**options)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", get_args(linear.Bits))
def test_every_width_in_every_granularity(bits: int, granularity: str) -> None:
    """A weird shape; more bits never lose more, and the file holds what the pass chose."""
    weight = torch.randn(41, 72, generator=torch.Generator().manual_seed(bits))
    for symmetric in (False, True):
        made = quantized(weight, torch.bfloat16, bits=bits, granularity=granularity, group_size=24, symmetric=symmetric)
        again = AffineWeight.unpack(made.format, made.pack())
        torch.testing.assert_close(again.dequantize(), made.dequantize(), rtol=0, atol=0)
        error = float((made.dequantize(torch.float32) - weight).norm() / weight.norm())
        assert error < 1.6 / 2**bits * (3 if granularity == "tensor" else 2)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    tail=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 2**32),
)
def test_least_squares_is_never_worse_than_the_full_range(
    bits: int, granularity: str, symmetric: bool, tail: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 16, generator=generator) * torch.randn(7, 16, generator=generator).abs() ** tail
    options = {"bits": bits, "granularity": granularity, "group_size": 8, "symmetric": symmetric}

    def error(range: str) -> float:
        made = quantized(weight, range=range, **options)
        return float((made.dequantize().double() - weight).square().sum())

    assert error("least_squares") <= error("minmax") * (1 + 1e-5) + 1e-12


def test_least_squares_pays_at_few_bits() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = {
        range: float((quantized(weight, bits=2, group_size=64, range=range).dequantize() - weight).square().sum())
        for range in ("minmax", "least_squares")
    }
    assert errors["least_squares"] < 0.8 * errors["minmax"]
