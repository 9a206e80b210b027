"""What all quantized products have in common: a weight laid out for a device, its tiles, the gradient to x."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from effcli.formats import Packing, Quantized

# float32 numbers of one step of dequantization, per thread: 1 MiB, which stays in a core's level-2 cache. A tile is
# four steps. Beyond eight threads a step grows no more: the weight is not to exist whole.
_STEP: Final = 2**18
_STEP_THREADS: Final = 8
_TILE_STEPS: Final = 4


# Writes rows [start, stop) of a weight into a tensor (stop - start, in).
Fill = Callable[[int, int, Tensor], None]


def offers(namespace: str, operator: str) -> bool:
    """Whether this build of torch has the operator: these are private and come and go."""
    return hasattr(getattr(torch.ops, namespace), operator)


def reference(x: Tensor, weight: Quantized) -> Tensor:
    """x (..., in) floating -> (..., out) in x's dtype, computed in float64 on the weight rounded to x's dtype."""
    return (x.double() @ weight.dequantize(x.dtype).double().T).to(x.dtype)


@dataclass(frozen=True)
class Packed(abc.ABC):
    """A weight (out, in) laid out for a device.

    dtype: what the weight is dequantized to unless told otherwise, as `Quantized.dtype`.
    """

    format: Packing
    shape: tuple[int, int]
    dtype: torch.dtype

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is held, by name."""

    @abc.abstractmethod
    def restore(self) -> Quantized:
        """The weight this was prepared from, bit for bit (without its input scale)."""

    @abc.abstractmethod
    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Dequantize rows [start, stop): (stop - start, in); in `dtype`, or in float32 if that is cheaper."""

    @abc.abstractmethod
    def route(self, rows: int, dtype: torch.dtype) -> str:
        """Name of the kernel that multiplies `rows` rows of `dtype`."""

    @abc.abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x (rows, in) of a working dtype, rows > 0 -> (rows, out) in x's dtype."""

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What inputs of `dtype` are multiplied in."""
        # CPUs convert float16 but seldom multiply it.
        return torch.float32 if dtype == torch.float16 and self.device.type == "cpu" else dtype

    def cut_off(self, x: Tensor) -> Tensor | None:
        """Which inputs x (rows, in) are clamped and so get no gradient: bool, the shape of x; None for none of them."""
        return None

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def fill(self, start: int, stop: int, out: Tensor) -> None:
        """Dequantize rows [start, stop) into `out` (stop - start, in)."""
        out.copy_(self.step(start, stop, out.dtype))

    def tiles(self, dtype: torch.dtype, fill: Fill | None = None) -> Iterator[tuple[int, Tensor]]:
        """Dequantized rows (n, in) in `dtype` with the number of their first row; a tile lives until the next one.

        fill: writes rows in place of `self.fill`.
        """
        fill = fill or self.fill
        rows, columns = self.shape
        step = max(1, _STEP * min(torch.get_num_threads(), _STEP_THREADS) // max(1, columns))
        size = min(rows, step * _TILE_STEPS)
        buffer = torch.empty(size, columns, dtype=dtype, device=self.device)
        for start in range(0, rows, max(1, size)):
            stop = min(start + size, rows)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                fill(first, last, buffer[first - start : last - start])
            yield start, buffer[: stop - start]

    def multiply_tiles(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out), dequantizing a tile of the weight at a time."""
        out = x.new_empty(x.shape[0], self.shape[0])
        x = x.to(_tile_dtype(x.dtype, x.device.type))
        for start, tile in self.tiles(x.dtype):
            out[:, start : start + tile.shape[0]] = x @ tile.T
        return out


@cache
def _tile_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What inputs of `dtype` and tiles are multiplied in: without instructions for bf16, torch's loop over bf16 numbers
    takes several times as long as a product of float32.
    """
    if dtype != torch.bfloat16 or device != "cpu":
        return dtype
    supported = offers("mkldnn", "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if supported else torch.float32


def route_name(packed: Packed, rows: int, dtype: torch.dtype) -> str:
    """The kernel that `matmul` picks for `rows` rows of activations in `dtype`."""
    return packed.route(rows, packed.working_dtype(dtype))


def matmul(x: Tensor, packed: Packed) -> Tensor:
    """x (..., in) floating -> x Ŵᵀ (..., out) in x's dtype. Gradients flow to x, never to the weight."""
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {packed.shape[1]}")
    if torch.is_grad_enabled() and x.requires_grad:
        product: Any = _Matmul
        result: Tensor = product.apply(x, packed)
        return result
    return _multiply(x, packed)


def _multiply(x: Tensor, packed: Packed) -> Tensor:
    flat = _rows(x)
    if flat.numel() == 0 or packed.shape[0] == 0:
        result = flat.new_zeros(flat.shape[0], packed.shape[0])
    else:
        result = packed.multiply(flat.to(packed.working_dtype(x.dtype))).to(x.dtype)
    return result.view(*x.shape[:-1], packed.shape[0])


def _rows(x: Tensor) -> Tensor:
    """x (..., n) as (rows, n); spelt out, since -1 is ambiguous where n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _Matmul(torch.autograd.Function):
    """The product with a gradient for x: gy Ŵ, a tile of Ŵ at a time. Where x is rounded first, that counts as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        ctx.cut_off = packed.cut_off(x)
        return _multiply(x, packed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packed: Packed = ctx.packed
        flat = _rows(gradient).to(_tile_dtype(gradient.dtype, gradient.device.type))
        result = flat.new_zeros(flat.shape[0], packed.shape[1], dtype=torch.float32)
        for start, tile in packed.tiles(flat.dtype):
            result += flat[:, start : start + tile.shape[0]] @ tile
        result = result.to(gradient.dtype).view(*gradient.shape[:-1], packed.shape[1])
        return result if ctx.cut_off is None else result.masked_fill(ctx.cut_off, 0), None
