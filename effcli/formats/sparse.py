"""Sparse matrices: a pattern that says which weights are kept, and the kept ones in a format of numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from effcli.formats import patterns
from effcli.formats.affine import Affine
from effcli.formats.base import (
    SHAPE_BYTES,
    ByFormat,
    Described,
    Integers,
    Numbers,
    Packing,
    Quantized,
    Strategy,
    Tensors,
    Values,
    expect_input_scale,
    expect_shape,
    shape_tensor,
)
from effcli.formats.codebook import Codebook
from effcli.formats.dense import Dense, DenseWeight

# The formats of numbers, whose weights a pattern may leave out.
VALUES: tuple[type[Values], ...] = (Dense, Affine, Codebook)


class _Described(Described):
    format: Literal["sparse"]
    pattern: patterns.AnyDescribed
    values: Annotated[Described, ByFormat(VALUES)]

    def made(self) -> Sparse:
        values = self.values.made()
        assert isinstance(values, Values)
        return Sparse(self.pattern.made(), values)


@dataclass(frozen=True)
class Sparse(Packing):
    """Weights of which a `pattern` keeps some, in the format `values`; all others are exactly 0.

    In a file the codes of the kept ones follow one another, row by row. Scales, zero points and tables are those of the
    whole matrix: what shares a scale is told by a weight's place in it, whichever weights are kept.
    """

    name = "sparse"
    suffixes = frozenset(
        {"weight_shape", "weight_mask", "weight_indices", "weight_gaps", "weight_gap_count", "weight_gap_lengths"}
    ).union(*(kind.suffixes for kind in VALUES))
    description = _Described

    pattern: patterns.Pattern
    values: Values

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.values.bits

    @property
    def strategy(self) -> Strategy:  # type: ignore[override]
        return self.values.strategy

    @property
    def group_size(self) -> int:  # type: ignore[override]
        return self.values.group_size

    @property
    def standard_obstacle(self) -> str:
        return "transformers reads no sparse weights"

    @property
    def rounds_inputs(self) -> bool:
        return self.values.rounds_inputs

    @property
    def row_group(self) -> int:
        groups = [group for group in (self.values.row_group, self.pattern.row_group) if group]
        return math.lcm(*groups) if groups else 0

    @property
    def signed_bits(self) -> int:
        return self.values.signed_bits

    @property
    def floating(self) -> bool:
        return self.values.floating

    @property
    def filled(self) -> Values:
        return self.values

    def nbytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        """Bytes on disk; an upper bound where the pattern does not say how many weights are kept."""
        codes = self.values.code_bytes(1, self.pattern.most_kept(shape))
        return SHAPE_BYTES + self.pattern.nbytes(shape) + codes + self.values.beside_bytes(shape, scale_bytes)

    def check(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        expect_shape(tensors, shape)
        self.values.check_beside(tensors, shape)
        if not self.rounds_inputs:
            expect_input_scale(tensors, shape[1])
        self.values.check_codes(tensors, 1, int(self.pattern.unpack(tensors, shape).sum()))

    def restore(self, tensors: Tensors, shape: tuple[int, int]) -> SparseWeight:
        mask = self.pattern.unpack(tensors, shape)
        kept = self.values.unpack_codes(tensors, 1, int(mask.sum())).view(-1)
        codes = kept.new_zeros(shape).masked_scatter_(mask.to(kept.device), kept)
        # Where inputs become int8, `input_scale` is that of the values; it is the layer's own otherwise.
        own = set() if self.rounds_inputs else {"input_scale"}
        values = self.values.build(codes, {key: tensor for key, tensor in tensors.items() if key not in own})
        return SparseWeight(self, values, mask, None if self.rounds_inputs else tensors.get("input_scale"))

    def to_json(self) -> dict[str, Any]:
        return {"format": "sparse", "pattern": self.pattern.to_json(), "values": self.values.to_json()}

    def __str__(self) -> str:
        return f"sparse {self.pattern}, {self.values}"


@dataclass(frozen=True)
class SparseWeight(Quantized):
    """One sparse weight matrix.

    values: all weights (out, in), of which those that are not kept count as 0, whatever their codes; mask: bool
    (out, in), the kept ones; input_scale: floating (in,) or None, explicit on the input.
    """

    format: Sparse
    values: Numbers
    mask: Tensor
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.format != self.format.values or tuple(self.mask.shape) != self.values.shape:
            raise ValueError(f"weights of {self.values.format} {self.values.shape} for {self.format}")
        if self.values.input_scale is not None:
            raise ValueError("the input scale belongs to the sparse weight, not to its values")
        if self.format.rounds_inputs and self.input_scale is not None:
            raise ValueError("inputs that become int8 take no explicit scale beforehand")
        self.format.pattern.check(self.mask)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def density(self) -> float:
        """The share of the weights that are kept; 0 for a matrix without weights."""
        return float(self.mask.sum()) / max(self.mask.numel(), 1)

    @property
    def input_grid(self) -> tuple[float, int] | None:
        return self.values.input_grid

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.dequantize(dtype).masked_fill(~self.mask, 0)

    def filled(self) -> Numbers | None:
        zeros = self.values.zero_codes()
        if zeros is None:
            return None
        made: Any = self.values
        found: Numbers = dataclasses.replace(made, codes=torch.where(self.mask, self.values.codes, zeros))
        if self.input_scale is not None:
            found = found.with_input_scale(self.input_scale)
        return found

    def integers(self) -> Integers | None:
        found = self.values.integers()
        return None if found is None else Integers(found.codes.masked_fill(~self.mask, 0), found.scale)

    def pack(self) -> dict[str, Tensor]:
        packed = {
            **shape_tensor(self.shape),
            **self.format.pattern.pack(self.mask),
            **self.format.values.pack_codes(self.values.codes[self.mask].view(1, -1)),
            **self.values.beside(),
        }
        if self.input_scale is not None:
            packed["input_scale"] = self.input_scale
        return {suffix: tensor.contiguous() for suffix, tensor in packed.items()}

    def with_input_scale(self, scale: Tensor) -> SparseWeight:
        return dataclasses.replace(self, input_scale=scale)

    def join(self, others: Sequence[Quantized]) -> SparseWeight:
        weights = [self, *(other for other in others if isinstance(other, SparseWeight))]
        if len(weights) <= len(others) or any(weight.format.pattern != self.format.pattern for weight in weights):
            raise ValueError("weights of different formats are not one")
        values = self.values.join([weight.values for weight in weights[1:]])
        assert isinstance(values, Numbers)
        format = Sparse(self.format.pattern, values.format)
        return SparseWeight(format, values, torch.cat([weight.mask for weight in weights]))


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights of a matrix are kept. kept: bool (out, in); pattern: how a file says so."""

    kept: Tensor
    pattern: patterns.Pattern = field(default_factory=patterns.Bitmask)

    @staticmethod
    def of(weight: Quantized | None) -> Mask | None:
        """The mask of a sparse weight; None of any other."""
        return Mask(weight.mask, weight.format.pattern) if isinstance(weight, SparseWeight) else None

    def to(self, device: torch.device) -> Mask:
        return self if self.kept.device == device else Mask(self.kept.to(device), self.pattern)

    def chunk(self, count: int) -> list[Mask]:
        """Equal parts of the rows."""
        return [Mask(part, self.pattern) for part in self.kept.chunk(count)]

    def __and__(self, other: Mask | None) -> Mask:
        """What both keep, in the pattern of this mask where it still is one, as a bitmask else."""
        if other is None:
            return self
        kept = self.kept & other.kept
        try:
            self.pattern.check(kept)
        except ValueError:
            return Mask(kept)
        return Mask(kept, self.pattern)

    def over(self, weight: Quantized | Tensor) -> SparseWeight:
        """The weight (out, in) without what is not kept; a sparse one keeps what both keep.

        A bitmask becomes gaps where a file of them is smaller.

        `ValueError` for a mask of another shape or not of its pattern, and for a format that no pattern goes around.
        """
        if isinstance(weight, SparseWeight):
            both = Mask(weight.mask, weight.format.pattern) & self
            return dataclasses.replace(both.over(weight.values), input_scale=weight.input_scale)
        if isinstance(weight, Tensor):
            return self.over(DenseWeight(Dense(weight.dtype), weight))
        if not isinstance(weight, Numbers):
            raise ValueError(f"weights stored as {weight.format} cannot be left out")
        if tuple(self.kept.shape) != weight.shape:
            raise ValueError(f"a mask {tuple(self.kept.shape)} of a weight {weight.shape}")
        pattern = patterns.smallest(self.kept) if isinstance(self.pattern, patterns.Bitmask) else self.pattern
        format = Sparse(pattern, weight.format)
        if format.rounds_inputs or weight.input_scale is None:
            return SparseWeight(format, weight, self.kept)
        made: Any = weight
        values: Numbers = dataclasses.replace(made, input_scale=None)
        return SparseWeight(format, values, self.kept, weight.input_scale)
