"""Inputs rounded to int8 as floating-point numbers: by hand, as the integer kernel rounds them, within half a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from effcli.formats import Affine, AffineWeight
from effcli.kernels import int8_matmul
from effcli.layers.input_rounding import (
    InputRounding,
    round_inputs,
    round_tensor,
    round_tokens,
    straight_through,
    tensor_parameters,
)
from effcli.passes.quantize._affine import encode, extremes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows: int, columns: int, dtype: torch.dtype = torch.float32, inputs: str = "token") -> AffineWeight:
    weight, format = normal(rows, columns, seed=1), Affine(8, "channel", symmetric=True)
    made = encode(weight, *extremes(weight, format), format, dtype)
    if inputs == "token":
        return dataclasses.replace(made, format=dataclasses.replace(format, activations="token"))
    scale, zero = tensor_parameters(-1.5, 2.5, dtype)
    return dataclasses.replace(
        made,
        format=dataclasses.replace(format, activations="tensor"),
        activation_scale=scale,
        activation_zero=zero,
    )


def test_tokens_by_hand() -> None:
    """Steps of 255 / 127.5 = 2 and of 1: 3 lies between two levels and goes to the even code, 255 to the last one."""
    x = torch.tensor([[255.0, 3.0, -5.1, 0.9], [127.5, -127.5, 0.4, 0.6]])
    assert round_tokens(x).tolist() == [[254, 4, -6, 0], [127, -128, 0, 1]]


def test_a_range_by_hand() -> None:
    """[-1, 50] has the step 0.2 and the zero point -128 + 5: codes -128, -123 and 127 stand for -1, 0 and 50."""
    scale, zero = tensor_parameters(-1, 50)
    assert (float(scale), zero.tolist()) == (pytest.approx(0.2), [-123])
    x = torch.tensor([-1.0, 0.0, 50.0, 0.31, -7.0, 51.0])
    torch.testing.assert_close(
        round_tensor(x, float(scale), int(zero)), torch.tensor([-1.0, 0.0, 50.0, 0.4, -1.0, 50.0])
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_at_the_ends(dtype: torch.dtype) -> None:
    """An activation that is always 0, one of one sign, one that is too small or too large for the dtype."""
    assert [part.item() for part in tensor_parameters(0, 0, dtype)] == [1, -128]
    assert tensor_parameters(0, 5, dtype)[1].item() == -128
    # A scale that its dtype rounds up reaches from -5 beyond 0.
    assert tensor_parameters(-5, 0, dtype)[1].item() == (126 if dtype is torch.bfloat16 else 127)
    for bound in (1e-44, 1e38):
        scale, zero = tensor_parameters(-bound, bound, dtype)
        assert scale.dtype == dtype and zero.dtype == torch.int8
        assert float(scale) > 0 and bool(scale.isfinite())


@given(rows=st.integers(1, 9), columns=st.integers(1, 41), loudness=st.floats(-12, 12), seed=st.integers(0, 2**32))
def test_a_token_is_off_by_half_a_step_at_most(rows: int, columns: int, loudness: float, seed: int) -> None:
    x = normal(rows, columns, seed=seed) * 10**loudness
    step = x.double().abs().amax(1, keepdim=True) / 127.5
    assert bool(((round_tokens(x).double() - x.double()).abs() <= step / 2 * (1 + 1e-4)).all())


@given(low=st.floats(-100, 0), high=st.floats(0, 100), seed=st.integers(0, 2**32))
def test_a_fixed_range_is_off_by_half_a_step_at_most(low: float, high: float, seed: int) -> None:
    """Zero is a level, so that the range shifts by up to half a step at its ends."""
    x = torch.rand(300, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    scale, zero = tensor_parameters(low, high)
    error = (round_tensor(x, float(scale), int(zero)) - x).abs()
    inside = (x >= low + float(scale)) & (x <= high - float(scale))
    assert bool((error[inside] <= float(scale) * (0.5 + 1e-3)).all())
    assert bool((error <= float(scale) * (1 + 1e-3) + 1e-30).all()) or high == low
    assert round_tensor(torch.zeros(1), float(scale), int(zero)).item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_a_dense_layer_multiplies_what_the_kernel_does(inputs: str, dtype: torch.dtype) -> None:
    """The same integers: in float32 the outputs differ by the rounding of sums, else by that of inputs and outputs."""
    weight = quantized(41, 72, dtype, inputs)
    layer = nn.Linear(72, 41, bias=False).requires_grad_(False)
    layer.weight.copy_(weight.dequantize(torch.float32))
    layer.to(dtype)
    round_inputs(layer, weight)
    x = normal(3, 5, 72, seed=2).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(layer(x), int8_matmul.reference(x, weight), rtol=tolerance, atol=tolerance * 10)
    if dtype is torch.float32:
        packed = int8_matmul.prepare(weight)
        torch.testing.assert_close(layer(x), int8_matmul.matmul(x, packed), rtol=1e-5, atol=1e-4)


def test_what_a_layer_was_told_before_is_forgotten() -> None:
    layer = nn.Linear(8, 4)
    x = normal(2, 8)
    plain = layer(x)
    for _ in range(2):
        round_inputs(layer, quantized(4, 8, inputs="tensor"))
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, InputRounding) and hook.scale is not None
    assert not torch.equal(layer(x), plain)
    round_inputs(layer, torch.zeros(4, 8))
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_gradients_pass_straight_through(inputs: str) -> None:
    """Those of the layer's own product, 0 where a fixed range from -1.5 to 2.5 cuts off; the values stay the same."""
    layer = nn.Linear(6, 3)
    weight = quantized(3, 6, inputs=inputs)
    round_inputs(layer, weight)
    x = (2 * normal(5, 6)).requires_grad_()
    plain = layer(x)
    with straight_through(layer):
        outputs = layer(x)
    assert torch.equal(outputs, plain) and x.abs().max() > 2.6
    outputs.sum().backward()
    expected = layer.weight.detach().sum(0).expand(5, 6)
    if inputs == "tensor":
        expected = expected * ((x > -1.5 - 1e-6) & (x < 2.5 + 1e-6))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, InputRounding) and not hook.straight
