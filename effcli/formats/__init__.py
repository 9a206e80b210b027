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

from effcli.errors import UnsupportedError
from effcli.formats.affine import Affine, AffineWeight, quantize_codes
from effcli.formats.base import Activations, Described, Entries, Integers, Packing, Quantized, Scheme, Strategy
from effcli.formats.bits import pack_bits, unpack_bits
from effcli.formats.codebook import Codebook, CodebookWeight, DoubleQuantized, Kind
from effcli.formats.dense import Dense, DenseWeight
from effcli.formats.patterns import Bitmask, Gaps, NOfM, Pattern
from effcli.formats.sparse import VALUES, Mask, Sparse, SparseWeight
from effcli.platform import registry
from effcli.platform.registry import Registry

_KINDS: tuple[type[Packing], ...] = (*VALUES, Sparse)
# Every format of effcli by the name that its description has.
FORMATS: Mapping[str, type[Packing]] = MappingProxyType({kind.name: kind for kind in _KINDS})
_OTHERS: Registry[Packing] = Registry("format", registry.FORMATS, ("effcli.formats.base:Packing",), {})

# The tensors that a layer quantized in a format of effcli may consist of, by the end of their names.
SUFFIXES = frozenset[str]().union(*(kind.suffixes for kind in FORMATS.values()))


def find(name: str) -> type[Packing]:
    """The format of this name, effcli's own or of an installed package.

    Raises `UnsupportedError` where there is none, `UserError` when that of another package cannot serve.
    """
    own = FORMATS.get(name)
    if own is not None:
        return own
    if _OTHERS.find(name) is None:
        raise UnsupportedError(
            f"there is no format {name[:60]!r}: neither effcli nor an installed package has it",
            "install the package that offers the format",
        )
    return _OTHERS.load(name)


def format_from_json(data: Mapping[str, Any]) -> Packing:
    """The inverse of a format's `to_json`; raises what `find` raises, and `ValueError` for what is no format."""
    return find(data["format"]).from_json(data)


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
    "Mask",
    "NOfM",
    "Packing",
    "Pattern",
    "Quantized",
    "Scheme",
    "Sparse",
    "SparseWeight",
    "Strategy",
    "find",
    "format_from_json",
    "pack_bits",
    "quantize_codes",
    "unpack",
    "unpack_bits",
]
