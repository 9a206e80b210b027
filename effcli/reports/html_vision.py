"""The sections of a report that only a vision network has: latencies, classes, and activations with their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence

from effcli.reports import svg_vision, units
from effcli.reports.columns import EMPTY_TEXT, latency_cell
from effcli.reports.escaping import markup as escape
from effcli.reports.html_parts import breakable, folded, headings, missing, number, sortable
from effcli.reports.report import ActivationRange, Classification, ClassRow, Report, Stage

# More pictures of activations are folded until asked for.
_MANY_PICTURES = 24


def latencies(report: Report) -> str:
    """One row per stage and runtime; empty without latencies."""
    first = report.stages[0]
    rows = []
    for stage in report.stages:
        for found in stage.latencies:
            cell = latency_cell(found, stage, first)
            tone = "bad" if cell.tone else "figure" if cell.note else "none"
            rows.append(
                f'<th scope="row">{escape(stage.name)}</th><td>{escape(found.runtime)}</td>'
                + number(found.milliseconds, units.significant(found.milliseconds))
                + f'<td class="number"><span class="{tone}">{escape(cell.note) or EMPTY_TEXT}</span></td>'
                + number(found.fastest, units.significant(found.fastest))
                + number(found.repetitions, f"{found.repetitions:,}")
                + number(found.threads, str(found.threads))
                + f"<td>{escape(found.device)}</td>"
            )
    if not rows:
        return ""
    titles = ["step", "runtime", "median, ms", "against input", "fastest, ms", "repetitions", "threads", "device"]
    head = headings(titles, titles[2:7])
    return f"<section><h2>Latency of one input</h2>{sortable(head, rows)}</section>"


def classes(report: Report) -> str:
    """How well each class is recognised before and after, and what it is taken for; empty without classes."""
    found = [(stage, given) for stage in report.stages if (given := _classification(stage)) and given.classes]
    parts = [_confusions(report.stages), _class_table(found)]
    return f"<section><h2>Classes</h2>{''.join(parts)}</section>" if any(parts) else ""


def activations(ranges: Sequence[ActivationRange]) -> str:
    """The values of each activation on the calibration data, and what of them the chosen range cuts off."""
    if not ranges:
        return ""
    pictures = []
    for found in ranges:
        part = clipped_fraction(found)
        lost = f'<small class="bad">{_percent(part)} clipped</small>' if part else "<small>none clipped</small>"
        chosen = f"<small>{escape(found.observer)}: {found.low:.4g} to {found.high:.4g}</small>"
        caption = f"<b>{breakable(found.name)}</b>{chosen}{lost}"
        pictures.append(f"<figure>{svg_vision.activation_plot(found)}<figcaption>{caption}</figcaption></figure>")
    key = (
        '<span><i class="after"></i>inside the range of 8 bits</span><span><i class="clipped"></i>clipped</span>'
        "<span>height: logarithm of the count, a line per power of ten</span>"
    )
    grid = f'<p class="legend">{key}</p><div class="histograms">{"".join(pictures)}</div>'
    if len(ranges) <= _MANY_PICTURES:
        return f"<h3>Activations</h3>{grid}"
    return f"<details><summary>Activations <small>{len(ranges):,}</small></summary>{grid}</details>"


def definitions(report: Report) -> str:
    """What the figures of a vision network mean, of those that the report has."""
    found = [given for stage in report.stages if (given := _classification(stage))]
    text = ""
    if any(given.agreement is not None for given in found):
        text += " Agreement: images whose likeliest class is the original's."
    if any(given.sqnr is not None for given in found):
        text += " SQNR: energy of the original's outputs over that of their change, 10 log10."
    if any(row.macs is not None for stage in report.stages for row in stage.ledger):
        text += " MACs: multiplications of one input."
    return text


def clipped_fraction(activation: ActivationRange) -> float:
    """The part of the counted values below `low` or above `high`, 0 to 1; a bin cut by a limit counts in proportion."""
    total = sum(activation.counts)
    outside = 0.0
    # A range is kept in float32: its last digits must not cut off the bin in which all of a ReLU6's largest lie.
    tiny = 1e-4
    for start, end, count in zip(activation.edges, activation.edges[1:], activation.counts, strict=False):
        if end > start:
            kept = max(0.0, min(end, activation.high) - max(start, activation.low)) / (end - start)
        else:
            kept = float(activation.low <= start <= activation.high)
        outside += count * (1 - kept if kept < 1 - tiny else 0.0)
    return outside / total if total else 0.0


def _classification(stage: Stage) -> Classification | None:
    return stage.quality.classification if stage.quality else None


def _confusions(stages: Sequence[Stage]) -> str:
    """The matrices of the first and the last stage that have one, for the same classes."""
    found = [(stage, given) for stage in stages if (given := _classification(stage)) and given.confusion]
    if not found:
        return ""
    last = found[-1][1]
    ends = [entry for entry in found if len(entry[1].confusion) == len(last.confusion)]
    ends = ends if len(ends) == 1 else [ends[0], ends[-1]]
    count = len(last.confusion)
    names = [row.name for row in last.classes] if len(last.classes) == count else [str(k) for k in range(count)]
    shown = svg_vision.most_confused(last.confusion)
    note = "rows: the class; columns: what it was taken for"
    if len(shown) < count:
        note = f"the {len(shown)} most confused of {count:,} classes; {note}"
    key = (
        '<span><i class="right"></i>recognised</span><span><i class="wrong"></i>taken for another class</span>'
        "<span>shade: square root of the share of all images of the class</span>"
    )
    figures = "".join(
        f"<figure>{svg_vision.confusion_plot(given.confusion, names, shown, f'Confusion of classes, {stage.name}')}"
        f"<figcaption>{escape(stage.name)}</figcaption></figure>"
        for stage, given in ends
    )
    return f'<h3>Confusion <small>{note}</small></h3><p class="legend">{key}</p><div class="matrices">{figures}</div>'


def _class_table(found: Sequence[tuple[Stage, Classification]]) -> str:
    """Recall after every step, the class that lost most first, and the precision at the end."""
    if not found:
        return ""
    last = found[-1][1].classes
    found = [entry for entry in found if len(entry[1].classes) == len(last)]
    first = found[0][1].classes
    compared = len(found) > 1
    recalls = [row.recall for _, given in found for row in given.classes if row.recall is not None]
    lowest = math.floor(10 * min(recalls, default=0.0)) / 10
    titles = ["class", "images", *(stage.name for stage, _ in found)]
    head = headings(titles[:2], ["images"]) + "".join(
        f'<th scope="col" class="number">{escape(title)}<small>recall</small></th>' for title in titles[2:]
    )
    if compared:
        head += headings(["change"], ["change"])
        head += f'<th scope="col" class="way">{100 * lowest:.0f}% to 100%</th>'
    head += '<th scope="col" class="number">precision</th>'
    rows = []
    for k in sorted(range(len(last)), key=lambda k: _change(first[k], last[k])):
        cells = [
            f'<th scope="row" data-v="{k}">{escape(last[k].name)}</th>',
            number(last[k].images, f"{last[k].images:,}"),
            *(_share(given.classes[k].recall) for _, given in found),
        ]
        if compared:
            cells.append(_changed(first[k], last[k], lowest))
        cells.append(_share(last[k].precision))
        rows.append("".join(cells))
    order = "; largest loss first" if compared else ""
    shown = f'<div class="classes">{sortable(head, rows)}</div>'
    return folded("Recall and precision", f"{len(last):,} classes{order}", len(last), shown)


def _share(value: float | None) -> str:
    return missing() if value is None else number(value, units.fraction(value))


def _change(before: ClassRow, after: ClassRow) -> float:
    """The gain of recall, -1 to 1; what was not measured comes last."""
    return math.inf if before.recall is None or after.recall is None else after.recall - before.recall


def _changed(before: ClassRow, after: ClassRow, lowest: float) -> str:
    """Two cells: the change of recall in points, and where it went from and to."""
    if before.recall is None or after.recall is None:
        return f'{missing()}<td class="none">{EMPTY_TEXT}</td>'
    change = after.recall - before.recall
    stderr = math.sqrt(after.recall * (1 - after.recall) / after.images) if after.images else 0.0
    # Within two standard errors of one measurement a loss is not told from chance.
    bad = -change > 2 * stderr
    tone = " bad" if bad else ""
    text = units.points(after.recall, before.recall)
    picture = svg_vision.recall_plot(before.recall, after.recall, lowest, bad)
    return f'<td class="number{tone}" data-v="{change!r}">{text}</td><td data-v="{after.recall!r}">{picture}</td>'


def _percent(part: float) -> str:
    """A small part as a percentage of two digits: 0.012%, where `units.fraction` would say 0.0%."""
    return f"{units.significant(100 * part, 2)}%"


__all__ = ["activations", "classes", "clipped_fraction", "definitions", "latencies"]
