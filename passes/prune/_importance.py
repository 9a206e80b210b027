"""How much each position of a group matters, float32 (count,): the least are removed first."""

from __future__ import annotations

import torch
from torch import Tensor

from effcli.layers.contract import Members
from effcli.layers.coupling import Coupled


def magnitude(group: Coupled, seen: Members) -> Tensor:
    """Σ w² over everything that goes with a position, as a share of the group's mean (arXiv:1608.08710).

    The shares of groups of different widths can be compared.
    """
    sums = seen.sums(group)
    return sums / sums.mean().clamp(min=torch.finfo(torch.float32).tiny)


def batchnorm(group: Coupled, seen: Members) -> Tensor:
    """Σ |γ| over the batch norms that a channel passes (arXiv:1708.06519)."""
    scales = (member.per_position(seen.read(member.parameter).abs(), group.count) for member in group.norms)
    return torch.stack(list(scales)).sum(0)
