"""Tables and codes under a layer's inputs: in turn, each where the output error is least with the other in place.

The gradient of tr((Ŵ - W) G (Ŵ - W)ᵀ) with respect to an entry is the sum of those with respect to the weights that
share it (arXiv:1510.00149, section 3.3). The error is quadratic in the entries, so a few conjugate directions do what
the paper needs many steps of gradient descent for, and each costs one product with G. With the table in place a column
of weights is best moved to the entries nearest to w_j - Σ_{k≠j} (ŵ_k - w_k) G_kj / G_jj: column after column, they make
up for each other's errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcli.layers.contract import Statistics
from effcli.passes.quantize._tables import ascending

# Conjugate directions for the tables of one round: a handful, since the entries of a table hardly depend on each other.
_DIRECTIONS = 4
# Columns that are moved before their errors are passed on to all others, by one product.
_BLOCK = 128


def refit(
    weight: Tensor, table: Tensor, codes: Tensor, seen: Sequence[Statistics], rounds: int, keep_zeros: bool
) -> tuple[Tensor, Tensor, float]:
    """Table and codes whose output error is, in every independent problem, no larger, and the share that it fell by.

    weight: float32 (out, in), its rows in as many equal groups as there are Gram matrices; table: ascending (tables,
    entries), each for as many neighbours in the flattened weight; codes: uint8 (out, in). Rows are independent of each
    other unless all share one table. keep_zeros: entries and weights that are exactly 0 stay what they are.
    """
    objective = Objective(weight, seen, 1 if len(table) == 1 else len(weight))
    entries, moved = table.float(), codes
    fixed = (weight == 0) & keep_zeros
    for _ in range(rounds):
        moved = objective.best_codes(entries, moved, fixed)
        entries = objective.best_table(entries, moved, (entries == 0) & keep_zeros)
        # Least squares may have moved entries past each other.
        entries, moved = ascending(entries, moved)
    entries = entries.to(table.dtype)
    before, after = objective.errors(table.float(), codes), objective.errors(entries.float(), moved)
    better = (after < before).unsqueeze(1)
    gain = 1 - float(torch.minimum(before, after).sum() / before.sum().clamp(min=torch.finfo(torch.float64).tiny))
    entries = torch.where(better.repeat_interleave(len(table) // len(better), 0), entries, table)
    return entries, torch.where(better, moved, codes), gain if float(before.sum()) > 0 else 0.0


class Objective:
    """tr((Ŵ - W) G (Ŵ - W)ᵀ) as a function of tables (tables, entries) and codes (out, in).

    problems: how many parts, equally many tables and rows of each, do not depend on each other.
    """

    def __init__(self, target: Tensor, seen: Sequence[Statistics], problems: int) -> None:
        self._target = target
        self._grams = torch.stack([gram.matrix for gram in seen])
        self._problems = problems

    def errors(self, table: Tensor, codes: Tensor) -> Tensor:
        """The error of each problem, float64 (problems,)."""
        difference = self._spread(table, codes).sub_(self._target)
        return self._product(difference).double().mul_(difference).view(self._problems, -1).sum(1)

    def best_table(self, table: Tensor, codes: Tensor, fixed: Tensor) -> Tensor:
        """The table float32 (tables, entries) after some conjugate directions; entries that are `fixed` stay."""
        index = _index(table, codes)

        def summed(values: Tensor) -> Tensor:
            """Over the weights that share an entry."""
            return torch.zeros_like(table).scatter_add_(1, index, values.reshape(index.shape))

        # Jacobi's preconditioner: the curvature of each entry alone.
        diagonal = self._grams.diagonal(dim1=1, dim2=2).unsqueeze(1)
        curvature = summed(diagonal.expand(self._grouped(self._target).shape))
        curvature = curvature.clamp_(min=torch.finfo(torch.float32).tiny)
        difference = self._spread(table, codes).sub_(self._target)
        residual = -summed(self._product(difference)) * ~fixed
        scaled = residual / curvature
        direction, energy = scaled, self._dot(residual, scaled)
        for _ in range(_DIRECTIONS):
            bent = summed(self._product(self._spread(direction, codes))) * ~fixed
            length = _over(energy, self._dot(direction, bent))
            table = table + self._times(length, direction)
            residual = residual - self._times(length, bent)
            scaled = residual / curvature
            before, energy = energy, self._dot(residual, scaled)
            direction = scaled + self._times(_over(energy, before), direction)
        return table

    def best_codes(self, table: Tensor, codes: Tensor, fixed: Tensor) -> Tensor:
        """Codes uint8 (out, in), column after column the best with all others in place; `fixed` ones stay.

        table: ascending.
        """
        codes, columns = codes.clone(), codes.shape[1]
        # The table of each weight, in every row the same number of weights after the other.
        owner = torch.arange(codes.numel(), device=codes.device) // (codes.numel() // len(table))
        owner = owner.view_as(codes)
        middles = (table[:, 1:] + table[:, :-1]) / 2
        difference = self._spread(table, codes).sub_(self._target)
        product = self._product(difference)
        for start in range(0, columns, _BLOCK):
            block = slice(start, min(start + _BLOCK, columns))
            error, bent = difference[:, block], product[:, block].clone()
            before = error.clone()
            for j in range(error.shape[1]):
                column = start + j
                curvature = self._each(self._grams[:, column, column])
                own = bent[:, j] / curvature.clamp(min=torch.finfo(torch.float32).tiny)
                ideal = self._target[:, column] + error[:, j] - own
                tables = owner[:, column]
                nearest = torch.searchsorted(middles[tables], ideal.unsqueeze(1))
                stays = fixed[:, column] | (curvature <= 0)
                nearest = torch.where(stays, codes[:, column].long(), nearest[:, 0])
                step = table[tables, nearest] - self._target[:, column] - error[:, j]
                step = torch.where(stays, 0.0, step)
                codes[:, column] = nearest.to(torch.uint8)
                error[:, j] += step
                # Only columns of this block that are still to come need to know at once.
                later = slice(column + 1, block.stop)
                self._grouped(bent)[..., j + 1 :].baddbmm_(
                    self._grouped(step.unsqueeze(1)), self._grams[:, column, later].unsqueeze(1)
                )
            passed = self._grouped(error - before) @ self._grams[:, block]
            product += passed.view_as(product)
        return codes

    def _each(self, values: Tensor) -> Tensor:
        """values (groups,) for each row, (out,)."""
        return values.repeat_interleave(len(self._target) // len(values))

    def _grouped(self, values: Tensor) -> Tensor:
        """View (out, n) as (groups, rows, n)."""
        return values.view(len(self._grams), -1, values.shape[1])

    def _product(self, values: Tensor) -> Tensor:
        return (self._grouped(values) @ self._grams).view_as(values)

    def _spread(self, table: Tensor, codes: Tensor) -> Tensor:
        return table.gather(1, _index(table, codes)).view_as(self._target)

    def _dot(self, one: Tensor, other: Tensor) -> Tensor:
        return (one.double() * other).view(self._problems, -1).sum(1)

    def _times(self, factor: Tensor, table: Tensor) -> Tensor:
        return (table.view(self._problems, -1) * factor.float().unsqueeze(1)).view_as(table)


def _index(table: Tensor, codes: Tensor) -> Tensor:
    return codes.reshape(len(table), -1).long()


def _over(one: Tensor, other: Tensor) -> Tensor:
    """one / other, and 0 where there is nothing left to divide."""
    return torch.where(other > 0, one / other, 0.0)
