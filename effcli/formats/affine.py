"""Affine quantization: evenly spaced values, (q - zero) · scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.formats.base import (
    FLOATING,
    Activations,
    Bits,
    Described,
    GroupSize,
    Integers,
    Numbers,
    Quantized,
    Strategy,
    Tensors,
    Values,
    expect,
    expect_input_scale,
    expect_numbers,
)
from effcli.formats.bits import pack_bits, unpack_bits

# How a layer's inputs become int8 at run time: not at all, with a scale per token taken as they come, or with one scale
# and zero point for all, fixed beforehand.


class _Described(Described):
    format: Literal["affine"]
    bits: Bits
    strategy: Strategy
    group_size: GroupSize
    symmetric: bool = Field(strict=True)
    activations: Activations = "none"

    def made(self) -> Affine:
        return Affine(self.bits, self.strategy, self.group_size, self.symmetric, self.activations)


@dataclass(frozen=True)
class Affine(Values):
    """Integers q in [0, 2**bits) that stand for (q - zero) · scale, one scale per tensor, row, or group of a row.

    `group_size` columns share a scale when `strategy` is "group" and must divide the row length; it is 0 otherwise.
    Symmetric weights have the fixed zero 2**(bits-1), which is not stored. With `activations` the layer multiplies
    integers with integers: its inputs are rounded to int8, and its weights are symmetric of 8 bits with one scale per
    row or tensor, so that the sum of products is an integer and is rescaled once.
    """

    name = "affine"
    suffixes = frozenset(
        {
            "weight",
            "weight_packed",
            "weight_shape",
            "weight_scale",
            "weight_zero_point",
            "input_scale",
            "input_zero_point",
        }
    )
    description = _Described

    bits: int
    strategy: Strategy
    group_size: int = 0
    symmetric: bool = False
    activations: Activations = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, not {self.bits}")
        if (self.strategy == "group") != (self.group_size > 0):
            raise ValueError("a group size belongs to the strategy 'group', and only to it")
        integer = self.bits == 8 and self.symmetric and self.strategy != "group"
        if self.activations != "none" and not integer:
            raise ValueError("int8 activations need symmetric weights of 8 bits, one scale per channel or tensor")

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
        # Spelt out, since -1 is ambiguous for a weight without rows or columns.
        numbers = {"tensor": weight.numel(), "channel": weight.shape[1], "group": self.group_size}[self.strategy]
        return weight.reshape(rows, columns, numbers)

    @property
    def standard(self) -> Affine:
        return self

    @property
    def rounds_inputs(self) -> bool:
        return self.activations != "none"

    @property
    def stores_shape(self) -> bool:
        return not self.rounds_inputs

    @property
    def signed_bits(self) -> int:
        return self.bits if self.symmetric and self.strategy != "group" else 0

    def code_bytes(self, rows: int, columns: int) -> int:
        return rows * (columns if self.rounds_inputs else math.ceil(columns * self.bits / 32) * 4)

    def beside_bytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        rows, columns = self.scale_shape(shape)
        total = rows * columns * scale_bytes
        if self.rounds_inputs:
            return total + (scale_bytes + 1 if self.activations == "tensor" else 0)
        if not self.symmetric:
            total += 1 if self.strategy == "tensor" else math.ceil(rows * self.bits / 32) * 4 * columns
        return total

    def pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        """`weight_packed`, the words of each row, or a plain int8 `weight` where the inputs are int8 too."""
        return {"weight": self.signed(codes)} if self.rounds_inputs else {"weight_packed": pack_bits(codes, self.bits)}

    def check_codes(self, tensors: Tensors, rows: int, columns: int) -> None:
        if self.rounds_inputs:
            expect(tensors, "weight", (torch.int8,), (rows, columns))
        else:
            expect(tensors, "weight_packed", (torch.int32,), (rows, math.ceil(columns * self.bits / 32)))

    def unpack_codes(self, tensors: Tensors, rows: int, columns: int) -> Tensor:
        if self.rounds_inputs:
            return (tensors["weight"].to(torch.int16) + self.fixed_zero).to(torch.uint8)
        return unpack_bits(tensors["weight_packed"], self.bits, columns)

    def check_beside(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        rows, columns = self.scale_shape(shape)
        expect_numbers(tensors, "weight_scale", FLOATING, rows * columns)
        if self.rounds_inputs:
            if self.activations == "tensor":
                expect_numbers(tensors, "input_scale", FLOATING, 1)
                if "input_zero_point" in tensors:
                    expect_numbers(tensors, "input_zero_point", (torch.int8,), 1)
            return
        expect_input_scale(tensors, shape[1])
        if self.symmetric:
            if "weight_zero_point" in tensors:
                raise ValueError("symmetric weights have no weight_zero_point")
        elif self.strategy == "tensor":
            expect_numbers(tensors, "weight_zero_point", (torch.int8,), 1)
        else:
            expect(tensors, "weight_zero_point", (torch.int32,), (math.ceil(rows * self.bits / 32), columns))

    def build(self, codes: Tensor, tensors: Tensors) -> AffineWeight:
        rows = codes.shape[0]
        scale = tensors["weight_scale"].reshape(self.scale_shape((rows, codes.shape[1])))
        if self.rounds_inputs:
            return AffineWeight(
                self,
                codes,
                scale,
                activation_scale=tensors.get("input_scale"),
                activation_zero=tensors.get("input_zero_point"),
            )
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            if self.strategy == "tensor":
                zero = (zero.to(torch.int16) + self.fixed_zero).to(torch.uint8).reshape(scale.shape)
            else:
                zero = unpack_bits(zero.t().contiguous(), self.bits, rows).t().contiguous()
        return AffineWeight(self, codes, scale, zero, tensors.get("input_scale"))

    def signed(self, codes: Tensor) -> Tensor:
        """Codes of symmetric weights as int8: code · scale is the weight."""
        return (codes.to(torch.int16) - self.fixed_zero).to(torch.int8)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "affine",
            "bits": self.bits,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activations": self.activations,
        }

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.strategy == "group" else self.strategy
        inputs = "" if self.activations == "none" else f", int8 inputs per {self.activations}"
        return f"int{self.bits} {where} {'sym' if self.symmetric else 'asym'}{inputs}"


@dataclass(frozen=True)
class AffineWeight(Numbers):
    """One quantized weight matrix.

    codes: uint8 (out, in); scale: floating (scale rows, scale columns) as stored; zero: uint8, the shape of `scale`,
    or None when symmetric; input_scale: floating (in,) or None, explicit on the input.
    activation_scale: floating (1,) and activation_zero: int8 (1,), of inputs quantized per tensor: an input x becomes
    round(clamp(x / scale + zero, -128, 127)), in the dtype of x, as compressed-tensors has it. None otherwise.
    """

    format: Affine
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    input_scale: Tensor | None = None
    activation_scale: Tensor | None = None
    activation_zero: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.format.activations == "tensor") != (self.activation_scale is not None):
            raise ValueError("a fixed scale of the inputs belongs to activations per tensor, and only to them")
        if self.format.activations != "none" and self.input_scale is not None:
            raise ValueError("inputs that become int8 take no explicit scale beforehand")

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating: (q - zero) · scale, the product rounded once to `dtype` (default: the scale's).

        q - zero is an integer of at most 8 bits and exact, so float32 arithmetic rounded at the end equals the
        arithmetic of the stock loaders in the scale's own dtype. The input scale is not part of it.
        """
        zero: Tensor | int = self.format.fixed_zero if self.zero is None else self.zero.float().unsqueeze(-1)
        values = (self.format.grouped(self.codes).float() - zero) * self.scale.float().unsqueeze(-1)
        return values.reshape(self.codes.shape).to(dtype or self.scale.dtype)

    def beside(self) -> dict[str, Tensor]:
        scale = self.scale.reshape(-1) if self.format.strategy == "tensor" else self.scale
        if self.format.rounds_inputs:
            held = {"weight_scale": scale}
            if self.activation_scale is not None and self.activation_zero is not None:
                held |= {"input_scale": self.activation_scale, "input_zero_point": self.activation_zero}
            return held
        held = {"weight_scale": scale}
        if self.zero is not None:
            if self.format.strategy == "tensor":
                signed = self.zero.to(torch.int16) - self.format.fixed_zero
                held["weight_zero_point"] = signed.to(torch.int8).reshape(-1)
            else:
                # Zero points are packed along the rows: word k of a column holds the zeros of rows 32k/b onwards.
                held["weight_zero_point"] = pack_bits(self.zero.t(), self.format.bits).t()
        if self.input_scale is not None:
            held["input_scale"] = self.input_scale
        return held

    @property
    def signed(self) -> Tensor:
        """The codes of symmetric weights as int8 (out, in): code · scale is the weight."""
        return self.format.signed(self.codes)

    @property
    def input_grid(self) -> tuple[float, int] | None:
        if self.activation_scale is None or self.activation_zero is None:
            return None
        return float(self.activation_scale), int(self.activation_zero)

    def zero_codes(self) -> Tensor:
        if self.zero is None:
            return torch.full((1, 1), self.format.fixed_zero, dtype=torch.uint8, device=self.device)
        return self.zero.unsqueeze(-1).expand(self.format.grouped(self.codes).shape).reshape(self.shape)

    def integers(self) -> Integers | None:
        return Integers(self.signed, self.scale.reshape(-1)) if self.format.signed_bits else None

    def with_input_scale(self, scale: Tensor) -> AffineWeight:
        return dataclasses.replace(self, input_scale=scale)

    def join(self, others: Sequence[Quantized]) -> AffineWeight:
        """As `Quantized.join`; `ValueError` when their inputs become int8 with different scales."""
        weights = [self, *self.alike(others)]
        if any(_activation(weight) != _activation(self) for weight in weights):
            raise ValueError("the inputs of one layer have one scale")
        spread = [_per_channel(weight) if weight.format.strategy == "tensor" else weight for weight in weights]
        zeros = [weight.zero for weight in spread if weight.zero is not None]
        return dataclasses.replace(
            spread[0],
            codes=torch.cat([weight.codes for weight in spread]),
            scale=torch.cat([weight.scale for weight in spread]),
            zero=torch.cat(zeros) if zeros else None,
        )


def quantize_codes(weight: Tensor, scale: Tensor, zero: Tensor | float, format: Affine) -> Tensor:
    """Round weight (out, in) to the nearest code: clamp(round(w / scale) + zero, 0, 2**bits - 1), uint8 (out, in).

    scale: floating, zero: the shape of `scale` or a number; shapes as `Affine.scale_shape`.
    """
    zeros = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    levels = (format.grouped(weight) / scale.unsqueeze(-1)).round_().add_(zeros).clamp_(0, format.levels)
    return levels.to(torch.uint8).reshape(weight.shape)


def _activation(weight: AffineWeight) -> list[float]:
    return [float(part) for part in (weight.activation_scale, weight.activation_zero) if part is not None]


def _per_channel(weight: AffineWeight) -> AffineWeight:
    """The same numbers with the tensor's scale repeated for every channel."""
    rows = weight.codes.shape[0]
    format = dataclasses.replace(weight.format, strategy="channel")
    zero = None if weight.zero is None else weight.zero.expand(rows, 1)
    return dataclasses.replace(weight, format=format, scale=weight.scale.expand(rows, 1), zero=zero)
