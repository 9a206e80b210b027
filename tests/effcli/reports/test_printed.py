"""A report in Python shows the same tables as the command line and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import checked

from effcli.reports.printed import PrintedReport
from effcli.reports.report import Report


def test_it_prints_as_the_table(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = str(PrintedReport.of(report))
    for stage in report.stages:
        assert stage.name in text
        assert all(remark.split()[0] in text for remark in stage.remarks)
    assert "269 MB" in text
    assert "\x1b" not in text
    assert repr(PrintedReport.of(report)) == text
    assert max(map(len, text.splitlines())) <= 80


def test_a_notebook_shows_the_table_of_the_page(report: Report) -> None:
    hostile = report.stages[1].model_copy(update={"name": "<script>alert(1)</script>\x1b[2J"})
    shown = PrintedReport.of(report.model_copy(update={"stages": (report.stages[0], hostile)}))
    page = checked(shown._repr_html_())
    assert page.counts["table"] == 1
    assert "script" not in page.counts
    assert "<script>alert(1)</script>\\x1b[2J" in "".join(page.text)
    # What a style says must not reach beyond the cell of the notebook.
    (style,) = (each.inside[0] for each in page.root.all("style"))
    assert all(line.startswith(".effcli-report ") for line in str(style).strip().splitlines())


def test_it_is_the_report_of_the_output(report: Report, tmp_path: Path) -> None:
    shown = PrintedReport.of(report)
    shown.write(tmp_path)
    assert Report.read(tmp_path) == report
    assert PrintedReport.read(tmp_path) == shown
    assert shown.model_dump() == report.model_dump()
