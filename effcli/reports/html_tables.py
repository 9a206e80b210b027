"""Tables of a page, before a template draws them: heads, rows of fields, and what a column is sorted by."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from effcli.reports.columns import EMPTY_TEXT

# A table of more rows is folded until asked for.
LONG = 40


@dataclass(frozen=True)
class Head:
    """The head of a column. note: a small line below, such as a unit; hint: what the figure is; css: classes."""

    title: str
    note: str = ""
    css: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Field:
    """One cell. key: what its column is sorted by, unless its text; note: a small line below, in the classes `tone`.

    text_css, css: classes of the text and of the cell; bar: the length of a bar below, as CSS has it; picture: drawn
    in place of the text; row: whether it is the head of its row.
    """

    text: str = ""
    note: str = ""
    key: str | None = None
    css: str = ""
    text_css: str = ""
    tone: str = ""
    bar: str = ""
    picture: Markup = field(default_factory=Markup)
    row: bool = False

    @property
    def plain(self) -> bool:
        """Whether the text is all there is in it, as in most cells of a long table."""
        return not (self.picture or self.text_css or self.note or self.bar)


@dataclass(frozen=True)
class Table:
    """A table; name: what a screen reader calls it; css: `ledger` for one whose columns the reader can sort by."""

    name: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[Field]]
    css: str = "ledger"


@dataclass(frozen=True)
class Folded:
    """A table under a title that opens and closes it; closed where it has many rows."""

    title: str
    note: str
    table: Table
    wrapped: str = ""
    closed: bool | None = None

    @property
    def open(self) -> bool:
        return len(self.table.rows) <= LONG if self.closed is None else not self.closed


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


def is_positive(value: float) -> bool:
    """Whether a bar can be drawn for it."""
    return 0 < value < math.inf


def number(value: float, text: str, bar: str = "") -> Field:
    """A field that is sorted by `value`; NaN as the worst there is."""
    key = "Infinity" if value != value else repr(value).replace("inf", "Infinity")
    return Field(text, key=key, css="number", bar=bar)


def missing() -> Field:
    """The field of a figure that was not measured; it is sorted below all others."""
    return Field(EMPTY_TEXT, key="-1", css="number none")


def headings(titles: Sequence[str], numeric: Container[str] = ()) -> list[Head]:
    """The heads of columns, figures to the right."""
    return [Head(title, css="number" if title in numeric else "") for title in titles]


__all__ = [
    "LONG",
    "Field",
    "Folded",
    "Head",
    "Table",
    "headings",
    "is_positive",
    "missing",
    "number",
    "value_text",
]
