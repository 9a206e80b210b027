"""SparseGPT's weights: removed column after column while the columns that follow make up for each (arXiv:2301.00774).

A weight that goes costs w_j² R_jj², H = R Rᵀ, once all later columns have made up for it (section 3.2; the paper's
[H⁻¹]_jj of the columns from j on is 1 / R_jj²). Matrices are transposed here, (in, out): a column of the weight is then
contiguous.
"""

from __future__ import annotations

import dataclasses

import torch

from effcli.layers.contract import Layer
from effcli.layers.statistics import Statistics
from effcli.passes._feedback import Feedback, factorize
from effcli.passes.prune._pruning import Candidate, Pruning, better, divided, largest, largest_of

# Columns whose errors are fed forward by one product; where there is no pattern their weights compete, too.
_BLOCK = 128


def sparsegpt(options: Pruning, layer: Layer, seen: Statistics, damping: float) -> tuple[Candidate, dict[str, float]]:
    """What SparseGPT makes of a weight, or its largest entries where those err less, with notes.

    Raises `NumericsError` when the Gram matrix cannot be factored with any damping up to one.
    """

    def factored() -> Feedback:
        found = factorize(seen.matrix, damping, False, layer.name)
        # The weights of a channel that no token used cost nothing, and go first.
        return dataclasses.replace(found, remaining=found.remaining.masked_fill(seen.matrix.diagonal() == 0, 0))

    feedback = seen.remember(("sparsegpt", damping), factored)
    plain = layer.weight, options.chosen(layer.weight.abs(), layer)
    chosen, ratio = better(layer, seen, plain, compensated(options, layer, feedback))
    return chosen, {"damping": feedback.damping, "error_over_magnitude": ratio}


def compensated(options: Pruning, layer: Layer, feedback: Feedback) -> Candidate:
    """A weight float32 (out, in) that makes up for what is removed of it, and what is kept.

    feedback: of the columns in their own order. What an earlier pass removed goes without being made up for.
    """
    factors, remaining, pattern = feedback.factors, feedback.remaining.unsqueeze(1), options.n_of_m
    weight = layer.weight.t().contiguous()
    free = torch.ones_like(weight, dtype=torch.bool) if layer.mask is None else layer.mask.kept.t()
    # Columns that are chosen from together.
    stretch = _BLOCK if pattern is None else pattern.of
    block = max(_BLOCK // stretch, 1) * stretch
    there = torch.stack([part.sum() for part in torch.split(free, stretch)])
    removed = divided(options.share, free.numel(), there).unsqueeze(1)
    kept, left, errors = torch.empty_like(free), torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        # What each weight should be, with all errors so far.
        wanted = weight[start:stop].addmm(factors[:start, start:stop].t(), errors[:start])
        for first in range(start, stop, stretch):
            part, here = slice(first, first + stretch), wanted[first - start : first - start + stretch]
            here.addmm_(factors[start:first, part].t(), errors[start:first])
            # And what it would become if all of the stretch stayed: each then makes up for the moves before it.
            moves = torch.linalg.solve_triangular(
                factors[part, part].t(), here - weight[part], upper=False, unitriangular=True
            )
            costs = moves.add_(weight[part]).square_().mul_(remaining[part])
            if pattern is None:
                costs = costs.masked_fill_(~free[part], torch.inf).reshape(1, -1)
                kept[part] = largest(costs, removed[first // stretch]).view_as(here)
            else:
                kept[part] = largest_of(costs.masked_fill_(~free[part], -1).t(), pattern).t()
            stays, made, pulls = kept[part] & free[part], errors[part].t(), factors[part, part].t()
            rows = (each.unbind() for each in (here, stays, pulls, weight[part], left[part], errors[part]))
            for k, (value, stay, pull, before, after, error) in enumerate(zip(*rows, strict=True)):
                value.addmv_(made.narrow(1, 0, k), pull.narrow(0, 0, k))
                torch.mul(value, stay, out=after)
                torch.sub(before, after, out=error)
    return left.t().contiguous(), options.masked(kept.t().contiguous())
