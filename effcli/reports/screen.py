"""What the commands show besides a report: a run as it goes along, single measurements, options, plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from effcli.reports import units
from effcli.reports.columns import EMPTY_TEXT
from effcli.reports.terminal import SweepProgress, stage_line
from effcli.reports.text import Console, Name, Text
from effcli.run.listener import Silent, phases

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from effcli.layers.contract import Pass
    from effcli.layers.result import Phases
    from effcli.options import Options
    from effcli.platform.registry import Entry
    from effcli.reports.report import ClassRow, Quality, Report, Speed, Stage
    from effcli.run.forecast import Forecast
    from effcli.run.recipe import Recipe

# So many classes are listed whole.
_MOST_CLASSES = 40


class Waiting(Silent):
    """How far a command is, on standard error: see `SweepProgress`. A context manager; `phases` is what to tell it."""

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, forecast: Forecast | None = None
    ) -> None:
        """forecast: of the phases that come, for the time that is left of them all."""
        self._quiet = quiet
        self._console = console or Console(stderr=True)
        self._bar = SweepProgress(quiet, self._console, forecast=forecast)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    @property
    def phases(self) -> Phases:
        return phases(self)

    def progress_start(self, name: str, total: int, unit: str = "block") -> None:
        self._bar.start(name, total, unit)

    def progress(self, done: int) -> None:
        self._bar.advance(done)

    def progress_end(self) -> None:
        self._bar.finish()

    def say(self, text: str) -> None:
        """Show one line."""
        if not self._quiet:
            self._print(text)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Screen(Waiting):
    """A run as it goes along, on standard error: how far each phase is, and a line for each finished stage.

    With `quiet` the lines of stages remain, and those of long phases.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        quiet: bool = False,
        console: Console | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        super().__init__(quiet=quiet, console=console, forecast=forecast)
        self._recipe = recipe
        self._stages: list[Stage] = []

    def stage(self, stage: Stage) -> None:
        """Show what was measured after the input or a pass."""
        self._stages.append(stage)
        self._print(stage_line(self._report()))

    def _report(self) -> Report:
        """The stages so far as a report, which is what the renderers take."""
        from effcli.reports.report import Report

        return Report(
            effcli_version="", model=self._recipe.model, output=self._recipe.output, machine="", stages=(*self._stages,)
        )


def quality_table(quality: Quality) -> RenderableType:
    """The figures of `effcli eval`; below them how well each class is recognised, where classes were counted."""
    rows = []
    if quality.perplexity is not None:
        rows.append(("perplexity", units.significant(quality.perplexity, 4), units.count(quality.tokens, "token")))
    if quality.kl is not None:
        rows.append(("KL to the reference", units.significant(quality.kl), "nats per token"))
    if quality.accuracy is not None:
        figure = units.fraction(quality.accuracy, quality.accuracy_stderr)
        rows.append(("accuracy", figure, units.count(quality.examples, "example")))
    for task in quality.tasks:
        figure = units.fraction(task.accuracy, task.accuracy_stderr)
        rows.append(("", figure, f"{units.count(task.examples, 'example')} of {task.name}"))
    found = quality.classification
    if found is None:
        return _table(rows)
    images = units.count(found.images, "image")
    if found.top1 is not None:
        rows.append(("top-1", units.fraction(found.top1, found.top1_stderr), images))
    if found.top5 is not None:
        rows.append(("top-5", units.fraction(found.top5), images))
    if found.agreement is not None:
        rows.append(("agreement", units.fraction(found.agreement), "same class as the reference's"))
    if found.sqnr is not None:
        rows.append(("SQNR", f"{units.significant(found.sqnr)} dB", "outputs against the reference's"))
    return Group(_table(rows), *_class_table(found.classes))


def _class_table(classes: Sequence[ClassRow]) -> list[RenderableType]:
    """All classes in their order, or of very many those of the lowest recall; nothing without classes."""
    if not classes:
        return []
    shown, title = classes, f"{len(classes):,} classes"
    if len(classes) > _MOST_CLASSES:
        tested = [row for row in classes if row.recall is not None]
        shown = sorted(tested, key=lambda row: row.recall or 0.0)[:_MOST_CLASSES]
        title = f"{len(shown)} of {title}, lowest recall first"

    def percent(value: float | None) -> str:
        return EMPTY_TEXT if value is None else units.fraction(value)

    rows = [(row.name, percent(row.recall), percent(row.precision), f"{row.images:,}") for row in shown]
    table = _table(rows, ("class", "recall", "precision", "images"))
    for column in table.columns[1:]:
        column.justify = "right"
    return [Text(), Text(title, style="bold"), table]


def speed_table(speed: Speed) -> Table:
    """The figures of `effcli bench`."""
    conditions = f"{speed.device}, {units.count(speed.threads, 'thread')}"
    prefill = f"{units.count(speed.prefill_tokens, 'token')}, {speed.prefill_kernel or speed.kernel}"
    return _table(
        [
            ("prefill", f"{units.significant(speed.prefill_tokens_per_second)} tok/s", prefill),
            ("decode", f"{units.significant(speed.decode_tokens_per_second)} tok/s", speed.kernel),
            ("on", conditions, ""),
        ]
    )


def forecast_table(forecast: Forecast) -> RenderableType:
    """What each phase is expected to take, then all together; below that what ended the rehearsal."""
    rows = [
        (each.phase, f"not predicted: {each.reason}" if each.seconds is None else units.duration(each.seconds))
        for each in forecast.phases
    ]
    if len(rows) > 1:
        rows.append(("all together", units.duration(forecast.seconds)))
    ended = [Text(f"no further phase is predicted: {forecast.ended}", style="yellow")] if forecast.ended else []
    return Group(Text(), *([_table(rows, ("phase", "expected"))] if rows else []), *ended)


_TARGETS = "export targets of other packages"


def passes_table(
    families: Mapping[str, Mapping[str, Entry]],
    targets: Mapping[str, Entry] = MappingProxyType({}),
    remarks: Iterable[str] = (),
) -> RenderableType:
    """The passes by families, and the export targets of other packages, with their packages; then remarks."""
    groups = {family or "of other packages": entries for family, entries in families.items()}
    groups |= {_TARGETS: targets} if targets else {}
    widest = max(len(name) for entries in groups.values() for name in entries)
    parts: list[RenderableType] = []
    for title, entries in groups.items():
        foreign = any(entry.package for entry in entries.values())
        table = _table((name, entry.summary, *([entry.package] if foreign else [])) for name, entry in entries.items())
        table.columns[0].min_width = widest
        parts += [*([Text()] if parts else []), Text(title, style="bold"), table]
    return Group(*parts, *(Text(remark, style="yellow") for remark in remarks))


def passes_lines(
    families: Mapping[str, Mapping[str, Entry]],
    targets: Mapping[str, Entry] = MappingProxyType({}),
    remarks: Iterable[str] = (),
) -> list[str]:
    """As `passes_table`, one line each for programs: the name, the family or else the package, the summary."""
    passes = [
        (name, entry.package or family, entry.summary)
        for family in families
        for name, entry in families[family].items()
    ]
    others = [(name, entry.package, entry.summary) for name, entry in targets.items()]
    wide, long = (max(len(row[at]) for row in (*passes, *others)) for at in (0, 1))
    lines = [
        [f"{name:<{wide}}  {place:<{long}}  {summary}".rstrip() for name, place, summary in own]
        for own in (passes, others)
    ]
    return [*lines[0], *(["", f"{_TARGETS}:", *lines[1]] if others else []), *remarks]


def options_table(name: str, summary: str, options: type[Pass]) -> RenderableType:
    """The options of the pass `name` with their values and defaults: common ones, then those that few runs change.

    Those that every pass has stand behind its own. Where a network read as a graph has another default, that stands
    beside the one of language models.
    """
    from effcli.layers import contract

    fields = sorted(options.model_fields.items(), key=lambda item: item[0] in contract.Pass.model_fields)
    others = {key: f"; in graphs {_written(value)}" for key, value in options.graph_defaults.items()}
    rare = [field for field in fields if field[0] in options.rare]
    common = [field for field in fields if field not in rare]
    parts: list[RenderableType] = [Text(f"{name}: {summary}")]
    for title, group in (("common options", common), ("rare options", rare)):
        if group:
            parts += [Text(), Text(title, style="bold"), _options(group, others)]
    return Group(*parts)


def targets_table(targets: Mapping[str, type[Options]]) -> RenderableType:
    """The options of export targets, with their values and defaults."""
    parts: list[RenderableType] = []
    for name, options in targets.items():
        fields = list(options.model_fields.items())
        parts += [Text(), Text(f"--to {name}" + ("" if fields else ": no options"), style="bold")]
        parts += [_options([(f"--{key.replace('_', '-')}", field) for key, field in fields])] if fields else []
    return Group(*parts)


def _options(fields: Iterable[tuple[str, FieldInfo]], others: Mapping[str, str] = MappingProxyType({})) -> Table:
    rows = [
        (key, _values(field), _default(field) + others.get(key, ""), field.description or "") for key, field in fields
    ]
    return _table(rows, ("option", "values", "default", ""))


# What fields of records are called above their column, with their unit.
_TITLES = {
    "layers": "layer",
    "nbytes": "size",
    "macs": "MACs",
    "ram": "RAM",
    "milliseconds": "median, ms",
    "fastest": "fastest, ms",
    "bits_per_weight": "bits/weight",
}
_IN_BYTES = ("nbytes", "ram", "flash")
_NAMES = ("layers", "layer", "name")
# Cells up to this width stay in one line, for what is cut off them would be missed.
_SHORT = 18


def records_table(title: str, records: Sequence[BaseModel], remarks: Iterable[str] = ()) -> RenderableType:
    """Records of one kind as a table with a column per field, then remarks. Names of layers go on behind a dot."""
    parts: list[RenderableType] = [Text(title)] if title else []
    if records:
        names = list(type(records[0]).model_fields)
        rows = [[_shown(name, getattr(record, name)) for name in names] for record in records]
        filled = [at for at in range(len(names)) if any(row[at] for row in rows)]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.padding = (0, 2, 0, 0)
        cells: list[list[RenderableType]] = [[] for _ in rows]
        for at in filled:
            name, column = names[at], [row[at] for row in rows]
            dotted = [Name(cell) for cell in column] if name in _NAMES else []
            numeric = all(isinstance(getattr(record, name), int | float | None) for record in records)
            table.add_column(
                _TITLES.get(name, name.replace("_", " ")),
                justify="right" if numeric else "left",
                overflow="fold",
                no_wrap=not dotted and max(map(len, column)) <= _SHORT,
                min_width=max((cell.narrowest for cell in dotted), default=None),
            )
            shown: list[RenderableType] = [*dotted] or [Text(cell) for cell in column]
            for own, cell in zip(cells, shown, strict=True):
                own.append(cell)
        for own in cells:
            table.add_row(*own)
        parts.append(table)
    parts += [Text(remark, style="yellow") for remark in remarks]
    return Group(*parts)


def _shown(name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, tuple):
        return units.shape(value)
    if isinstance(value, float):
        return units.significant(value)
    if isinstance(value, int) and (name in _IN_BYTES or name.endswith("_bytes")):
        return units.size(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _values(field: FieldInfo) -> str:
    """What an option takes, as people write it: `2, 3, 4`, `int`, `text or none`."""
    from typing import Annotated, Literal, get_args, get_origin

    def words(annotation: Any) -> list[str]:
        if get_origin(annotation) is Literal:
            return [", ".join(str(value) for value in get_args(annotation))]
        if get_origin(annotation) is tuple:
            return [f"list of {words(get_args(annotation)[0])[0]}"]
        if get_origin(annotation) is dict:
            return ["mapping"]
        if get_origin(annotation) is Annotated:
            # What a validator takes is more than what it makes of it, as the text of a size is.
            own, *metadata = get_args(annotation)
            taken = [given for item in metadata if (given := getattr(item, "json_schema_input_type", None))]
            return words(next((given for given in taken if get_args(given)), own))
        if get_args(annotation):
            return [word for member in get_args(annotation) for word in words(member)]
        return [{type(None): "null", str: "text", bool: "true, false"}.get(annotation, annotation.__name__)]

    bounds = [f"{sign} {bound}" for item in field.metadata for sign, bound in _bounds(item)]
    return " or ".join(words(field.annotation)) + (f" {' and '.join(bounds)}" if bounds else "")


def _bounds(item: Any) -> list[tuple[str, Any]]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return [(sign, getattr(item, name)) for name, sign in signs.items() if getattr(item, name, None) is not None]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _written(field.get_default(call_default_factory=True, validated_data={}))


def _written(value: Any) -> str:
    """A value as people write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "none" if value in ((), {}) else str(value)


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD if header else None, show_edge=False, pad_edge=False, show_header=bool(header))
    table.padding = (0, 2, 0, 0)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


__all__ = [
    "Screen",
    "Waiting",
    "forecast_table",
    "options_table",
    "passes_table",
    "quality_table",
    "records_table",
    "speed_table",
    "targets_table",
]
