"""What the commands print: tables for people, JSON for programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effcli.reports.report import Report


def print_report(report: Report, layers: int | None) -> None:
    """The table of a run, what became of its layers (`layers` of each pass; None: only those kept), and remarks."""
    from effcli.reports import terminal

    show(terminal.stage_table(report))
    if layers is not None:
        for stage in report.stages[1:]:
            show(terminal.ledger_table(stage, layers))
    show(terminal.remarks(report))


def show(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=1))


def path_of(value: str | None) -> Path | None:
    return Path(value).expanduser() if value is not None else None
