"""GPTQ: round column after column, and let the columns that follow make up for each error (arXiv:2210.17323).

With the inputs' H = G + λ·I factored as H = R Rᵀ, R upper triangular, column j becomes

    ŵ_j = Q(w_j + Σ_{k<j} (w_k - ŵ_k) · R_kj / R_jj),

which is the paper's update by rows of the inverse's Cholesky factor, algebraically the same (arXiv:2307.13304, theorem
6) and without an inverse. Afterwards codes and scales are improved in turn, each with everything else in place, which
can only lower tr(D H Dᵀ). The damping λ does more than make H invertible: it keeps errors from being balanced against
each other along directions that the calibration tokens hardly show, where other tokens would not agree.

Matrices are transposed here, (in, out): a column of the weight is then contiguous. Rows of a weight do not depend on
each other, so a large weight is taken a number of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.formats import Affine
from effcli.passes._feedback import Feedback, row_errors
from effcli.passes.quantize._affine import extremes, parameters, rounded

# Columns whose errors are fed forward together, by one product, when the last of them is rounded.
_BLOCK = 128
# Rows rounded together, and numbers of a step of the search for ranges, which stay in the second-level cache.
_ROWS = 2048
_STEP = 1 << 18


@dataclass
class Grid:
    """What codes stand for, (code - zero) · scale.

    scale, zero: float32 (groups, out), the first of them changed in place by `refine`; size: columns of a group;
    levels: the largest code; dtype: what scales are stored in.
    """

    scale: Tensor
    zero: Tensor
    size: int
    levels: int
    dtype: torch.dtype

    def values(self, codes: Tensor) -> Tensor:
        """What codes (in, out) stand for, float32 (in, out)."""
        steps = codes.view(-1, self.size, codes.shape[1]) - self.zero.unsqueeze(1)
        return steps.mul_(self.scale.unsqueeze(1)).view(codes.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest codes of a weight (in, out), float32 (in, out)."""
        grouped = weight.view(-1, self.size, weight.shape[1]) / self.scale.unsqueeze(1)
        return grouped.round_().add_(self.zero.unsqueeze(1)).clamp_(0, self.levels).view(weight.shape)


@dataclass(frozen=True)
class Quantization:
    """codes: uint8 (out, in); scale: float32, shaped like the format's; kept: rows for which the nearest codes were
    better; ratio: the output error as a fraction of that of the nearest codes.
    """

    codes: Tensor
    scale: Tensor
    kept: int
    ratio: float


def quantize(
    weight: Tensor,
    gram: Tensor,
    feedback: Feedback,
    scale: Tensor,
    zero: Tensor,
    format: Affine,
    dtype: torch.dtype,
    sweeps: int,
) -> Quantization:
    """Round a weight (out, in) with feedback, then improve it by `sweeps` sweeps.

    gram: float32 (in, in); scale, zero: float32 (out, groups), as `_affine.parameters` returns them. The output error
    tr(D G Dᵀ) of no row is above that of its nearest codes with `scale` and `zero`.
    """
    codes, scales = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), torch.empty_like(scale)
    kept, reached, plain = 0, 0.0, 0.0
    ridge = feedback.damping * float(gram.diagonal().mean())
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = weight[rows].t().contiguous()
        # A copy in any case: transposing a single group's scales would be no more than another view of them.
        own = scale[rows].t().clone(memory_format=torch.contiguous_format)
        grid = Grid(own, zero[rows].t().contiguous(), weight.shape[1] // scale.shape[1], format.levels, dtype)
        nearest = grid.nearest(part)
        bound = row_errors(grid.values(nearest) - part, gram)
        chosen = fed_back(part, feedback, grid)
        for _ in range(sweeps):
            refine(part, gram, ridge, chosen, grid)
        error = row_errors(grid.values(chosen) - part, gram)
        # A comparison that also takes what is not a number to the nearest codes.
        worse = ~(error <= bound)
        codes[rows] = torch.where(worse, nearest, chosen).t().to(torch.uint8)
        scales[rows] = torch.where(worse.unsqueeze(1), scale[rows], grid.scale.t())
        kept += int(worse.sum())
        reached += float(torch.where(worse, bound, error).sum(dtype=torch.float64))
        plain += float(bound.sum(dtype=torch.float64))
    return Quantization(codes, scales, kept, reached / plain if plain > 0 else 1.0)


def weighted_range(
    weight: Tensor, importance: Tensor, format: Affine, dtype: torch.dtype, shrinks: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Shrink each range to the factor in `shrinks` with the least Σ_j importance_j · (ŵ_j - w_j)².

    weight: float32 (out, in); importance: float32 (in,). Returns (low, high), float32 (out, groups). With R_jj² of
    `Feedback` for importance the sum is what feedback leaves of the output error, to the extent that the columns which
    were moved err like the original ones.
    """
    low, high = extremes(weight, format)
    step = max(_STEP // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        factor = _best_shrink(weight[rows], importance, low[rows], high[rows], format, dtype, shrinks)
        low[rows] *= factor
        high[rows] *= factor
    return low, high


def _best_shrink(
    weight: Tensor,
    importance: Tensor,
    low: Tensor,
    high: Tensor,
    format: Affine,
    dtype: torch.dtype,
    shrinks: tuple[float, ...],
) -> Tensor:
    grouped = format.grouped(weight)
    shares = importance.view(1, grouped.shape[1], -1)
    best, chosen = torch.full_like(low, torch.inf), torch.ones_like(low)
    for shrink in shrinks:
        scale, zero = parameters(low * shrink, high * shrink, format, dtype)
        steps = rounded(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), format.levels).sub_(grouped)
        error = steps.square_().mul_(shares).sum(-1)
        chosen = torch.where(error < best, shrink, chosen)
        best = torch.minimum(best, error)
    return chosen


def fed_back(weight: Tensor, feedback: Feedback, grid: Grid) -> Tensor:
    """The codes of a weight (in, out), float32 (in, out), each column rounded with the errors before it made up for.

    Weights that are 0 stay 0, with no error of their own: what was pruned stays pruned.
    """
    order, factors = feedback.order, feedback.factors
    ordered = weight[order]
    errors, codes = torch.empty_like(ordered), torch.empty_like(weight)
    for start in range(0, len(order), _BLOCK):
        here = slice(start, start + _BLOCK)
        groups = order[here] // grid.size
        scale, zero = grid.scale[groups], grid.zero[groups]
        pruned = ordered[here] == 0
        least, most = (-zero).masked_fill_(pruned, 0), (grid.levels - zero).masked_fill_(pruned, 0)
        # What each column should be; then in place, one after the other, the code that it gets, less the zero.
        levels = ordered[here].addmm(factors[:start, here].t(), errors[:start])
        made, pulls = errors[here].t(), factors[here, here].t()
        rows = (each.unbind() for each in (levels, pulls, scale, least, most, ordered[here], errors[here]))
        for k, (level, pull, step, low, high, target, error) in enumerate(zip(*rows, strict=True)):
            level.addmv_(made.narrow(1, 0, k), pull.narrow(0, 0, k)).div_(step).round_().clamp_(low, high)
            torch.addcmul(target, level, step, value=-1, out=error)
        codes[order[here]] = levels.add_(zero)
    return codes


def refine(weight: Tensor, gram: Tensor, ridge: float, codes: Tensor, grid: Grid) -> None:
    """Improve codes (in, out) and the grid's scales in place by one sweep; tr(D H Dᵀ) falls or stays, for every row.

    H = G + ridge·I. With the slope p_j = (D H)_j of half the error, the best value of a column, all others in place, is
    ŵ_j - p_j / H_jj, and the nearest code to it is the best code. Within a group, where all have one scale s, a code c
    becomes round(c - p_j / (s H_jj)), and each step of it moves the slopes p / s of the columns that follow.
    """
    difference = grid.values(codes) - weight
    pruned = weight == 0
    diagonal = gram.diagonal() + ridge
    own = diagonal.tolist()
    for group in range(grid.scale.shape[0]):
        first, last = group * grid.size, (group + 1) * grid.size
        columns = slice(first, last)
        slope = (gram[columns] @ difference).add_(difference[columns], alpha=ridge)
        _rescale(columns, group, gram, ridge, codes, grid, difference, slope)
        slope.div_(grid.scale[group])
        steps = torch.zeros_like(slope)
        for start in range(first, last, _BLOCK):
            here = slice(start, min(start + _BLOCK, last))
            taken, before = steps[here.start - first : here.stop - first], steps[: start - first]
            moved = slope[here.start - first : here.stop - first].addmm_(gram[here, first:start], before)
            targets = torch.sub(codes[here], moved.div_(diagonal[here].unsqueeze(1)))
            least = torch.where(pruned[here], grid.zero[group], 0)
            most = torch.where(pruned[here], grid.zero[group], grid.levels)
            made, pulls = taken.t(), gram[here, here]
            rows = (each.unbind() for each in (targets, pulls, least, most, codes[here], taken))
            for k, (target, pull, low, high, code, step) in enumerate(zip(*rows, strict=True)):
                if own[start + k] > 0:
                    target.addmv_(made.narrow(1, 0, k), pull.narrow(0, 0, k), alpha=-1 / own[start + k])
                    torch.sub(target.round_().clamp_(low, high), code, out=step)
        codes[columns] += steps
        difference[columns] += steps.mul_(grid.scale[group])


def _rescale(
    columns: slice,
    group: int,
    gram: Tensor,
    ridge: float,
    codes: Tensor,
    grid: Grid,
    difference: Tensor,
    slope: Tensor,
) -> None:
    """Give one group the best scale for its codes, in place; `difference` (in, out) and its slope (size, out) follow.

    With v = code - zero it is s - (v · p) / (v H vᵀ), and taken where the error falls with the scale as it is stored.
    """
    levels = codes[columns] - grid.zero[group]
    bend = (gram[columns, columns] @ levels).add_(levels, alpha=ridge)
    along, curvature = (slope * levels).sum(0), (bend * levels).sum(0)
    scale = grid.scale[group]
    better = (scale - along / curvature).to(grid.dtype).float()
    step = better - scale
    falls = (curvature > 0) & (better > 0) & (2 * step * along + step.square() * curvature < 0)
    step = torch.where(falls, step, 0)
    scale.copy_(torch.where(falls, better, scale))
    difference[columns] += levels.mul_(step)
    slope += bend.mul_(step)
