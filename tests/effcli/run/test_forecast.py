"""What is expected of the phases, next to what they took and to what is left."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from effcli.reports.report import PhaseTime
from effcli.run.forecast import Expected, Forecast

FORECAST = Forecast(
    phases=(
        Expected(phase="planning", seconds=1),
        Expected(phase="awq", seconds=20),
        Expected(phase="verifying", reason="in one piece"),
        Expected(phase="exporting", seconds=4),
    )
)


def test_all_together() -> None:
    assert FORECAST.seconds == 25
    assert Forecast().seconds == 0


def test_beside_what_was_measured() -> None:
    measured = [PhaseTime(name=name, seconds=2) for name in ("awq", "verifying", "texts")]
    found = [(each.name, each.seconds, each.predicted, each.reason) for each in FORECAST.beside(measured)]
    assert found == [
        ("awq", 2, 20, ""),
        ("verifying", 2, None, "in one piece"),
        ("texts", 2, None, "the rehearsal had no such phase"),
    ]
    ended = Forecast(ended="there is no text").beside(measured[:1])
    assert [each.reason for each in ended] == ["there is no text"]


def test_what_is_left() -> None:
    assert FORECAST.left((), "planning", 0.25) == 0.75 + 24
    assert FORECAST.left({"planning"}, "awq", 5) == 15 + 4
    # A phase that takes longer than expected says itself how long.
    assert FORECAST.left({"planning"}, "awq", 30) == 4
    assert FORECAST.left({"planning"}, "awq", 30, own=10) == 14
    assert FORECAST.left({"planning", "awq"}, "verifying", 1) == 4
    assert FORECAST.left({"planning", "awq"}, "texts", 1) == 4
    assert Forecast().left((), "awq", 1) == 0


def test_no_time_is_negative() -> None:
    with pytest.raises(ValidationError):
        Expected(phase="awq", seconds=-1)
