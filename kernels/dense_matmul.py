"""y = x Wᵀ with W dense: the product of torch, for weights that no kernel multiplies in the form of their file.

The dense weight is held beside the tensors that stand for it in a file, from which `restore` reads it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.formats import Quantized, unpack
from effcli.kernels._packed import Packed, matmul, reference, route_name


@dataclass(frozen=True)
class Whole(Packed):
    """dense: floating (out, in); packed: the tensors of the file by suffix, empty where they are the same numbers."""

    dense: Tensor
    packed: dict[str, Tensor]

    @staticmethod
    def build(weight: Quantized, device: torch.device) -> Whole:
        packed = {suffix: tensor.to(device) for suffix, tensor in weight.pack().items() if suffix != "input_scale"}
        dense = packed.pop("weight") if weight.format.name == "dense" else weight.dequantize().to(device)
        return Whole(weight.format, weight.shape, weight.dtype, dense, packed)

    def tensors(self) -> dict[str, Tensor]:
        return {"dense": self.dense, **self.packed}

    def restore(self) -> Quantized:
        return unpack(self.format, self.packed or {"weight": self.dense}, self.shape)

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.dense[start:stop]

    def route(self, rows: int, dtype: torch.dtype) -> str:
        what = "dense" if self.format.name == "dense" else f"dense copy of {self.format.name} weights"
        return f"torch, {what}, {self.device.type}"

    def multiply(self, x: Tensor) -> Tensor:
        return x @ self.dense.to(x.dtype).T if x.dtype == self.dense.dtype else self.multiply_tiles(x)


def prepare(weight: Quantized, device: torch.device | str | None = None) -> Whole:
    """Lay `weight` out for `device` (default: where its numbers are). The input scale is left to the caller."""
    return Whole.build(weight, weight.device if device is None else torch.device(device))


__all__ = ["Packed", "Whole", "matmul", "prepare", "reference", "route_name"]
