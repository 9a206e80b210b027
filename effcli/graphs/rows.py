"""Rows of integer weights: signed codes with one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from effcli.formats import AffineWeight

Numbers = NDArray[np.float64]

# Codes from -127 to 127, so that they are symmetric as the scale is.
_LARGEST = 127
# Below four fifths of the range the error of the clipped weights outweighs every gain at 8 bits.
_SHRINKS = np.linspace(1, 0.8, 21)


@dataclass(frozen=True)
class Rows:
    """Codes int8 (out, ...) that stand for code · scale, scales float64 (out,).

    bits: how the codes can be stored; raised: rows whose scale is larger than their weights ask for, since their bias
    would not fit otherwise; rounded_again: the weight was compressed in another form before.
    """

    codes: NDArray[np.int8]
    scales: Numbers
    bits: Literal[2, 4, 8] = 8
    raised: int = 0
    rounded_again: bool = False

    def reshaped(self, shape: tuple[int, ...]) -> Rows:
        return replace(self, codes=self.codes.reshape(shape))


def rows_of(weight: Numbers, stored: AffineWeight | None, least: Numbers, silent: float, clip: bool) -> Rows:
    """Codes in the shape of `weight` (out, ...).

    stored: kept as it is when it is symmetric with a scale per channel or tensor. least: the smallest scale (out,)
    with which the bias fits; silent: the scale of a row of zeros; clip: search for the range with the least squared
    error.
    """
    if stored is not None and stored.zero is None and stored.input_scale is None and stored.format.strategy != "group":
        return _kept(stored, weight.shape)
    matrix = weight.reshape(len(weight), -1)
    largest = np.abs(matrix).max(axis=1, initial=0)
    if clip:
        largest = largest * _shrinks(matrix, largest)
    scales = np.where(largest > 0, largest / _LARGEST, silent)
    raised = scales < least
    scales = np.maximum(scales, least).astype(np.float32).astype(np.float64)
    codes = np.clip(np.rint(matrix / scales[:, None]), -_LARGEST, _LARGEST).astype(np.int8)
    return Rows(codes.reshape(weight.shape), scales, 8, int((raised & (largest > 0)).sum()), stored is not None)


def _kept(stored: AffineWeight, shape: tuple[int, ...]) -> Rows:
    format = stored.format
    codes = (stored.codes.short() - format.fixed_zero).to(torch.int8).numpy()
    scales = np.broadcast_to(stored.scale.double().numpy().reshape(-1), len(codes))
    return Rows(codes.reshape(shape), scales, 2 if format.bits <= 2 else 4 if format.bits <= 4 else 8)


def _shrinks(matrix: Numbers, largest: Numbers) -> Numbers:
    """The factor (out,) of each row's range with the least squared error."""
    best, factors = np.full(len(matrix), np.inf), np.ones(len(matrix))
    for shrink in _SHRINKS:
        scale = np.maximum(largest * shrink / _LARGEST, np.finfo(np.float64).tiny)[:, None]
        rounded = np.clip(np.rint(matrix / scale), -_LARGEST, _LARGEST) * scale
        error = np.square(rounded - matrix).sum(1)
        factors = np.where(error < best, shrink, factors)
        best = np.minimum(best, error)
    return factors
