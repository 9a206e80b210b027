"""The `alps` pass: by hand, its steps against float64, and never worse than SparseGPT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from related_inputs import matrix, related, seen
from torch import Tensor

from effcli.errors import NumericsError
from effcli.formats import Mask
from effcli.layers.contract import Layer, Needs
from effcli.layers.statistics import Statistics
from effcli.passes.prune import _alps, alps
from effcli.passes.prune._alps import PENALTIES, refit, scaled, support
from effcli.passes.prune.alps import ALPS
from effcli.passes.prune.sparsegpt import SparseGPT


def left(config: Any, weight: Tensor, gram: Statistics) -> Tensor:
    outcome = config.apply(Layer("layer", "linear", weight, torch.float32), gram)
    found: Tensor = outcome.weight.masked_fill(~outcome.mask.kept, 0)
    return found


def error(weight: Tensor, made: Tensor, gram: Tensor) -> float:
    difference = made.double() - weight.double()
    return float(((difference @ gram.double()) * difference).sum())


def test_by_hand() -> None:
    """H = [[2, 1], [1, 2]] on each pair of channels, one of which stays: the other adds half of itself to it."""
    pair = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    gram = Statistics.of(torch.block_diag(pair, pair), torch.ones(4), 1)
    weight = torch.tensor([[1.0, 2.0, 8.0, -5.0], [3.0, 1.0, -4.0, -6.0]])
    expected = torch.tensor([[0.0, 2.5, 5.5, 0.0], [3.5, 0.0, 0.0, -8.0]])
    torch.testing.assert_close(left(ALPS(pattern="1:2", damping=0), weight, gram), expected)
    # And of all eight weights the four that do most.
    expected = torch.tensor([[0.0, 0.0, 8.0, -5.0], [0.0, 0.0, -4.0, -6.0]])
    torch.testing.assert_close(left(ALPS(sparsity=0.5, damping=0), weight, gram), expected)


def test_a_step_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations 3 and 4 in float64, with V for ρ U, against three steps of each penalty in float32."""
    monkeypatch.setattr(_alps, "fastest", lambda device: torch.float32)
    gram, weight = seen(related(200, 24, 1)).matrix, matrix(6, 24, 2)
    problem = scaled(gram, 0.01, "layer")

    def largest(magnitudes: Tensor) -> Tensor:
        return magnitudes > magnitudes.flatten().kthvalue(72).values

    found = support(weight, problem, 3, largest)
    hessian, w = problem.hessian.double(), weight.double()
    sparse, dual = w.clone(), torch.zeros_like(w)
    # The first step of all returns W, which `support` starts from.
    for steps, penalty in zip((4, 3, 3, 3, 3), PENALTIES, strict=True):
        inverse = torch.linalg.inv(hessian + penalty * torch.eye(24))
        for _ in range(steps):
            dense = (w @ hessian - dual + penalty * sparse) @ inverse
            whole = dense + dual / penalty
            sparse = whole * largest(whole.abs())
            dual = dual + penalty * (dense - sparse)
    torch.testing.assert_close(found, whole.float(), rtol=1e-3, atol=1e-3)


def test_the_scaled_matrix() -> None:
    gram = seen(related(50, 8, 3)).matrix
    problem = scaled(gram, 0.5, "layer")
    torch.testing.assert_close(problem.hessian.diagonal(), torch.full((8,), 1.5))
    expected = (gram / problem.scale / problem.scale.unsqueeze(1)).fill_diagonal_(1.5)
    torch.testing.assert_close(problem.hessian, expected)
    for penalty, pull in zip(PENALTIES, problem.pulls, strict=True):
        inverse = torch.linalg.inv(problem.hessian.double() + penalty * torch.eye(8))
        torch.testing.assert_close(pull.double(), penalty * inverse, rtol=0.01, atol=0.01)


@given(seed=st.integers(0, 2**32), columns=st.sampled_from([4, 12, 40]), tokens=st.integers(2, 80))
def test_refitting_ends_at_the_exact_solution(seed: int, columns: int, tokens: int) -> None:
    """Of each row by itself in float64; no step on the way there raises the error."""
    weight, hessian = matrix(3, columns, seed), scaled(seen(related(tokens, columns, seed)).matrix, 0.05, "").hessian
    kept = matrix(3, columns, seed + 1) > 0
    expected = torch.zeros(3, columns, dtype=torch.float64)
    for row, stays in enumerate(kept):
        own = hessian[stays][:, stays].double()
        expected[row, stays] = torch.linalg.solve(own, hessian[stays].double() @ weight[row].double())
    least, before = error(weight, expected, hessian), error(weight, weight * kept, hessian)
    for steps in range(4):
        after = error(weight, refit(weight, weight, hessian, kept, steps), hessian)
        assert after <= before * (1 + 1e-4) + 1e-6
        before = after
    assert error(weight, refit(weight, weight, hessian, kept, 3 * columns), hessian) <= least * 1.01 + 1e-5


@given(
    options=st.sampled_from([{"sparsity": 0.3}, {"sparsity": 0.5}, {"sparsity": 0.9}, {"pattern": "2:4"}]),
    rows=st.integers(1, 9),
    columns=st.sampled_from([4, 24, 136]),
    tokens=st.integers(1, 60),
    loudness=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**32),
)
def test_never_worse_than_sparsegpt(
    options: dict[str, Any], rows: int, columns: int, tokens: int, loudness: float, seed: int
) -> None:
    weight, gram = matrix(rows, columns, seed), seen(related(tokens, columns, seed, loudness))
    bound = error(weight, left(SparseGPT(**options), weight, gram), gram.matrix)
    whole = error(weight, torch.zeros_like(weight), gram.matrix)
    assert error(weight, left(ALPS(**options), weight, gram), gram.matrix) <= bound + 1e-5 * whole


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_it_pays_on_related_inputs(options: dict[str, Any]) -> None:
    layer = Layer("layer", "linear", matrix(48, 96, 9), torch.float32)
    assert ALPS(**options).apply(layer, seen(related(500, 96, 10))).notes["error_over_sparsegpt"] < 0.9


def test_three_digits_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16 lead to as small an error as those in float32."""
    weight, inputs = matrix(48, 96, 9), related(500, 96, 10)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(_alps, "fastest", lambda device, dtype=dtype: dtype)
        gram = seen(inputs)
        errors.append(error(weight, left(ALPS(sparsity=0.6), weight, gram), gram.matrix))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


def test_layers_of_one_input_share_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counted(gram: Tensor, damping: float, name: str) -> Any:
        calls.append(damping)
        return scaled(gram, damping, name)

    monkeypatch.setattr(alps, "scaled", counted)
    gram = seen(related(60, 16, 11))
    for k in range(3):
        left(ALPS(), matrix(4, 16, k), gram)
    assert calls == [0.01]


def test_a_threshold_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer with many weights, where the sample meets every column."""
    monkeypatch.setattr(alps, "_SAMPLED", 256)
    layer = Layer("layer", "linear", matrix(64, 48, 1), torch.float32)
    kept = ALPS(sparsity=0.75)._largest(layer.weight.abs(), layer)
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.06)
    masked = Layer("layer", "linear", layer.weight, torch.float32, mask=Mask(layer.weight > 0))
    assert not ALPS(sparsity=0.1)._largest(layer.weight.abs(), masked)[layer.weight <= 0].any()


def test_a_matrix_without_a_factor_is_refused() -> None:
    broken = Statistics.of(torch.full((8, 8), torch.nan), torch.ones(8), 5)
    with pytest.raises(NumericsError, match="layer"):
        left(ALPS(), matrix(4, 8, 0), broken)
    with pytest.raises(NumericsError, match="layer"):
        left(ALPS(), matrix(4, 8, 0), Statistics.of(torch.eye(8) - 3, torch.ones(8), 5))


def test_what_it_asks_for() -> None:
    assert ALPS().needs == Needs.GRAM
    with pytest.raises(ValueError, match="steps"):
        ALPS(steps=0)
