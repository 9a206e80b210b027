"""y = x Ŵᵀ with Ŵ sparse: matrix product with a weight of which a mask keeps some, by device and by how many it keeps.

| device | pattern and values | layout |
|---|---|---|
| CUDA | 2:4 of floating-point numbers or of up to 4 bits | `Pairs`: Triton reads the kept weights and their places |
| CPU | at most a tenth of many floating-point numbers kept | `Rows`: torch's product with compressed sparse rows |
| any | any other | `Filled`: the kernel of the values, which multiplies the zeros too |

`Filled` makes nothing faster: on a CPU a dense product beats every one that skips zeros until nine of ten weights are
gone (benchmarks/sparse_matmul.py). What is saved there is the file.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from effcli.formats import AffineWeight, DenseWeight, NOfM, Quantized, Sparse, SparseWeight
from effcli.formats.base import Numbers
from effcli.kernels._packed import Packed, matmul, reference, route_name

# Compressed rows beat the dense product where at most this share of at least so many weights is kept, and x has at most
# so many rows (benchmarks/sparse_matmul.py).
ROWS_DENSITY: Final = 0.1
ROWS_WEIGHTS: Final = 2**19
ROWS: Final = 64


@dataclass(frozen=True)
class Filled(Packed):
    """values: the weights with zeros filled in, laid out; pattern: the tensors that say which are kept, by suffix."""

    format: Sparse
    values: Packed
    pattern: dict[str, Tensor]

    @staticmethod
    def build(weight: SparseWeight, values: Packed) -> Filled:
        pattern = weight.format.pattern.pack(weight.mask)
        placed = {suffix: tensor.to(values.device) for suffix, tensor in pattern.items()}
        return Filled(weight.format, weight.shape, weight.dtype, values, placed)

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


@dataclass(frozen=True)
class Rows(Packed):
    """Compressed sparse rows on the CPU. matrix: float32 (out, in) with int32 indices, of the kept weights alone."""

    format: Sparse
    matrix: Tensor

    @staticmethod
    def serves(weight: SparseWeight) -> bool:
        many = ROWS_WEIGHTS <= weight.mask.numel() < 2**31
        return many and weight.format.floating and weight.density <= ROWS_DENSITY

    @staticmethod
    def build(weight: SparseWeight) -> Rows:
        mask = weight.mask.cpu()
        ends = pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        columns, kept = mask.nonzero()[:, 1].to(torch.int32), weight.values.codes.cpu()[mask].float()
        with warnings.catch_warnings():
            # torch warns once in a process that the type is in beta.
            warnings.simplefilter("ignore", UserWarning)
            matrix = torch.sparse_csr_tensor(ends, columns, kept, weight.shape)
        return Rows(weight.format, weight.shape, weight.dtype, matrix)

    def tensors(self) -> dict[str, Tensor]:
        matrix = self.matrix
        return {"ends": matrix.crow_indices(), "columns": matrix.col_indices(), "kept": matrix.values()}

    def restore(self) -> SparseWeight:
        ends, columns, kept = self.tensors().values()
        mask = torch.sparse_csr_tensor(ends, columns, torch.ones_like(kept), self.shape).to_dense().bool()
        codes = self.matrix.to_dense().to(self.dtype)
        values: Any = self.format.values
        return SparseWeight(self.format, DenseWeight(values, codes), mask)

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        ends, columns, kept = self.tensors().values()
        first, last = int(ends[start]), int(ends[stop])
        values = torch.zeros(stop - start, self.shape[1])
        rows = torch.arange(stop - start).repeat_interleave(ends[start : stop + 1].diff())
        values[rows, columns[first:last].long()] = kept[first:last]
        return values

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def route(self, rows: int, dtype: torch.dtype) -> str:
        return "compressed rows, cpu" if rows <= ROWS else "compressed rows to tiles, cpu"

    def multiply(self, x: Tensor) -> Tensor:
        if len(x) > ROWS:
            return self.multiply_tiles(x)
        if len(x) == 1:
            return torch.mv(self.matrix, x[0]).unsqueeze(0)
        return torch.mm(self.matrix, x.T).T


@dataclass(frozen=True)
class Pairs(Packed):
    """Two of every four neighbours kept, on a GPU.

    values: floating (out, in / 2), or two codes in a byte, uint8 (out, in / 4); places: uint8 (out, ceil(in / 8)), of
    each two blocks; scale, zero: those of codes, (scale rows, groups), or None.
    """

    format: Sparse
    values: Tensor
    places: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @staticmethod
    def serves(weight: SparseWeight) -> bool:
        """Whether the weight has this form: a scale must serve whole blocks of four."""
        values = weight.values
        if weight.format.pattern != NOfM(2, 4) or not values.codes.numel():
            return False
        return weight.format.floating or (
            isinstance(values, AffineWeight)
            and values.format.bits <= 4
            and values.format.group_size % 4 == 0
            and not values.format.rounds_inputs
        )

    @staticmethod
    def build(weight: SparseWeight, device: torch.device) -> Pairs:
        rows, columns = weight.shape
        kept = weight.mask.view(-1, 4).nonzero()[:, 1].view(-1, 2).to(torch.uint8)
        places = pad((kept[:, 0] | kept[:, 1] << 2).view(rows, -1), (0, columns // 4 % 2)).view(rows, -1, 2)
        packed = places[..., 0] | places[..., 1] << 4
        codes = weight.values.codes[weight.mask].view(rows, -1)
        scale = zero = None
        if isinstance(weight.values, AffineWeight):
            codes = codes[:, ::2] | codes[:, 1::2] << 4
            scale = weight.values.scale.to(device)
            zero = None if weight.values.zero is None else weight.values.zero.to(device)
        return Pairs(
            weight.format, weight.shape, weight.dtype, codes.contiguous().to(device), packed.to(device), scale, zero
        )

    def tensors(self) -> dict[str, Tensor]:
        held = {"values": self.values, "places": self.places, "scale": self.scale, "zero": self.zero}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def _numbers(self, start: int, stop: int) -> SparseWeight:
        """Rows [start, stop) of the weight; the codes of weights that are not kept are 0."""
        octets = self.places[start:stop]
        quads = torch.stack((octets & 15, octets >> 4), -1).flatten(1)[:, : self.shape[1] // 4]
        places = torch.stack((quads & 3, quads >> 2), -1).long()
        kept = self.values[start:stop]
        if self.scale is not None:
            kept = torch.stack((kept & 15, kept >> 4), -1)
        blocks = kept.new_zeros(*places.shape[:2], 4)
        codes = blocks.scatter(2, places, kept.view(places.shape)).view(-1, self.shape[1])
        mask = blocks.bool().scatter(2, places, True).view(codes.shape)
        values: Any = self.format.values
        if self.scale is None:
            return SparseWeight(self.format, DenseWeight(values, codes), mask)
        taken = slice(None) if len(self.scale) == 1 else slice(start, stop)
        zero = None if self.zero is None else self.zero[taken]
        return SparseWeight(self.format, AffineWeight(values, codes, self.scale[taken], zero), mask)

    def restore(self) -> SparseWeight:
        return self._numbers(0, self.shape[0])

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._numbers(start, stop).dequantize(torch.float32)

    def route(self, rows: int, dtype: torch.dtype) -> str:
        from effcli.kernels import _sparse_matmul_triton as kernels

        return kernels.plan(rows, self.shape).name

    def multiply(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out) through the Triton kernel, also on the CPU under TRITON_INTERPRET=1."""
        from effcli.kernels import _sparse_matmul_triton as kernels

        if self.scale is None:
            return kernels.multiply(x, self.values, self.places)
        spread = self.shape[0], self.scale.shape[1]
        affine: Any = self.format.values
        return kernels.multiply(
            x,
            self.values,
            self.places,
            self.scale.expand(spread),
            None if self.zero is None else self.zero.expand(spread),
            fixed_zero=affine.fixed_zero,
            group=self.shape[1] // spread[1],
        )


def prepare(weight: SparseWeight, device: torch.device) -> Packed | None:
    """Lay `weight` out for a kernel that skips or never reads zeros; None where there is none on `device`."""
    if device.type == "cuda" and Pairs.serves(weight):
        return Pairs.build(weight, device)
    if device.type == "cpu" and Rows.serves(weight):
        return Rows.build(weight)
    return None


__all__ = ["Filled", "Packed", "Pairs", "Rows", "matmul", "prepare", "reference", "route_name"]
