"""How far a compressed weight may lie from the input's, where a pass folded scales into it or not.

A folded scale multiplies the columns of the layers that read an input and divides the rows of the layer, or the weight
of the norm, that produces it. The ledger measures errors as if it had been undone, so it is undone here: from the norm,
whose two weights say what it was, and else by the scale that brings the two matrices closest, which never lies further
off than the true one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.language.weights import Weights
from effcli.layers.result import ratio
from effcli.reports.report import LedgerRow

# What rounding to the dtype of the file, and sums in another order, add to a measured error.
_SLACK = 1e-4
# Where several passes scaled one layer their errors are of differently scaled weights. Another layer's lies near 1 off.
_COARSE = 0.5
_ROUNDS = 12


class Folds:
    """What the ledgers of a run say of scales and errors."""

    def __init__(self, before: Weights, after: Weights, rows: Iterable[LedgerRow]) -> None:
        self._before = before
        self._after = after
        self._parameters = set(before.skeleton.parameters())
        self._rows: dict[str, list[LedgerRow]] = {}
        for row in rows:
            if row.status != "kept":
                self._rows.setdefault(row.name, []).append(row)
        self._into = {name: self._producers(name, found) for name, found in self._rows.items()}
        self._all = {producer for found in self._into.values() for producer in found}
        self._blocks = {self._block(name) for name, found in self._into.items() if found}

    def scaled(self, name: str) -> bool:
        """Whether scales were folded inside the block that a parameter stands in."""
        return self._block(name) in self._blocks

    def limit(self, layer: str) -> float | None:
        """The largest ‖W - Ŵ‖² / ‖W‖² of a layer that the run took; None where that is not known."""
        reach = 1.0
        for row in self._rows[layer]:
            if row.weight_error is None or not math.isfinite(row.weight_error):
                return None
            reach *= 1 + math.sqrt(row.weight_error)
        several = len(self._rows[layer]) > 1
        error = (reach - 1) ** 2 * 1.02 + _SLACK
        return max(4 * error, _COARSE) if several and (self._into[layer] or self.rows(layer)) else error

    def columns(self, layer: str) -> Columns | None:
        """The scale folded into the columns of a layer; None where there is none."""
        producers = self._into[layer]
        if not producers:
            return None
        weights = {f"{producer}.weight" for producer in producers}
        if len(weights) != 1 or not weights <= self._parameters:
            return Columns()
        (weight,) = weights
        first, second = (found.parameter(weight).float() for found in (self._before, self._after))
        if first.ndim != 1 or first.shape != second.shape:
            return Columns()
        # The weight of some norms stands for 1 + w.
        return Columns((first / second, (1 + first) / (1 + second)))

    def rows(self, layer: str) -> bool:
        """Whether the rows of a layer were divided by a scale that others take."""
        return any(layer == producer or layer.startswith(f"{producer}.") for producer in self._all)

    def _producers(self, layer: str, rows: Iterable[LedgerRow]) -> list[str]:
        block = self._block(layer)
        names = [str(row.notes["folded_into"]) for row in rows if "folded_into" in row.notes]
        return [f"{block}.{name}" if block else name for name in names]

    def _block(self, name: str) -> str:
        """The block that a parameter or a layer stands in; empty outside of them."""
        return next((block for block in self._before.skeleton.block_names if name.startswith(f"{block}.")), "")


@dataclass(frozen=True)
class Columns:
    """A scale (in,) folded into columns: one of `candidates`, or unknown without any."""

    candidates: tuple[Tensor, ...] = ()


def distance(first: Tensor, second: Tensor, columns: Columns | None, rows: bool) -> float:
    """‖first - second‖² / ‖first‖² of two float32 matrices (out, in) once the scales folded into `second` are undone.

    columns: what was folded into its columns; rows: whether its rows were divided by an unknown scale.
    """
    if columns is None:
        return _apart(first, _fitted_rows(first, second) if rows else second)
    found = []
    for scale in columns.candidates:
        if scale.numel() == second.shape[1] and bool((torch.isfinite(scale) & (scale != 0)).all()):
            undone = second / scale
            found.append(_apart(first, _fitted_rows(first, undone) if rows else undone))
    return min(found) if found else _apart(first, _fitted(first, second) if rows else _fitted_columns(first, second))


def _apart(first: Tensor, second: Tensor) -> float:
    return ratio(float((first - second).square().sum()), float(first.square().sum()))


def _fitted_rows(first: Tensor, second: Tensor) -> Tensor:
    """`second` with each row scaled so that it lies closest to that of `first`."""
    factors = (first * second).sum(1, keepdim=True) / second.square().sum(1, keepdim=True).clamp_min(1e-30)
    return second * factors


def _fitted_columns(first: Tensor, second: Tensor) -> Tensor:
    return _fitted_rows(first.t(), second.t()).t()


def _fitted(first: Tensor, second: Tensor) -> Tensor:
    """`second` with rows and columns scaled: first to the same norms, which for scaled copies is it, then to fit."""
    for _ in range(_ROUNDS):
        for dim in (1, 0):
            wanted, held = (torch.linalg.vector_norm(matrix, dim=dim, keepdim=True) for matrix in (first, second))
            second = second * wanted / held.clamp_min(1e-30)
    for _ in range(_ROUNDS):
        second = _fitted_columns(first, _fitted_rows(first, second))
    return second
