"""Pieces of HTML that the sections of a report share. Every text that goes in is escaped here."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from effcli.reports.columns import EMPTY_TEXT, Cell
from effcli.reports.escaping import markup as escape

# A table of more rows is folded until asked for.
LONG = 40


def figure(found: Cell | None) -> str:
    """A figure with what is to be said of it below."""
    if found is None:
        return f'<span class="none">{EMPTY_TEXT}</span>'
    tone = " bad" if found.tone else ""
    if not found.note:
        return f'<span class="figure{tone}">{escape(found.text)}</span>'
    return f'<span class="figure">{escape(found.text)}</span><small class="note{tone}">{escape(found.note)}</small>'


def value_text(value: Any) -> str:
    """A value of an option or a note in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(value_text(item) for item in value)
    return str(value)


def breakable(name: str) -> str:
    """A layer's name that may wrap after its dots."""
    return escape(name).replace(".", ".<wbr>")


def is_positive(value: float) -> bool:
    """Whether a bar can be drawn for it."""
    return 0 < value < math.inf


def number(value: float, text: str) -> str:
    """A table cell that is sorted by `value`."""
    return f'<td class="number" data-v="{value!r}">{escape(text)}</td>'


def missing() -> str:
    """The table cell of a figure that was not measured; it is sorted below all others."""
    return f'<td class="number none" data-v="-1">{EMPTY_TEXT}</td>'


def headings(titles: Sequence[str], numeric: Container[str]) -> str:
    """The head of a table, figures to the right."""
    return "".join(f'<th scope="col"{right(title in numeric)}>{escape(title)}</th>' for title in titles)


def right(numeric: bool) -> str:
    """The attribute that sets figures to the right."""
    return ' class="number"' if numeric else ""


def sortable(head: str, rows: Iterable[str]) -> str:
    """A table whose columns the reader can sort by; the head and each row are cells in a line."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="ledger"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def folded(title: str, note: str, rows: int, content: str) -> str:
    """`content` under a title that opens and closes it; closed where it has many rows."""
    opened = " open" if rows <= LONG else ""
    return f"<details{opened}><summary>{title} <small>{note}</small></summary>{content}</details>"
