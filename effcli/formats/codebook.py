"""Codebook quantization: codes that stand for the entries of a table, times a scale where blocks have one.

One layout serves four ways of choosing the table. Weights are taken in the order of the flattened matrix: number n
belongs to block n // size, whether the block is a tensor, a row, a group of a row, or a run that crosses rows.

| kind | table | scale |
|---|---|---|
| kmeans | 2**bits entries per tensor, row or group, found by clustering | none |
| nf4 | the 16 quantiles of a normal distribution | one per block of the flattened matrix |
| binary | -1, 1 | one per tensor, row or group |
| ternary | -1, 0, 1 | one per tensor, row or group |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.formats import huffman
from effcli.formats.base import (
    FLOATING,
    SHAPE_BYTES,
    Bits,
    Described,
    Dtype,
    Entries,
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

Kind = Literal["kmeans", "nf4", "binary", "ternary"]

# QLoRA, arXiv:2305.14314, appendix E.
NF4_LEVELS: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_LEVELS: Final[dict[str, tuple[float, ...]]] = {
    "nf4": NF4_LEVELS,
    "binary": (-1.0, 1.0),
    # Two bits have a fourth code, which no weight takes.
    "ternary": (-1.0, 0.0, 1.0, 0.0),
}
_BITS: Final = {"nf4": 4, "binary": 1, "ternary": 2}
# Scales that share a scale of their own in double quantization.
DOUBLE_BLOCK: Final = 256


class _Described(Described):
    format: Literal["codebook"]
    # Not "kind": that is the layer's, beside which this stands in a checkpoint.
    codebook: Kind
    bits: Bits
    strategy: Strategy
    group_size: GroupSize
    double: bool = Field(strict=True)
    huffman: bool = Field(strict=True)
    dtype: Dtype | None

    def made(self) -> Codebook:
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return Codebook(self.codebook, self.bits, self.strategy, self.group_size, self.double, self.huffman, dtype)


@dataclass(frozen=True)
class Codebook(Values):
    """Codes of `bits` bits for the entries of a table.

    `strategy` says what shares a table (kmeans) or a scale: the tensor, a row, or `group_size` numbers: of a row, which
    they must divide, or for nf4 of the flattened matrix, whose last block may be shorter. double: nf4's scales are
    themselves quantized, in blocks of 256. huffman: the codes are Huffman-coded in the file. dtype: what the weight is
    dequantized to, the network's own; None while that is not known.
    """

    name = "codebook"
    suffixes = frozenset(
        {
            "weight_packed",
            "weight_lengths",
            "weight_shape",
            "weight_table",
            "weight_scale",
            "weight_scale_absmax",
            "weight_scale_mean",
            "input_scale",
        }
    )
    description = _Described

    kind: Kind
    bits: int
    strategy: Strategy
    group_size: int = 0
    double: bool = False
    huffman: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.bits != _BITS.get(self.kind, self.bits):
            raise ValueError(f"{self.kind} has no codes of {self.bits} bits")
        if (self.strategy == "group") != (self.group_size > 0):
            raise ValueError("a group size belongs to the strategy 'group', and only to it")
        if self.kind == "nf4" and self.strategy != "group":
            raise ValueError("nf4 has a scale per block, whose length is its group size")
        if self.double and self.kind != "nf4":
            raise ValueError("only the scales of nf4 are quantized again")

    @property
    def learned(self) -> bool:
        return self.kind == "kmeans"

    @property
    def standard_obstacle(self) -> str:
        return f"{self.kind} has no place in compressed-tensors"

    @property
    def row_group(self) -> int:
        return self.group_size if self.fits_rows else 0

    @property
    def signed_bits(self) -> int:
        return 0 if self.learned or self.strategy == "group" else 2

    @property
    def fits_rows(self) -> bool:
        """Whether groups must divide the rows; blocks of nf4 run on over their ends."""
        return self.kind != "nf4"

    def block(self, shape: tuple[int, int]) -> int:
        """How many neighbours in the flattened matrix share a table or a scale."""
        rows, columns = shape
        if self.strategy == "group":
            if self.fits_rows and columns % self.group_size:
                raise ValueError(f"group size {self.group_size} does not divide {columns}")
            return self.group_size
        return max(1, columns if self.strategy == "channel" else rows * columns)

    def blocks(self, shape: tuple[int, int]) -> int:
        """How many tables or scales a matrix of this `shape` has."""
        return math.ceil(math.prod(shape) / self.block(shape))

    def code_bytes(self, rows: int, columns: int) -> int:
        words = math.ceil(rows * columns * self.bits / 32) * 4
        # No code of single symbols is longer than one of fixed length; it has the length of each to store.
        return words + (1 << self.bits if self.huffman else 0)

    def beside_bytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        blocks = self.blocks(shape)
        if self.learned:
            return blocks * (1 << self.bits) * scale_bytes
        if self.double:
            return blocks + 4 * math.ceil(blocks / DOUBLE_BLOCK) + 4
        return blocks * (4 if self.kind == "nf4" else scale_bytes)

    def pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        """`weight_packed` holds the codes in the order of the flattened matrix: words (1, n) of `pack_bits`, or the
        bytes of the Huffman code whose lengths stand in `weight_lengths`.
        """
        if self.huffman:
            stream, lengths = huffman.encode(codes.reshape(-1))
            return {"weight_packed": stream, "weight_lengths": lengths}
        return {"weight_packed": pack_bits(codes.reshape(1, -1), self.bits)}

    def check_codes(self, tensors: Tensors, rows: int, columns: int) -> None:
        if not self.huffman:
            expect(tensors, "weight_packed", (torch.int32,), (1, math.ceil(rows * columns * self.bits / 32)))
            return
        expect(tensors, "weight_lengths", (torch.uint8,), None)
        expect(tensors, "weight_packed", (torch.uint8,), None)
        if tensors["weight_lengths"].ndim != 1 or tensors["weight_packed"].ndim != 1:
            raise ValueError("a Huffman code is a row of bytes")
        if len(tensors["weight_lengths"]) > 1 << self.bits:
            raise ValueError(f"{len(tensors['weight_lengths'])} symbols in a code for {self}")

    def unpack_codes(self, tensors: Tensors, rows: int, columns: int) -> Tensor:
        if self.huffman:
            codes = huffman.decode(tensors["weight_packed"], tensors["weight_lengths"], rows * columns)
        else:
            codes = unpack_bits(tensors["weight_packed"], self.bits, rows * columns)
        return codes.view(rows, columns)

    def check_beside(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        blocks = self.blocks(shape)
        expect_input_scale(tensors, shape[1])
        if self.learned:
            expect(tensors, "weight_table", FLOATING, None)
            table = tensors["weight_table"]
            if table.shape != (blocks, 1 << self.bits):
                raise ValueError(f"a table of shape {tuple(table.shape)} for a weight of shape {shape}")
        elif self.double:
            expect(tensors, "weight_scale", (torch.uint8,), (blocks,))
            expect(tensors, "weight_scale_absmax", (torch.float32,), (math.ceil(blocks / DOUBLE_BLOCK),))
            expect_numbers(tensors, "weight_scale_mean", (torch.float32,), 1)
        else:
            expect_numbers(tensors, "weight_scale", FLOATING, blocks)

    def build(self, codes: Tensor, tensors: Tensors) -> CodebookWeight:
        table = tensors["weight_table"] if self.learned else fixed_table(self.kind)
        scale: Tensor | DoubleQuantized | None = tensors.get("weight_scale")
        if self.double:
            scale = DoubleQuantized(
                tensors["weight_scale"], tensors["weight_scale_absmax"], tensors["weight_scale_mean"]
            )
        return CodebookWeight(self, codes, table, scale, tensors.get("input_scale"))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "codebook",
            "codebook": self.kind,
            "bits": self.bits,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "double": self.double,
            "huffman": self.huffman,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.strategy == "group" else self.strategy
        name = f"kmeans{self.bits}" if self.learned else self.kind
        return f"{name} {where}{' double' if self.double else ''}{' huffman' if self.huffman else ''}"


@dataclass(frozen=True)
class DoubleQuantized:
    """Scales that are themselves quantized (QLoRA, arXiv:2305.14314, section 3): mean + map[code] · absmax.

    codes: uint8 (scales,), of the signed 8-bit map that `dynamic_map` gives; absmax: float32, one for 256 scales;
    mean: float32 (), what was subtracted from all scales beforehand.
    """

    codes: Tensor
    absmax: Tensor
    mean: Tensor

    def restore(self) -> Tensor:
        """The scales, float32 (scales,)."""
        blocks = torch.arange(len(self.codes), device=self.codes.device) // DOUBLE_BLOCK
        values = dynamic_map().to(self.codes.device)[self.codes.long()] * self.absmax[blocks]
        return values + self.mean


@cache
def dynamic_map() -> Tensor:
    """256 ascending float32 values in [-1, 1], denser towards zero: the 8-bit dynamic data type of arXiv:2110.02861.

    For each decade 10^(i-6), i from 0 to 6, the midpoints of 2^i equal parts of [0.1, 1], with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (bounds[:-1] + bounds[1:]) / 2
        values += (10.0 ** (i - 6) * middles).tolist()
        values += (-(10.0 ** (i - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def fixed_table(kind: Kind) -> Tensor:
    """The table of a kind that stores none, float32 (1, 2**bits)."""
    return torch.tensor([_LEVELS[kind]], dtype=torch.float32)


@dataclass(frozen=True)
class CodebookWeight(Numbers):
    """One weight matrix of codes for a table.

    codes: uint8 (out, in); table: floating (tables, 2**bits), ascending where it is learned; scale: floating (blocks,),
    the same quantized, or None where the table is learned; input_scale: floating (in,) or None, explicit on the input.
    """

    format: Codebook
    codes: Tensor
    table: Tensor
    scale: Tensor | DoubleQuantized | None = None
    input_scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype or self.table.dtype

    @property
    def scales(self) -> Tensor | None:
        """The scales as numbers, (blocks,)."""
        return self.scale.restore() if isinstance(self.scale, DoubleQuantized) else self.scale

    def block_index(self) -> Tensor:
        """Number of the block of each weight, int64 (out, in)."""
        numbers = torch.arange(self.codes.numel(), device=self.codes.device)
        return (numbers // self.format.block(self.shape)).view(self.codes.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating: table[code] · scale, the product rounded once to `dtype` (default: the network's)."""
        size, blocks = self.format.block(self.shape), self.format.blocks(self.shape)
        codes = self.codes.reshape(-1)
        table = self.table.float()
        if len(table) == 1:
            values = table[0][codes.long()]
        else:
            # Groups divide rows and rows divide the tensor, so that every table serves as many weights.
            values = table.gather(1, codes.view(blocks, size).long()).reshape(-1)
        scales = self.scales
        if scales is not None:
            values = values * scales.float().repeat_interleave(size)[: values.numel()]
        return values.view(self.codes.shape).to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, for which a Huffman code need not be written."""
        if not self.format.huffman:
            return super().nbytes
        beside = SHAPE_BYTES + sum(tensor.nbytes for tensor in self.beside().values())
        return beside + huffman.nbytes(self.codes.reshape(-1))

    def beside(self) -> dict[str, Tensor]:
        packed = {}
        if self.format.learned:
            packed["weight_table"] = self.table
        if isinstance(self.scale, DoubleQuantized):
            packed["weight_scale"] = self.scale.codes
            packed["weight_scale_absmax"] = self.scale.absmax
            packed["weight_scale_mean"] = self.scale.mean
        elif self.scale is not None:
            packed["weight_scale"] = self.scale
        if self.input_scale is not None:
            packed["input_scale"] = self.input_scale
        return packed

    def zero_codes(self) -> Tensor | None:
        zeros = self.table == 0
        if not bool(zeros.any(1).all()):
            return None
        first = zeros.to(torch.uint8).argmax(1).to(torch.uint8)
        return first.view(1, 1) if len(first) == 1 else first[self.block_index()]

    def entries(self) -> Entries | None:
        return Entries(self.codes, self.table) if self.format.learned else None

    def integers(self) -> Integers | None:
        scales = self.scales
        if not self.format.signed_bits or scales is None:
            return None
        return Integers(self.table[0].to(torch.int8)[self.codes.long()], scales)

    def with_input_scale(self, scale: Tensor) -> CodebookWeight:
        return dataclasses.replace(self, input_scale=scale)

    def join(self, others: Sequence[Quantized]) -> CodebookWeight:
        """As `Quantized.join`, for kinds whose groups divide the rows."""
        weights = [self, *self.alike(others)]
        format = self.format
        if not format.fits_rows:
            raise ValueError(f"the blocks of {format.kind} cross the ends of rows")
        repeats = [len(weight.codes) if format.strategy == "tensor" else 1 for weight in weights]
        if format.strategy == "tensor":
            format = dataclasses.replace(format, strategy="channel")
        codes = torch.cat([weight.codes for weight in weights])
        if format.learned:
            tables = [weight.table.repeat_interleave(n, 0) for weight, n in zip(weights, repeats, strict=True)]
            return CodebookWeight(format, codes, torch.cat(tables))
        scales = [
            weight.scale.repeat_interleave(n)
            for weight, n in zip(weights, repeats, strict=True)
            if isinstance(weight.scale, Tensor)
        ]
        return CodebookWeight(format, codes, self.table, torch.cat(scales))
