"""Several adapters in one: by hand, and as PEFT combines what it is given."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from effcli.adapters.combine import combined, deltas_combined, generator
from effcli.layers.edits import Edit

WEIGHTS = torch.tensor([1.0, 0.5])


def deltas() -> Tensor:
    return torch.tensor([[4.0, -3.0, 1.0, 0.0], [2.0, 5.0, -6.0, 1.0]])


def add(delta: Tensor) -> Edit:
    return Edit(lambda value: lambda values, rows: values.add_(delta[rows]), {"adapter": "sum"})


def test_linear() -> None:
    edits = [(add(delta), weight) for delta, weight in zip(deltas(), WEIGHTS.tolist(), strict=True)]
    zeros = torch.zeros(4)
    made = combined(edits, "linear", 1.0, 0, "layer").open(zeros)(zeros, slice(0, 4))
    assert made.tolist() == [5, -0.5, -2, 0.5]


def test_ties() -> None:
    """Of each the two largest stay: [4, -3, 0, 0] and [0, 5, -6, 0]. The signs of the sums are +, +, -, +."""
    assert deltas_combined(deltas(), WEIGHTS, "ties", 0.5).tolist() == [4, 2.5, -3, 0]


def test_dare_keeps_the_mean() -> None:
    ones = torch.ones(2, 200, 500)
    made = deltas_combined(ones, WEIGHTS, "dare", 0.25, [generator(0, number, "a") for number in (0, 1)])
    assert sorted(set(made.flatten().tolist())) == [0, 2, 4, 6]
    assert float(made.mean()) == pytest.approx(1.5, rel=0.02)
    assert float((made > 3).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_draws_hang_on_seed_adapter_and_place() -> None:
    def drawn(seed: int, number: int, name: str) -> list[float]:
        return torch.rand(4, generator=generator(seed, number, name)).tolist()

    assert drawn(0, 0, "a") == drawn(0, 0, "a")
    assert len({tuple(drawn(*key)) for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))}) == 4


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("combination", ["ties", "dare", "dare_ties"])
def test_as_peft_combines(combination: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    given, weights = torch.randn(3, 40, 30, generator=random), torch.tensor([1.0, 0.3, -0.5])
    generators = [generator(0, number, "x") for number in range(3)]
    made = deltas_combined(given.clone(), weights, combination, density, generators)  # type: ignore[arg-type]
    # The same draws for PEFT's.
    draws = iter([torch.rand(40, 30, generator=generator(0, number, "x")) < density for number in range(3)])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(draws).float())
    theirs = {"ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties"}[combination]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = getattr(merge_utils, theirs)(list(given), weights, density)
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("combination", ["linear", "ties", "dare"])
def test_rows_of_a_whole(combination: str) -> None:
    """Slices of rows give what the whole matrix gives."""
    random = torch.Generator().manual_seed(0)
    weight, first, second = torch.randn(3, 6, 5, generator=random)
    edits = [(add(first), 2.0), (add(second), 0.5)]
    edit = combined(edits, combination, 0.5, 0, "layer")  # type: ignore[arg-type]
    rows = edit.open(weight)
    made = torch.cat([rows(weight[part].clone(), part) for part in (slice(0, 2), slice(2, 6))])
    draws = [generator(0, number, "layer") for number in (0, 1)]
    changes = torch.stack([first, second])
    if combination == "linear":
        delta = 2.0 * first + 0.5 * second
    else:
        delta = deltas_combined(changes, torch.tensor([2.0, 0.5]), combination, 0.5, draws)  # type: ignore[arg-type]
    torch.testing.assert_close(made, weight + delta)
    assert edit.notes["adapters"] == [{"adapter": "sum"}] * 2


def test_one_is_left_as_it_is() -> None:
    edit = add(torch.ones(2, 2))
    assert combined([(edit, 1.0)], "linear", 0.5, 0, "layer") is edit
