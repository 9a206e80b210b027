"""y = x Ŵᵀ with Ŵ = table[q] · scale: matrix product with a weight of codes for a table, by device.

One operation serves k-means (a table per tensor, row or group, no scale), NF4 (a fixed table of 16 and a scale per 64
numbers of the flattened matrix, which may be quantized itself), binary and ternary weights (1 and 2 bits, one scale per
tensor, row or group). The weight is held as in the file, its codes in as few bits as they need, quantized scales
quantized.

| device | few rows of x | many rows of x |
|---|---|---|
| CUDA | Triton, sums in registers | Triton dot |
| anything else | look up several weights at a time, tile by tile | the same |

torch has no kernel for this on the CPU, and there a lookup costs more than a product. So as many weights are looked up
at a time as 16 bytes hold: the table of a code becomes one of all pairs (4 and 6 bits) or quadruples (1 to 3 bits) of
codes, whose entries torch gathers as one number. Where blocks with a table of their own are too short for that, or a
code has 5, 7 or 8 bits, weights are looked up one at a time. Tiles are rows of the weight, dequantized into a buffer
that stays in the cache: the dequantized weight never exists whole.

Numerics: products accumulate in float32. A weight is table[q] · scale in float32, rounded once to the dtype it is
multiplied in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from effcli.formats import Codebook, CodebookWeight, DoubleQuantized, pack_bits, unpack_bits
from effcli.formats.codebook import DOUBLE_BLOCK, dynamic_map
from effcli.kernels._packed import Packed, matmul, reference, route_name

# Bits of codes that may be looked up at once, by bits of a code; five and seven bits would straddle bytes.
_UNITS: Final = {1: (4, 1), 2: (8, 4, 2), 3: (12, 6, 3), 4: (8, 4), 5: (5,), 6: (12, 6), 7: (7,), 8: (8,)}
# A type as long as so many float32 values.
_CARRIER: Final = {1: torch.float32, 2: torch.int64, 4: torch.complex128}

# A block's own table of units must serve at least so many times as many units as it has entries.
_WORTH: Final = 4


@dataclass(frozen=True)
class Coded(Packed):
    """Codes in the bits that they need, each row filled up to whole words.

    words: int32 (out, ceil(in·bits/32)); table: floating (tables, 2**bits); scale: floating (blocks,), the same
    quantized, or None.
    """

    format: Codebook
    words: Tensor
    table: Tensor
    scale: Tensor | DoubleQuantized | None

    @staticmethod
    def build(weight: CodebookWeight, device: torch.device) -> Coded:
        words = pack_bits(weight.codes, weight.format.bits).to(device)
        scale = weight.scale
        if isinstance(scale, DoubleQuantized):
            scale = DoubleQuantized(scale.codes.to(device), scale.absmax.to(device), scale.mean.to(device))
        elif scale is not None:
            scale = scale.to(device).contiguous()
        return Coded(weight.format, weight.shape, weight.dtype, words, weight.table.to(device).contiguous(), scale)

    def tensors(self) -> dict[str, Tensor]:
        held = {"words": self.words, "table": self.table}
        if isinstance(self.scale, DoubleQuantized):
            double = {"scale_absmax": self.scale.absmax, "scale_mean": self.scale.mean}
            return held | {"scale": self.scale.codes} | double
        return held if self.scale is None else held | {"scale": self.scale}

    def restore(self) -> CodebookWeight:
        codes = unpack_bits(self.words, self.format.bits, self.shape[1])
        return CodebookWeight(self.format, codes, self.table, self.scale)

    @property
    def row_blocks(self) -> int | None:
        """Blocks of a row; 0 where all rows lie in one block, None where blocks run on over the ends of rows."""
        if self.format.strategy == "tensor":
            return 0
        columns, size = self.shape[1], self.format.block(self.shape)
        return columns // size if columns % size == 0 else None

    def step(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(stop - start, self.shape[1], dtype=torch.float32, device=self.device)
        self.fill(start, stop, values)
        return values

    def fill(self, start: int, stop: int, out: Tensor) -> None:
        if out.dtype != torch.float32:
            super().fill(start, stop, out)
            return
        # Written in place: memory that is new to the process costs more than the lookup.
        tables = self.table if len(self.table) == 1 else self.table[slice(*self._block_range(start, stop))]
        lookup(self.words[start:stop], tables.float(), self.format.bits, out)
        if self.scale is None:
            return
        first, last = self._block_range(start, stop)
        scale = self._scales(first, last)
        if self.row_blocks is not None:
            # One scale for as many numbers each, or one for all.
            out.view(last - first, -1).mul_(scale.unsqueeze(1))
            return
        size = self.format.block(self.shape)
        spread = scale.repeat_interleave(size)[start * self.shape[1] - first * size :]
        out.mul_(spread[: out.numel()].view(out.shape))

    def _block_range(self, start: int, stop: int) -> tuple[int, int]:
        """The blocks, from the first up to the last, that rows [start, stop) touch."""
        size, columns = self.format.block(self.shape), self.shape[1]
        return start * columns // size, -(-stop * columns // size)

    def _scales(self, first: int, last: int) -> Tensor:
        """Scales of blocks [first, last), float32."""
        if not isinstance(self.scale, DoubleQuantized):
            assert self.scale is not None
            return self.scale[first:last].float()
        # A part of the whole groups that its first and last scale lie in.
        begin = first - first % DOUBLE_BLOCK
        absmax = self.scale.absmax[begin // DOUBLE_BLOCK : -(-last // DOUBLE_BLOCK)]
        part = DoubleQuantized(self.scale.codes[begin:last], absmax, self.scale.mean)
        return part.restore()[first - begin :]

    def route(self, rows: int, dtype: torch.dtype) -> str:
        if self.device.type != "cuda":
            return f"codebook lookup tiles, {self.device.type}"
        from effcli.kernels import _codebook_matmul_triton as kernels

        return kernels.plan(rows, self.shape[1]).name

    def multiply(self, x: Tensor) -> Tensor:
        return self.multiply_triton(x) if x.device.type == "cuda" else self.multiply_tiles(x)

    def multiply_triton(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out) through the Triton kernel, also on the CPU under TRITON_INTERPRET=1."""
        from effcli.kernels import _codebook_matmul_triton as kernels

        if isinstance(self.scale, DoubleQuantized):
            scale: Tensor | None = self.scale.codes
            double = self.scale.absmax, self.scale.mean, dynamic_map().to(x.device)
        else:
            scale, double = self.scale, None
        # For the whole tensor a block is all the columns of any row.
        size = self.shape[1] if self.row_blocks == 0 else self.format.block(self.shape)
        return kernels.multiply(
            x, self.words, self.table, scale, double, bits=self.format.bits, size=size, row_blocks=self.row_blocks
        )


def lookup(words: Tensor, tables: Tensor, bits: int, out: Tensor) -> None:
    """Write into `out`, float32 (rows, columns), what the codes in words int32 (rows, ceil(columns·bits/32)) stand for.

    tables: float32 (n, 2**bits): of the whole, or of n blocks of equal length that follow one another.
    """
    (rows, columns), count = out.shape, len(tables)
    block = rows * columns // count
    for unit in _UNITS[bits]:
        width = unit // bits
        # Units must not run over the ends of blocks, rows apart.
        fits = block % width == 0 or block == columns
        if count == 1 or (fits and block >= _WORTH * width * 2**unit):
            break
    units = _split(words, unit, -(-columns // width))
    index = units.to(torch.int32).view(-1)
    if count > 1:
        index = index.view(count, -1) + (torch.arange(count, dtype=torch.int32, device=out.device) << unit).unsqueeze(1)
    entries = _tables_of_units(tables, bits, width).view(-1).view(_CARRIER[width])
    whole = columns % width == 0
    target = out if whole else out.new_empty(rows, -(-columns // width) * width)
    torch.index_select(entries, 0, index.view(-1), out=target.view(-1).view(_CARRIER[width]))
    if not whole:
        out.copy_(target[:, :columns])


def _tables_of_units(tables: Tensor, bits: int, width: int) -> Tensor:
    """From tables (n, 2**bits) those of all `width` codes in a row: (n, 2**(bits·width), width), the first code low."""
    if width == 1:
        return tables.contiguous()
    codes = torch.arange(1 << (bits * width), device=tables.device)
    parts = torch.stack([(codes >> (bits * j)) & ((1 << bits) - 1) for j in range(width)], dim=1)
    return tables.index_select(1, parts.view(-1)).view(len(tables), -1, width)


def _split(words: Tensor, unit: int, count: int) -> Tensor:
    """The first `count` units of so many bits of every row of int32 words: (rows, count), integers."""
    if unit % 3:
        return unpack_bits(words, unit, count)
    # Three bytes hold two units of 12 bits; a row's last words may hold a part of one.
    octets = words.contiguous().view(torch.uint8)
    triples = pad(octets, (0, -octets.shape[1] % 3)).view(len(words), -1, 3).to(torch.int16)
    low, middle, high = triples.unbind(-1)
    units = torch.stack((low | (middle & 15) << 8, middle >> 4 | high << 4), dim=-1).flatten(1)
    if unit < 12:
        shifts = torch.arange(0, 12, unit, dtype=torch.int16, device=words.device)
        units = ((units.unsqueeze(-1) >> shifts) & ((1 << unit) - 1)).flatten(1)
    return units[:, :count]


def prepare(weight: CodebookWeight, device: torch.device | str | None = None) -> Coded:
    """Lay `weight` out for `device` (default: where its codes are). The input scale is left to the caller."""
    return Coded.build(weight, weight.codes.device if device is None else torch.device(device))


__all__ = ["Coded", "Packed", "matmul", "prepare", "reference", "route_name"]
