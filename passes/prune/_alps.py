"""Which weights stay and what they become, by the alternating direction method of multipliers (arXiv:2406.07831).

Sought is the Ŵ of least tr((Ŵ - W) H (Ŵ - W)ᵀ) with so many weights other than 0. It is split in two, X that makes the
error small and D that is sparse, and a penalty ρ draws them together (the paper's equations 3 and 4, U = V / ρ):

    X = W + (D - U - W) T,  T = ρ (H + ρ I)⁻¹
    D = the largest weights of X + U,  U = U + X - D

Columns are scaled to a unit diagonal of H, so that the largest weights are those whose removal costs most and one row
of penalties suits all layers (arXiv:2401.02938). Each T is made once for all layers that share an input; a step is then
one product, of which three digits are enough, for it decides which weights stay and the values come afterwards from
conjugate gradients (section 3.3 of the paper), in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.errors import NumericsError
from effcli.layers.statistics import fastest

# The penalties, each a constant factor above the one before: where they are small the support still moves freely.
PENALTIES = tuple(0.2 * 7.5 ** (k / 4) for k in range(5))
# A channel whose inputs are this much smaller than the others' is taken for one without any.
_SILENT = 1e-6


@dataclass(frozen=True)
class Scaled:
    """A Gram matrix with a unit diagonal.

    scale: float32 (in,), what columns of a weight are multiplied by; hessian: float32 (in, in), damped; pulls: the T of
    each penalty, (in, in), in the dtype that multiplies fastest.
    """

    scale: Tensor
    hessian: Tensor
    pulls: Sequence[Tensor]


def scaled(gram: Tensor, damping: float, name: str) -> Scaled:
    """Scale a Gram matrix float32 (in, in); damping: what is added to the unit diagonal.

    `NumericsError` for one that is not positive definite with that and the penalty.
    """
    loudness = gram.diagonal().sqrt()
    least = _SILENT * float(loudness.mean())
    scale = loudness.clamp(min=least) if least > 0 else torch.ones_like(loudness)
    hessian = gram / scale / scale.unsqueeze(1)
    hessian.diagonal().add_(damping)
    pulls = []
    for penalty in PENALTIES:
        penalized = hessian.clone()
        penalized.diagonal().add_(penalty)
        lower, failed = torch.linalg.cholesky_ex(penalized)
        if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
            raise NumericsError(
                f"the Gram matrix of the inputs of {name} has no Cholesky factor",
                "its inputs overflow or are damaged; check the checkpoint with `effcli eval`, or ignore this layer",
            )
        pulls.append(torch.cholesky_inverse(lower).mul_(penalty).to(fastest(gram.device)))
    return Scaled(scale, hessian, pulls)


def support(weight: Tensor, problem: Scaled, steps: int, largest: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight float32 (out, in), scaled, as it is when the penalties are through; its largest entries are to stay.

    steps: with each penalty; largest: which entries of a matrix of magnitudes stay, bool (out, in).
    """
    # X + U - W. Both D and the U of the step before are parts of X + U: where one has an entry the other has none.
    moved, before = torch.zeros_like(weight), PENALTIES[0]
    asked = torch.empty_like(weight, dtype=problem.pulls[0].dtype)
    for penalty, pull in zip(PENALTIES, problem.pulls, strict=True):
        for step in range(steps):
            factor = 1.0 if step else before / penalty
            gap = moved + weight
            # A product takes a quarter of the time of `masked_fill_`.
            gap.mul_(~largest(gap.abs()))
            torch.sub(moved, gap, alpha=1 + factor, out=asked)
            if factor != 1:
                gap.mul_(factor)
            torch.add(gap, asked @ pull, out=moved)
        before = penalty
    return moved.add_(weight)


def refit(start: Tensor, weight: Tensor, hessian: Tensor, kept: Tensor, steps: int) -> Tensor:
    """Move the kept entries of `start` towards the least error, with conjugate gradients for all rows at once.

    start, weight: float32 (out, in); kept: bool (out, in); hessian: float32 (in, in) with one number on its diagonal,
    which is why nothing is preconditioned. The error of no row rises, but for rounding.
    """
    there = kept.to(start.dtype)
    found = start * there
    slope = (weight - found).mm(hessian).mul_(there)
    along, size = slope.clone(), slope.square().sum(1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(steps):
        bend = along.mm(hessian).mul_(there)
        step = size / (along * bend).sum(1, keepdim=True).clamp_(min=tiny)
        found.addcmul_(along, step)
        slope.addcmul_(bend, step, value=-1)
        size, last = slope.square().sum(1, keepdim=True), size
        along.mul_(size / last.clamp(min=tiny)).add_(slope)
    return found
