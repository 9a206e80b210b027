"""Inputs that become int8 in front of a layer, as floating-point numbers: what a network of dense weights computes.

The integers are those of `effcli.kernels.int8_matmul`, which multiplies them; here they are turned back at once. Within
the range of the codes the error is at most half a step, and a step is max|x| / 127.5 of a token, or (high - low) / 255
of a range that is fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effcli.formats import Quantized
from effcli.kernels.int8_matmul import quantize_tokens

Network = TypeVar("Network", bound=nn.Module)

# The smallest and the largest code.
LOWEST, HIGHEST = -128, 127


def tensor_parameters(low: float, high: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scale of `dtype` (1,) and zero point int8 (1,) whose codes cover low ≤ 0 ≤ high; scale 1 for an empty range.

    The zero point is chosen for the scale as `dtype` holds it.
    """
    width = (high - low) / (HIGHEST - LOWEST)
    limits = torch.finfo(dtype)
    step = min(max(width, limits.tiny), limits.max) if width > 0 else 1.0
    scale = torch.tensor([step], dtype=torch.float64).to(dtype)
    zero = (LOWEST - low / scale.double()).round().clamp(LOWEST, HIGHEST)
    return scale, zero.to(torch.int8)


def round_tokens(x: Tensor) -> Tensor:
    """x (..., in), every token rounded with a scale of its own."""
    codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]))
    return (codes * scale).view(x.shape)


def round_tensor(x: Tensor, scale: float, zero: int) -> Tensor:
    """x of any shape rounded with one scale, a number that x's dtype holds, and zero point."""
    codes = (x / scale + zero).clamp(LOWEST, HIGHEST).round()
    return (codes - zero) * scale


class InputRounding:
    """A hook before a module's forward that rounds its first argument, per token unless a scale is fixed.

    straight: whether gradients pass as if nothing were rounded (arXiv:1308.3432), 0 where a fixed range cuts off.
    """

    def __init__(self, scale: float | None = None, zero: int = 0) -> None:
        self.scale = scale
        self.zero = zero
        self.straight = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if not self.straight:
            return (self._rounded(x), *rest)
        with torch.no_grad():
            rounded, inside = self._rounded(x), self._inside(x)
        return (_Straight.apply(x, rounded, inside), *rest)  # type: ignore[no-untyped-call]

    def _rounded(self, x: Tensor) -> Tensor:
        return round_tokens(x) if self.scale is None else round_tensor(x, self.scale, self.zero)

    def _inside(self, x: Tensor) -> Tensor | None:
        """Where the codes reach, bool like x; None everywhere."""
        if self.scale is None:
            return None
        codes = x / self.scale + self.zero
        return (codes >= LOWEST) & (codes <= HIGHEST)


class _Straight(torch.autograd.Function):
    """`rounded` in the place of x, with the gradient of x itself where `inside`, bool like x or None for everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        if inside is not None:
            ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return (gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient), None, None


@contextmanager
def straight_through(network: nn.Module) -> Iterator[None]:
    """Let gradients pass where modules of `network` round their inputs."""
    hooks = [hook for module in network.modules() for hook in module._forward_pre_hooks.values()]
    found = [hook for hook in hooks if isinstance(hook, InputRounding)]
    for hook in found:
        hook.straight = True
    try:
        yield
    finally:
        for hook in found:
            hook.straight = False


def round_inputs(module: nn.Module, weight: Quantized | Tensor) -> None:
    """Let `module` round its inputs as `weight` asks, and only so: what an earlier weight asked for is forgotten."""
    _forget(module)
    if isinstance(weight, Quantized) and weight.format.rounds_inputs:
        module.register_forward_pre_hook(InputRounding(*(weight.input_grid or ())))


def keep_inputs(network: Network) -> Network:
    """Let no module of `network` round its inputs any more; the network itself."""
    for module in network.modules():
        _forget(module)
    return network


def _forget(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, InputRounding):
            del module._forward_pre_hooks[key]


__all__ = [
    "InputRounding",
    "keep_inputs",
    "round_inputs",
    "round_tensor",
    "round_tokens",
    "straight_through",
    "tensor_parameters",
]
