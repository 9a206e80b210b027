"""Distances of weights whose rows and columns were scaled: what the scale did is undone, and nothing else."""

from __future__ import annotations

import pytest
import torch

from effcli.language.folding import Columns, distance

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(32, 48, generator=GENERATOR)
ROWS = torch.rand(32, 1, generator=GENERATOR) * 4 + 0.1
COLUMNS = torch.rand(48, generator=GENERATOR) * 4 + 0.1
NOISE = 0.1 * torch.randn(32, 48, generator=GENERATOR)
ERROR = float(NOISE.square().sum() / WEIGHT.square().sum())
MADE = WEIGHT + NOISE


def test_without_a_scale() -> None:
    assert distance(WEIGHT, MADE, None, rows=False) == pytest.approx(ERROR)
    assert distance(WEIGHT, 2 * WEIGHT, None, rows=False) == pytest.approx(1)


def test_a_known_scale_is_undone() -> None:
    columns = Columns((COLUMNS + 1, COLUMNS))
    assert distance(WEIGHT, MADE * COLUMNS, columns, rows=False) == pytest.approx(ERROR)
    assert distance(WEIGHT, 2 * WEIGHT * COLUMNS, columns, rows=False) > 0.1


def test_an_unknown_scale_lies_no_further_off_than_the_true_one() -> None:
    for columns, rows, made in (
        (None, True, MADE / ROWS),
        (Columns(), False, MADE * COLUMNS),
        (Columns(), True, MADE * COLUMNS / ROWS),
        (Columns((COLUMNS,)), True, MADE * COLUMNS / ROWS),
        # A norm's weight of 0 says nothing of the scale.
        (Columns((COLUMNS * torch.nan,)), True, MADE * COLUMNS / ROWS),
    ):
        assert 0.5 * ERROR < distance(WEIGHT, made, columns, rows) <= ERROR


def test_another_weight_is_not_fitted() -> None:
    other = torch.randn(32, 48, generator=GENERATOR)
    for columns in (None, Columns()):
        assert distance(WEIGHT, other, columns, rows=True) > 0.8
    assert not distance(WEIGHT, other * torch.nan, Columns(), rows=True) < 1


def test_channels_of_zeros() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    weight[:, 5] = 0
    assert distance(weight, weight * COLUMNS / ROWS, Columns(), rows=True) == pytest.approx(0, abs=1e-6)
    assert distance(weight * 0, weight * 0, Columns(), rows=True) == 0
