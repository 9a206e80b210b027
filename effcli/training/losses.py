"""What a student network learns from a teacher: losses of distillation, each as in its paper.

Every loss is a scalar, a mean over the inputs of the batch, and 0 where the student does as the teacher. Gradients
reach the student alone: what the teacher gives is detached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this a norm counts as 0.
_LEAST = 1e-12


def response(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(t / T) || softmax(s / T)), the answers of a teacher (arXiv:1503.02531, section 2).

    student, teacher: logits (n, ..., classes); the mean is taken over all but the last axis. The factor T² keeps the
    gradient's size as the temperature changes.
    """
    taught = F.log_softmax(teacher.detach() / temperature, -1)
    learned = F.log_softmax(student / temperature, -1)
    # What the teacher rules out costs nothing, even where the student rules it out, too.
    each = torch.where(taught.isneginf(), torch.zeros_like(learned), taught.exp() * (taught - learned))
    return each.sum(-1).mean() * temperature**2


def top_response(student: Tensor, values: Tensor, classes: Tensor, rest: Tensor, temperature: float = 1.0) -> Tensor:
    """`response` to a teacher of which the k largest logits are known: the other classes count as one.

    student: logits (n, ..., classes); values: the teacher's largest logits (n, ..., k), classes: int64 (n, ..., k),
    which they are of; rest: log Σ exp of the teacher's other logits over T, (n, ...), -inf where there are none. With
    all classes known it is `response`; otherwise never above it, for what is joined can only lose information.
    """
    taught = torch.cat([values.detach() / temperature, rest.detach().unsqueeze(-1)], -1)
    taught = taught - torch.logsumexp(taught, -1, keepdim=True)
    scaled = student / temperature
    known = scaled.gather(-1, classes)
    whole = torch.logsumexp(scaled, -1, keepdim=True)
    # The share of the others from what is known: 1 - Σ p, without a copy of all logits.
    left = torch.log1p(-(known - whole).exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    learned = torch.cat([known - whole, left], -1)
    divergence = torch.where(taught.isinf(), torch.zeros_like(learned), taught.exp() * (taught - learned)).sum(-1)
    return divergence.mean() * temperature**2


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of the features of each input, (n, ...) each (PyTorch's distillation tutorial)."""
    return 1 - F.cosine_similarity(student.flatten(1), teacher.detach().flatten(1)).mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """‖Q_s / ‖Q_s‖ - Q_t / ‖Q_t‖‖, Q the sum of squares over channels (arXiv:1612.03928, section 3.1, p = 2).

    student, teacher: (n, channels, ...) with as many channels as each has and the same places.
    """
    learned, taught = (
        F.normalize(features.square().sum(1).flatten(1), dim=1) for features in (student, teacher.detach())
    )
    return _norm(learned - taught).mean()


def gradient_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """½ ‖J_s - J_t‖², J = ∂L/∂x at the network's inputs (arXiv:1612.03928, section 3.2).

    student, teacher: the gradients of the loss of each network at the inputs, (n, ...). The student's must have been
    made with `create_graph=True`.
    """
    return (student - teacher.detach()).flatten(1).square().sum(1).mean() / 2


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance of distances between inputs, in units of their mean (arXiv:1904.05068, section 3.2.1).

    student, teacher: features (n, ...), n at least 2; widths may differ.
    """
    learned, taught = _distances(student.flatten(1)), _distances(teacher.detach().flatten(1))
    return F.smooth_l1_loss(learned, taught)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber distance of the cosines of all angles between three inputs (arXiv:1904.05068, section 3.2.2).

    student, teacher: features (n, ...), n at least 3; widths may differ.
    """
    return F.smooth_l1_loss(_angles(student.flatten(1)), _angles(teacher.detach().flatten(1)))


def flow(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
) -> Tensor:
    """‖G_s - G_t‖² of the inner products G = Σ F₁ F₂ / (h w) between two layers (Yim et al., CVPR 2017, section 3).

    student, teacher: the features of an earlier and of a later layer, (n, channels, h, w), with the same h and w and
    the channels of each layer as in the other network.
    """
    learned, taught = _flow(*student), _flow(*(features.detach() for features in teacher))
    return (learned - taught).square().sum((1, 2)).mean()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_s - G_t‖² / n², G the inner products of the inputs of a batch, rows of length 1 (arXiv:1907.09682, section 3).

    student, teacher: features (n, ...); widths may differ.
    """
    learned, taught = (
        F.normalize(features.flatten(1) @ features.flatten(1).t(), dim=1) for features in (student, teacher.detach())
    )
    return (learned - taught).square().sum() / len(student) ** 2


def activation_pattern(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Squared hinge on which units fire, ahead of the ReLU (arXiv:1811.03233).

    student, teacher: (n, ...) of the same shape, before the ReLU. A unit that fires in the teacher is pushed above
    `margin`, one that does not below -`margin`; what lies beyond costs nothing.
    """
    fires = teacher.detach() > 0
    missed = torch.where(fires, margin - student, margin + student).clamp(min=0)
    return missed.flatten(1).square().sum(1).mean()


def weights(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ ‖W_s - W_t‖² / Σ ‖W_t‖² over parameters of the same shapes."""
    apart = torch.stack([(own - other.detach()).square().sum() for own, other in zip(student, teacher, strict=True)])
    whole = torch.stack([other.detach().square().sum() for other in teacher])
    return apart.sum() / whole.sum().clamp(min=_LEAST)


def _norm(values: Tensor) -> Tensor:
    """The length of each row (n, m), with a gradient of 0 at 0."""
    squares = values.square().sum(1)
    return torch.where(squares > 0, squares.clamp(min=_LEAST**2).sqrt(), squares)


def _distances(features: Tensor) -> Tensor:
    """Distances of all pairs of rows (n, m) over their mean, (n (n - 1) / 2,)."""
    first, second = torch.triu_indices(len(features), len(features), 1, device=features.device)
    apart = _norm(features[first] - features[second])
    return apart / apart.mean().clamp(min=_LEAST)


def _angles(features: Tensor) -> Tensor:
    """cos of the angle at each row between any two others, (n, n, n); 0 where two of the three are one."""
    apart = F.normalize(features.unsqueeze(0) - features.unsqueeze(1), dim=2)
    return apart @ apart.mT


def _flow(earlier: Tensor, later: Tensor) -> Tensor:
    """(n, channels of the earlier, channels of the later)."""
    places = earlier.shape[-2:].numel()
    return earlier.flatten(2) @ later.flatten(2).mT / places


__all__ = [
    "activation_pattern",
    "attention",
    "cosine",
    "flow",
    "gradient_attention",
    "relational_angle",
    "relational_distance",
    "response",
    "similarity",
    "top_response",
    "weights",
]
