"""Nothing that a terminal obeys comes out of a console, however it got in."""

from __future__ import annotations

import io

import pytest
from rich import text
from rich.table import Table

from effcli.reports.text import Console, Text, draws_bars

NASTY = "a\x1b]0;x\x07\u202eb"
VISIBLE = r"a\x1b]0;x\x07\u202eb"


def test_text_is_laid_out_with_what_is_visible() -> None:
    table = Table(box=None)
    table.add_column(Text(NASTY))
    table.add_row(Text("").append(NASTY))
    assert printed(table).split() == [VISIBLE, VISIBLE]


def test_what_others_made_is_caught_as_it_is_written() -> None:
    assert printed(text.Text(NASTY)).rstrip("\n") == r"a\x1b]0;x\u202eb"
    assert "\x1b]" not in printed(NASTY)


def test_colours_stay() -> None:
    assert printed(Text(NASTY, style="bold"), colours=True) == f"\x1b[1m{VISIBLE}\x1b[0m\n"


@pytest.mark.parametrize(("widgets", "draws"), [(None, False), ("found", True)])
def test_a_notebook_draws_bars_with_ipywidgets_alone(
    widgets: str | None, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effcli.reports.text.find_spec", lambda name: widgets)
    assert draws_bars(Console(file=io.StringIO(), force_jupyter=True)) == draws
    assert not draws_bars(Console(file=io.StringIO(), force_jupyter=False))
    assert draws_bars(Console(file=io.StringIO(), force_terminal=True))


def printed(thing: object, colours: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=colours, color_system="standard" if colours else None).print(thing)
    return file.getvalue()
