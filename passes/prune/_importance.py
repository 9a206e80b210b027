"""How much each position of a group matters, (count,): the least are removed first.

`lasso` and `reconstruction` see the layers that read the group and the Gram matrices G = X Xᵀ of their inputs. What a
position adds to the outputs of a reader is W_p X_p, over the columns behind it, and the energy of several of them
together is quadratic:

    ‖Σ_p β_p W_p X_p‖² = βᵀ A β,   A_pq = Σ_{a in p, b in q} (WᵀW)_ab G_ab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.layers.contract import Members, Needs, Reader
from effcli.layers.coupling import Coupled
from effcli.layers.restoring import damped_factor

# How far a penalty is raised, step by step, and how often each is minimized over.
_PENALTIES = 40
_STEPS = 60
# Positions of a group are removed in so many rounds at most, those of one round by the same scores.
_ROUNDS = 128
# Added to the diagonal of a Gram matrix, as a share of its mean, before it is inverted.
_DAMPING = 0.01
# How much of the mean diagonal of a Gram matrix may be rounding of its float32 sums.
_ROUNDING = 1e-3


def magnitude(group: Coupled, seen: Members) -> Tensor:
    """Σ w² over everything that goes with a position, as a share of the group's mean (arXiv:2301.12900, section 3.4).

    The shares of groups of different widths can be compared. arXiv:1608.08710 takes Σ |w| of the filter alone.
    """
    sums = seen.sums(group)
    return sums / sums.mean().clamp(min=torch.finfo(torch.float32).tiny)


def batchnorm(group: Coupled, seen: Members) -> Tensor:
    """|γ|, a mean over the batch norms that a channel passes (arXiv:1708.06519)."""
    scales = (member.per_position(seen.read(member.parameter).abs(), group.count) for member in group.norms)
    return torch.stack(list(scales)).mean(0)


def apoz(group: Coupled, seen: Members) -> Tensor:
    """The share of a position's activations that are not zero, where they are read (arXiv:1607.03250, equation 1)."""
    readers = _readers(group, seen)
    nonzero = torch.stack([reader.per_position(reader.seen.nonzero, group.count) for reader in readers])
    columns = torch.stack(
        [reader.per_position(torch.ones_like(reader.seen.nonzero), group.count) for reader in readers]
    )
    # Who reads a part of the group tells of that part alone.
    shares = (nonzero / columns.clamp(min=1)).sum(0) / (columns > 0).sum(0).clamp(min=1)
    if group.count > 1 and bool(shares.max() == shares.min()):
        raise UnsupportedError(
            f"the activations of all channels of {group.name} are 0 equally often, which tells nothing of them",
            "choose another `criterion`, for this group alone under `layers`",
        )
    return shares


def taylor(group: Coupled, seen: Members) -> Tensor:
    """|Σ w · ∂L/∂w| over all that goes with a position, a mean over samples (arXiv:1906.10771, equation 8, unsquared).

    To first order it is how much the loss changes without the position.
    """
    return seen.products(group, Needs.GRADIENTS).abs() / max(seen.samples, 1)


def taylor_squared(group: Coupled, seen: Members) -> Tensor:
    """Σ (w · ∂L/∂w)² over all that goes with a position, a mean over samples (arXiv:1906.10771, equation 8)."""
    return seen.products(group, Needs.SQUARED_GRADIENTS) / max(seen.samples, 1)


def lasso(group: Coupled, seen: Members, width: int) -> Tensor:
    """The |β| of min_β ½ ‖Y - Σ_p β_p W_p X_p‖² + λ ‖β‖₁ (arXiv:1707.06168, equation 2), for the last λ with `width` of
    them other than 0 as λ rises; those that fall out on the way follow, the first to fall last.
    """
    total = sum(_energies(reader, group.count) for reader in _readers(group, seen))
    assert isinstance(total, Tensor)
    return path(total, width)


def path(energies: Tensor, width: int) -> Tensor:
    """Positions by how long they stay while the penalty rises, until `width` are left: (count,).

    energies: A, float64 (count, count). Each step lets FISTA (Beck and Teboulle 2009) minimize
    ½ βᵀAβ - βᵀA1 + λ‖β‖₁ from the β of the step before.
    """
    target = energies.sum(1)
    step = 1 / float(torch.linalg.matrix_norm(energies, 2).clamp(min=torch.finfo(torch.float64).tiny))
    rank, beta, kept = torch.zeros_like(target), torch.ones_like(target), torch.ones_like(target)
    highest = float(target.abs().max())
    for number, exponent in enumerate(torch.linspace(-4, 0, _PENALTIES).tolist()):
        penalty = highest * 10**exponent
        ahead, momentum = beta, 1.0
        for _ in range(_STEPS):
            last, moved = beta, ahead - step * (energies @ ahead - target)
            beta = moved.sign() * (moved.abs() - step * penalty).clamp(min=0)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead, momentum = beta + (momentum - 1) / following * (beta - last), following
        if int((beta != 0).sum()) < width:
            break
        rank[beta != 0], kept = number + 1, beta
    # Of those that stayed equally long the larger β matters more.
    return rank + kept.abs() / (kept.abs().max() + 1)


def _energies(reader: Reader, count: int) -> Tensor:
    """A of one reader as a share of the energy of its outputs, float64 (count, count)."""
    gram = reader.seen.matrix.double()
    position = reader.position.to(gram.device)
    taken = (position >= 0).nonzero().flatten()
    gram, weight = gram[taken][:, taken], reader.weight.to(gram.device, gram.dtype)[:, taken]
    # Which column stands behind each position, as a matrix of ones (count, columns).
    place = (torch.arange(count, device=gram.device).unsqueeze(1) == position[taken]).double()
    found = place @ ((weight.T @ weight) * gram) @ place.T
    return (found / found.sum().clamp(min=torch.finfo(torch.float64).tiny)).cpu()


def reconstruction(group: Coupled, seen: Members, width: int) -> Tensor:
    """In which order the positions go when each time those go whose removal costs the readers least.

    The error of the outputs, as a share of their energy, summed over the readers: once they are restored, with biases
    that take in means, see `Elimination`; of readers that are not to be restored as it is left, see `Omission`.
    """
    damping = seen.chosen[group.name].restoring
    readers: list[Elimination | Omission] = [
        Omission(_energies(reader, group.count))
        if damping is None
        else Elimination(reader, group.count, reader.biased, damping)
        for reader in _readers(group, seen)
    ]
    left = torch.ones(group.count, dtype=torch.bool)
    order = torch.full((group.count,), float(group.count), dtype=torch.float64)
    most = -(-group.count // _ROUNDS)
    while (surplus := int(left.sum()) - width) > 0:
        cost = torch.stack([reader.costs() for reader in readers]).sum(0)
        cost[~left] = torch.inf
        gone = cost.topk(min(most, surplus), largest=False).indices
        order[gone] = group.count - left.sum().double()
        left[gone] = False
        for reader in readers:
            reader.remove(gone)
    # Of those that stay, what it would cost to remove them next, below 1 in sum.
    cost = torch.stack([reader.costs() for reader in readers]).sum(0)
    cost = cost.clamp(min=0)
    return torch.where(left, order + cost / (cost[left].sum() + 1), order)


class Omission:
    """A reader that loses positions one after the other, with nothing that makes up for them.

    energies: its A, float64 (count, count). Removing p adds A_pp + 2 Σ_q A_pq to the error, over all q that are gone.
    """

    def __init__(self, energies: Tensor) -> None:
        self.energies = energies
        self.gone = torch.zeros(len(energies), dtype=torch.bool)

    def costs(self) -> Tensor:
        """What removing each position would add to the error, float64 (count,), below 0 where errors cancel.

        0 for those that are gone.
        """
        return (self.energies.diagonal() + 2 * self.energies[:, self.gone].sum(1)).masked_fill(self.gone, 0)

    def remove(self, positions: Tensor) -> None:
        """Let positions go, int64 (n,)."""
        self.gone[positions] = True


class Elimination:
    """A reader that loses columns one after the other, the others making up for each (optimal brain surgery).

    With H = (G + λ·I)⁻¹, removing the columns p adds tr(W_p (H_pp)⁻¹ W_pᵀ) to the error; what is left becomes
    W - W_p (H_pp)⁻¹ H_p: and H - H_:p (H_pp)⁻¹ H_p: (Frantar et al. 2022, arXiv:2203.07259, equations 3 and 5, for
    several columns).
    """

    def __init__(self, reader: Reader, count: int, centred: bool, damping: float = _DAMPING) -> None:
        """centred: whether a bias makes up for the means of the inputs; damping: λ as a share of G's mean diagonal."""
        gram = reader.seen.matrix.double() / reader.seen.tokens
        self.weight = reader.weight.to(gram.device, gram.dtype, copy=True)
        # Of inputs that never change nothing but rounding is left once they are centred.
        least = _ROUNDING * float(gram.diagonal().mean())
        if centred:
            gram -= torch.outer(reader.seen.mean.double(), reader.seen.mean.double())
        energy = float(((self.weight @ gram) * self.weight).sum())
        self.energy = max(energy, least * float(self.weight.square().sum())) or 1.0
        mean = max(float(gram.diagonal().mean()), least) or 1.0
        gram.diagonal().clamp_(min=0)
        lower, _ = damped_factor(gram, damping, mean, reader.name)
        self.inverse = torch.cholesky_inverse(lower)
        # The columns behind each position, (count, columns), where every position has as many.
        position = reader.position.to(gram.device)
        taken = (position >= 0).nonzero().flatten()
        order = taken[position[taken].argsort(stable=True)]
        every = torch.arange(count, device=gram.device).unsqueeze(1)
        if len(order) % count or not bool((position[order].view(count, -1) == every).all()):
            raise UnsupportedError(
                f"{reader.name} reads the positions of a group unequally often",
                "choose another `criterion`, for this group alone under `layers`",
            )
        self.columns = order.view(count, -1)
        self.gone = torch.zeros(count, dtype=torch.bool, device=gram.device)

    def costs(self) -> Tensor:
        """What removing each position would add to the error, float64 (count,); 0 for those that are gone."""
        if self.columns.shape[1] == 1:
            order = self.columns.flatten()
            found = self.weight.square().sum(0)[order] / self.inverse.diagonal()[order]
        else:
            own = self.inverse[self.columns.unsqueeze(2), self.columns.unsqueeze(1)]
            own[self.gone] = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
            blocks = self.weight[:, self.columns].permute(1, 2, 0)
            found = (torch.linalg.solve(own, blocks) * blocks).sum((1, 2))
        return (found / self.energy).masked_fill(self.gone, 0).cpu()

    def remove(self, positions: Tensor) -> None:
        """Let positions go, int64 (n,)."""
        positions = positions.to(self.gone.device)
        self.gone[positions] = True
        columns = self.columns[positions].flatten()
        solved = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        self.weight -= self.weight[:, columns] @ solved
        self.inverse -= self.inverse[:, columns] @ solved
        self.weight[:, columns] = 0


def _readers(group: Coupled, seen: Members) -> Sequence[Reader]:
    """The readers of a group that some calibration input reached."""
    readers = [reader for reader in seen.readers(group) if reader.seen.tokens]
    if not readers:
        raise UnsupportedError(
            f"no layer that reads the channels of {group.name} saw a calibration input",
            "choose another `criterion`, for this group alone under `layers`",
        )
    return readers
