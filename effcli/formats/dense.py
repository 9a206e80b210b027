"""Floating-point numbers, as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from effcli.formats.base import (
    Described,
    Dtype,
    Numbers,
    Quantized,
    Strategy,
    Tensors,
    Values,
    expect,
    expect_input_scale,
)


class _Described(Described):
    format: Literal["dense"]
    dtype: Dtype

    def made(self) -> Dense:
        return Dense(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Dense(Values):
    """Floating-point numbers, as they are: their own codes."""

    name = "dense"
    suffixes = frozenset({"weight", "input_scale"})
    description = _Described
    strategy: ClassVar[Strategy] = "tensor"  # type: ignore[misc]
    group_size: ClassVar[int] = 0  # type: ignore[misc]

    dtype: torch.dtype

    @property
    def stores_shape(self) -> bool:
        return False

    @property
    def floating(self) -> bool:
        return True

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 8 * self.dtype.itemsize

    def code_bytes(self, rows: int, columns: int) -> int:
        return rows * columns * self.dtype.itemsize

    def beside_bytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        return 0

    def pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": codes}

    def check_codes(self, tensors: Tensors, rows: int, columns: int) -> None:
        expect(tensors, "weight", (self.dtype,), (rows, columns))

    def unpack_codes(self, tensors: Tensors, rows: int, columns: int) -> Tensor:
        return tensors["weight"]

    def check_beside(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        expect_input_scale(tensors, shape[1])

    def build(self, codes: Tensor, tensors: Tensors) -> DenseWeight:
        return DenseWeight(self, codes, tensors.get("input_scale"))

    def to_json(self) -> dict[str, Any]:
        return {"format": "dense", "dtype": str(self)}

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class DenseWeight(Numbers):
    """A weight matrix of floating-point numbers. codes: the numbers themselves, (out, in)."""

    format: Dense
    codes: Tensor
    input_scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.codes.to(dtype or self.dtype)

    def beside(self) -> dict[str, Tensor]:
        return {} if self.input_scale is None else {"input_scale": self.input_scale}

    def zero_codes(self) -> Tensor:
        return self.codes.new_zeros(1, 1)

    def with_input_scale(self, scale: Tensor) -> DenseWeight:
        return dataclasses.replace(self, input_scale=scale)

    def join(self, others: Sequence[Quantized]) -> DenseWeight:
        weights = [self, *self.alike(others)]
        return DenseWeight(self.format, torch.cat([weight.codes for weight in weights]))
