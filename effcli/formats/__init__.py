"""How numbers are stored: formats are values, with the arithmetic to pack, unpack and restore them.

A format knows nothing of how its numbers were chosen. `Dense` numbers stand as they are, `Affine` ones on an evenly
spaced grid, `Codebook` ones in a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effcli.formats import affine, codebook
from effcli.formats.affine import Activations, Affine, AffineWeight, quantize_codes
from effcli.formats.base import Dense, Packing, Quantized, Strategy
from effcli.formats.bits import pack_bits, unpack_bits
from effcli.formats.codebook import Codebook, CodebookWeight, DoubleQuantized, Kind


def format_from_json(data: dict[str, Any]) -> Packing:
    """The inverse of a format's `to_json`."""
    return Codebook.from_json(data) if data["format"] == "codebook" else Affine.from_json(data)


def unpack(format: Packing, tensors: dict[str, Tensor]) -> Quantized:
    """The inverse of `Quantized.pack`, for a weight in `format`."""
    if isinstance(format, Codebook):
        return CodebookWeight.unpack(format, tensors)
    assert isinstance(format, Affine)
    return AffineWeight.unpack(format, tensors)


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
