"""A report as one HTML file: no request leaves it, and it reads without JavaScript, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from effcli.errors import writing
from effcli.reports import html_ledger, html_quality, html_sensitivity, html_vision, svg
from effcli.reports.columns import EMPTY_TEXT, Column, became, columns, conditions, export_lines, training_text
from effcli.reports.html_remarks import gather
from effcli.reports.html_summary import sentence
from effcli.reports.html_tables import Field, Folded, Head, Table, headings, value_text
from effcli.reports.html_templates import drawn
from effcli.reports.html_templates import render as rendered
from effcli.reports.phase_times import phase_rows, phase_titles
from effcli.reports.report import Report, Stage
from effcli.reports.svg_training import training_plot
from effcli.run import yaml_files as yamls

FILE_NAME = "report.html"

# What the head of the page shows of the last stage, where it was measured.
_TILES = ("size", "bits", "perplexity", "accuracy", "top1", "agreement", "sqnr", "decode")
# What the figures of a column are, for who points at its head.
_HINTS = {
    "size": "of the weight files on disk",
    "bits": "stored bits over the number of weights, scales and zero points included",
    "perplexity": "exp of the mean loss per token; lower is better",
    "kl": "mean KL divergence of the predictions from the input's, per token",
    "accuracy": "multiple-choice questions answered rightly",
    "top1": "inputs whose likeliest class is right",
    "top5": "inputs whose class is among the five likeliest",
    "agreement": "inputs whose likeliest class is the original's",
    "sqnr": "energy of the original's outputs over that of their change",
    "prefill": "tokens of a prompt read per second",
    "decode": "tokens written per second, one after another",
    "memory": "highest resident memory during the pass",
    "seconds": "of the pass itself, measuring excluded",
}


def write(report: Report, folder: Path) -> None:
    """Write `report.html` into `folder`."""
    path = folder / FILE_NAME
    with writing(path):
        path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The whole page."""
    return rendered(
        "report.html.j2",
        title=f"{report.model} \N{MIDDLE DOT} effcli",
        report=report,
        steps=", then ".join(stage.name for stage in report.stages[1:]) or "measured, not compressed",
        sentence=sentence(report),
        tiles=list(_tiles(report)),
        stages=_stages(report),
        levels=html_quality.LEVEL_NAMES if len(report.stages) > 1 and _has_quality(report) else (),
        notes=conditions(report.stages),
        measured_on=[f"{key}: {name}" for key, name in html_quality.data_names(report).items()],
        quality_plots=[drawn(plot) for plot in html_quality.plots(report)],
        searched=any(stage.search is not None and stage.search.measure for stage in report.stages),
        unmeasured=html_quality.unmeasured_searches(report),
        texts=_texts(report),
        remarks=gather(report.stages),
        latencies=html_vision.latencies(report),
        exports=export_lines(report),
        classes=html_vision.classes(report),
        passes=list(_passes(report)),
        facts=[(key, value) for key, value in [("machine", report.machine), *report.software.items()] if value],
        phases=_phases(report),
        recipe=yamls.dump(report.given or report.recipe) if report.recipe else "",
        definitions=html_vision.definitions(report),
    )


def table(report: Report) -> str:
    """The table of all stages alone, with what it says in one sentence, for a page that holds more than that."""
    return rendered(
        "stages.html.j2", sentence=sentence(report), stages=_stages(report), notes=conditions(report.stages)
    )


@dataclass(frozen=True)
class _Tile:
    """The last figure of a column; was: the input's, and what else is to be said of it; level: of quality lost."""

    title: str
    note: str
    text: str
    unit: str
    was: str
    tone: str


def _tiles(report: Report) -> Iterator[_Tile]:
    found = {column.key: column for column in columns(report)}
    names = html_quality.data_names(report)
    for key in (*_TILES, *(key for key in found if key.startswith("latency"))):
        if key not in found or found[key].cells[-1] is None:
            continue
        column = found[key]
        first, last = column.cells[0], column.cells[-1]
        assert last is not None
        was = f"from {first.text}" if first is not None and len(column.cells) > 1 else ""
        title = column.key if column.key.startswith("latency ") else column.title
        tone = _tone(report, column, len(column.cells) - 1)
        note = ", ".join(part for part in (was, last.note) if part)
        yield _Tile(title, names.get(key, ""), last.text, column.unit, note, tone)


def _tone(report: Report, column: Column, index: int) -> str:
    """The classes of what is said below a figure: how much quality was lost, or that it is a step back."""
    lost = html_quality.loss(column.key, report.stages[index], report.stages[0])
    if lost is not None:
        return f"lost{lost.level}"
    cell = column.cells[index]
    return "bad" if cell is not None and cell.tone else ""


def _has_quality(report: Report) -> bool:
    first = report.stages[0]
    keys = [column.key for column in columns(report)]
    return any(html_quality.loss(key, stage, first) for key in keys for stage in report.stages[1:])


def _stages(report: Report) -> Table:
    found = columns(report)
    names = html_quality.data_names(report)
    heads = [
        Head(
            column.title,
            ", ".join(part for part in (column.unit, names.get(column.key, "")) if part),
            "number" if column.numeric else column.key,
            _HINTS.get(column.key, ""),
        )
        for column in found
    ]
    rows = [[_field(report, column, index) for column in found] for index in range(len(report.stages))]
    return Table("Step by step", heads, rows, "stages")


def _field(report: Report, column: Column, index: int) -> Field:
    stage, cell = report.stages[index], column.cells[index]
    css = "number" if column.numeric else column.key
    if column.key == "step":
        return Field(stage.name, row=True)
    if cell is None:
        return Field(EMPTY_TEXT, text_css="none", css=css)
    tone = _tone(report, column, index)
    lost = html_quality.loss(column.key, stage, report.stages[0])
    note = f"{cell.note} {lost.stderr}".strip() if lost is not None and cell.note else cell.note
    largest = max(each.nbytes for each in report.stages) or 1
    return Field(
        cell.text + html_quality.stderr_text(column.key, stage),
        note,
        css=css,
        text_css="figure" if note else f"figure {tone}".strip(),
        tone=f"note {tone}".strip(),
        bar=f"{72 * stage.nbytes / largest:.1f}px" if column.key == "size" else "",
    )


def _phases(report: Report) -> Folded | None:
    """How long each phase took, next to what was predicted; None of a report that does not say."""
    rows = phase_rows(report)
    if not rows:
        return None
    titles = phase_titles(rows)
    cells = [[Field(row.name, row=True), *(Field(text, css="number") for text in row[1 : len(titles)])] for row in rows]
    table = Table("Time of each phase", headings(titles, titles[1:]), cells, "")
    return Folded(table.name, rows[-1].took, table, closed=True)


@dataclass(frozen=True)
class _Written:
    """What one stage wrote behind a prompt: the beginning that the input wrote, too, and what follows it.

    alike: whether it is the input's text to the end.
    """

    name: str
    same: str
    other: str
    alike: bool


def _texts(report: Report) -> list[tuple[str, list[_Written]]]:
    """Every prompt with what each stage wrote behind it; empty where nothing was written."""
    first, *others = report.stages
    found = []
    for at, each in enumerate(first.continuations):
        # Spaces before the first word would stand at the edge of the page.
        original = each.text.lstrip()
        written = [_Written(first.name, original, "", False)]
        for stage in others:
            for text in (one.text.lstrip() for one in stage.continuations[at : at + 1]):
                # Marked from the beginning of the word.
                same = original[: _common(original, text)]
                same = same if text == same else same[: same.rfind(" ") + 1]
                written.append(_Written(stage.name, same, text[len(same) :], text == original))
        found.append((each.prompt.lstrip(), written))
    return found


def _common(one: str, two: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))


@dataclass(frozen=True)
class _Pass:
    """The section of one stage behind the input."""

    stage: Stage
    became: str
    options: list[tuple[str, str]]
    search: Markup
    training_note: str
    training_measured: str
    training: Markup
    plots: Markup
    histograms: list[tuple[str, Markup]]
    activations: Markup
    ledger: Folded | None


def _passes(report: Report) -> Iterator[_Pass]:
    drawn_before: html_ledger.Drawn = {}
    for stage in report.stages[1:]:
        training = stage.training
        measured = f"error: {training.measured}" if training and training.measured else "error"
        yield _Pass(
            stage=stage,
            became=became(stage),
            options=list(_options(stage.options)),
            search=html_sensitivity.choices(stage.search) if stage.search is not None else Markup(),
            training_note=training_text(training) if training is not None else "",
            training_measured=measured,
            training=drawn(training_plot(training)) if training is not None else Markup(),
            plots=html_ledger.plots(stage.ledger, stage.name, drawn_before) if stage.ledger else Markup(),
            histograms=[(each.layer, drawn(svg.histogram_plot(each))) for each in stage.histograms],
            activations=html_vision.activations(stage.activations),
            ledger=html_ledger.table(stage.ledger) if stage.ledger else None,
        )


def _options(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if value not in ((), [], {}, None):
            yield key, value_text(value)
