"""How numbers are stored: formats are values, with the arithmetic to pack, unpack and restore them.

A format knows nothing of how its numbers were chosen. `Dense` numbers stand as they are, `Affine` ones on an evenly
spaced grid, `Codebook` ones in a table; `Sparse` leaves out numbers of any of these. Nobody outside asks which format
one has: what a format can do it says itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from effcli.formats.affine import Affine, AffineWeight, quantize_codes
from effcli.formats.base import Activations, Described, Entries, Integers, Packing, Quantized, Scheme, Strategy
from effcli.formats.bits import pack_bits, unpack_bits
from effcli.formats.codebook import Codebook, CodebookWeight, DoubleQuantized, Kind
from effcli.formats.dense import Dense, DenseWeight
from effcli.formats.patterns import Bitmask, Blocks, Gaps, Pattern
from effcli.formats.sparse import VALUES, Sparse, SparseWeight

_KINDS: tuple[type[Packing], ...] = (*VALUES, Sparse)
# Every format by the name that its description has.
FORMATS: Mapping[str, type[Packing]] = MappingProxyType({kind.name: kind for kind in _KINDS})

# The tensors that a quantized layer may consist of, by the end of their names.
SUFFIXES = frozenset[str]().union(*(kind.suffixes for kind in FORMATS.values()))


def format_from_json(data: Mapping[str, Any]) -> Packing:
    """The inverse of a format's `to_json`."""
    return FORMATS[data["format"]].from_json(data)


def unpack(format: Packing, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None = None) -> Quantized:
    """The inverse of `Quantized.pack`, for a weight of this `shape` in `format`; None takes the shape it says itself.

    `ValueError` when the tensors are not what packing such a weight gives. Nothing is unpacked before the sizes are
    checked: a file may claim any number of rows.
    """
    if shape is None:
        rows, columns = tensors["weight_shape"].tolist() if "weight_shape" in tensors else tensors["weight"].shape
        shape = rows, columns
    format.check(tensors, shape)
    return format.restore(tensors, shape)


__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Activations",
    "Affine",
    "AffineWeight",
    "Bitmask",
    "Blocks",
    "Codebook",
    "CodebookWeight",
    "Dense",
    "DenseWeight",
    "Described",
    "DoubleQuantized",
    "Entries",
    "Gaps",
    "Integers",
    "Kind",
    "Packing",
    "Pattern",
    "Quantized",
    "Scheme",
    "Sparse",
    "SparseWeight",
    "Strategy",
    "format_from_json",
    "pack_bits",
    "quantize_codes",
    "unpack",
    "unpack_bits",
]
