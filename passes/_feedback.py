"""How the error of one input column is made up for by those that follow, and what an error costs.

With the inputs' H = G + λ·I factored as H = R Rᵀ, R upper triangular, an error e_k in column k asks of each later
column j for e_k · R_kj / R_jj (arXiv:2307.13304, theorem 6). GPTQ and SparseGPT both rest on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.errors import NumericsError

# The first damping to try where none at all was asked for and the factorization fails, and the largest.
_LEAST_DAMPING = 1e-6
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Feedback:
    """How the error of each column moves those that come after it.

    order: int64 (in,), the columns in the order in which they are taken; factors: float32 (in, in), in that order,
    R_kj / R_jj at (k, j), of which only k < j is read; remaining: float32 (in,), in the original order, R_jj²: what the
    square of an error in column j still costs when all later columns have made up for it; damping: the fraction of the
    mean diagonal that was added to the diagonal.
    """

    order: Tensor
    factors: Tensor
    remaining: Tensor
    damping: float


def factorize(gram: Tensor, damping: float, act_order: bool, name: str) -> Feedback:
    """Factor a Gram matrix float32 (in, in); act_order: loud columns first, by falling diagonal.

    A channel that no token used has a zero row: any positive diagonal, here the mean of the others, leaves its column
    at the nearest codes and the others undisturbed. When the matrix is not positive definite to float32's precision,
    the damping is raised tenfold until it is; the caller tells of it. `NumericsError` when that never comes.
    """
    diagonal = gram.diagonal()
    ascending = torch.arange(len(diagonal), device=diagonal.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else ascending
    mean = diagonal.mean()
    # Factored from the last column to the first: flipped, an ordinary Cholesky factor is the upper one.
    flipped = order.flip(0)
    matrix = gram[flipped][:, flipped]
    positive = torch.where(diagonal == 0, mean if float(mean) > 0 else torch.ones_like(mean), diagonal)[flipped]
    tried = damping
    while tried <= max(damping, _MOST_DAMPING):
        matrix.diagonal().copy_(positive + tried * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            factors = lower.flip(0, 1)
            own = factors.diagonal().clone()
            remaining = torch.empty_like(own).index_copy_(0, order, own.square())
            return Feedback(order, factors.div_(own), remaining, tried)
        tried = max(10 * tried, _LEAST_DAMPING)
    raise NumericsError(
        f"the Gram matrix of the inputs of {name} has no Cholesky factor, not even with a damping of {_MOST_DAMPING:g}",
        "its inputs overflow or are damaged; check the checkpoint with `effcli eval`, or ignore this layer",
    )


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d G dᵀ of each row d of D, given transposed as (in, out): float32 (out,), 0 where rounding makes it negative."""
    return (gram @ difference).mul_(difference).sum(0).clamp_(min=0)
