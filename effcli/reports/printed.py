"""A report in Python: it prints as the table of the command line, and a notebook shows the table of the page."""

from __future__ import annotations

import io

from effcli.reports import html
from effcli.reports.report import Report
from effcli.reports.terminal import remarks, stage_table
from effcli.reports.text import Console


class PrintedReport(Report):
    """The record of one run: what `compress` returns, and what `report.json` in its output holds.

    `stages` has the input first and one entry per pass, each with its size in bytes, quality, speed and a row for every
    layer. `print(report)` shows these as a table, and so does a notebook whose cell ends with the report.
    `read(folder)` reads the report of an output, and raises `CheckpointError` where there is none.
    """

    @classmethod
    def of(cls, report: Report) -> PrintedReport:
        """The same report as one that prints."""
        return cls.model_validate(report, from_attributes=True)

    def __str__(self) -> str:
        """The table of all stages with the remarks below, as wide as the terminal, without colours."""
        text = io.StringIO()
        console = Console(file=text, force_terminal=False, force_jupyter=False, color_system=None)
        console.print(stage_table(self))
        console.print(remarks(self))
        return text.getvalue().rstrip()

    def __repr__(self) -> str:
        """As it prints, so that a session shows it by its name: all fields would fill many screens."""
        return str(self)

    def _repr_html_(self) -> str:
        """The table of all stages as HTML that loads nothing and runs no script."""
        return html.table(self)


__all__ = ["PrintedReport"]
