"""y = x Ŵᵀ for a weight in any format: `prepare` picks the operation's file by the weight, `matmul` multiplies.

| weight | operation |
|---|---|
| affine | `affine_matmul` |
| affine, inputs rounded to int8 | `int8_matmul` |
| codebook: k-means, NF4, binary, ternary | `codebook_matmul` |
| dense | `dense_matmul` |
| sparse | `sparse_matmul`: the kept weights alone where that is faster, else that of its values with zeros filled in |
| of another package | `dense_matmul`: a dense copy |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from effcli.formats import AffineWeight, CodebookWeight, DenseWeight, Quantized, SparseWeight
from effcli.kernels import affine_matmul, codebook_matmul, dense_matmul, int8_matmul, sparse_matmul
from effcli.kernels._packed import Packed, matmul, route_name


def prepare(weight: Quantized, device: torch.device | str | None = None) -> Packed:
    """Lay `weight` out for `device` (default: where its codes are). The input scale is left to the caller."""
    return KERNELS.get(type(weight), dense_matmul.prepare)(weight, device)


def _affine(weight: AffineWeight, device: torch.device | str | None) -> Packed:
    if weight.format.rounds_inputs:
        return int8_matmul.prepare(weight, device)
    return affine_matmul.prepare(weight, device)


def _sparse(weight: SparseWeight, device: torch.device | str | None) -> Packed:
    found = sparse_matmul.prepare(weight, weight.device if device is None else torch.device(device))
    if found is not None:
        return found
    filled = weight.filled()
    if filled is None:
        return dense_matmul.prepare(weight, device)
    return sparse_matmul.Filled.build(weight, prepare(filled, device))


# What lays out the weights of each format.
KERNELS: Final[Mapping[type[Quantized], Callable[[Any, torch.device | str | None], Packed]]] = {
    AffineWeight: _affine,
    CodebookWeight: codebook_matmul.prepare,
    DenseWeight: dense_matmul.prepare,
    SparseWeight: _sparse,
}


__all__ = ["Packed", "matmul", "prepare", "route_name"]
