"""What all formats and all quantized weights have in common."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Strategy = Literal["tensor", "channel", "group"]


class Packing(abc.ABC):
    """How the weights of a quantized matrix are stored. Formats are frozen values."""

    bits: int
    group_size: int

    @abc.abstractmethod
    def nbytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        """Bytes on disk of a weight (out, in) of this `shape`; scale_bytes: of one number of the network's dtype."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `format_from_json` restores it from."""


class Quantized(abc.ABC):
    """A quantized weight matrix (out, in).

    codes: uint8 (out, in); input_scale: floating (in,) or None. With an input scale s the layer computes Ŵ (x / s): the
    scale that no producer could take in stays explicit on the input.
    """

    format: Packing
    codes: Tensor
    input_scale: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """What the weight is dequantized to unless told otherwise: the dtype of the network."""

    @abc.abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating, rounded once to `dtype`. The input scale is not part of it."""

    @abc.abstractmethod
    def pack(self) -> dict[str, Tensor]:
        """Tensors by suffix, as they stand in a file."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.pack().values())

    def effective(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating: the dequantized weight with the explicit input scale divided in."""
        dense = self.dequantize(torch.float32)
        if self.input_scale is not None:
            dense = dense / self.input_scale.float()
        return dense.to(dtype or self.dtype)


@dataclass(frozen=True)
class Dense:
    """Floating-point numbers, as they are."""

    dtype: torch.dtype

    def nbytes(self, shape: tuple[int, int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")
