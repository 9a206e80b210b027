"""The `wanda` pass: by hand, and against a plain reference in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.layers.contract import Layer, Needs
from effcli.layers.statistics import Statistics
from effcli.passes.prune.wanda import Wanda


def kept(weight: Tensor, inputs: Tensor, sparsity: float = 0.5) -> Tensor:
    seen = Statistics(inputs.shape[1], Needs.NORMS)
    seen.add(inputs)
    outcome = Wanda(sparsity=sparsity).apply(Layer("layer", "linear", weight, torch.float32), seen)
    assert outcome.mask is not None and outcome.weight is weight
    return outcome.mask.kept


def test_by_hand() -> None:
    """The inputs have the norms 5, 1, 2 and 0: the scores are 5, 3, 4, 0 and 5, 6, 8, 0."""
    inputs = torch.tensor([[3.0, 1.0, 0.0, 0.0], [4.0, 0.0, 2.0, 0.0]])
    weight = torch.tensor([[1.0, -3.0, 2.0, 9.0], [-1.0, 6.0, 4.0, 9.0]])
    assert kept(weight, inputs).tolist() == [[True, False, True, False], [False, True, True, False]]


@given(columns=st.integers(1, 20), sparsity=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_is_the_plain_reference(columns: int, sparsity: float, seed: int) -> None:
    """In a single row what is kept has the highest scores, but for ties of float32."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(1, columns, generator=generator), torch.randn(30, columns, generator=generator)
    scores = weight.double().abs() * inputs.double().square().sum(0).sqrt()
    stays = kept(weight, inputs, sparsity)
    ranked = sorted(scores.flatten().tolist())[min(round(sparsity * columns), columns - 1) :]
    torch.testing.assert_close(torch.tensor(sorted(scores[stays].tolist())), torch.tensor(ranked), rtol=1e-5, atol=0)


def test_what_it_asks_for() -> None:
    assert Wanda().needs == Needs.NORMS
