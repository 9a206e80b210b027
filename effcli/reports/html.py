"""A report as one HTML file: no request leaves it, and it reads without JavaScript, in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effcli.errors import writing
from effcli.reports import html_ledger, html_sensitivity, html_vision, svg
from effcli.reports.columns import Column, became, columns, conditions, export_lines, training_text
from effcli.reports.escaping import markup as escape
from effcli.reports.html_parts import breakable, figure, right, value_text
from effcli.reports.html_style import CSS, SORT
from effcli.reports.report import Report, Stage, Training
from effcli.reports.svg_training import training_plot
from effcli.run import yaml_files as yamls

FILE_NAME = "report.html"

# What the head of the page shows of the last stage, where it was measured.
_TILES = ("size", "bits", "perplexity", "accuracy", "top1", "agreement", "sqnr", "decode")


def write(report: Report, folder: Path) -> None:
    """Write `report.html` into `folder`."""
    path = folder / FILE_NAME
    with writing(path):
        path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The whole page."""
    title = f"{report.model} \N{MIDDLE DOT} effcli"
    body = [
        _head(report),
        _stages(report),
        _remarks(report),
        html_vision.latencies(report),
        _exports(report),
        html_vision.classes(report),
        *(part for stage in report.stages[1:] for part in (_search(stage), _stage(stage))),
        _provenance(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    steps = ", then ".join(stage.name for stage in report.stages[1:]) or "measured, not compressed"
    output = f' into <span class="path">{escape(report.output)}</span>' if report.output else ""
    parts = [
        f'<header><p class="maker">effcli {escape(report.effcli_version)}</p>',
        f"<h1>{escape(report.model)}</h1>",
        f'<p class="lead">{escape(steps)}{output}</p>',
    ]
    if report.verified:
        parts.append(f'<p class="verified">{escape(report.verified)}</p>')
    found = {column.key: column for column in columns(report)}
    keys = [*_TILES, *(key for key in found if key.startswith("latency"))]
    tiles = [tile for key in keys if key in found and (tile := _tile(found[key]))]
    parts.append(f'<dl class="tiles">{"".join(tiles)}</dl></header>')
    return "".join(parts)


def _tile(column: Column) -> str:
    """The last figure of a column, and the input's below it."""
    first, last = column.cells[0], column.cells[-1]
    if last is None:
        return ""
    unit = f" <small>{escape(column.unit)}</small>" if column.unit else ""
    was = f"from {first.text}" if first is not None and len(column.cells) > 1 else ""
    note = ", ".join(part for part in (was, last.note) if part)
    tone = ' class="bad"' if last.tone else ""
    title = column.key if column.key.startswith("latency ") else column.title
    return (
        f"<div><dt>{escape(title)}</dt><dd>{escape(last.text)}{unit}</dd>"
        f"<dd{tone}>{escape(note) or '&nbsp;'}</dd></div>"
    )


def _stages(report: Report) -> str:
    found = columns(report)
    head = "".join(
        f'<th scope="col"{_numeric(column)}>{escape(column.title)}'
        + (f"<small>{escape(column.unit)}</small>" if column.unit else "")
        + "</th>"
        for column in found
    )
    largest = max(stage.nbytes for stage in report.stages) or 1
    rows = []
    for index, stage in enumerate(report.stages):
        cells = []
        for column in found:
            cell = figure(column.cells[index])
            if column.key == "step":
                cells.append(f'<th scope="row">{cell}</th>')
                continue
            if column.key == "size":
                cell += f'<span class="bar" style="width:{72 * stage.nbytes / largest:.1f}px"></span>'
            cells.append(f"<td{_numeric(column)}>{cell}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    items = "".join(f"<li>{escape(text)}</li>" for text in conditions(report.stages))
    notes = f'<ul class="notes">{items}</ul>' if items else ""
    return (
        f'<section><h2>Step by step</h2><div class="scroll"><table class="stages"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}</section>"
    )


def _exports(report: Report) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in export_lines(report))
    return f'<section><h2>Exports</h2><ul class="notes">{items}</ul></section>' if items else ""


def _remarks(report: Report) -> str:
    items = [
        f"<li><b>{escape(stage.name)}</b> {escape(remark)}</li>" for stage in report.stages for remark in stage.remarks
    ]
    return f'<section><h2>Remarks</h2><ul class="remarks">{"".join(items)}</ul></section>' if items else ""


def _search(stage: Stage) -> str:
    """How the options of the pass behind it were chosen."""
    found = stage.search
    if found is None:
        return ""
    what = f"bits per layer for {stage.name}, from what each layer costs alone; {found.sensitivity.explained}"
    return f"<section><h2>Search</h2><p>{escape(what)}</p></section>{html_sensitivity.choices(found)}"


def _stage(stage: Stage) -> str:
    parts = [f'<section class="pass"><h2>{escape(stage.name)}</h2>', _options(stage.options)]
    parts.append(f'<p class="lead">{became(stage)}</p>')
    if stage.training is not None:
        parts.append(_training(stage.training))
    if stage.ledger:
        parts.append(html_ledger.plots(stage.ledger))
    if stage.histograms:
        figures = "".join(
            f"<figure>{svg.histogram_plot(found)}<figcaption>{breakable(found.layer)}</figcaption></figure>"
            for found in stage.histograms
        )
        key = '<span><i class="before"></i>before, upwards</span><span><i class="after"></i>after, downwards</span>'
        parts.append(f'<h3>Weights</h3><p class="legend">{key}</p><div class="histograms">{figures}</div>')
    parts.append(html_vision.activations(stage.activations))
    if stage.ledger:
        parts.append(html_ledger.table(stage.ledger))
    return "".join(parts) + "</section>"


def _training(training: Training) -> str:
    measured = f"error: {training.measured}" if training.measured else "error"
    key = f'<span><i class="s0"></i>loss</span><span><i class="s1"></i>{escape(measured)}</span>'
    return (
        f"<h3>Training <small>{escape(training_text(training))}</small></h3>"
        f'<p class="legend">{key}</p><div class="curve">{training_plot(training)}</div>'
    )


def _options(options: Mapping[str, Any]) -> str:
    items = "".join(
        f"<li>{escape(key)} <b>{escape(value_text(value))}</b></li>"
        for key, value in options.items()
        if value not in ((), [], {}, None)
    )
    return f'<ul class="options">{items}</ul>' if items else ""


def _provenance(report: Report) -> str:
    parts = ["<section><h2>How it was made</h2>"]
    facts = [("machine", report.machine), *report.software.items()]
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts if value)
    parts.append(f'<dl class="facts">{items}</dl>')
    if report.recipe:
        parts.append(f"<h3>Recipe</h3><pre>{escape(yamls.dump(report.recipe))}</pre>")
    parts.append(
        '<p class="notes">Sizes are powers of 1000. Ratios and changes are against the input. '
        "Output error: mean squared norm of (W - \N{LATIN CAPITAL LETTER W WITH CIRCUMFLEX}) x "
        "over that of W x on the calibration inputs; weight error: the same without x."
        f"{html_vision.definitions(report)}</p></section>"
    )
    return "".join(parts)


def _numeric(column: Column) -> str:
    return right(True) if column.numeric else f' class="{column.key}"'
