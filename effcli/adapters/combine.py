"""Several adapters in one: what each adds to a weight, weighted, trimmed, by majority of signs or drawn by chance."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from effcli.adapters import formulas
from effcli.layers.edits import Edit, Rows, slices

Combination = Literal["linear", "ties", "dare", "dare_ties"]


def combined(
    edits: Sequence[tuple[Edit, float]], combination: Combination, density: float, seed: int, name: str
) -> Edit:
    """One edit of several with their weights: W + Σ w D for `linear`, the other arguments are of `deltas_combined`.

    name: of the place, which the draws depend on besides the seed and the adapter's number.
    """
    ((first, weight), *others) = edits
    notes: dict[str, Any] = dict(first.notes) if not others else {"adapters": [dict(edit.notes) for edit, _ in edits]}
    if combination == "linear":
        return first if not others and weight == 1 else Edit(lambda value: _linear(edits, value), notes)

    def open(value: Tensor) -> Rows:
        changes = torch.stack([_change(edit, value) for edit, _ in edits])
        weights = torch.tensor([weight for _, weight in edits])
        generators = [generator(seed, number, name) for number in range(len(edits))]
        return formulas.sum_with(deltas_combined(changes, weights, combination, density, generators))

    return Edit(open, {**notes, "combination": combination})


def _linear(edits: Sequence[tuple[Edit, float]], value: Tensor) -> Rows:
    """W + Σ w (edit(W) - W), a few rows at a time."""
    opened = [(edit.open(value), weight) for edit, weight in edits]

    def new(values: Tensor, rows: slice) -> Tensor:
        made = values.clone()
        for one, weight in opened:
            made.add_(one(values.clone(), rows).sub_(values), alpha=weight)
        return made

    return new


def _change(edit: Edit, value: Tensor) -> Tensor:
    """What an edit adds to a whole parameter, float32."""
    new, change = edit.open(value), torch.empty(value.shape)
    for rows in slices(value.shape):
        values = value[rows].float()
        change[rows] = new(values.clone(), rows) - values
    return change


def generator(seed: int, number: int, name: str) -> torch.Generator:
    """Of the draws for one adapter's part in a place."""
    digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def deltas_combined(
    deltas: Tensor,
    weights: Tensor,
    combination: Literal["ties", "dare", "dare_ties"],
    density: float,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """One change of several, in the shape of one.

    deltas: float32 (adapters, ...), which may be changed; weights: (adapters,); density: the share of the numbers of
    each that count; generators: one for each adapter, of what is drawn.

    ties: of each D the largest numbers, then of these at each place the weighted mean of those whose sign is that of
    their sum (TIES-merging, arXiv:2306.01708, algorithm 1). dare: each number is kept by chance and divided by that
    chance (arXiv:2311.03099, equation 2), then Σ w D; dare_ties: the same, then the signs.
    """
    for number, delta in enumerate(deltas):
        if combination == "ties":
            _trim(delta, density)
        else:
            kept = torch.rand(delta.shape, generator=generators[number]) < density
            delta.mul_(kept).div_(density)
    shaped = weights.view(-1, *[1] * (deltas.ndim - 1))
    if combination == "dare":
        return (deltas * shaped).sum(0)
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agreeing = deltas.sign() == sign
    return (deltas * shaped * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _trim(delta: Tensor, density: float) -> None:
    """Set all but the largest share `density` of the numbers to 0."""
    flat = delta.view(-1)
    fewest = flat.numel() - int(density * flat.numel())
    if fewest:
        flat[flat.abs().topk(fewest, largest=False).indices] = 0


__all__ = ["Combination", "combined", "deltas_combined", "generator"]
