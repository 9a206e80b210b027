"""What all formats and all quantized weights have in common.

A format of numbers stores a code for each weight and, beside the codes, what they stand for: scales, zero points,
tables. The two are packed apart, so that a pattern of zeros can hold the codes of a few weights only.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidatorFunctionWrapHandler,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema
from torch import Tensor

Strategy = Literal["tensor", "channel", "group"]
Activations = Literal["none", "token", "tensor"]
Tensors = Mapping[str, Tensor]

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Bits = Annotated[int, Field(strict=True, ge=1, le=8)]
GroupSize = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


# What `weight_shape` takes.
SHAPE_BYTES = 16


class Described(BaseModel):
    """A format as a checkpoint's config describes it: what `Packing.to_json` gives, checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str

    def made(self) -> Packing:
        """The format itself; `ValueError` when there is none like that."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.made()
        return self


@dataclass(frozen=True)
class ByFormat:
    """Tells pydantic to check a description against the model of the format that it names.

    formats: those that it may name; beside: what stands beside the format in the description; others: finds a format
    of another package by its name, or raises; None where only `formats` may stand.
    """

    formats: tuple[type[Packing], ...]
    beside: type[Described] | None = None
    others: Callable[[str], type[Packing]] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {kind.name: handler.generate_schema(self._model(kind)) for kind in self.formats}
        own = core_schema.tagged_union_schema(choices, discriminator="format")

        def validate(data: Any, ours: ValidatorFunctionWrapHandler) -> Any:
            name = data.get("format") if isinstance(data, dict) else None
            if not isinstance(name, str) or name in choices or self.others is None:
                return ours(data)
            return self._model(self.others(name)).model_validate(data)

        return core_schema.no_info_wrap_validator_function(validate, own)

    def _model(self, kind: type[Packing]) -> type[Described]:
        """The model of a format's description, with what stands beside it."""
        if self.beside is None:
            return kind.description
        return create_model(kind.name, __base__=(self.beside, kind.description))


class Scheme(Protocol):
    """What compressed-tensors says of a layer's weights; see `Affine` for what each of these means."""

    @property
    def bits(self) -> int: ...

    @property
    def strategy(self) -> Strategy: ...

    @property
    def group_size(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def activations(self) -> Activations: ...

    @property
    def rounds_inputs(self) -> bool: ...


class Packing(abc.ABC):
    """How the weights of a quantized matrix are stored. Formats are frozen values."""

    # What `to_json` writes as "format", and the tensors that a weight may consist of, by the end of their names.
    name: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    description: ClassVar[type[Described]]

    bits: int
    strategy: Strategy
    group_size: int

    @abc.abstractmethod
    def nbytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        """Bytes on disk of a weight (out, in) of this `shape`; scale_bytes: of one number of the network's dtype."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `from_json` restores it from."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys of others may stand beside it. `ValueError` for what is no format."""
        known = {key: value for key, value in data.items() if key in cls.description.model_fields}
        made = cls.description.model_validate(known).made()
        assert isinstance(made, cls)
        return made

    @abc.abstractmethod
    def check(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        """`ValueError` unless `tensors`, by suffix, have the types and sizes of a weight of this `shape`."""

    @abc.abstractmethod
    def restore(self, tensors: Tensors, shape: tuple[int, int]) -> Quantized:
        """The weight of which `check` has passed the tensors. `ValueError` when they do not fit each other."""

    @property
    def standard(self) -> Scheme | None:
        """The scheme under which compressed-tensors stores it, None where it has no place for it."""
        return None

    @property
    def standard_obstacle(self) -> str:
        """Why compressed-tensors has no place for it; empty when it has one."""
        return "" if self.standard is not None else f"{self} has no place in compressed-tensors"

    @property
    def rounds_inputs(self) -> bool:
        """Whether a layer rounds its inputs to int8."""
        return False

    @property
    def row_group(self) -> int:
        """How many neighbours of a row share something, and so must divide it; 0 where nothing must."""
        return self.group_size

    @property
    def signed_bits(self) -> int:
        """The bits of signed integers that are the weights divided by a scale per row or tensor; 0 where none are."""
        return 0

    @property
    def learned(self) -> bool:
        """Whether the weights are the entries of tables that are stored with them."""
        return False

    @property
    def floating(self) -> bool:
        """Whether the weights are floating-point numbers, none of which was rounded to fewer bits."""
        return False

    @property
    def filled(self) -> Packing:
        """The format of the same weights where the zeros of a mask stand in the matrix as numbers, too."""
        return self


class Values(Packing):
    """A format of numbers: a code for each of them, and beside the codes what they stand for."""

    @property
    def stores_shape(self) -> bool:
        """Whether `weight_shape` stands in a file, which the codes alone do not tell."""
        return True

    def nbytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        return self.code_bytes(*shape) + self.beside_bytes(shape, scale_bytes) + (SHAPE_BYTES * self.stores_shape)

    @abc.abstractmethod
    def code_bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk of the codes (rows, columns); an upper bound when Huffman-coded."""

    @abc.abstractmethod
    def beside_bytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        """Bytes on disk of all else of a weight of this `shape`."""

    @abc.abstractmethod
    def pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes (rows, columns) as they stand in a file."""

    @abc.abstractmethod
    def check_codes(self, tensors: Tensors, rows: int, columns: int) -> None:
        """`ValueError` unless the tensors of `pack_codes` are those of codes (rows, columns)."""

    @abc.abstractmethod
    def unpack_codes(self, tensors: Tensors, rows: int, columns: int) -> Tensor:
        """The inverse of `pack_codes`."""

    @abc.abstractmethod
    def check_beside(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        """`ValueError` unless all tensors but the codes are those of a weight of this `shape`."""

    @abc.abstractmethod
    def build(self, codes: Tensor, tensors: Tensors) -> Numbers:
        """The weight of codes (out, in) and of the tensors beside them."""

    def check(self, tensors: Tensors, shape: tuple[int, int]) -> None:
        self.check_beside(tensors, shape)
        self.check_codes(tensors, *shape)
        if self.stores_shape:
            expect_shape(tensors, shape)

    def restore(self, tensors: Tensors, shape: tuple[int, int]) -> Numbers:
        return self.build(self.unpack_codes(tensors, *shape), tensors)


@dataclass(frozen=True)
class Integers:
    """Weights that are integers times scales: codes int8 (out, in), scale floating (out,) or (1,)."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Entries:
    """Weights that are entries of tables: codes uint8 (out, in), tables floating (tables, entries), as many rows each.

    With groups of a row there are more tables than rows.
    """

    codes: Tensor
    tables: Tensor


class Quantized(abc.ABC):
    """A quantized weight matrix (out, in).

    input_scale: floating (in,) or None. With an input scale s the layer computes Ŵ (x / s): the scale that no producer
    could take in stays explicit on the input.
    """

    format: Packing
    input_scale: Tensor | None

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where its numbers are."""

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

    def alike(self, others: Sequence[Quantized]) -> list[Self]:
        """The `others` as weights of this class; `ValueError` where one is of another."""
        found = [other for other in others if isinstance(other, type(self))]
        if len(found) < len(others):
            raise ValueError("weights of different formats are not one")
        return found

    @abc.abstractmethod
    def join(self, others: Sequence[Quantized]) -> Quantized:
        """One weight of these rows and then those of `others`, which have the same format and no input scale.

        What each has for its whole tensor, a scale or a table, becomes one for each of its rows.
        """

    @abc.abstractmethod
    def with_input_scale(self, scale: Tensor) -> Self:
        """The same weight with the scale (in,) explicit on its input."""

    @property
    def input_grid(self) -> tuple[float, int] | None:
        """Scale and zero point of all inputs where they become int8 with fixed ones, None otherwise."""
        return None

    def integers(self) -> Integers | None:
        """The integers that `format.signed_bits` speaks of, None where there are none."""
        return None

    def entries(self) -> Entries | None:
        """The entries of tables that the weights of a `learned` format are, None for other formats."""
        return None

    def filled(self) -> Quantized | None:
        """The same weight in `format.filled`; None where some zeros of a mask have no number there."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.pack().values())

    @property
    def nonzeros(self) -> int:
        """How many of the weights are not 0."""
        return int(torch.count_nonzero(self.dequantize(torch.float32)))

    def effective(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) floating: the dequantized weight with the explicit input scale divided in."""
        dense = self.dequantize(torch.float32)
        if self.input_scale is not None:
            dense = dense / self.input_scale.float()
        return dense.to(dtype or self.dtype)


class Numbers(Quantized):
    """A weight in a format of numbers. codes: (out, in), uint8 unless the numbers are dense."""

    format: Values
    codes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @abc.abstractmethod
    def beside(self) -> dict[str, Tensor]:
        """What stands in a file beside the codes and the shape, by suffix."""

    def zero_codes(self) -> Tensor | None:
        """Codes that stand for 0, of a shape that extends to (out, in); None where some weights have none."""
        return None

    def pack(self) -> dict[str, Tensor]:
        packed = {**self.format.pack_codes(self.codes), **self.beside()}
        if self.format.stores_shape:
            packed |= shape_tensor(self.shape)
        return {suffix: tensor.contiguous() for suffix, tensor in packed.items()}


def expect(tensors: Tensors, suffix: str, dtypes: Collection[torch.dtype], size: tuple[int, ...] | None) -> None:
    """`ValueError` unless there is a tensor `suffix` of one of `dtypes` and of the shape `size`; None is any."""
    found = tensors.get(suffix)
    if found is None:
        raise ValueError(f"{suffix} is missing")
    if found.dtype not in dtypes or (size is not None and tuple(found.shape) != size):
        wanted = "" if size is None else f" of shape {size}"
        raise ValueError(f"{suffix} is {found.dtype} of shape {tuple(found.shape)}, not {dtypes}{wanted}")


def expect_numbers(tensors: Tensors, suffix: str, dtypes: Collection[torch.dtype], count: int) -> None:
    """`ValueError` unless there is a tensor `suffix` of one of `dtypes` with `count` numbers, in whatever shape."""
    expect(tensors, suffix, dtypes, None)
    if tensors[suffix].numel() != count:
        raise ValueError(f"{suffix} has {tensors[suffix].numel()} numbers, not {count}")


def shape_tensor(shape: tuple[int, int]) -> dict[str, Tensor]:
    """The shape of a weight, as it stands in a file."""
    return {"weight_shape": torch.tensor(shape, dtype=torch.int64)}


def expect_shape(tensors: Tensors, shape: tuple[int, int]) -> None:
    """`ValueError` unless `weight_shape` says `shape`."""
    expect(tensors, "weight_shape", (torch.int64, torch.int32), (2,))
    if tensors["weight_shape"].tolist() != list(shape):
        raise ValueError(f"weight_shape is {tensors['weight_shape'].tolist()} for a weight of shape {shape}")


def expect_input_scale(tensors: Tensors, columns: int) -> None:
    """`ValueError` unless an explicit `input_scale`, if there is one, has a number for each column."""
    if "input_scale" in tensors:
        expect(tensors, "input_scale", FLOATING, (columns,))
