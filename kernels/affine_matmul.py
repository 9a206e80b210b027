"""y = x Ŵᵀ with Ŵ = (q - zero) · scale: matrix product with an affine-quantized weight, by device and rows of x.

`prepare` lays a weight out once for its device, `matmul` multiplies, `route_name` says which kernel it picks.

| layout | device, weights | bits held per weight | few rows of x | many rows of x |
|---|---|---|---|---|
| `Nibbles` | CPU, 2 to 4 bits | 4, and 4 (2 at 2 bits) | torch's int4 kernel | FBGEMM unpack, tile by tile |
| `Bytes` | CPU, 5 to 8 bits | 8 | torch's int8 kernel, by groups | convert, tile by tile |
| `Words` | CUDA, 2 to 8 bits | as in the file | Triton GEMV | Triton dot, split along K |
| `Words` | anything else | as in the file | unpack in plain torch, tile by tile | the same |

`Nibbles` holds two copies at four bits because it pays: 4096 × 4096, one row takes 0.46 ms through the int4 kernel and
4.4 ms through the tiles, 128 rows take 29 ms and 13 ms (bf16: 2.0 and 10.5). Where the int4 kernel cannot serve (scales
that are no bf16 values, group sizes it does not know) only the copy for the tiles is made. Tiles are rows of the
weight, dequantized into a buffer that stays in the cache: the dequantized weight never exists whole.

Numerics: products accumulate in float32. A tile is (q - zero) · scale rounded once to the activations' dtype, as the
stock loaders do. torch's int4 kernel keeps scale and (8 - zero) · scale in bf16 and rounds no weight: on weights
as they are it errs less than a dense bf16 layer. It is used for bf16 activations only. float16 activations are
multiplied in float32 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from effcli.formats import Affine, AffineWeight, pack_bits, unpack_bits
from effcli.kernels._packed import Packed, matmul, offers, reference, route_name

# Largest number of rows of x for which torch's kernel beats the tiles. Measured by benchmarks/affine_matmul.py
# on an AMD EPYC (Zen 5, AVX-512 with bf16), one thread, 4096 × 4096, groups of 128.
INT4_ROWS: Final = 28
INT8_ROWS: Final = 24
INT8_GROUP_ROWS: Final = 20

_INT4_GROUPS: Final = (256, 128, 64, 32)


@dataclass(frozen=True)
class Words(Packed):
    """The file's own layout: words int32 (out, ceil(in·bits/32)), scale (scale rows, groups), zero uint8 or None."""

    format: Affine
    words: Tensor
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def build(weight: AffineWeight) -> Words:
        zero = None if weight.zero is None else weight.zero.contiguous()
        words = pack_bits(weight.codes, weight.format.bits)
        return Words(weight.format, weight.shape, weight.scale.dtype, words, weight.scale.contiguous(), zero)

    def tensors(self) -> dict[str, Tensor]:
        held = {"words": self.words, "scale": self.scale}
        return held if self.zero is None else {**held, "zero": self.zero}

    def restore(self) -> AffineWeight:
        codes = unpack_bits(self.words, self.format.bits, self.shape[1])
        return AffineWeight(self.format, codes, self.scale, self.zero)

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        rows = slice(None) if self.format.strategy == "tensor" else slice(start, stop)
        codes = unpack_bits(self.words[start:stop], self.format.bits, self.shape[1])
        zero = None if self.zero is None else self.zero[rows]
        return AffineWeight(self.format, codes, self.scale[rows], zero).dequantize(dtype)

    def route(self, rows: int, dtype: torch.dtype) -> str:
        if self.device.type != "cuda" or self.format.bits < 2:
            return f"unpack tiles, {self.device.type}"
        from effcli.kernels import _affine_matmul_triton as kernels

        return kernels.plan(self.format.bits, self.group, rows, self.shape).name

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.format.group_size or max(1, self.shape[1])

    def multiply(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or self.format.bits < 2:
            return self.multiply_tiles(x)
        return self.multiply_triton(x)

    def multiply_triton(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out) through the Triton kernels, also on the CPU under TRITON_INTERPRET=1."""
        from effcli.kernels import _affine_matmul_triton as kernels

        groups = self.scale.shape[1]
        scale = self.scale.expand(self.shape[0], groups)
        zero = None if self.zero is None else self.zero.expand(self.shape[0], groups)
        return kernels.multiply(
            x, self.words, scale, zero, bits=self.format.bits, fixed_zero=self.format.fixed_zero, group=self.group
        )


@dataclass(frozen=True)
class Nibbles(Packed):
    """Up to 4 bits on the CPU.

    rows: uint8 (out · groups, group · width / 8 + 4), the codes of one group in `width` bits, low first, and then its
    factor and offset in float16: what FBGEMM unpacks to factor · q + offset.
    scale: (out, groups) or None. None: the factor is the scale and the offset -zero · scale, where float16 can say
    so. Otherwise the factor is 1, the offset -zero, and the scale is multiplied afterwards.
    int4, scale_and_zero: what torch's int4 kernel reads, the latter bf16 (in / its group, out, 2); None where it
    cannot serve.
    """

    format: Affine
    rows: Tensor
    scale: Tensor | None
    int4: Tensor | None
    scale_and_zero: Tensor | None

    @staticmethod
    def serves(format: Affine, shape: tuple[int, int]) -> bool:
        group = format.group_size or shape[1]
        width = 2 if format.bits == 2 else 4
        return (
            2 <= format.bits <= 4
            and min(shape) > 0
            and group % (8 // width) == 0
            and offers("quantized", f"embedding_bag_{width}bit_unpack")
        )

    @staticmethod
    def build(weight: AffineWeight) -> Nibbles:
        format, (out, columns) = weight.format, weight.shape
        group = format.group_size or columns
        groups = columns // group
        scale = weight.scale.expand(out, groups)
        zero = torch.tensor(format.fixed_zero) if weight.zero is None else weight.zero
        zero = zero.float().expand(out, groups)
        offset = -zero * scale.float()
        folded = _in_half(scale, offset)
        tail = torch.stack((scale, offset) if folded else (torch.ones_like(zero), -zero), dim=-1).to(torch.float16)
        width = 2 if format.bits == 2 else 4
        places = weight.codes.reshape(out * groups, -1, 8 // width)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8)
        octets = (places << shifts).sum(-1, dtype=torch.uint8)
        rows = torch.cat((octets, tail.view(out * groups, 2).view(torch.uint8)), dim=1)
        int4, scale_and_zero = _int4_layout(weight, scale, zero)
        kept = None if folded else scale.contiguous()
        return Nibbles(format, weight.shape, weight.scale.dtype, rows, kept, int4, scale_and_zero)

    @property
    def width(self) -> int:
        return 2 if self.format.bits == 2 else 4

    @property
    def groups(self) -> int:
        return self.rows.shape[0] // self.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        held = {"rows": self.rows, "scale": self.scale, "int4": self.int4, "scale_and_zero": self.scale_and_zero}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def restore(self) -> AffineWeight:
        out, columns = self.shape
        shifts = torch.arange(0, 8, self.width, dtype=torch.uint8)
        codes = ((self.rows[:, :-4].unsqueeze(-1) >> shifts) & (2**self.width - 1)).view(out, columns)
        factor, zero = self._tails(self.rows)
        scale = factor.view(out, -1).to(self.dtype) if self.scale is None else self.scale
        taken = slice(0, 1) if self.format.strategy == "tensor" else slice(None)
        kept = None if self.format.symmetric else zero.view(out, -1).to(torch.uint8)[taken].contiguous()
        return AffineWeight(self.format, codes, scale[taken].contiguous(), kept)

    @staticmethod
    def _tails(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and zero, float32 (n, 1), of n groups; the zero is an integer, found by rounding."""
        tail = _halves(rows[:, -4:]).float()
        factor, offset = tail[:, :1], tail[:, 1:]
        return factor, torch.round(-offset / factor)

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        rows = self.rows[start * self.groups : stop * self.groups]
        values: Tensor
        if self.width == 2:
            values = torch.ops.quantized.embedding_bag_2bit_unpack(rows)
        else:
            values = torch.ops.quantized.embedding_bag_4bit_unpack(rows)
        if self.scale is not None:
            values *= self.scale[start:stop].reshape(-1, 1)
        elif dtype != torch.bfloat16 and not self.format.symmetric:
            # An odd zero above 8 times a scale of 8 bits takes one bit more than float16 has: below bf16's rounding,
            # but not below float32's. What was lost in the offset is put back.
            factor, zero = self._tails(rows)
            values += -zero * factor - _halves(rows[:, -2:]).float()
        return values.view(stop - start, self.shape[1])

    def _few(self, rows: int, dtype: torch.dtype) -> bool:
        return self.int4 is not None and dtype == torch.bfloat16 and rows <= INT4_ROWS

    def route(self, rows: int, dtype: torch.dtype) -> str:
        bits, few = self.format.bits, self._few(rows, dtype)
        name, width = ("int4pack", 4) if few else (f"fbgemm {self.width}-bit unpack tiles", self.width)
        return f"{name}, cpu" if bits == width else f"{name} ({bits}-bit weights held in {width} bits), cpu"

    def multiply(self, x: Tensor) -> Tensor:
        if self._few(x.shape[0], x.dtype):
            assert self.int4 is not None and self.scale_and_zero is not None
            group = self.shape[1] // self.scale_and_zero.shape[0]
            packed = torch.ops.aten._weight_int4pack_mm_for_cpu
            result: Tensor = packed(x.contiguous(), self.int4, group, self.scale_and_zero)
            return result
        return self.multiply_tiles(x)


@dataclass(frozen=True)
class Bytes(Packed):
    """5 to 8 bits on the CPU.

    codes: int8 (groups, out, in / groups), q - zero where that fits and q - 128 for asymmetric 8 bits;
    scale: (groups, out); zero: uint8 (groups, out) when asymmetric.
    """

    format: Affine
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def serves(format: Affine, shape: tuple[int, int]) -> bool:
        return 5 <= format.bits <= 8 and min(shape) > 0

    @staticmethod
    def build(weight: AffineWeight) -> Bytes:
        format, (out, columns) = weight.format, weight.shape
        groups = columns // (format.group_size or columns)
        zero = None if weight.zero is None else weight.zero.expand(out, groups).T.contiguous()
        codes = weight.codes.view(out, groups, -1).transpose(0, 1).to(torch.int16)
        codes -= format.fixed_zero if zero is None or format.bits == 8 else zero.unsqueeze(-1)
        scale = weight.scale.expand(out, groups).T.contiguous()
        return Bytes(format, weight.shape, weight.scale.dtype, codes.to(torch.int8).contiguous(), scale, zero)

    def tensors(self) -> dict[str, Tensor]:
        held = {"codes": self.codes, "scale": self.scale}
        return held if self.zero is None else {**held, "zero": self.zero}

    def lack(self, start: int, stop: int) -> Tensor | None:
        """float32 (groups, stop - start), what the codes lack to be q - zero; None if nothing."""
        return 128 - self.zero[:, start:stop].float() if self.zero is not None and self.format.bits == 8 else None

    def restore(self) -> AffineWeight:
        back = self.codes.to(torch.int16)
        back += self.format.fixed_zero if self.zero is None or self.format.bits == 8 else self.zero.unsqueeze(-1)
        codes = back.to(torch.uint8).transpose(0, 1).reshape(self.shape)
        taken = slice(0, 1) if self.format.strategy == "tensor" else slice(None)
        zero = None if self.zero is None else self.zero.T[taken].contiguous()
        return AffineWeight(self.format, codes, self.scale.T[taken].contiguous(), zero)

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(stop - start, *self.codes.shape[::2], dtype=torch.float32)
        values.copy_(self.codes[:, start:stop].transpose(0, 1))
        lack = self.lack(start, stop)
        if lack is not None:
            values += lack.T.unsqueeze(-1)
        values *= self.scale[:, start:stop].T.unsqueeze(-1).float()
        return values.view(stop - start, self.shape[1])

    def _few(self, rows: int, dtype: torch.dtype) -> bool:
        groups, _, group = self.codes.shape
        return (
            dtype == self.scale.dtype == torch.bfloat16
            and rows <= (INT8_ROWS if groups == 1 else INT8_GROUP_ROWS)
            # Rows that are no multiple of the vector length are read past their end.
            and group % 32 == 0
            and offers("aten", "_weight_int8pack_mm")
        )

    def route(self, rows: int, dtype: torch.dtype) -> str:
        return "int8pack, cpu" if self._few(rows, dtype) else "int8 convert tiles, cpu"

    def multiply(self, x: Tensor) -> Tensor:
        if not self._few(x.shape[0], x.dtype):
            return self.multiply_tiles(x)
        groups, out, group = self.codes.shape
        packed = torch.ops.aten._weight_int8pack_mm
        pieces = x.view(-1, groups, group).transpose(0, 1).contiguous()
        lack = self.lack(0, out)
        if groups == 1 and lack is None:
            whole: Tensor = packed(pieces[0], self.codes[0], self.scale[0])
            return whole
        result = torch.zeros(x.shape[0], out, dtype=torch.float32)
        for piece, codes, scale in zip(pieces, self.codes, self.scale, strict=True):
            result += packed(piece, codes, scale)
        if lack is not None:
            result += pieces.float().sum(-1).T @ (lack * self.scale)
        return result.to(x.dtype)


def _in_half(scale: Tensor, offset: Tensor) -> bool:
    """Whether float16 holds every scale exactly and nonzero, and every offset to its full precision of 11 bits."""
    exact = (scale.to(torch.float16).to(scale.dtype) == scale) & (scale != 0)
    half = offset.to(torch.float16).abs()
    close = (half >= torch.finfo(torch.float16).tiny) & half.isfinite() | (offset == 0)
    return bool((exact & close).all())


def _int4_layout(weight: AffineWeight, scale: Tensor, zero: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What torch's int4 kernel reads: packed codes c, and bf16 (in / group, out, 2) of s and t in (c - 8) · s + t.

    scale, zero: (out, groups). Codes of fewer bits are shifted so that the middle of their range stands at 8, where
    the kernel's bf16 arithmetic loses least. (None, None) where the kernel cannot serve, or where bf16 scales would
    alter the weight.
    """
    out, columns = weight.shape
    own = weight.format.group_size or columns
    group = next((size for size in _INT4_GROUPS if own % size == 0), 0)
    if (
        not group
        or out % 16
        or not torch.equal(scale.to(torch.bfloat16).to(scale.dtype), scale)
        or not offers("aten", "_weight_int4pack_mm_for_cpu")
        or not offers("aten", "_convert_weight_to_int4pack_for_cpu")
    ):
        return None, None
    middle = weight.format.fixed_zero
    pair = torch.stack((scale.float(), (middle - zero) * scale.float()), dim=-1).to(torch.bfloat16)
    pair = pair.repeat_interleave(own // group, dim=1).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32) + (8 - middle), 1), pair


def prepare(weight: AffineWeight, device: torch.device | str | None = None) -> Words | Nibbles | Bytes:
    """Lay `weight` out for `device` (default: where its codes are). The input scale is left to the caller."""
    target = weight.codes.device if device is None else torch.device(device)
    if target.type == "cpu":
        weight = _moved(weight, target)
        for layout in (Nibbles, Bytes):
            if layout.serves(weight.format, weight.shape):
                return layout.build(weight)
        return Words.build(weight)
    packed = Words.build(weight)
    zero = None if packed.zero is None else packed.zero.to(target)
    words, scale = packed.words.to(target), packed.scale.to(target)
    return Words(packed.format, packed.shape, packed.dtype, words, scale, zero)


def _moved(weight: AffineWeight, device: torch.device) -> AffineWeight:
    zero = None if weight.zero is None else weight.zero.to(device)
    return AffineWeight(weight.format, weight.codes.to(device), weight.scale.to(device), zero)


def _halves(octets: Tensor) -> Tensor:
    """uint8 (n, 2·k) as float16 (n, k); a copy, for a single row may begin at an odd byte."""
    return octets.clone(memory_format=torch.contiguous_format).view(torch.float16)


__all__ = ["Bytes", "Nibbles", "Packed", "Words", "matmul", "prepare", "reference", "route_name"]
