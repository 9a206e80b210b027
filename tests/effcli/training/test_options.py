"""The options that training passes share: how the learning rate goes, and how many steps there are."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from effcli.training.options import TrainingOptions


def test_the_cosine_is_that_of_torch() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(10):
        assert TrainingOptions().factor(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_it_rises_to_its_highest_and_falls_to_nothing() -> None:
    options = TrainingOptions(warmup=4)
    rates = [options.factor(step, 12) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.05
    assert rates[8] == pytest.approx(0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert [TrainingOptions(schedule="constant", warmup=2).factor(step, 9) for step in (0, 1, 5, 8)] == [0.5, 1, 1, 1]


def test_a_warmup_longer_than_the_training() -> None:
    assert [TrainingOptions(warmup=10).factor(step, 2) for step in range(2)] == [0.1, 0.2]
    assert TrainingOptions(warmup=1).factor(0, 1) == 1


def test_steps_take_the_place_of_epochs() -> None:
    assert TrainingOptions(epochs=3).total(7) == 21
    assert TrainingOptions(epochs=3, steps=5).total(7) == 5


def test_steps_of_an_epoch() -> None:
    assert TrainingOptions().per_epoch(65, 8) == 9
    assert TrainingOptions(batch_size=16).per_epoch(65, 8) == 5
    assert TrainingOptions(accumulation=4).per_epoch(65, 8) == 3
    assert TrainingOptions(hold_out=0.5).per_epoch(64, 8) == 4
    assert TrainingOptions().per_epoch(1, 8) == 1


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"steps": 0}, {"learning_rate": 0}, {"clip": 0}, {"accumulation": 0}, {"warmup": -1}]
)
def test_what_is_out_of_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainingOptions(**wrong)  # type: ignore[arg-type]
