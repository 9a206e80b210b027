"""Where the weights are that a sparse matrix keeps: a mask bool (out, in) as it stands in a file.

| pattern | what is stored | bits per weight |
|---|---|---|
| bitmask | a bit for each weight | 1 |
| n:m | which n of each m neighbours of a row are kept | n/m · log2 m, rounded up |
| gaps | how many zeros lie before each kept weight | density · (bits + fillers) |
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from effcli.formats import huffman
from effcli.formats.base import Bits, Tensors, expect
from effcli.formats.bits import pack_bits, unpack_bits

# The most neighbours of an n:m pattern: a place among them is a byte.
MOST = 256


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DescribedBitmask(_Described):
    kind: Literal["bitmask"]

    def made(self) -> Bitmask:
        return Bitmask()


class DescribedBlocks(_Described):
    kind: Literal["n:m"]
    kept: Annotated[int, Field(strict=True, ge=1, le=MOST)]
    of: Annotated[int, Field(strict=True, ge=1, le=MOST)]

    def made(self) -> NOfM:
        return NOfM(self.kept, self.of)


class DescribedGaps(_Described):
    kind: Literal["gaps"]
    bits: Bits
    huffman: bool = Field(strict=True)

    def made(self) -> Gaps:
        return Gaps(self.bits, self.huffman)


AnyDescribed = Annotated[DescribedBitmask | DescribedBlocks | DescribedGaps, Field(discriminator="kind")]


class Pattern(abc.ABC):
    """How a mask is stored. Patterns are frozen values."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes on disk of the mask of a weight of this `shape`; an upper bound where that depends on the mask."""

    @abc.abstractmethod
    def pack(self, mask: Tensor) -> dict[str, Tensor]:
        """A mask bool (out, in) as tensors by suffix. `ValueError` for one that is not of this pattern."""

    @abc.abstractmethod
    def unpack(self, tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        """The inverse of `pack`; `ValueError` when the tensors are those of no mask of this `shape`."""

    def most_kept(self, shape: tuple[int, int]) -> int:
        """How many weights of a matrix of this `shape` may be kept."""
        return math.prod(shape)

    def check(self, mask: Tensor) -> None:
        """`ValueError` unless `mask` is of this pattern."""
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(f"a mask of {mask.dtype} of {mask.ndim} axes is none of a matrix")

    @property
    def row_group(self) -> int:
        """How many neighbours of a row belong together, and so must divide it; 0 where none do."""
        return 0


@dataclass(frozen=True)
class Bitmask(Pattern):
    """A bit for each weight, the first of a row's eight in the lowest bit of a byte; every row begins a byte."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bitmask"}

    def nbytes(self, shape: tuple[int, int]) -> int:
        return shape[0] * math.ceil(shape[1] / 8)

    def pack(self, mask: Tensor) -> dict[str, Tensor]:
        octets = np.packbits(mask.cpu().numpy(), axis=1, bitorder="little")
        return {"weight_mask": torch.from_numpy(octets).to(mask.device)}

    def unpack(self, tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        rows, columns = shape
        expect(tensors, "weight_mask", (torch.uint8,), (rows, math.ceil(columns / 8)))
        octets = tensors["weight_mask"]
        bits = np.unpackbits(octets.cpu().numpy(), axis=1, bitorder="little")
        if bits[:, columns:].any():
            raise ValueError("weight_mask has bits beyond the end of a row")
        return torch.from_numpy(bits[:, :columns].astype(bool)).to(octets.device)

    def __str__(self) -> str:
        return "bitmask"


@dataclass(frozen=True)
class NOfM(Pattern):
    """n:m sparsity: of every `of` neighbours of a row exactly `kept` stay, such as 2:4. Their places are stored."""

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.of <= MOST:
            raise ValueError(f"{self.kept} of {self.of} neighbours cannot be kept")

    @property
    def row_group(self) -> int:
        return self.of

    @property
    def _bits(self) -> int:
        return max(1, (self.of - 1).bit_length())

    def to_json(self) -> dict[str, Any]:
        return {"kind": "n:m", "kept": self.kept, "of": self.of}

    def most_kept(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        if columns % self.of:
            raise ValueError(f"blocks of {self.of} do not divide {columns}")
        return rows * (columns // self.of) * self.kept

    def nbytes(self, shape: tuple[int, int]) -> int:
        return math.ceil(self.most_kept(shape) * self._bits / 32) * 4

    def check(self, mask: Tensor) -> None:
        super().check(mask)
        rows, columns = mask.shape
        self.most_kept((rows, columns))
        if bool((mask.reshape(rows, columns // self.of, self.of).sum(2) != self.kept).any()):
            raise ValueError(f"some {self.of} neighbours do not keep {self.kept}")

    def pack(self, mask: Tensor) -> dict[str, Tensor]:
        self.check(mask)
        places = (mask.reshape(-1, self.of) if mask.numel() else mask.new_zeros(0, self.of)).nonzero()[:, 1]
        return {"weight_indices": pack_bits(places.view(1, -1), self._bits)}

    def unpack(self, tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        count = self.most_kept(shape)
        expect(tensors, "weight_indices", (torch.int32,), (1, math.ceil(count * self._bits / 32)))
        places = unpack_bits(tensors["weight_indices"], self._bits, count).view(-1, self.kept).long()
        if bool((places >= self.of).any()) or bool((places[:, 1:] <= places[:, :-1]).any()):
            raise ValueError(f"weight_indices are not {self.kept} ascending places of {self.of}")
        mask = torch.zeros(len(places), self.of, dtype=torch.bool, device=places.device)
        return mask.scatter_(1, places, True).view(shape)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@dataclass(frozen=True)
class Gaps(Pattern):
    """How many zeros lie before each kept weight of the flattened matrix (arXiv:1510.00149, section 3, figure 2).

    A gap has `bits` bits. The largest one, 2**bits - 1, is a filler: so many zeros, and no weight behind them. The
    paper's filler is followed by a weight of 0; here none is stored, which not every table of weights could say.
    huffman: the gaps are Huffman-coded.
    """

    bits: int
    huffman: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"gaps have 1 to 8 bits, not {self.bits}")

    @property
    def _filler(self) -> int:
        return (1 << self.bits) - 1

    def to_json(self) -> dict[str, Any]:
        return {"kind": "gaps", "bits": self.bits, "huffman": self.huffman}

    def nbytes(self, shape: tuple[int, int]) -> int:
        # Every gap goes at least one weight further. No code of single symbols is longer than one of fixed length.
        words = math.ceil(math.prod(shape) * self.bits / 32) * 4
        return words + 8 + (1 << self.bits if self.huffman else 0)

    def pack(self, mask: Tensor) -> dict[str, Tensor]:
        stream = self.stream(mask)
        found = {"weight_gap_count": torch.tensor([len(stream)], dtype=torch.int64)}
        if self.huffman:
            found["weight_gaps"], found["weight_gap_lengths"] = huffman.encode(stream)
        else:
            found["weight_gaps"] = pack_bits(stream.view(1, -1), self.bits)
        return found

    def stream(self, mask: Tensor) -> Tensor:
        """The gaps of a mask with their fillers, uint8 (gaps,)."""
        zeros = _zeros_before(mask)
        ends = (zeros // self._filler + 1).cumsum(0)
        count = int(ends[-1]) if len(ends) else 0
        stream = torch.full((count,), self._filler, dtype=torch.uint8, device=mask.device)
        stream[ends - 1] = (zeros % self._filler).to(torch.uint8)
        return stream

    def unpack(self, tensors: Tensors, shape: tuple[int, int]) -> Tensor:
        total = math.prod(shape)
        expect(tensors, "weight_gap_count", (torch.int64,), (1,))
        count = int(tensors["weight_gap_count"])
        if not 0 <= count <= total:
            raise ValueError(f"weight_gap_count is {count} for a weight of shape {shape}")
        if self.huffman:
            for suffix in ("weight_gaps", "weight_gap_lengths"):
                expect(tensors, suffix, (torch.uint8,), (tensors[suffix].numel(),) if suffix in tensors else None)
            if len(tensors["weight_gap_lengths"]) > 1 << self.bits:
                raise ValueError(f"{len(tensors['weight_gap_lengths'])} symbols in a code for {self}")
            stream = huffman.decode(tensors["weight_gaps"], tensors["weight_gap_lengths"], count)
            stream = stream.to(tensors["weight_gaps"].device)
        else:
            expect(tensors, "weight_gaps", (torch.int32,), (1, math.ceil(count * self.bits / 32)))
            stream = unpack_bits(tensors["weight_gaps"], self.bits, count).view(-1)
        kept = stream < self._filler
        places = (stream.long() + kept).cumsum(0)
        if count and (not bool(kept[-1]) or int(places[-1]) > total):
            raise ValueError("weight_gaps do not end with a weight of the matrix")
        mask = torch.zeros(total, dtype=torch.bool, device=stream.device)
        mask[places[kept] - 1] = True
        return mask.view(shape)

    def __str__(self) -> str:
        return f"gaps of {self.bits} bits{' huffman' if self.huffman else ''}"


def smallest(mask: Tensor) -> Pattern:
    """The pattern that takes the fewest bytes for a mask bool (out, in): a bitmask, or gaps of the best length.

    Gaps are Huffman-coded where that makes them smaller by a twentieth at least, for decoding takes time.
    """
    whole = Bitmask().nbytes((mask.shape[0], mask.shape[1]))
    zeros = _zeros_before(mask)
    # Gaps of one bit take one for every weight.
    sizes = {bits: math.ceil(int((zeros // ((1 << bits) - 1) + 1).sum()) * bits / 8) + 8 for bits in range(2, 9)}
    bits = min(sizes, key=sizes.__getitem__)
    stream = Gaps(8).stream(mask)
    coded = huffman.nbytes(stream) + 8
    if coded < min(0.95 * sizes[bits], whole):
        return Gaps(8, huffman=True)
    return Gaps(bits) if sizes[bits] < whole else Bitmask()


def _zeros_before(mask: Tensor) -> Tensor:
    """How many zeros lie before each kept weight of the flattened mask, int64 (kept,)."""
    places = mask.reshape(-1).nonzero().view(-1)
    return places.diff(prepend=places.new_full((1,), -1)) - 1
