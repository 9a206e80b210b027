"""y = x Ŵᵀ for a weight in any format: `prepare` picks the operation's file by the weight, `matmul` multiplies.

| weight | operation |
|---|---|
| affine | `affine_matmul` |
| affine, inputs rounded to int8 | `int8_matmul` |
| codebook: k-means, NF4, binary, ternary | `codebook_matmul` |
"""

from __future__ import annotations

import torch

from effcli.formats import AffineWeight, CodebookWeight, Quantized
from effcli.kernels import affine_matmul, codebook_matmul, int8_matmul
from effcli.kernels._packed import Packed, matmul, route_name


def prepare(weight: Quantized, device: torch.device | str | None = None) -> Packed:
    """Lay `weight` out for `device` (default: where its codes are). The input scale is left to the caller."""
    if isinstance(weight, CodebookWeight):
        return codebook_matmul.prepare(weight, device)
    assert isinstance(weight, AffineWeight)
    if weight.format.activations == "none":
        return affine_matmul.prepare(weight, device)
    return int8_matmul.prepare(weight, device)


__all__ = ["Packed", "matmul", "prepare", "route_name"]
