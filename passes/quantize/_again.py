"""A new weight in the format that an old one had: rounded to the nearest, with scales and tables of its own."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.formats import Affine, AffineWeight, CodebookWeight, Quantized, SparseWeight
from effcli.passes.quantize import _affine, _nf4
from effcli.passes.quantize._kmeans import assign, cluster
from effcli.passes.quantize._tables import by_block


def again(weight: Tensor, before: Quantized) -> Quantized | Tensor:
    """`weight`, float32 (out, in), as `before` is stored; dense where that is.

    An explicit scale of the inputs, and the grid of inputs that become int8, stay. A pattern of zeros is not part of
    it. Raises `UnsupportedError` for formats that hold signs alone.
    """
    values = before.values if isinstance(before, SparseWeight) else before
    scale = before.input_scale
    if scale is not None:
        weight = weight * scale.float()
    made: Quantized | Tensor
    if isinstance(values, AffineWeight):
        made = _rounded(weight, values)
    elif isinstance(values, CodebookWeight):
        made = _looked_up(weight, values)
    elif before.format.floating:
        return weight
    else:
        raise _unsupported(before)
    return made if scale is None else made.with_input_scale(scale)


def _rounded(weight: Tensor, before: AffineWeight) -> AffineWeight:
    format = before.format
    plain: Affine = dataclasses.replace(format, activations="none")
    made = _affine.encode(weight, *_affine.extremes(weight, plain), plain, before.dtype)
    return dataclasses.replace(
        made,
        format=format,
        activation_scale=before.activation_scale,
        activation_zero=before.activation_zero,
    )


def _looked_up(weight: Tensor, before: CodebookWeight) -> CodebookWeight:
    format = before.format
    if format.kind == "nf4":
        return _nf4.quantize(weight, format)
    if format.kind == "kmeans":
        values = by_block(weight, format)
        table = cluster(values, None, format.bits, before.table.dtype, zeros=True)
        return CodebookWeight(format, assign(values, table).view_as(weight), table)
    raise _unsupported(before)


def _unsupported(before: Quantized) -> UnsupportedError:
    return UnsupportedError(
        f"a sum is not rounded to {before.format} again", "store it dense, and put a pass behind that compresses it"
    )


__all__ = ["again"]
