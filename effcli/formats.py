"""How numbers are stored: formats are values, with the arithmetic to pack, unpack and restore them.

A format knows nothing of how its numbers were chosen. The packed layout is the one of compressed-tensors'
`pack-quantized` (https://github.com/vllm-project/compressed-tensors): element j of a row stands in bits
[j·b, (j+1)·b) of the row's stream of 32-bit little-endian words, for every b from 1 to 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Strategy = Literal["tensor", "channel", "group"]

# 32 elements of b bits fill exactly b words, so a row is packed in runs of 32.
_RUN = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (rows, n) below 2**bits into int32 words (rows, ceil(n·bits/32)).

    Every code lies in at most two neighbouring words; both parts are or-ed in, since no two codes share a bit.
    """
    rows, count = codes.shape
    runs = math.ceil(count / _RUN)
    padded = torch.zeros(rows, runs * _RUN, dtype=torch.int64, device=codes.device)
    padded[:, :count] = codes
    padded = padded.view(rows, runs, _RUN)
    words = torch.zeros(rows, runs, bits, dtype=torch.int64, device=codes.device)
    for j in range(_RUN):
        word, shift = divmod(j * bits, 32)
        spread = padded[:, :, j] << shift
        words[:, :, word] |= spread & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, :, word + 1] |= spread >> 32
    packed = words.view(rows, runs * bits)[:, : math.ceil(count * bits / 32)]
    # Words above 2**31 wrap to negative int32: the same bits.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Restore uint8 codes (rows, count) from int32 words (rows, ceil(count·bits/32))."""
    rows = words.shape[0]
    if bits in (2, 4, 8):
        # Codes that never straddle a byte: split bytes, 8 times less memory than going through words.
        # One word may have any stride and still count as contiguous; bytes can be viewed of stride 1 only.
        ready = words.is_contiguous() and words.stride(1) == 1
        whole = words if ready else words.clone(memory_format=torch.contiguous_format)
        octets = whole.view(torch.uint8).view(rows, 4 * words.shape[1], 1)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes: Tensor = (octets >> shifts) & (2**bits - 1)
        return codes.view(rows, words.shape[1] * 32 // bits)[:, :count]
    runs = math.ceil(count / _RUN)
    padded = torch.zeros(rows, runs * bits, dtype=torch.int32, device=words.device)
    padded[:, : words.shape[1]] = words
    padded = padded.view(rows, runs, bits)
    codes = torch.empty(rows, runs, _RUN, dtype=torch.uint8, device=words.device)
    for j in range(_RUN):
        word, shift = divmod(j * bits, 32)
        # Arithmetic shifts smear the sign upwards; the mask keeps only the bits that belong to this word.
        low = min(bits, 32 - shift)
        code = (padded[:, :, word] >> shift) & (2**low - 1)
        if low < bits:
            code |= (padded[:, :, word + 1] & (2 ** (bits - low) - 1)) << low
        codes[:, :, j] = code.to(torch.uint8)
    return codes.view(rows, runs * _RUN)[:, :count]


@dataclass(frozen=True)
class Dense:
    """Floating-point numbers, as they are."""

    dtype: torch.dtype

    def nbytes(self, shape: tuple[int, int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Affine:
    """Integers q in [0, 2**bits) that stand for (q - zero) · scale, one scale per tensor, row, or group of a row.

    `group_size` columns share a scale when `strategy` is "group" and must divide the row length; it is 0 otherwise.
    Symmetric weights have the fixed zero 2**(bits-1), which is not stored.
    """

    bits: int
    strategy: Strategy
    group_size: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits}")
        if (self.strategy == "group") != (self.group_size > 0):
            raise ValueError("a group size belongs to the strategy 'group', and only to it")

    @property
    def levels(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def fixed_zero(self) -> int:
        """The zero point of symmetric weights."""
        return 1 << (self.bits - 1)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a weight (out, in): (1, 1), (out, 1) or (out, in / group_size)."""
        rows, columns = shape
        if self.strategy == "tensor":
            return 1, 1
        if self.strategy == "channel":
            return rows, 1
        if columns % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {columns}")
        return rows, columns // self.group_size

    def grouped(self, weight: Tensor) -> Tensor:
        """View weight (out, in) as (scale rows, scale columns, numbers per scale)."""
        rows, columns = self.scale_shape((weight.shape[0], weight.shape[1]))
        # Spelt out, since -1 is ambiguous for a weight without rows.
        numbers = weight.numel() if self.strategy == "tensor" else weight.shape[1] // columns
        return weight.reshape(rows, columns, numbers)

    def nbytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        """Bytes on disk of a weight of this `shape`, scales and packed zero points included."""
        rows, columns = shape
        scale_rows, scale_columns = self.scale_shape(shape)
        total = rows * math.ceil(columns * self.bits / 32) * 4 + 16
        total += scale_rows * scale_columns * scale_bytes
        if not self.symmetric:
            total += 1 if self.strategy == "tensor" else math.ceil(scale_rows * self.bits / 32) * 4 * scale_columns
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "affine",
            "bits": self.bits,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Affine:
        return Affine(data["bits"], data["strategy"], data["group_size"], data["symmetric"])

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.strategy == "group" else self.strategy
        return f"int{self.bits} {where} {'sym' if self.symmetric else 'asym'}"


Format = Dense | Affine


@dataclass(frozen=True)
class AffineWeight:
    """One quantized weight matrix.

    codes: uint8 (out, in); scale: floating (scale rows, scale columns) as stored; zero: uint8, the shape of `scale`,
    or None when symmetric; input_scale: floating (in,) or None. With an input scale s the layer computes
    Ŵ (x / s): the scale that no producer could take in stays explicit on the input.
    """

    format: Affine
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating: (q - zero) · scale, the product rounded once to `dtype` (default: the scale's).

        q - zero is an integer of at most 8 bits and exact, so float32 arithmetic rounded at the end equals the
        arithmetic of the stock loaders in the scale's own dtype. The input scale is not part of it.
        """
        zero: Tensor | int = self.format.fixed_zero if self.zero is None else self.zero.float().unsqueeze(-1)
        values = (self.format.grouped(self.codes).float() - zero) * self.scale.float().unsqueeze(-1)
        return values.reshape(self.codes.shape).to(dtype or self.scale.dtype)

    def effective(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating: the dequantized weight with the explicit input scale divided in."""
        dense = self.dequantize(torch.float32)
        if self.input_scale is not None:
            dense = dense / self.input_scale.float()
        return dense.to(dtype or self.scale.dtype)

    def pack(self) -> dict[str, Tensor]:
        """Tensors by suffix, as they stand in a file: `weight_packed`, `weight_scale`, `weight_shape` ..."""
        packed = {
            "weight_packed": pack_bits(self.codes, self.format.bits),
            "weight_scale": self.scale.reshape(-1) if self.format.strategy == "tensor" else self.scale,
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if self.zero is not None:
            if self.format.strategy == "tensor":
                signed = self.zero.to(torch.int16) - self.format.fixed_zero
                packed["weight_zero_point"] = signed.to(torch.int8).reshape(-1)
            else:
                # Zero points are packed along the rows: word k of a column holds the zeros of rows 32k/b onwards.
                packed["weight_zero_point"] = pack_bits(self.zero.t(), self.format.bits).t()
        if self.input_scale is not None:
            packed["input_scale"] = self.input_scale
        return {suffix: tensor.contiguous() for suffix, tensor in packed.items()}

    @staticmethod
    def unpack(format: Affine, tensors: dict[str, Tensor]) -> AffineWeight:
        """The inverse of `pack`."""
        rows, columns = (int(n) for n in tensors["weight_shape"].tolist())
        codes = unpack_bits(tensors["weight_packed"], format.bits, columns)
        scale = tensors["weight_scale"].reshape(format.scale_shape((rows, columns)))
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            if format.strategy == "tensor":
                zero = (zero.to(torch.int16) + format.fixed_zero).to(torch.uint8).reshape(scale.shape)
            else:
                zero = unpack_bits(zero.t().contiguous(), format.bits, rows).t().contiguous()
        return AffineWeight(format, codes, scale, zero, tensors.get("input_scale"))


def quantize_codes(weight: Tensor, scale: Tensor, zero: Tensor | float, format: Affine) -> Tensor:
    """Round weight (out, in) to the nearest code: clamp(round(w / scale) + zero, 0, 2**bits - 1), uint8 (out, in).

    scale: floating, zero: the shape of `scale` or a number; shapes as `Affine.scale_shape`.
    """
    zeros = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    levels = (format.grouped(weight) / scale.unsqueeze(-1)).round_().add_(zeros).clamp_(0, format.levels)
    return levels.to(torch.uint8).reshape(weight.shape)
