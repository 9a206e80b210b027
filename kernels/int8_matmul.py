"""y = x Ŵᵀ in integers: int8 weights of one scale per row or tensor, and inputs rounded to int8 on the way in.

    y = (token scale · row scale) · (Σ w · q - zero · Σ w),  w and q in [-128, 127], the sum in int32

| device | route |
|---|---|
| CUDA | Triton: few rows are quantized in the launch that multiplies them, many rows in one before |
| CPU with int8 dot products (VNNI, AMX) | `torch._int_mm` |
| anything else | float32 products of some columns at a time, tile by tile |

All routes give the same integer sum, exactly: float32 holds every integer up to 2^24, and columns are taken as many at
a time as cannot exceed it, at least 1024. `torch._int_mm` is exact without VNNI too, but one scalar loop: on an AMD
EPYC (Zen 3), one thread, 4096 × 4096, one row takes 11 ms and 64 rows 880 ms, through float32 7 and 54 ms. torch's
dynamic quantized linear is faster still and does not serve: without VNNI its sums of pairs saturate at 16 bits.

Numerics: inputs are rounded as compressed-tensors' stock path rounds them (`compute_dynamic_scales_and_zp`,
`quantize`), in x's own dtype, so that both find the same integers:

- per token: scale = max|x| / 127.5, the dtype's epsilon for a token of zeros, q = round(clamp(x / scale, -128, 127));
- per tensor: q = round(clamp(x / scale + zero, -128, 127)).

Quotients and sums are rounded to x's dtype, halves to even. The sum is then rescaled once, in float32. A token that
holds an infinity or a NaN comes out as such. For gradients the rounding counts as the identity; per tensor, inputs that
were clamped get none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.formats import Affine, AffineWeight
from effcli.kernels._packed import Packed, matmul, route_name

# float32 holds every integer up to 2^24: inputs of at most 2^7 times weights whose magnitudes add up to 2^17, which
# those of 1024 columns never exceed.
_EXACT_MAGNITUDE: Final = 2**17
_EXACT_COLUMNS: Final = 1024

# 2^16 · 128 · 255 < 2^31: as many products, the zero point taken off, fit int32.
MOST_COLUMNS: Final = 2**16


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x (rows, in) per row: integers in [-128, 127], (rows, in), and their scale, (rows, 1), in x's dtype."""
    scale = x.abs().amax(1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).clamp_(-128, 127).round_(), scale


def quantize_tensor(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Round x (rows, in) with one scale (1,) and zero point int8 (1,): integers in [-128, 127], in x's dtype."""
    return (x / scale.to(x.dtype)).add_(zero).clamp_(-128, 127).round_()


def reference(x: Tensor, weight: AffineWeight) -> Tensor:
    """x (..., in) floating -> (..., out) in x's dtype: the rounded inputs times the weight, in float64."""
    flat = x.reshape(-1, x.shape[-1])
    if weight.activation_scale is None or weight.activation_zero is None:
        codes, scale = quantize_tokens(flat)
        inputs = codes.double() * scale.double()
    else:
        codes = quantize_tensor(flat, weight.activation_scale, weight.activation_zero)
        inputs = (codes.double() - weight.activation_zero) * weight.activation_scale.to(x.dtype).double()
    dense = weight.signed.double() * weight.scale.double()
    return (inputs @ dense.T).to(x.dtype).view(*x.shape[:-1], dense.shape[0])


@dataclass(frozen=True)
class Integers(Packed):
    """Weights and inputs of 8 bits.

    codes: int8 (out, in); scale: floating (out, 1) or (1, 1); activation_scale: floating (1,), activation_zero: int8
    (1,) and row_sums: int32 (out,), Σ w, all None where inputs have a scale per token. span: so many neighbouring
    columns may be summed in float32.
    """

    format: Affine
    codes: Tensor
    scale: Tensor
    activation_scale: Tensor | None
    activation_zero: Tensor | None
    row_sums: Tensor | None
    span: int = _EXACT_COLUMNS

    @staticmethod
    def build(weight: AffineWeight, device: torch.device) -> Integers:
        if weight.shape[1] > MOST_COLUMNS:
            raise UnsupportedError(
                f"a layer of {weight.shape[1]} inputs may overflow its int32 sums, which hold {MOST_COLUMNS} products",
                "keep this layer's activations as they are: activations none",
            )
        codes = weight.signed.to(device)
        zero = weight.activation_zero
        if weight.activation_scale is not None and zero is None:
            zero = torch.zeros(1, dtype=torch.int8)
        return Integers(
            weight.format,
            weight.shape,
            weight.dtype,
            codes,
            weight.scale.to(device).contiguous(),
            None if weight.activation_scale is None else weight.activation_scale.to(device),
            None if zero is None else zero.to(device),
            None if zero is None else codes.sum(1, dtype=torch.int32),
            _exact_span(codes) if device.type == "cpu" and not _has_dot_products() else _EXACT_COLUMNS,
        )

    def tensors(self) -> dict[str, Tensor]:
        held = {
            "codes": self.codes,
            "scale": self.scale,
            "activation_scale": self.activation_scale,
            "activation_zero": self.activation_zero,
            "row_sums": self.row_sums,
        }
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def restore(self) -> AffineWeight:
        codes = (self.codes.to(torch.int16) + self.format.fixed_zero).to(torch.uint8)
        return AffineWeight(
            self.format,
            codes,
            self.scale,
            activation_scale=self.activation_scale,
            activation_zero=self.activation_zero,
        )

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        rows = slice(None) if self.format.strategy == "tensor" else slice(start, stop)
        return self.codes[start:stop].float() * self.scale[rows].float()

    def fill_integers(self, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of the weight, without its scale, into `out`."""
        out.copy_(self.codes[start:stop])

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # The integers depend on the dtype that x is divided in.
        return dtype

    def cut_off(self, x: Tensor) -> Tensor | None:
        if self.activation_scale is None or self.activation_zero is None:
            return None
        level = x / self.activation_scale.to(x.dtype) + self.activation_zero
        return (level < -128) | (level > 127)

    def route(self, rows: int, dtype: torch.dtype) -> str:
        if self.device.type == "cuda":
            from effcli.kernels import _int8_matmul_triton as kernels

            return kernels.plan(rows, self.shape).name
        return "int8 _int_mm, cpu" if self._dot_products() else f"int8 in float32 tiles, {self.device.type}"

    def _dot_products(self) -> bool:
        return self.device.type == "cpu" and _has_dot_products()

    def multiply(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return self.multiply_triton(x)
        if self.activation_scale is None or self.activation_zero is None:
            codes, scale = quantize_tokens(x)
        else:
            codes = quantize_tensor(x, self.activation_scale, self.activation_zero)
            scale = self.activation_scale.to(x.dtype)
        sums = self.sums(codes)
        if self.row_sums is not None and self.activation_zero is not None:
            sums -= self.activation_zero.to(torch.int32) * self.row_sums
        return (sums * (scale.float() * self.scale.float().T)).to(x.dtype)

    def multiply_triton(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out) through the Triton kernels, also on the CPU under TRITON_INTERPRET=1."""
        from effcli.kernels import _int8_matmul_triton as kernels

        activation = None
        if self.activation_scale is not None and self.activation_zero is not None and self.row_sums is not None:
            activation = self.activation_scale.to(x.dtype), self.activation_zero, self.row_sums
        return kernels.multiply(x, self.codes, self.scale, activation)

    def sums(self, codes: Tensor) -> Tensor:
        """Σ w · q, int32 (rows, out), of the integers q (rows, in) in any dtype."""
        # With AMX torch 2.13 returns numbers that were never computed where there is one column.
        if self._dot_products() and codes.shape[1] > 1:
            return torch._int_mm(codes.to(torch.int8), self.codes.T)
        result = torch.zeros(codes.shape[0], self.shape[0], dtype=torch.int32, device=codes.device)
        codes = codes.float()
        for start, tile in self.tiles(torch.float32, self.fill_integers):
            part = result[:, start : start + tile.shape[0]]
            for first in range(0, codes.shape[1], self.span):
                columns = slice(first, first + self.span)
                part += (codes[:, columns] @ tile[:, columns].T).to(torch.int32)
        return result


@cache
def _has_dot_products() -> bool:
    """Whether this CPU multiplies and adds int8 numbers in one instruction, which is what `torch._int_mm` is for."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and supported()


def _exact_span(codes: Tensor) -> int:
    """The most columns, in halves of all, that codes int8 (out, in) allow to sum up exactly in float32."""
    magnitude = codes.to(torch.int16).abs_()
    span = max(_EXACT_COLUMNS, codes.shape[1])
    while span > _EXACT_COLUMNS:
        parts = [magnitude[:, first : first + span] for first in range(0, codes.shape[1], span)]
        if all(int(part.sum(1, dtype=torch.int32).max()) <= _EXACT_MAGNITUDE for part in parts if part.numel()):
            break
        span = max(_EXACT_COLUMNS, -(-span // 2))
    return span


def prepare(weight: AffineWeight, device: torch.device | str | None = None) -> Integers:
    """Lay `weight` out for `device` (default: where its codes are)."""
    return Integers.build(weight, weight.codes.device if device is None else torch.device(device))


__all__ = ["Integers", "Packed", "matmul", "prepare", "quantize_tensor", "quantize_tokens", "reference", "route_name"]
