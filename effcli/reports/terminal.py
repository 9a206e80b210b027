"""A report in the terminal: tables that stay readable at 80 columns, remarks, and the progress of a sweep."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from effcli.platform import memory
from effcli.reports import units
from effcli.reports.columns import (
    EMPTY_TEXT,
    Cell,
    Column,
    became,
    columns,
    conditions,
    export_lines,
    training_text,
)
from effcli.reports.phase_times import phase_rows, phase_titles
from effcli.reports.text import Console, Name, Text, draws_bars

if TYPE_CHECKING:
    from effcli.reports.compare import Comparison, Unit
    from effcli.reports.report import LedgerRow, Report, Stage
    from effcli.run.forecast import Forecast

# Columns that share one, so that a full table fits 80 characters: the second stands below the first.
_STACKED = {"seconds": "memory", "agreement": "sqnr"}
_SHORT_TITLES = {"memory": "memory", "sqnr": "SQNR, dB"}
# A long name that is two words in its project's own spelling.
_NARROW_TITLES = {"onnxruntime": "ONNX\nRuntime"}
_LONG_NAME = 7
# A phase of fewer seconds leaves no line.
MOMENT = 2.0
_HEIGHTS = "▁▂▃▄▅▆▇█"
_UNITS: dict[Unit, Callable[[float], str]] = {
    "bytes": units.size,
    "ratio": units.ratio,
    "bits": units.bits,
    "number": lambda value: units.significant(value, 4),
    "fraction": units.fraction,
    "rate": units.significant,
    "decibels": units.significant,
    "milliseconds": units.significant,
    "seconds": units.duration,
}


def stage_table(report: Report) -> Group:
    """The table of a run: one row for the input and one per pass, each figure with its change below it.

    Below the table: under what conditions the figures were taken, and which kernels ran.
    """
    found = {column.key: column for column in columns(report)}
    kernels = found.pop("kernel", None)
    table = _table()
    fillers: list[Callable[[int], Text]] = []
    longest = max(len(line) for cell in found["step"].cells if cell for line in (cell.text, cell.note))
    if longest > _LONG_NAME:
        # 80 columns hold long names or the top-5, which says least; the HTML report has both.
        found.pop("top5", None)
    for key, column in found.items():
        below = found.get(_STACKED.get(key, ""))
        if key in _STACKED.values() and any(found.get(top) for top, low in _STACKED.items() if low == key):
            continue
        header = [_NARROW_TITLES.get(column.title, column.title)]
        header += [_SHORT_TITLES.get(below.key, below.title) if below else column.unit]
        # What does not fit is cut with a mark: "1.2" must not stand for 1.21 GB.
        # A classifier's table has more columns: there even a short name gives way.
        fixed = column.numeric or (longest <= 8 and "top1" not in found)
        table.add_column(
            "\n".join(header).rstrip(),
            justify="right" if column.numeric else "left",
            no_wrap=fixed,
            overflow="ellipsis" if fixed else "fold",
        )
        fillers.append(_stacked(column, below) if below else _noted(column))
    for row in range(len(report.stages)):
        table.add_row(*(fill(row) for fill in fillers))
    captions = conditions(report.stages)
    if kernels is not None:
        steps: dict[str, list[str]] = {}
        for stage, cell in zip(report.stages, kernels.cells, strict=True):
            if cell:
                steps.setdefault(cell.text, []).append(stage.name)
        captions += [f"kernel of {', '.join(names)}: {text}" for text, names in steps.items()]
    return Group(table, *(Text(caption, style="dim") for caption in captions))


def stage_line(report: Report) -> str:
    """The last stage of `report` in one plain line, for logs and for the moment a pass ends."""
    parts = []
    for column in columns(report)[1:]:
        cell = column.cells[-1]
        if cell is not None and column.key != "kernel":
            label = {"size": "", "seconds": "in", "bits": ""}.get(column.key, column.title)
            unit = " bits/weight" if column.key == "bits" else f" {column.unit}" if column.unit else ""
            note = f" ({cell.note})" if cell.note else ""
            parts.append(f"{label} {cell.text}{unit}{note}".strip())
    return f"{report.stages[-1].name}: {', '.join(parts)}"


def ledger_table(stage: Stage, worst: int | None = 10) -> Group:
    """The `worst` compressed layers of `stage` by their error (None: all), and every layer that was kept, with why."""
    compressed = sorted((row for row in stage.ledger if row.status == "compressed"), key=_harm, reverse=True)
    shown = compressed if worst is None else compressed[:worst]
    by_output = any(row.output_error is not None for row in compressed)
    by_weight = any(row.weight_error is not None for row in compressed)
    heading = f"{stage.name}: {became(stage)}"
    if compressed:
        heading = _ledger_title(stage.name, len(shown), len(compressed), by_output or by_weight)
    title = Text(heading, style="bold")
    kept = [Text(line, style="dim") for line in _kept_lines(row for row in stage.ledger if row.status == "kept")]
    if not shown:
        return Group(title, *kept)
    table = _table()
    table.add_column("layer", overflow="fold", min_width=_narrowest(row.name for row in shown))
    table.add_column("format", overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    if by_output:
        table.add_column("output\nerror", justify="right", no_wrap=True)
    if by_weight:
        table.add_column("weight\nerror", justify="right", no_wrap=True)
    for row in shown:
        errors = [row.output_error] * by_output + [row.weight_error] * by_weight
        table.add_row(
            _with_reason(row.name, row.reason),
            Text(row.format),
            units.bits(row.bits_per_weight),
            units.size(row.nbytes),
            *(EMPTY_TEXT if value is None else units.error(value) for value in errors),
        )
    return Group(title, table, *kept)


def remarks(report: Report) -> Group:
    """What the user should know of how the request was carried out, stage by stage, and of the exports, if any."""
    lines = []
    for stage in report.stages:
        for remark in stage.remarks:
            line = Text(f"{stage.name}: ", style="yellow")
            line.append(remark, style="default")
            lines.append(line)
    lines += [Text("exported to ", style="yellow").append(line, "default") for line in export_lines(report)]
    return Group(*lines)


def trainings(report: Report) -> Group:
    """How each pass that trained went, in a line with its loss as a row of blocks."""
    lines = []
    for stage in report.stages:
        if stage.training is not None:
            curve = _blocks([loss for _, loss in stage.training.curve if math.isfinite(loss)])
            line = Text(f"{stage.name}: ", style="bold").append(training_text(stage.training), "default")
            lines.append(line.append(f" {curve}", "dim") if curve else line)
    return Group(*lines)


def phase_table(report: Report) -> Table:
    """How long each phase took, next to what was predicted where it was."""
    rows = phase_rows(report)
    titles = phase_titles(rows)
    table = _table()
    for title in titles:
        table.add_column(title, justify="left" if title == titles[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row[: len(titles)]))
    return table


def compare_table(a: Report, b: Report, worst: int | None = 20) -> Group:
    """Two runs side by side, what makes them hard to compare, and the layers in which they differ (None: all)."""
    from effcli.reports.compare import compare

    comparison = compare(a, b)
    sides = (comparison.a, comparison.b)
    table = _table()
    table.add_column("")
    for side in sides:
        table.add_column(Text(side.label), justify="right", overflow="fold")
    table.add_column("change", justify="right", no_wrap=True)
    if comparison.a.model != comparison.b.model:
        table.add_row("model", *(Text(side.model, overflow="fold") for side in sides), "differs")
    table.add_row("passes", *(Text(", ".join(side.steps) or "none") for side in sides), "")
    for figure in comparison.figures:
        values = (EMPTY_TEXT if value is None else _UNITS[figure.unit](value) for value in (figure.a, figure.b))
        table.add_row(figure.title, *values, figure.change)
    if any(side.kernel for side in sides):
        table.add_row("kernel", *(Text(side.kernel or EMPTY_TEXT) for side in sides), "")
    parts: list[RenderableType] = [table]
    parts += [Text("note: ", style="yellow").append(caveat, "default") for caveat in comparison.caveats]
    if comparison.layers:
        parts += [Text(), _layer_differences(comparison, worst)]
    if comparison.same_layers:
        verb = "is" if comparison.same_layers == 1 else "are"
        parts.append(Text(f"{units.count(comparison.same_layers, 'layer')} {verb} the same in both", style="dim"))
    return Group(*parts)


class SweepProgress:
    """The phases of a run, one after another: how far each is, how long it has taken, the time left, resident memory.

    With `quiet`, and where the console is no terminal, one plain line for each phase when it ends, unless it was over
    in a moment. As a context manager it takes the bar away when the work fails.
    """

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        forecast: Forecast | None = None,
    ) -> None:
        """forecast: what the phases are expected to take, for the time that is left of them all."""
        self._console = console or Console(stderr=True)
        self._plain = quiet or not draws_bars(self._console)
        self._clock = clock
        self._forecast = forecast
        self._over: set[str] = set()
        self._bar: Progress | None = None
        self._name = ""
        self._unit = "block"
        self._total = 0
        self._done = 0
        self._began = 0.0
        # From when and from how many on the pace is taken.
        self._pace: tuple[float, int] | None = None

    def start(self, name: str, total: int, unit: str = "block") -> None:
        """Begin the phase `name` over `total` blocks, or whatever `unit` says; 0 where the total is not known yet.

        Told again under the same name before `finish`, it is the same phase, whose total is known now.
        """
        again = name == self._name
        if not again:
            self._stop()
            self._name, self._began, self._done, self._pace = name, self._clock(), 0, None
        self._unit, self._total = unit, total
        if self._plain:
            return
        if self._bar is None:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
                # What a notebook's kernel says of widgets that are gone is not for the reader.
                redirect_stderr=not self._console.is_jupyter,
                expand=True,
                refresh_per_second=2,
                get_time=self._clock,
            )
            self._bar.add_task(name, total=total or None, state=self._state())
            self._bar.start()
        else:
            self._bar.update(self._bar.task_ids[0], total=total or None, state=self._state())

    def advance(self, done: int) -> None:
        """Say that `done` blocks, counted from the start of the phase, are finished."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, state=self._state())
        # A pass that goes on after a crash begins in the middle.
        self._pace = self._pace or (self._clock(), done)

    def finish(self) -> None:
        """End the phase: take the bar away, and leave one line where there was none."""
        self._stop()
        self._over.add(self._name)
        spent = self._clock() - self._began
        if self._name and self._plain and spent >= MOMENT:
            counted = f"{units.count(self._done, self._unit)} in " if self._done else ""
            line = f"{self._name}: {counted}{units.duration(spent)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._name = ""

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _state(self) -> str:
        """'block 7 of 30, 1m20s left, 5m in all, 812 MB': the first block's time is not known before it is over."""
        parts = [f"{self._unit} {min(self._done + 1, self._total)} of {self._total}"] if self._total else []
        began, first = self._pace or (self._began, 0)
        now, left = self._clock(), None
        if first < self._done < self._total:
            left = (now - began) / (self._done - first) * (self._total - self._done)
            parts.append(f"{units.duration(left)} left")
        if self._forecast is not None:
            whole = self._forecast.left(self._over, self._name, now - self._began, left)
            parts.append(f"{units.duration(whole)} {'left ' if left is None else ''}in all")
        parts.append(units.size(memory.current()))
        return ", ".join(parts)


def _blocks(values: Sequence[float], most: int = 24) -> str:
    """A row of at most `most` blocks whose heights go from the least of the values, or of their means, to the most."""
    wide = min(len(values), most)
    ends = [len(values) * k // wide for k in range(wide + 1)] if wide else []
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(ends)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(_HEIGHTS[round((mean - low) / ((high - low) or 1) * (len(_HEIGHTS) - 1))] for mean in means)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")


def _noted(column: Column) -> Callable[[int], Text]:
    return lambda row: _cell(column.cells[row])


def _stacked(column: Column, below: Column) -> Callable[[int], Text]:
    def fill(row: int) -> Text:
        top, low = column.cells[row], below.cells[row]
        if top is None and low is None:
            return _cell(None)
        return _cell(Cell(top.text if top else EMPTY_TEXT, low.text if low else ""))

    return fill


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text(EMPTY_TEXT, style="dim")
    text = Text(cell.text)
    if cell.note:
        text.append(f"\n{cell.note}", style="yellow" if cell.tone == "bad" else "dim")
    elif cell.tone == "bad":
        text.stylize("yellow")
    return text


def _harm(row: LedgerRow) -> tuple[float, float]:
    """Order by output error, then by weight error; NaN is the worst there is."""
    return tuple(  # type: ignore[return-value]
        -1.0 if value is None else float("inf") if value != value else value
        for value in (row.output_error, row.weight_error)
    )


def _ledger_title(name: str, shown: int, compressed: int, measured: bool) -> str:
    if shown == compressed:
        return f"{name}: {units.count(compressed, 'compressed layer')}"
    which = "largest error first" if measured else "errors not measured"
    return f"{name}: {shown} of {units.count(compressed, 'compressed layer')}, {which}"


def _with_reason(name: str, reason: str) -> RenderableType:
    return Group(Name(name), Text(reason, style="dim")) if reason else Name(name)


def _narrowest(names: Iterable[str]) -> int | None:
    """The width of a column in which no word of these names is cut."""
    return max((Name(name).narrowest for name in names), default=None)


def _layer_differences(comparison: Comparison, worst: int | None) -> Group:
    """The layers that differ, first those that differ most."""
    shown = comparison.layers if worst is None else comparison.layers[:worst]
    table = _table()
    title = units.count(len(comparison.layers), "different layer")
    if len(shown) < len(comparison.layers):
        title = f"{len(shown)} of {title}"
    table.add_column("layer", overflow="fold", min_width=_narrowest(layer.name for layer in shown))
    for label in (comparison.a.label, comparison.b.label):
        table.add_column(Text(f"format\n{label}"), overflow="fold")
    kinds = {layer.error for layer in shown} - {""}
    mixed = len(kinds) > 1
    if mixed:
        table.add_column("error of")
    error = "error" if mixed or not kinds else f"{next(iter(kinds))} error"
    if comparison.last_pass_alone:
        error += ",\nlast pass"
    for label in (comparison.a.label, comparison.b.label):
        table.add_column(Text(f"{error}\n{label}"), justify="right", overflow="fold")
    for layer in shown:
        errors = (EMPTY_TEXT if value is None else units.error(value) for value in (layer.error_a, layer.error_b))
        stored = (Text(found or "absent") for found in (layer.format_a, layer.format_b))
        table.add_row(Name(layer.name), *stored, *([layer.error] if mixed else []), *errors)
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    if kinds:
        told = "errors are relative and squared"
        if comparison.last_pass_alone:
            told += "; several passes changed some layers, and each error is that of the last one alone"
        parts.append(Text(told, style="dim"))
    return Group(*parts)


def _kept_lines(rows: Iterable[LedgerRow]) -> list[str]:
    """One line for all layers that share a reason, a format and, but for its numbers, a name."""
    alike: dict[tuple[str, str, str], list[LedgerRow]] = {}
    for row in rows:
        alike.setdefault((re.sub(r"\d+", "*", row.name), row.reason, row.format), []).append(row)
    lines = []
    for (pattern, reason, stored), members in alike.items():
        name = members[0].name if len(members) == 1 else f"{pattern} ({units.count(len(members), 'layer')})"
        line = f"kept {name}: {stored}, {units.size(sum(row.nbytes for row in members))}"
        lines.append(f"{line}; {reason}" if reason else line)
    return lines


__all__ = [
    "SweepProgress",
    "compare_table",
    "ledger_table",
    "remarks",
    "stage_line",
    "stage_table",
    "trainings",
]
