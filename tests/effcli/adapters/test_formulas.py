"""Each formula on numbers small enough to work it out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effcli.adapters import formulas
from effcli.layers.edits import Rows

W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
A = torch.tensor([[1.0, 3.0]])
B = torch.tensor([[1.0], [-1.0], [0.0]])
# W + 2 B A
LORA = [[3.0, 8.0], [1.0, -2.0], [0.0, 0.0]]


def whole(rows: Rows, weight: Tensor = W) -> Tensor:
    """All rows, in two slices."""
    parts = [slice(0, 1), slice(1, len(weight))]
    return torch.cat([rows(weight[part].clone(), part) for part in parts])


def test_low_rank() -> None:
    assert whole(formulas.low_rank(A, B, 2.0)).tolist() == LORA


def test_decomposed() -> None:
    """The rows of V have the norms √73, √5 and 0; each gets the length m."""
    made = whole(formulas.decomposed(A, B, 2.0, torch.tensor([10.0, 5.0, 7.0])))
    first, second = 10 / math.sqrt(73), 5 / math.sqrt(5)
    expected = torch.tensor([[3 * first, 8 * first], [second, -2 * second], [0, 0]])
    torch.testing.assert_close(made, expected)


def test_decomposed_embedding() -> None:
    """Here the columns of V have the norms √10 and √68."""
    made = whole(formulas.decomposed_embedding(W, B.t(), A.t(), 2.0, torch.tensor([1.0, 2.0])))
    expected = torch.tensor(LORA) * torch.tensor([1 / math.sqrt(10), 2 / math.sqrt(68)])
    torch.testing.assert_close(made, expected)


def test_hadamard() -> None:
    """2 (B A) ∘ (C A), C = 1: W + 2 [[1, 9], [-1, -9], [0, 0]]."""
    made = whole(formulas.hadamard((B, A, torch.ones(3, 1), A), 2.0))
    assert made.tolist() == [[3, 20], [1, -14], [0, 0]]


def test_kronecker() -> None:
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert formulas.kronecker(first, second).tolist() == [[0, 1, 0, 2], [1, 0, 2, 0]]


def test_kronecker_of_a_kernel() -> None:
    """Input channels 0 and 1 get 1 and 2 times the kernel [3, 4]."""
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[[[3.0, 4.0]]]])
    assert formulas.kronecker(first, second).tolist() == [[3, 4, 6, 8]]


def test_tucker() -> None:
    """One output of 2, inputs of 3 and 5, a kernel [7, 1]."""
    made = formulas.tucker(torch.tensor([[[[7.0, 1.0]]]]), torch.tensor([[2.0]]), torch.tensor([[3.0, 5.0]]))
    assert made.tolist() == [[[[42, 6]], [[70, 10]]]]


def test_scaled() -> None:
    assert whole(formulas.scaled_inputs(torch.tensor([2.0, 3.0]))).tolist() == [[2, 6], [6, 12], [0, 0]]
    factor = formulas.scaled_outputs(torch.tensor([2.0, 3.0, 4.0]))
    assert whole(factor).tolist() == [[2, 4], [9, 12], [0, 0]]
    assert whole(factor, torch.ones(3)).tolist() == [2, 3, 4]


def test_sum() -> None:
    assert whole(formulas.sum_with(torch.ones(3, 2), 0.5)).tolist() == [[1.5, 2.5], [3.5, 4.5], [0.5, 0.5]]


def test_replaced() -> None:
    other = -W.to(torch.bfloat16)
    assert whole(formulas.replaced(other)).tolist() == (-W).tolist()
    own = W.clone()
    formulas.replaced(own)(torch.zeros_like(W), slice(0, 3)).zero_()
    assert torch.equal(own, W)
    rows = formulas.replaced_rows(torch.tensor([2, 0]), torch.tensor([[9.0, 9.0], [8.0, 8.0]]))
    assert whole(rows).tolist() == [[8, 8], [3, 4], [9, 9]]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_float64_reference(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight, a, b, m = (torch.randn(shape, generator=random) for shape in ((30, 20), (4, 20), (30, 4), (30,)))
    rows = formulas.low_rank(a, b, 0.7) if kind == "lora" else formulas.decomposed(a, b, 0.7, m)
    exact = weight.double() + 0.7 * b.double() @ a.double()
    if kind == "dora":
        exact *= (m.double() / exact.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(whole(rows, weight).double(), exact, rtol=1e-5, atol=1e-5)
