"""NF4 as a function of tensors: the nearest level of each number in its block, and scales in 8 bits.

Codes and constants are those of `quantize_4bit` in bitsandbytes 0.50 on the CPU, bit for bit.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from effcli.formats import Codebook, CodebookWeight, DoubleQuantized
from effcli.formats.codebook import DOUBLE_BLOCK, dynamic_map, fixed_table

# A block of zeros is divided by this.
_TINY = 1e-38
# Numbers per step: bounds the working set beside a weight of any size.
_STEP = 1 << 20
# bitsandbytes rounds a number of [-1, 1] to the nearest of so many evenly spaced ones before it looks up its code.
_CELLS = 1 << 16


def quantize(weight: Tensor, format: Codebook) -> CodebookWeight:
    """A floating weight (out, in) in `format`, which is one of NF4."""
    codes, largest = encode(weight, format.group_size)
    scale = double_quantize(largest) if format.double else largest
    return CodebookWeight(format, codes, fixed_table("nf4").to(codes.device), scale)


def encode(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 and the largest magnitude of each block, float32 (blocks,), of a floating weight of any shape.

    Number n of the flattened weight is in block n // block_size; the last block may be shorter. A number halfway
    between two levels takes the lower one.
    """
    flat = weight.reshape(-1)
    rest = flat.numel() % block_size
    whole = flat[: flat.numel() - rest].view(-1, block_size)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    largest = torch.empty(math.ceil(flat.numel() / block_size), dtype=torch.float32, device=flat.device)
    rows = max(1, _STEP // block_size)
    for start in range(0, len(whole), rows):
        values = whole[start : start + rows].float()
        found = values.abs().amax(1)
        largest[start : start + len(values)] = found
        # The product with the reciprocal, not the quotient: they differ in the last bit.
        unit = values * (1.0 / found.clamp(min=_TINY)).unsqueeze(1)
        codes[start * block_size : (start + len(values)) * block_size] = _nearest_level(unit).view(-1)
    if rest:
        values = flat[-rest:].float()
        # Here bitsandbytes does take the quotient, and keeps the bound in place of zero.
        largest[-1] = values.abs().max().clamp(min=_TINY)
        codes[-rest:] = _nearest_level(values / largest[-1])
    return codes.view(weight.shape), largest


def double_quantize(scales: Tensor) -> DoubleQuantized:
    """8 bits for each of the scales, float32 (scales,), less their mean."""
    mean = scales.mean() if scales.numel() else scales.new_zeros(())
    blocks = math.ceil(scales.numel() / DOUBLE_BLOCK)
    rest = torch.nn.functional.pad(scales - mean, (0, blocks * DOUBLE_BLOCK - scales.numel())).view(-1, DOUBLE_BLOCK)
    absmax = rest.abs().amax(1)
    unit = (rest * (1.0 / absmax).unsqueeze(1)).clamp_(-1, 1)
    # A block of zeros is 0 / 0, whose code is 0: times a magnitude of zero every code is right.
    cells = ((unit.nan_to_num_(-1.0) + 1.0) * 0.5 * (_CELLS - 1) + 0.5).long()
    codes = _dynamic_codes().to(scales.device)[cells].view(-1)[: scales.numel()]
    return DoubleQuantized(codes, absmax, mean)


def _nearest_level(unit: Tensor) -> Tensor:
    """The code uint8 of the level nearest to each number of [-1, 1]."""
    levels = fixed_table("nf4").to(unit.device)[0]
    return torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


@cache
def _dynamic_codes() -> Tensor:
    """The code uint8 (65536,) of the number of the dynamic data type nearest to each of 65536 evenly spaced ones."""
    spaced = torch.arange(_CELLS, dtype=torch.float64) / (_CELLS - 1) * 2 - 1
    levels = dynamic_map().double()
    return torch.bucketize(spaced, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
