"""What adapters make of a weight: each kind a function of rows, in float32.

W is (out, in); of a convolution in = in_channels · kernel height · kernel width. s is the scaling of the adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effcli.layers.edits import Rows, slices


def low_rank(a: Tensor, b: Tensor, scaling: float) -> Rows:
    """LoRA: W + s B A (arXiv:2106.09685, equation 3); a (r, in), b (out, r)."""
    # Of equal numbers the same bits, however they are stored: a head stays tied to its embedding.
    a, b = a.float().contiguous(), b.float().contiguous()
    return lambda weight, rows: weight.addmm_(b[rows], a, alpha=scaling)


def decomposed(a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Rows:
    """DoRA: m V / ‖V‖, V = W + s B A, with the norm of each output's row (arXiv:2402.09353, equation 5).

    magnitude: m (out,). A row of zeros stays one.
    """
    added, m = low_rank(a, b, scaling), magnitude.float().view(-1, 1)

    def new(weight: Tensor, rows: slice) -> Tensor:
        direction = added(weight, rows)
        return direction.mul_(m[rows] / _norms(direction.square().sum(1, keepdim=True)))

    return new


def decomposed_embedding(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Rows:
    """DoRA on an embedding: m V / ‖V‖, V = W + s (B A)ᵀ, with the norm of each dimension over the vocabulary.

    weight: W (vocabulary, dim), of which a few rows are taken at a time; a (r, vocabulary), b (dim, r), magnitude: m
    (dim,).
    """
    added = low_rank(b.t(), a.t(), scaling)
    squares = torch.zeros(weight.shape[1])
    for rows in slices(weight.shape):
        squares += added(weight[rows].to(torch.float32, copy=True), rows).square().sum(0)
    factor = magnitude.float().view(-1) / _norms(squares)
    return lambda values, rows: added(values, rows).mul_(factor)


def _norms(squares: Tensor) -> Tensor:
    """What to divide by: norms, and 1 for zeros, which stay zeros."""
    return squares.sqrt_().masked_fill_(squares == 0, 1)


def hadamard(factors: tuple[Tensor, Tensor, Tensor, Tensor], scaling: float) -> Rows:
    """LoHa: W + s (B₁ A₁) ∘ (B₂ A₂) (FedPara, arXiv:2108.06098, proposition 1).

    factors: B₁ (out, r), A₁ (r, in), B₂ (out, r), A₂ (r, in).
    """
    b1, a1, b2, a2 = (each.float() for each in factors)
    return lambda weight, rows: weight.add_((b1[rows] @ a1).mul_(b2[rows] @ a2), alpha=scaling)


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A kernel of low rank along its channels, (out, in, height, width) (arXiv:2108.06098, proposition 3).

    core (r, r, height, width), left (r, out), right (r, in): Σ_ij core[i, j] left[i] right[j].
    """
    return torch.einsum("ijkl,ip,jr->prkl", core.float(), left.float(), right.float())


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """LoKr: W₁ ⊗ W₂ (KronA, arXiv:2212.10650, equation 3), (out, in) of the layer.

    first (o₁, i₁); second (o₂, i₂) or a kernel (o₂, i₂, height, width). A kernel belongs to its input channel.
    """
    first, second = first.float(), second.float()
    made = torch.kron(first.view(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())
    return made.reshape(len(made), -1)


def sum_with(delta: Tensor, scaling: float = 1.0) -> Rows:
    """W + s D; delta: D, of the shape of W."""
    return lambda weight, rows: weight.add_(delta[rows], alpha=scaling)


def scaled_inputs(factor: Tensor) -> Rows:
    """(IA)³ on what a layer reads: W diag(l) (arXiv:2205.05638, section 3.3); factor: l (in,)."""
    factor = factor.float()
    return lambda weight, rows: weight.mul_(factor)


def scaled_outputs(factor: Tensor) -> Rows:
    """(IA)³ on what a layer returns: diag(l) W, and of a bias l ∘ b; factor: l (out,)."""
    factor = factor.float()
    return lambda weight, rows: weight.mul_(factor[rows].view(-1, *[1] * (weight.ndim - 1)))


def replaced(value: Tensor) -> Rows:
    """The value itself, of a parameter that was trained whole."""
    return lambda weight, rows: value[rows].to(torch.float32, copy=True)


def replaced_rows(numbers: Tensor, values: Tensor) -> Rows:
    """Other values for some rows; numbers int64 (n,), values (n, ...). Of equal numbers the last counts."""
    place = {int(number): k for k, number in enumerate(numbers)}

    def new(weight: Tensor, rows: slice) -> Tensor:
        here = {number: k for number, k in place.items() if rows.start <= number < rows.stop}
        if here:
            weight[torch.tensor(list(here)) - rows.start] = values[list(here.values())].float()
        return weight

    return new


__all__ = [
    "decomposed",
    "decomposed_embedding",
    "hadamard",
    "kronecker",
    "low_rank",
    "replaced",
    "replaced_rows",
    "scaled_inputs",
    "scaled_outputs",
    "sum_with",
    "tucker",
]
