"""A report as one HTML file: no request leaves it, and it reads without JavaScript, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from effcli import human, svg, yamls
from effcli.columns import EMPTY_TEXT, Cell, Column, columns, conditions
from effcli.errors import writing
from effcli.report import LedgerRow, Report, Stage

FILE_NAME = "report.html"

# A ledger of more rows is folded until asked for.
_LONG = 40
# What the head of the page shows of the last stage, where it was measured.
_TILES = ("size", "bits", "perplexity", "accuracy", "decode")


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
        *(_stage(stage) for stage in report.stages[1:]),
        _provenance(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>{_SORT}</script>\n</body>\n</html>\n"
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
    tiles = [tile for key in _TILES if key in found and (tile := _tile(found[key]))]
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
    return (
        f"<div><dt>{escape(column.title)}</dt><dd>{escape(last.text)}{unit}</dd>"
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
            cell = _cell(column.cells[index])
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


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return f'<span class="none">{EMPTY_TEXT}</span>'
    tone = " bad" if cell.tone else ""
    if not cell.note:
        return f'<span class="figure{tone}">{escape(cell.text)}</span>'
    return f'<span class="figure">{escape(cell.text)}</span><small class="note{tone}">{escape(cell.note)}</small>'


def _remarks(report: Report) -> str:
    items = [
        f"<li><b>{escape(stage.name)}</b> {escape(remark)}</li>" for stage in report.stages for remark in stage.remarks
    ]
    return f'<section><h2>Remarks</h2><ul class="remarks">{"".join(items)}</ul></section>' if items else ""


def _stage(stage: Stage) -> str:
    parts = [f'<section class="pass"><h2>{escape(stage.name)}</h2>', _options(stage.options)]
    compressed = sum(row.status == "compressed" for row in stage.ledger)
    kept = len(stage.ledger) - compressed
    if compressed:
        text = f"{human.count(compressed, 'layer')} compressed" + (f", {kept:,} kept" if kept else "")
    else:
        text = "No layer was compressed" + (f"; {human.count(kept, 'layer')} kept." if kept else ".")
    parts.append(f'<p class="lead">{text}</p>')
    if stage.ledger:
        parts.append(_plots(stage.ledger))
    if stage.histograms:
        figures = "".join(
            f"<figure>{svg.histogram_plot(found)}<figcaption>{_breakable(found.layer)}</figcaption></figure>"
            for found in stage.histograms
        )
        key = '<span><i class="before"></i>before, upwards</span><span><i class="after"></i>after, downwards</span>'
        parts.append(f'<h3>Weights</h3><p class="legend">{key}</p><div class="histograms">{figures}</div>')
    if stage.ledger:
        parts.append(_ledger(stage.ledger))
    return "".join(parts) + "</section>"


def _options(options: Mapping[str, Any]) -> str:
    items = "".join(
        f"<li>{escape(key)} <b>{escape(_value(value))}</b></li>"
        for key, value in options.items()
        if value not in ((), [], {}, None)
    )
    return f'<ul class="options">{items}</ul>' if items else ""


def _plots(ledger: Sequence[LedgerRow]) -> str:
    axis = svg.layer_axis(ledger)
    by_output = any(row.output_error is not None for row in ledger)

    def error(row: LedgerRow) -> float | None:
        return row.output_error if by_output else row.weight_error

    kind = "output" if by_output else "weight"
    what = f"{kind} error, relative and squared"
    errors = svg.figure_plot(axis, ledger, error, human.error, f"{what}, per layer", log=True, height=300)
    stored = svg.figure_plot(
        axis,
        ledger,
        lambda row: row.bits_per_weight,
        lambda value: f"{human.bits(value)} bits",
        "Bits per weight, per layer",
        log=False,
        height=190,
    )
    keys = "".join(
        f'<span class="k{index}"><i class="s{index}"></i>{escape(role)}</span>'
        for index, role in enumerate(axis.legend)
    )
    if axis.legend and any(place.series is None for place in axis.places.values()):
        keys += '<span><i class="sx"></i>other</span>'
    parts = ['<div class="plots">', f'<p class="legend">{keys}</p>' if keys else ""]
    if errors:
        parts.append(f'<h3>Error per layer <small>{what}</small></h3><div class="scroll">{errors}</div>')
    parts.append(f'<h3>Bits per weight <small>hollow: kept</small></h3><div class="scroll">{stored}</div></div>')
    return "".join(parts)


def _ledger(ledger: Sequence[LedgerRow]) -> str:
    largest = max((found for row in ledger if _positive(found := row.output_error or 0.0)), default=0.0)
    by_output = any(row.output_error is not None for row in ledger)
    by_weight = any(row.weight_error is not None for row in ledger)
    titles = ["layer", "kind", "shape", "format", "bits", "size"]
    titles += ["output error"] * by_output + ["weight error"] * by_weight + ["status"]
    numeric = {"shape", "bits", "size", "output error", "weight error"}
    head = "".join(f'<th scope="col"{_right(title in numeric)}>{title}</th>' for title in titles)
    rows = []
    for row in ledger:
        notes = [row.reason, *(f"{key} {_value(value)}" for key, value in row.notes.items())]
        remark = "; ".join(note for note in notes if note)
        below = f"<small>{escape(remark)}</small>" if remark else ""
        cells = [
            f'<th scope="row">{escape(row.name)}{below}</th>',
            f"<td>{escape(row.kind)}</td>",
            _number(math.prod(row.shape), human.shape(row.shape)),
            f"<td>{escape(row.format)}</td>",
            _number(row.bits_per_weight, human.bits(row.bits_per_weight)),
            _number(row.nbytes, human.size(row.nbytes)),
        ]
        if by_output:
            cells.append(_error(row.output_error, largest))
        if by_weight:
            cells.append(_error(row.weight_error, 0.0))
        cells.append(f'<td class="{row.status}">{row.status}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    opened = " open" if len(ledger) <= _LONG else ""
    return (
        f"<details{opened}><summary>Ledger <small>{human.count(len(ledger), 'layer')}</small></summary>"
        f'<div class="scroll"><table class="ledger"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _error(value: float | None, largest: float) -> str:
    if value is None:
        return f'<td class="number none" data-v="-1">{EMPTY_TEXT}</td>'
    bar = ""
    if largest and _positive(value):
        bar = f'<span class="bar" style="width:{100 * value / largest:.1f}%"></span>'
    # NaN sorts as the worst there is.
    key = "Infinity" if value != value else repr(value).replace("inf", "Infinity")
    return f'<td class="number" data-v="{key}">{human.error(value)}{bar}</td>'


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
        "over that of W x on the calibration inputs; weight error: the same without x.</p></section>"
    )
    return "".join(parts)


def _value(value: Any) -> str:
    """A value of an option or a note in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _breakable(name: str) -> str:
    """A layer's name that may wrap after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _number(value: float, text: str) -> str:
    return f'<td class="number" data-v="{value!r}">{escape(text)}</td>'


def _numeric(column: Column) -> str:
    return _right(True) if column.numeric else f' class="{column.key}"'


def _right(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


_CSS = """
:root { color-scheme: light dark;
  --paper: #fcfcfa; --ink: #1d2025; --faint: #666b73; --line: #e4e4df; --wash: #f3f3ef;
  --accent: #2f6fb3; --bad: #b4531a;
  --c0: #2f6fb3; --c1: #d9722e; --c2: #2b9273; --c3: #b3478f;
  --c4: #7a63c9; --c5: #a88400; --c6: #2299b5; --c7: #c4414d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --ink: #e6e6e3; --faint: #979ba3; --line: #2c3036; --wash: #1d2024;
  --accent: #74aef0; --bad: #f0a267;
  --c0: #74aef0; --c1: #f49a5e; --c2: #58c9a5; --c3: #e58bc6;
  --c4: #b3a0f5; --c5: #d9b945; --c6: #62cbe3; --c7: #f48791; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 620; letter-spacing: -0.015em; margin: 4px 0 6px;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; font-weight: 620; letter-spacing: -0.01em; margin: 56px 0 12px; }
h3 { font-size: 14px; font-weight: 600; margin: 28px 0 8px; }
h3 small, summary small { font-weight: 400; color: var(--faint); margin-left: 6px; }
small { font-size: 12.5px; }
p { margin: 0 0 8px; }
.maker { color: var(--accent); font-weight: 600; font-size: 13px; margin: 0; }
.lead, .verified { color: var(--faint); overflow-wrap: anywhere; }
.verified::before { content: "\\2713\\a0"; color: var(--c2); font-weight: 700; }
.path, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
.bad { color: var(--bad); }
.none { color: var(--faint); }
.scroll { overflow-x: auto; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 1px; margin: 28px 0 0;
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tiles > div { padding: 14px 18px 12px; box-shadow: 0 0 0 1px var(--line); }
.tiles dt { color: var(--faint); font-size: 13px; }
.tiles dd { margin: 0; font-size: 13px; font-variant-numeric: tabular-nums; }
.tiles dd:not(.bad) { color: var(--faint); }
.tiles dt + dd:not(.bad) { font-size: 25px; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em;
  color: var(--ink); white-space: nowrap; }
.tiles dd small { font-weight: 400; letter-spacing: 0; color: var(--faint); }

table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 8px 12px; border-bottom: 1px solid var(--line);
  font-weight: 400; }
th:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-size: 13px; vertical-align: bottom; white-space: nowrap; }
thead small { display: block; }
.number { text-align: right; white-space: nowrap; }
.stages { width: auto; min-width: min(100%, 560px); }
.stages tbody th { font-weight: 600; }
.stages td small { display: block; }
.stages td small:not(.bad) { color: var(--faint); }
td.kernel { font-size: 13px; min-width: 150px; overflow-wrap: anywhere; color: var(--faint); }
.bar { display: block; height: 2px; margin: 4px 0 0 auto; background: var(--accent); border-radius: 1px; opacity: .75; }
.notes { color: var(--faint); font-size: 13px; list-style: none; padding: 0; margin: 10px 0 0; }

.remarks { list-style: none; padding: 0; margin: 0; }
.remarks li { border-left: 3px solid var(--bad); padding: 4px 0 4px 14px; margin-bottom: 8px; overflow-wrap: anywhere; }
.remarks b { font-weight: 600; margin-right: 6px; }
.pass { border-top: 1px solid var(--line); margin-top: 56px; }
.pass > h2 { margin-top: 28px; }
.options { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; padding: 0; margin: 0 0 12px; }
.options li { background: var(--wash); border-radius: 6px; padding: 2px 9px; font-size: 13px; color: var(--faint);
  overflow-wrap: anywhere; }
.options b { font-weight: 500; color: var(--ink); }

.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--faint); margin: 18px 0 0; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 6px;
  background: currentColor; }
.legend i.before, .legend i.after { border-radius: 2px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 12px; font-variant-numeric: tabular-nums; }
.plots svg { min-width: 640px; }
.grid { stroke: var(--line); }
.axis { stroke: var(--faint); stroke-opacity: .5; }
.trend { fill: none; stroke: currentColor; stroke-opacity: .28; stroke-width: 1.2; }
.mark { fill: currentColor; stroke: var(--paper); stroke-width: 1; }
.mark:hover { stroke: var(--ink); stroke-width: 2; }
.mark.kept { fill: var(--paper); stroke: currentColor; stroke-width: 1.5; }
.sx { color: var(--faint); }
SERIES
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 24px 28px;
  margin-top: 14px; }
figure { margin: 0; max-width: 320px; }
figcaption { font-size: 13px; color: var(--faint); margin-top: 2px; }
.before { fill: var(--faint); color: var(--faint); opacity: .55; }
.after { fill: var(--accent); color: var(--accent); }

details { margin-top: 28px; }
summary { cursor: pointer; font-size: 14px; font-weight: 600; }
.ledger { font-size: 13px; margin-top: 8px; }
.ledger th, .ledger td { padding-top: 5px; padding-bottom: 5px; }
.ledger th, .ledger td { white-space: nowrap; }
.ledger small { display: block; color: var(--faint); white-space: normal; }
.ledger .compressed { color: var(--faint); }
.ledger .kept { color: var(--bad); }
.ledger .bar { margin-top: 2px; }
.sorts { cursor: pointer; }
.sorts:hover, .sorts:focus-visible { color: var(--ink); }
[aria-sort=ascending]::after { content: "\\a0\\2191"; }
[aria-sort=descending]::after { content: "\\a0\\2193"; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, auto)); gap: 10px 24px; margin: 0; }
.facts dt { color: var(--faint); font-size: 13px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--wash); border-radius: 8px; padding: 14px 18px; overflow-x: auto; margin: 0; line-height: 1.55; }
@media print { main { padding: 0; max-width: none; } .scroll { overflow: visible; } }
""".replace(
    "SERIES",
    # Pointing at a series in the legend fades the others.
    "\n".join(
        f".s{k} {{ color: var(--c{k}); }}\n.plots:has(.k{k}:hover) :is(.mark, .trend):not(.s{k}) {{ opacity: .12; }}"
        for k in range(svg.SERIES)
    ),
)

_SORT = """
for (const table of document.querySelectorAll("table.ledger")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, at) => {
    const cell = row.cells[at];
    return "v" in cell.dataset ? +cell.dataset.v : cell.textContent;
  };
  heads.forEach((head, at) => {
    const sort = () => {
      const down = head.ariaSort !== "descending";
      const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
      const rows = [...body.rows].sort((a, b) => order(key(a, at), key(b, at)) * (down ? -1 : 1));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      body.append(...rows);
    };
    head.classList.add("sorts"); head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""
