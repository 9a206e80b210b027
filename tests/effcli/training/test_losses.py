"""Losses of distillation: cases by hand, gradients against finite differences, and what holds for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from effcli.training import losses

Loss = Callable[[Tensor, Tensor], Tensor]

# Losses of features (n, channels, h, w) of a student and a teacher of one shape.
FEATURES: dict[str, Loss] = {
    "response": lambda own, other: losses.response(own, other, temperature=3.0),
    "cosine": losses.cosine,
    "attention": losses.attention,
    "gradient_attention": losses.gradient_attention,
    "relational_distance": losses.relational_distance,
    "relational_angle": losses.relational_angle,
    "flow": lambda own, other: losses.flow((own[:, :2], own[:, 1:]), (other[:, :2], other[:, 1:])),
    "similarity": losses.similarity,
    "activation_pattern": losses.activation_pattern,
    "weights": lambda own, other: losses.weights([own], [other]),
}


def drawn(seed: int) -> Tensor:
    return torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FEATURES)
def test_the_gradient_is_that_of_finite_differences_and_of_the_student_alone(name: str) -> None:
    student, teacher = drawn(1).requires_grad_(), drawn(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: FEATURES[name](own, teacher), student)
    (reached,) = torch.autograd.grad(FEATURES[name](student, teacher), teacher, allow_unused=True)
    assert reached is None


@pytest.mark.parametrize("name", sorted(FEATURES.keys() - {"activation_pattern"}))
def test_a_student_that_does_as_its_teacher_loses_nothing_and_stays(name: str) -> None:
    student = drawn(1).requires_grad_()
    loss = FEATURES[name](student, student.detach().clone())
    loss.backward()
    assert student.grad is not None
    assert_close(loss.detach(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(student.grad, torch.zeros_like(student.grad), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["attention", "relational_distance", "relational_angle", "similarity"])
def test_widths_may_differ(name: str) -> None:
    wide = torch.cat([drawn(1), drawn(3)], 1)
    assert FEATURES[name](drawn(2), wide).isfinite()


def test_response_by_hand() -> None:
    """p = (½, ½) and q = (¾, ¼): KL = ln 2 - ½ ln 3 + ... = ½ ln(4/3); T = 1."""
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    student = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert_close(losses.response(student, teacher), torch.tensor(expected, dtype=torch.float64))


def test_classes_that_both_rule_out_cost_nothing() -> None:
    student, teacher = drawn(1).flatten(1), drawn(2).flatten(1)
    padded = [torch.cat([each, torch.full((4, 2), -torch.inf, dtype=torch.float64)], 1) for each in (student, teacher)]
    padded[0].requires_grad_()
    loss = losses.response(*padded)
    loss.backward()
    assert_close(loss.detach(), losses.response(student, teacher))
    assert padded[0].grad is not None and padded[0].grad.isfinite().all()


def test_response_at_two_degrees_is_four_times_that_of_halved_logits() -> None:
    student, teacher = drawn(1).flatten(1), drawn(2).flatten(1)
    assert_close(losses.response(student, teacher, 2.0), 4 * losses.response(student / 2, teacher / 2))


def largest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    values, classes = logits.topk(k, -1)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, classes, False)
    return values, classes, (logits / temperature).masked_fill(~others, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_response_with_all_classes_is_response(temperature: float) -> None:
    student, teacher = drawn(1).flatten(1), drawn(2).flatten(1)
    found = losses.top_response(student, *largest(teacher, 12, temperature), temperature)
    # The share of what is left out of nothing is rounding.
    assert_close(found, losses.response(student, teacher, temperature), rtol=1e-5, atol=1e-6)


def test_top_response_by_hand_and_never_above_response() -> None:
    """Of (½, ¼, ¼) the largest is known; q = (¼, ¼, ½): ½ ln 2 + ½ ln (½ / ¾)."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    found = losses.top_response(student, *largest(teacher, 1, 1.0))
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    student, teacher = drawn(1).flatten(1), drawn(2).flatten(1)
    found = [losses.top_response(student, *largest(teacher, k, 1.0)) for k in (1, 3, 6, 11)]
    assert all(small <= large + 1e-12 for small, large in itertools.pairwise(found))
    assert found[-1] <= losses.response(student, teacher) + 1e-12


def test_top_response_has_the_gradient_of_finite_differences() -> None:
    teacher = drawn(2).flatten(1)
    known = largest(teacher, 4, 2.0)
    student = drawn(1).flatten(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: losses.top_response(own, *known, 2.0), student)


def test_cosine_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[0.0, 1.0], [6.0, 8.0]])
    assert_close(losses.cosine(student, teacher), torch.tensor(0.5))


def test_attention_by_hand() -> None:
    """Squares (9, 16) and (16, 9), both of length √337: (7, 7) / √337 apart."""
    student = torch.tensor([[[3.0, 4.0]]])
    teacher = torch.tensor([[[4.0, 3.0]]])
    assert_close(losses.attention(student, teacher), torch.tensor(math.sqrt(98 / 337)))


def test_gradient_attention_by_hand() -> None:
    assert_close(
        losses.gradient_attention(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])),
        torch.tensor(2.0),
    )


def test_relational_distance_by_hand_and_at_any_scale() -> None:
    """Distances (1, 1, 2) and (1, 2, 3) over their means 4/3 and 2: (¼, -¼, 0) apart; ½ (1/16) twice over three."""
    student = torch.tensor([[0.0], [1.0], [2.0]])
    teacher = torch.tensor([[0.0], [1.0], [3.0]])
    # Pairs (0, 1), (0, 2), (1, 2): ¾, 3/2, ¾ and ½, 3/2, 1.
    assert_close(losses.relational_distance(student, teacher), torch.tensor(0.5 * (0.0625 + 0 + 0.0625) / 3))
    assert_close(losses.relational_distance(7 * student, teacher), losses.relational_distance(student, teacher))


def test_relational_angle_by_hand_and_turned() -> None:
    """A right angle with two of 45° and a straight line: cosines differ at all three corners, six of 27 entries."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    apart = [0 - -1, half - 1, half - 1]
    expected = sum(2 * 0.5 * value**2 for value in apart) / 27
    found = losses.relational_angle(student, teacher)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    turned = student @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert_close(losses.relational_angle(turned, teacher), found)


def test_flow_by_hand() -> None:
    """One channel each, two places: G = (1 · 3 + 2 · 4) / 2 = 5.5 and 0."""
    earlier, later = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]])
    nothing = torch.zeros(1, 1, 1, 2)
    assert_close(losses.flow((earlier, later), (earlier, nothing)), torch.tensor(5.5**2))


def test_similarity_by_hand() -> None:
    """Rows of the student (1, 0), (0, 1) and of the teacher (1, 1) / √2 twice: 4 - 2 √2 in all, over 4."""
    student, teacher = torch.eye(2), torch.ones(2, 1)
    assert_close(losses.similarity(student, teacher), torch.tensor((4 - 2 * math.sqrt(2)) / 4))


def test_activation_pattern_by_hand() -> None:
    """Fires: wants 1, has 0.5; does not: wants -1, has 0 and -3."""
    student, teacher = torch.tensor([[0.5, 0.0, -3.0]]), torch.tensor([[2.0, -0.1, -1.0]])
    assert_close(losses.activation_pattern(student, teacher), torch.tensor(0.25 + 1.0))


def test_weights_by_hand() -> None:
    student, teacher = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.zeros(2), torch.tensor([[2.0]])]
    assert_close(losses.weights(student, teacher), torch.tensor(6 / 4))


def test_a_student_whose_inputs_are_all_one_has_finite_gradients() -> None:
    student = torch.ones(3, 2, requires_grad=True)
    loss = losses.relational_distance(student, drawn(1).flatten(1)[:3].float())
    loss = loss + losses.relational_angle(student, drawn(1).flatten(1)[:3].float())
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()
