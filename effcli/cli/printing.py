"""What the commands print: tables for people, JSON for programs. All of standard output is written here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import MachineError
from effcli.reports.escaping import ENCODING_ERRORS, json_ascii, terminal

if TYPE_CHECKING:
    from effcli.reports.report import Report


def print_report(report: Report, layers: int | None) -> None:
    """What searches found, the table of a run, its layers (`layers` of each pass; None: only those kept), remarks."""
    from effcli.reports import terminal as tables
    from effcli.reports.terminal_search import search_table

    for stage in report.stages:
        if stage.search is not None:
            show(search_table(stage.search))
    show(tables.stage_table(report))
    if layers is not None:
        for stage in report.stages[1:]:
            show(tables.ledger_table(stage, layers))
    show(tables.trainings(report))
    show(tables.remarks(report))


def show(renderable: Any) -> None:
    """Print what rich can lay out."""
    from effcli.reports.text import Console

    with _standard_output():
        Console().print(renderable)


def to_terminal() -> bool:
    """Whether a person reads what is printed, and no program."""
    from effcli.reports.text import Console

    return Console().is_terminal


def say(line: str) -> None:
    """Print one line."""
    with _standard_output():
        print(terminal(line))


def indented(text: str) -> None:
    """Print prose below a line that it belongs to, wrapped between words."""
    from rich.padding import Padding

    from effcli.reports.text import Text

    show(Padding(Text(text), (0, 0, 0, 2), expand=False))


def print_json(data: Any) -> None:
    """Print `data` as JSON; a text is JSON already."""
    with _standard_output():
        print(json_ascii(data) if isinstance(data, str) else json.dumps(data, indent=1))


def path_of(value: str | None) -> Path | None:
    return Path(value).expanduser() if value is not None else None


def take_any_encoding() -> None:
    """Let standard output and error show what their encoding lacks in another way, instead of failing over it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=ENCODING_ERRORS)


def finish_output() -> None:
    """Write what standard output still holds."""
    if sys.stdout is not None and not sys.stdout.closed:
        with _standard_output():
            sys.stdout.flush()


@contextmanager
def _standard_output() -> Iterator[None]:
    """Map a refusal of standard output to a `MachineError`; a reader that has gone away stays a `BrokenPipeError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_output()
        raise MachineError(
            f"cannot write to standard output: {error.strerror or error}",
            "send it where there is room, or to a file with --json > FILE; what was written to OUT is complete",
        ) from error


def _forget_output() -> None:
    """Send what is still buffered nowhere: Python would complain over it when it ends."""
    import os

    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        return
