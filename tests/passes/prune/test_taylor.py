"""The `taylor` pass: by hand, and against the loss itself without each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from effcli.cli import main
from effcli.layers.contract import Layer, Needs
from effcli.layers.statistics import Gradients, Statistics
from effcli.passes.prune.taylor import Taylor


def kept(weight: Tensor, gradients: Tensor, gradient: Literal["squares", "sum"], **options: Any) -> list[list[bool]]:
    """gradients: of each sample, float32 (samples, out, in)."""
    config = Taylor(gradient=gradient, **options)
    seen = Statistics(weight.shape[1], config.needs)
    seen.add(torch.ones(1, weight.shape[1]))
    own = gradients.square() if gradient == "squares" else gradients
    seen = seen.with_gradients(Gradients.of({config.needs: own.sum(0)}, len(gradients)))
    outcome = config.apply(Layer("layer", "linear", weight, torch.float32), seen)
    assert outcome.mask is not None and outcome.weight is weight
    found: list[list[bool]] = outcome.mask.kept.tolist()
    return found


def test_by_hand() -> None:
    """Two samples. Squares: 1 · √5, 2 · √2, 3 · 0, 1 · √18; sums: 1 · 3, 2 · 0, 3 · 0, 1 · 6; twice that below."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0], [2.0, 4.0, 6.0, 2.0]])
    gradients = torch.tensor([[[1.0, 1.0, 0.0, 3.0]], [[2.0, -1.0, 0.0, 3.0]]]).expand(2, 2, 4)
    assert kept(weight, gradients, "squares", compare="row") == [[False, True, False, True]] * 2
    assert kept(weight, gradients, "sum", compare="row") == [[True, False, False, True]] * 2
    assert kept(weight, gradients, "squares") == [[False, False, False, True], [True, True, False, True]]


def test_to_first_order_it_is_the_change_of_the_loss() -> None:
    """Of a linear classifier in float64, with weights so small that higher orders vanish."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 3, bias=False).double()
    weight = torch.randn(3, 6, generator=generator) * 1e-4
    inputs, labels = torch.randn(20, 6, generator=generator, dtype=torch.float64), torch.arange(20) % 3

    def loss(value: Tensor) -> Tensor:
        return nn.functional.cross_entropy(inputs @ value.double().t(), labels, reduction="sum")

    with torch.no_grad():
        layer.weight.copy_(weight)
    (gradient,) = torch.autograd.grad(loss(layer.weight), layer.weight)
    seen = Statistics(6, Needs.GRADIENTS).with_gradients(Gradients.of({Needs.GRADIENTS: gradient.float()}, 20))
    scores = Taylor(gradient="sum").scores(Layer("layer", "linear", weight, torch.float32), seen)
    for place in [(0, 0), (1, 3), (2, 5)]:
        without = weight.clone()
        without[place] = 0
        change = abs(float(loss(without) - loss(weight)))
        assert float(scores[place]) == pytest.approx(change, rel=1e-2)


@pytest.mark.parametrize("command", [["plan"], ["compress", "-o", "out"]], ids=lambda command: command[0])
@pytest.mark.parametrize("step", ["taylor", "magnitude,taylor:allocation=global"])
def test_a_classifier_needs_labels(
    command: list[str], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is done."""
    monkeypatch.chdir(tmp_path)
    np.savez("inputs.npz", images=np.zeros((8, 28, 28), np.uint8))
    steps = [part for name in step.split(",") for part in ("--pass", name)]
    assert main([*command, "sample:cnn", *steps, "--calib", "inputs.npz"]) == 1
    assert "inputs.npz has no labels" in capsys.readouterr().err and not Path("out").exists()


def test_what_it_asks_for() -> None:
    assert Taylor().needs == Needs.SQUARED_GRADIENTS and Taylor(gradient="sum").needs == Needs.GRADIENTS
