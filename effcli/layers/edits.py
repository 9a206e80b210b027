"""New values of a network's parameters, made from the ones that they have, a few rows at a time.

A parameter is named by its key in the state dict. The weight of a layer is a matrix (out, in), whatever its storage,
and has the layer's name; every other parameter has its own shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from effcli.layers.layer import Kind

# Numbers that are looked at together.
_STEP = 1 << 18
# New rows, float32, of the rows that a slice names, float32 (rows, ...), which may be changed in place.
Rows = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Place:
    """A weight or another parameter of a network that may get a new value.

    shape: (out, in) of a layer, the parameter's own of anything else. head: whether it is the output head; tied: the
    place whose value it shares, empty where it has one of its own. A `part` is a tensor of the files that becomes a
    part of a parameter.
    """

    shape: tuple[int, ...]
    kind: Kind | Literal["embedding", "part", "other"]
    head: bool = False
    tied: str = ""


@dataclass(frozen=True)
class Edit:
    """How a parameter gets a new value. notes: for the ledger.

    guessed: whether the zeros of a dense matrix count as removed weights, where these stay 0.
    open: reads what it takes and returns the function of rows; it is given the value as it is, floating, of any dtype.
    """

    open: Callable[[Tensor], Rows]
    notes: Mapping[str, Any] = field(default_factory=dict)
    guessed: bool = True


def slices(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a parameter of this shape, a few at a time."""
    step = max(1, _STEP // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


__all__ = ["Edit", "Place", "Rows", "slices"]
