"""A format of one's own: weights that are powers of two, so that products are shifts (arXiv:1702.03044)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from effcli.formats import Quantized, Strategy, pack_bits, unpack_bits
from effcli.formats.base import Described, Dtype, Numbers, Tensors, Values, expect, expect_input_scale

# The largest power of two of a row, and six below it: sign · 3 bits, of which 7 stands for 0.
_BITS = 4
_ZERO = 7


class _Described(Described):
    """What stands in a checkpoint's config; pydantic checks it."""

    format: Literal["shift"]
    dtype: Dtype

    def made(self) -> Shift:
        return Shift(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Shift(Values):
    """Codes of 4 bits, and for each row the exponent of its largest weight. dtype: the network's."""

    name = "shift"
    suffixes = frozenset({"weight_packed", "weight_exponent", "weight_shape", "input_scale"})
    description = _Described
    bits: ClassVar[int] = _BITS  # type: ignore[misc]
    strategy: ClassVar[Strategy] = "channel"  # type: ignore[misc]
    group_size: ClassVar[int] = 0  # type: ignore[misc]

    dtype: torch.dtype

    def quantize(self, weight: Tensor) -> ShiftWeight:
        """Round the logarithm of each weight (out, in) to the nearest."""
        exponents = weight.float().abs().log2().round()
        top = exponents.amax(1, keepdim=True).clamp(-126, 127)
        below = (top - exponents).clamp(0, _ZERO).to(torch.uint8)
        return ShiftWeight(self, below | ((weight < 0).to(torch.uint8) << 3), top.view(-1).to(torch.int8))

    def code_bytes(self, rows: int, columns: int) -> int:
        return rows * math.ceil(columns * _BITS / 32) * 4

    def beside_bytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        return shape[0]

    def pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": pack_bits(codes, _BITS)}

    def check_codes(self, tensors: Tensors, rows: int, columns: int) -> None:
        expect(tensors, "weight_packed", (torch.int32,), (rows, math.ceil(columns * _BITS / 32)))

    def unpack_codes(self, tensors: Tensors, rows: int, columns: int) -> Tensor:
        return unpack_bits(tensors["weight_packed"], _BITS, columns)

    def check_beside(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        expect(tensors, "weight_exponent", (torch.int8,), (shape[0],))
        expect_input_scale(tensors, shape[1])

    def build(self, codes: Tensor, tensors: Tensors) -> ShiftWeight:
        return ShiftWeight(self, codes, tensors["weight_exponent"], tensors.get("input_scale"))

    def to_json(self) -> dict[str, Any]:
        return {"format": self.name, "dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        return "shift4"


@dataclass(frozen=True)
class ShiftWeight(Numbers):
    """A weight (out, in). codes: uint8 (out, in); exponents: int8 (out,)."""

    format: Shift
    codes: Tensor
    exponents: Tensor
    input_scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        below = self.codes & 7
        powers = torch.exp2(self.exponents.float().unsqueeze(1) - below).masked_fill(below == _ZERO, 0)
        return torch.where(self.codes > _ZERO, -powers, powers).to(dtype or self.dtype)

    def beside(self) -> dict[str, Tensor]:
        scale = {} if self.input_scale is None else {"input_scale": self.input_scale}
        return {"weight_exponent": self.exponents, **scale}

    def zero_codes(self) -> Tensor:
        return self.codes.new_full((1, 1), _ZERO)

    def with_input_scale(self, scale: Tensor) -> ShiftWeight:
        return dataclasses.replace(self, input_scale=scale)

    def join(self, others: Sequence[Quantized]) -> ShiftWeight:
        weights = [self, *(other for other in others if isinstance(other, ShiftWeight))]
        codes, exponents = (torch.cat([getattr(w, key) for w in weights]) for key in ("codes", "exponents"))
        return ShiftWeight(self.format, codes, exponents)
