"""What a run says reaches the log of the package, whoever listens."""

from __future__ import annotations

import logging

import pytest

from effcli.reports.report import Report
from effcli.run.listener import Silent, told
from effcli.run.logged import Logged


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def stage(self, stage: object) -> None:
        self.stages.append(getattr(stage, "name", ""))


def test_lines_stages_and_phases_are_logged_and_passed_on(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()
    listener = Logged(heard)
    with caplog.at_level(logging.DEBUG, "effcli"):
        listener.say("going on")
        for stage in report.stages:
            listener.stage(stage)
        with told(listener, "awq") as progress:
            progress(1, 2)
            progress(2, 2)
    assert heard.said == ["going on"]
    assert heard.stages == [stage.name for stage in report.stages]
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "going on") in lines
    assert any(level == "INFO" and text.startswith("input: 269 MB") and "perplexity" in text for level, text in lines)
    assert [text for level, text in lines if level == "DEBUG"] == ["awq begins", "awq: 0.0 s"]


def test_nothing_is_shown_unless_a_program_sets_logging_up(capfd: pytest.CaptureFixture[str]) -> None:
    import effcli

    assert effcli.__all__
    logging.getLogger("effcli.run").error("unheard")
    assert capfd.readouterr().err == ""
