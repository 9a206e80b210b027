"""Random weights in any format."""

from __future__ import annotations

import torch
from torch import Tensor

from effcli.formats import (
    Affine,
    AffineWeight,
    Codebook,
    CodebookWeight,
    Dense,
    DenseWeight,
    DoubleQuantized,
    NOfM,
    Packing,
    Pattern,
    Quantized,
    Sparse,
    SparseWeight,
)
from effcli.formats.base import Numbers
from effcli.formats.codebook import DOUBLE_BLOCK, fixed_table


def mask_of(pattern: Pattern, shape: tuple[int, int], seed: int = 0, density: float = 0.4) -> Tensor:
    """A mask bool of this `shape` and, unless the pattern says how many weights it keeps, about this density."""
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if not isinstance(pattern, NOfM):
        return numbers < density
    parts = numbers.view(-1, pattern.of) if numbers.numel() else numbers.new_zeros(0, pattern.of)
    places = parts.topk(pattern.kept).indices
    return torch.zeros(parts.shape, dtype=torch.bool).scatter_(1, places, True).view(shape)


def weight_in(format: Packing, shape: tuple[int, int], seed: int = 0) -> Quantized:
    """A weight (out, in) of this `shape` in `format`."""
    generator = torch.Generator().manual_seed(seed)

    def codes(size: tuple[int, ...], levels: int) -> Tensor:
        return torch.randint(levels, size, generator=generator).to(torch.uint8)

    def scale(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=generator) * 0.01 + 0.002

    if isinstance(format, Dense):
        return DenseWeight(format, torch.randn(shape, generator=generator).to(format.dtype))
    if isinstance(format, Affine):
        scales = format.scale_shape(shape)
        fixed = format.activations == "tensor"
        return AffineWeight(
            format,
            codes(shape, format.levels + 1),
            scale(scales),
            None if format.symmetric else codes(scales, format.levels + 1),
            activation_scale=torch.tensor([0.25]) if fixed else None,
            activation_zero=torch.tensor([-3], dtype=torch.int8) if fixed else None,
        )
    if isinstance(format, Sparse):
        values = weight_in(format.values, shape, seed)
        assert isinstance(values, Numbers)
        return SparseWeight(format, values, mask_of(format.pattern, shape, seed))
    assert isinstance(format, Codebook)
    blocks = format.blocks(shape)
    numbers = codes(shape, 3 if format.kind == "ternary" else 1 << format.bits)
    dtype = format.dtype or torch.float32
    if format.learned:
        table = torch.randn(blocks, 1 << format.bits, generator=generator).to(dtype).sort(1).values
        return CodebookWeight(format, numbers, table)
    if format.double:
        double = DoubleQuantized(codes((blocks,), 256), scale((-(-blocks // DOUBLE_BLOCK),)), torch.tensor(0.5))
        return CodebookWeight(format, numbers, fixed_table(format.kind), double)
    kept = torch.float32 if format.kind == "nf4" else dtype
    return CodebookWeight(format, numbers, fixed_table(format.kind), scale((blocks,)).to(kept))
