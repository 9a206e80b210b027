"""y = x Ŵᵀ with Ŵ sparse: the kernel of its values, which multiplies the zeros too.

The kept weights and zeros in between are laid out as the kernel of their format wants them, so that few bits stay few.
What is saved is the file: on no device does this skip a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.formats import Quantized, Sparse, SparseWeight
from effcli.formats.base import Numbers
from effcli.kernels._packed import Packed, matmul, reference, route_name


@dataclass(frozen=True)
class Filled(Packed):
    """values: the weights with zeros filled in, laid out; pattern: the tensors that say which are kept, by suffix."""

    format: Sparse
    values: Packed
    pattern: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {**self.values.tensors(), **self.pattern}

    def restore(self) -> Quantized:
        """The weight this was prepared from; the codes of weights that are not kept are those of 0."""
        values = self.values.restore()
        assert isinstance(values, Numbers)
        return SparseWeight(self.format, values, self.format.pattern.unpack(self.pattern, self.shape))

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.values.step(start, stop, dtype)

    def fill(self, start: int, stop: int, out: Tensor) -> None:
        self.values.fill(start, stop, out)

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.values.working_dtype(dtype)

    def cut_off(self, x: Tensor) -> Tensor | None:
        return self.values.cut_off(x)

    def route(self, rows: int, dtype: torch.dtype) -> str:
        return f"{self.values.route(rows, dtype)}, zeros filled in"

    def multiply(self, x: Tensor) -> Tensor:
        return self.values.multiply(x)


def prepare(weight: SparseWeight, values: Packed) -> Filled:
    """`weight` with its `values`, into which zeros are filled, laid out. The input scale is left to the caller."""
    pattern = {suffix: tensor.to(values.device) for suffix, tensor in weight.format.pattern.pack(weight.mask).items()}
    return Filled(weight.format, weight.shape, weight.dtype, values, pattern)


__all__ = ["Filled", "Packed", "matmul", "prepare", "reference", "route_name"]
