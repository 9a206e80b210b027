"""The `magnitude` pass: by hand, and against a plain reference."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.layers.contract import Layer, Needs
from effcli.passes.prune.magnitude import Magnitude


def kept(weight: Tensor, compare: Literal["layer", "row"], sparsity: float = 0.5) -> Tensor:
    outcome = Magnitude(sparsity=sparsity, compare=compare).apply(Layer("layer", "linear", weight, torch.float32))
    assert outcome.mask is not None and outcome.weight is weight
    return outcome.mask.kept


def test_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0], [0.5, 0.25, -2.5, 1.0]])
    assert kept(weight, "row").tolist() == [[True, False, False, True], [False, False, True, True]]
    assert kept(weight, "layer").tolist() == [[True, False, True, True], [False, False, True, False]]


@given(rows=st.integers(1, 6), columns=st.integers(1, 20), sparsity=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_nothing_kept_is_smaller_than_what_is_removed(rows: int, columns: int, sparsity: float, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double().float()
    stays = kept(weight, "layer", sparsity)
    ranked = sorted(weight.double().abs().flatten().tolist())[round(sparsity * weight.numel()) :]
    assert sorted(weight.double().abs()[stays].tolist()) == ranked


def test_what_it_asks_for() -> None:
    assert Magnitude().needs == Needs.NOTHING
    with pytest.raises(ValueError, match="compare"):
        Magnitude(compare="column")  # type: ignore[arg-type]
