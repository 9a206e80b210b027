"""Text for rich: names from outside are made visible before a table is laid out, and again where a console writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import rich.console
import rich.text
from rich.cells import cell_len
from rich.measure import Measurement
from rich.segment import Segment

from effcli.reports.escaping import terminal

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType, RenderResult


class Text(rich.text.Text):
    """Text in which no character is left that a terminal obeys."""

    def __init__(self, text: str = "", *args: Any, **kwargs: Any) -> None:
        super().__init__(terminal(text, lines=True), *args, **kwargs)

    def append(self, text: rich.text.Text | str, style: Any = None) -> Text:
        super().append(terminal(text, lines=True) if isinstance(text, str) else text, style)
        return self


class Name:
    """The name of a layer in a cell: too long for one line, it goes on behind a dot, never in the middle of a word.

    A name without dots, as C has it, goes on behind an underscore.
    """

    def __init__(self, name: str) -> None:
        shown = terminal(name, lines=True)
        end = "." if "." in shown else "_"
        self._parts = re.findall(rf"\{end}?[^{end}]*", shown)[:-1] or [""]

    def __rich_measure__(self, console: rich.console.Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(cell_len, self._parts)), cell_len("".join(self._parts)))

    def __rich_console__(self, console: rich.console.Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in self._parts:
            if lines[-1] and cell_len(lines[-1] + part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")

    @property
    def narrowest(self) -> int:
        """The width in which no word is cut."""
        return max(map(cell_len, self._parts))


class Console(rich.console.Console):
    """A console that writes no control character but its own, whatever it is given."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(terminal(segment.text, lines=True), segment.style)


def draws_bars(console: rich.console.Console) -> bool:
    """Whether a console can show a bar that moves: a terminal can, and a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
