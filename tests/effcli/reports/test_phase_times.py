"""The time of each phase in the terminal and on the page, with and without predictions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from pages import checked
from pydantic import ValidationError
from rich.console import Console

from effcli.reports import html
from effcli.reports.phase_times import PhaseRow, phase_rows
from effcli.reports.report import PhaseTime, Report
from effcli.reports.terminal import phase_table


def with_phases(report: Report, *phases: PhaseTime) -> Report:
    return report.model_copy(update={"phases": phases})


def shown(report: Report) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as found:
        console.print(phase_table(report))
    return found.get()


def test_without_predictions_the_sum_is_of_all(report: Report) -> None:
    made = with_phases(report, PhaseTime(name="planning", seconds=0.5), PhaseTime(name="awq", seconds=20))
    assert phase_rows(made) == [
        PhaseRow("planning", "0.50s"),
        PhaseRow("awq", "20s"),
        PhaseRow("all together", "20s"),
    ]
    assert "predicted" not in shown(made)
    assert "predicted" not in "".join(checked(html.render(made)).text)


def test_predictions_stand_beside_what_was_measured(report: Report) -> None:
    made = with_phases(
        report,
        PhaseTime(name="planning", seconds=1, reason="it was over before"),
        PhaseTime(name="awq", seconds=20, predicted=16),
        PhaseTime(name="awq: speed", seconds=10, predicted=12),
        PhaseTime(name="verifying", seconds=0.1, predicted=0),
    )
    assert phase_rows(made) == [
        PhaseRow("planning", "1.0s", "not predicted: it was over before"),
        PhaseRow("awq", "20s", "16s", "1.25x"),
        PhaseRow("awq: speed", "10s", "12s", "0.83x"),
        PhaseRow("verifying", "0.10s", "0s"),
        PhaseRow("all that were predicted", "30s", "28s", "1.07x"),
    ]
    for text in (shown(made), "".join(checked(html.render(made)).text)):
        for words in ("16s", "1.25x", "not predicted", "all that were predicted"):
            assert words in text


def test_a_report_of_before_there_were_times_opens(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    file = tmp_path / "report.json"
    data = json.loads(file.read_text())
    del data["phases"]
    file.write_text(json.dumps(data))
    found = Report.read(tmp_path)
    assert found.phases == ()
    assert phase_rows(found) == []
    assert "Time of each phase" not in html.render(found)


@pytest.mark.parametrize("data", [{"seconds": -1}, {"seconds": 1, "predicted": -2}, {"seconds": "soon"}])
def test_no_time_is_negative(data: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PhaseTime.model_validate({"name": "awq", **data})
