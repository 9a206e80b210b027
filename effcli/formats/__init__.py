"""How numbers are stored: formats are values, with the arithmetic to pack, unpack and restore them.

A format knows nothing of how its numbers were chosen. `Dense` numbers stand as they are, `Affine` ones on an evenly
spaced grid, `Codebook` ones in a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effcli.formats import affine, codebook
from effcli.formats.affine import Activations, Affine, AffineWeight, quantize_codes
from effcli.formats.base import Dense, Packing, Quantized, Strategy
from effcli.formats.bits import pack_bits, unpack_bits
from effcli.formats.codebook import Codebook, CodebookWeight, DoubleQuantized, Kind

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def format_from_json(data: dict[str, Any]) -> Packing:
    """The inverse of a format's `to_json`."""
    return Codebook.from_json(data) if data["format"] == "codebook" else Affine.from_json(data)


def unpack(format: Packing, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None = None) -> Quantized:
    """The inverse of `Quantized.pack`, for a weight of this `shape` in `format`; None takes the shape it says itself.

    `ValueError` when the tensors are not what packing such a weight gives. Nothing is unpacked before the sizes are
    checked: a file may claim any number of rows.
    """
    if shape is None:
        rows, columns = tensors["weight_shape"].tolist() if "weight_shape" in tensors else tensors["weight"].shape
        shape = rows, columns
    _check(format, tensors, shape)
    if isinstance(format, Codebook):
        weight: Quantized = CodebookWeight.unpack(format, dict(tensors))
    else:
        assert isinstance(format, Affine)
        weight = AffineWeight.unpack(format, dict(tensors))
    return weight


def _check(format: Packing, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """`ValueError` unless every tensor that `unpack` reads is there, of the right type and size."""
    rows, columns = shape

    def expect(suffix: str, dtypes: Collection[torch.dtype], size: tuple[int, ...] | None) -> None:
        found = tensors.get(suffix)
        if found is None:
            raise ValueError(f"{suffix} is missing")
        if found.dtype not in dtypes or (size is not None and tuple(found.shape) != size):
            wanted = "" if size is None else f" of shape {size}"
            raise ValueError(f"{suffix} is {found.dtype} of shape {tuple(found.shape)}, not {dtypes}{wanted}")

    def same_numbers(suffix: str, dtypes: Collection[torch.dtype], count: int) -> None:
        expect(suffix, dtypes, None)
        if tensors[suffix].numel() != count:
            raise ValueError(f"{suffix} has {tensors[suffix].numel()} numbers, not {count}")

    if "input_scale" in tensors and getattr(format, "activations", "none") == "none":
        expect("input_scale", _FLOATING, (columns,))
    if isinstance(format, Affine):
        scale_rows, scale_columns = format.scale_shape(shape)
        same_numbers("weight_scale", _FLOATING, scale_rows * scale_columns)
        if format.activations != "none":
            expect("weight", (torch.int8,), shape)
            if format.activations == "tensor":
                same_numbers("input_scale", _FLOATING, 1)
                if "input_zero_point" in tensors:
                    same_numbers("input_zero_point", (torch.int8,), 1)
            return
        expect("weight_packed", (torch.int32,), (rows, math.ceil(columns * format.bits / 32)))
        if format.symmetric:
            if "weight_zero_point" in tensors:
                raise ValueError("symmetric weights have no weight_zero_point")
        else:
            if format.strategy == "tensor":
                same_numbers("weight_zero_point", (torch.int8,), 1)
            else:
                expect("weight_zero_point", (torch.int32,), (math.ceil(scale_rows * format.bits / 32), scale_columns))
    elif isinstance(format, Codebook):
        blocks = format.blocks(shape)
        if format.huffman:
            expect("weight_lengths", (torch.uint8,), None)
            expect("weight_packed", (torch.uint8,), None)
            if tensors["weight_lengths"].ndim != 1 or tensors["weight_packed"].ndim != 1:
                raise ValueError("a Huffman code is a row of bytes")
        else:
            expect("weight_packed", (torch.int32,), (1, math.ceil(rows * columns * format.bits / 32)))
        if format.learned:
            expect("weight_table", _FLOATING, None)
        elif format.double:
            expect("weight_scale", (torch.uint8,), (blocks,))
            expect("weight_scale_absmax", (torch.float32,), (math.ceil(blocks / codebook.DOUBLE_BLOCK),))
            same_numbers("weight_scale_mean", (torch.float32,), 1)
        else:
            same_numbers("weight_scale", _FLOATING, blocks)
    expect("weight_shape", (torch.int64, torch.int32), (2,))
    if tensors["weight_shape"].tolist() != [rows, columns]:
        raise ValueError(f"weight_shape is {tensors['weight_shape'].tolist()} for a weight of shape {shape}")


def join_rows(weights: Sequence[Quantized]) -> Quantized:
    """One weight of the rows of all `weights`, which have one format and no input scale.

    What each has for its whole tensor, a scale or a table, becomes one for each of its rows.
    """
    first = weights[0]
    if isinstance(first, CodebookWeight):
        return codebook.join_rows([weight for weight in weights if isinstance(weight, CodebookWeight)])
    return affine.join_rows([weight for weight in weights if isinstance(weight, AffineWeight)])


def with_input_scale(weight: Quantized, scale: Tensor) -> Quantized:
    """The same weight with the scale (in,) explicit on its input."""
    assert isinstance(weight, AffineWeight | CodebookWeight)
    return dataclasses.replace(weight, input_scale=scale)


__all__ = [
    "Activations",
    "Affine",
    "AffineWeight",
    "Codebook",
    "CodebookWeight",
    "Dense",
    "DoubleQuantized",
    "Kind",
    "Packing",
    "Quantized",
    "Strategy",
    "format_from_json",
    "join_rows",
    "pack_bits",
    "quantize_codes",
    "unpack",
    "unpack_bits",
    "with_input_scale",
]
