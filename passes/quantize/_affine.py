"""Affine quantization that several passes share: ranges, rounding, and the search for a clipped range.

A range [lo, hi] of a group becomes scale = (hi - lo) / (2^b - 1) and zero = round(-lo / scale); symmetric weights take
[-bound, bound] and the fixed zero 2^(b-1). Scales are rounded to the dtype they are stored in before any code is
chosen, so codes are the nearest ones to what the file will say.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from effcli.formats import Affine, AffineWeight, quantize_codes

# Numbers per step, all candidates together: few enough for the second-level cache, enough to keep threads busy.
_STEP = 1 << 18
_FEWEST_ROWS = 64


def parameters(low: Tensor, high: Tensor, format: Affine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero, both float32 with the shape of `low` and `high`; the scale is representable in `dtype`.

    Zero is always inside the range, so that a weight of 0 stays 0.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = 2 * torch.maximum(-low, high) if format.symmetric else high - low
    tiny = torch.finfo(dtype).tiny
    scale = (width / format.levels).clamp(min=tiny, max=torch.finfo(dtype).max).to(dtype).float()
    if format.symmetric:
        return scale, torch.full_like(scale, format.fixed_zero)
    return scale, (-low / scale).round_().clamp_(0, format.levels)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """What values (..., n) become: (clamp(round(v / scale) + zero, 0, levels) - zero) · scale; scale (..., 1)."""
    return (values / scale).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(scale)


def extremes(weight: Tensor, format: Affine) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight behind each scale, (scale rows, scale columns)."""
    grouped = format.grouped(weight)
    return grouped.amin(-1), grouped.amax(-1)


def nearest(weight: Tensor, format: Affine, dtype: torch.dtype) -> Tensor:
    """Round weight (out, in) to the nearest level of its full range; float32 (out, in)."""
    scale, zero = parameters(*extremes(weight, format), format, dtype)
    grouped = format.grouped(weight)
    return rounded(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), format.levels).reshape(weight.shape)


def encode(weight: Tensor, low: Tensor, high: Tensor, format: Affine, dtype: torch.dtype) -> AffineWeight:
    """The quantized weight (out, in) for given ranges, (scale rows, scale columns)."""
    scale, zero = parameters(low, high, format, dtype)
    codes = quantize_codes(weight, scale, zero, format)
    return AffineWeight(format, codes, scale.to(dtype), None if format.symmetric else zero.to(torch.uint8))


def clipped_range(
    weight: Tensor, gram: Tensor | None, format: Affine, dtype: torch.dtype, shrinks: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Shrink each range to the factor in `shrinks` whose output error tr(D G Dᵀ) is least, D = Ŵ - W.

    weight: float32 (out, in); gram: float32 (in, in), None for the identity (least squares on the weights). Groups
    are taken one after the other with the errors of all others in place: with D split in columns D_g, the part of the
    error that depends on group g is tr(D_g G_gg D_gᵀ) + 2 tr(D_g C_gᵀ), C_g = Σ_{h≠g} D_h G_hg. Each step can only
    lower the total, so the result is never worse than the full range. Returns (low, high), shaped like the scales.
    """
    if format.strategy == "tensor":
        return _clipped_whole(weight, gram, format, dtype, shrinks)
    low, high = extremes(weight, format)
    size = format.group_size or weight.shape[1]
    for rows in _row_chunks(weight.shape[0], max(_STEP // (size * len(shrinks)), _FEWEST_ROWS)):
        _descend(weight[rows], gram, low[rows], high[rows], format, dtype, shrinks)
    return low, high


def _row_chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _descend(
    weight: Tensor,
    gram: Tensor | None,
    low: Tensor,
    high: Tensor,
    format: Affine,
    dtype: torch.dtype,
    shrinks: tuple[float, ...],
) -> None:
    """Coordinate descent over the groups of some rows; writes the ranges into `low` and `high`."""
    size = format.group_size or weight.shape[1]
    # All candidates at once, (shrinks, rows, groups): one large operation where a loop over them has many small ones.
    ratios = weight.new_tensor(shrinks).view(-1, 1, 1)
    lows, highs = low * ratios, high * ratios
    scale, zero = parameters(lows, highs, format, dtype)
    difference = nearest(weight, format, dtype).sub_(weight)
    chosen = torch.zeros(low.shape, dtype=torch.int64, device=weight.device)
    for group in range(low.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        values = weight[:, columns]
        here = slice(group, group + 1)
        steps = rounded(values, scale[..., here], zero[..., here], format.levels).sub_(values)
        if gram is None:
            errors = steps.square().sum(-1)
        else:
            own = gram[columns, columns]
            cross = difference @ gram[:, columns]
            cross.addmm_(difference[:, columns], own, alpha=-1).mul_(2)
            errors = (steps @ own).add_(cross).mul_(steps).sum(-1)
        # The first of equal ones, which is the widest range: (rows,).
        best = errors.argmin(0)
        chosen[:, group] = best
        index = best.view(1, -1, 1).expand(1, *values.shape)
        difference[:, columns] = steps.gather(0, index).squeeze(0)
    low.copy_(lows.gather(0, chosen.unsqueeze(0)).squeeze(0))
    high.copy_(highs.gather(0, chosen.unsqueeze(0)).squeeze(0))


def _clipped_whole(
    weight: Tensor, gram: Tensor | None, format: Affine, dtype: torch.dtype, shrinks: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    low, high = extremes(weight, format)
    best, chosen = torch.inf, 1.0
    for shrink in shrinks:
        scale, zero = parameters(low * shrink, high * shrink, format, dtype)
        step = rounded(weight, scale, zero, format.levels).sub_(weight)
        error = float((step if gram is None else step @ gram).mul(step).sum(dtype=torch.float64))
        if error < best:
            best, chosen = error, shrink
    return low * chosen, high * chosen
