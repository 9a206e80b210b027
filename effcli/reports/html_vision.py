"""The sections of a report that only a vision network has: latencies, classes, and activations with their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from effcli.reports import svg_vision, units
from effcli.reports.columns import EMPTY_TEXT, latency_cell
from effcli.reports.html_tables import Field, Folded, Head, Table, headings, missing, number
from effcli.reports.html_templates import drawn, render
from effcli.reports.report import ActivationRange, Classification, ClassRow, Report, Stage

# More pictures of activations are folded until asked for.
_MANY_PICTURES = 24


def latencies(report: Report) -> Markup:
    """One row per stage and runtime; empty without latencies."""
    first = report.stages[0]
    rows = []
    for stage in report.stages:
        for found in stage.latencies:
            cell = latency_cell(found, stage, first)
            tone = "bad" if cell.tone else "figure" if cell.note else "none"
            rows.append(
                [
                    Field(stage.name, row=True),
                    Field(found.runtime),
                    number(found.milliseconds, units.significant(found.milliseconds)),
                    Field(cell.note or EMPTY_TEXT, css="number", text_css=tone),
                    number(found.fastest, units.significant(found.fastest)),
                    number(found.repetitions, f"{found.repetitions:,}"),
                    number(found.threads, str(found.threads)),
                    Field(found.device),
                ]
            )
    if not rows:
        return Markup()
    titles = ["step", "runtime", "median, ms", "against input", "fastest, ms", "repetitions", "threads", "device"]
    return render("latencies.html.j2", table=Table("Latency of one input", headings(titles, titles[2:7]), rows))


def classes(report: Report) -> Markup:
    """How well each class is recognised before and after, and what it is taken for; empty without classes."""
    found = [(stage, given) for stage in report.stages if (given := _classification(stage)) and given.classes]
    matrices, note = _confusions(report.stages)
    table = _class_table(found)
    if not matrices and table is None:
        return Markup()
    return render("classes.html.j2", matrices=matrices, note=note, table=table)


@dataclass(frozen=True)
class _Activation:
    """A picture of an activation; clipped: the part that its range cuts off, empty where it cuts off none."""

    name: str
    range: str
    clipped: str
    picture: Markup


def activations(ranges: Sequence[ActivationRange]) -> Markup:
    """The values of each activation on the calibration data, and what of them the chosen range cuts off."""
    if not ranges:
        return Markup()
    pictures = []
    for found in ranges:
        part = clipped_fraction(found)
        chosen = f"{found.observer}: {found.low:.4g} to {found.high:.4g}"
        picture = drawn(svg_vision.activation_plot(found))
        pictures.append(_Activation(found.name, chosen, _percent(part) if part else "", picture))
    folded = f"{len(ranges):,}" if len(ranges) > _MANY_PICTURES else ""
    return render("activations.html.j2", activations=pictures, folded=folded)


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


def _confusions(stages: Sequence[Stage]) -> tuple[list[tuple[str, Markup]], str]:
    """The matrices of the first and the last stage that have one, for the same classes, by name; and a note on them."""
    found = [(stage, given) for stage in stages if (given := _classification(stage)) and given.confusion]
    if not found:
        return [], ""
    last = found[-1][1]
    ends = [entry for entry in found if len(entry[1].confusion) == len(last.confusion)]
    ends = ends if len(ends) == 1 else [ends[0], ends[-1]]
    count = len(last.confusion)
    names = [row.name for row in last.classes] if len(last.classes) == count else [str(k) for k in range(count)]
    shown = svg_vision.most_confused(last.confusion)
    note = "rows: the class; columns: what it was taken for"
    if len(shown) < count:
        note = f"the {len(shown)} most confused of {count:,} classes; {note}"
    matrices = [
        (
            stage.name,
            drawn(svg_vision.confusion_plot(given.confusion, names, shown, f"Confusion of classes, {stage.name}")),
        )
        for stage, given in ends
    ]
    return matrices, note


def _class_table(found: Sequence[tuple[Stage, Classification]]) -> Folded | None:
    """Recall after every step, the class that lost most first, and the precision at the end."""
    if not found:
        return None
    last = found[-1][1].classes
    found = [entry for entry in found if len(entry[1].classes) == len(last)]
    first = found[0][1].classes
    compared = len(found) > 1
    recalls = [row.recall for _, given in found for row in given.classes if row.recall is not None]
    lowest = math.floor(10 * min(recalls, default=0.0)) / 10
    heads = [
        Head("class"),
        Head("images", css="number"),
        *(Head(stage.name, note="recall", css="number") for stage, _ in found),
    ]
    if compared:
        heads += [Head("change", css="number"), Head(f"{100 * lowest:.0f}% to 100%", css="way")]
    heads.append(Head("precision", css="number"))
    rows = []
    for k in sorted(range(len(last)), key=lambda k: _change(first[k], last[k])):
        cells = [
            Field(last[k].name, key=str(k), row=True),
            number(last[k].images, f"{last[k].images:,}"),
            *(_share(given.classes[k].recall) for _, given in found),
        ]
        if compared:
            cells += _changed(first[k], last[k], lowest)
        cells.append(_share(last[k].precision))
        rows.append(cells)
    order = "; largest loss first" if compared else ""
    table = Table("Recall and precision", heads, rows)
    return Folded("Recall and precision", f"{len(last):,} classes{order}", table, wrapped="classes")


def _share(value: float | None) -> Field:
    return missing() if value is None else number(value, units.fraction(value))


def _change(before: ClassRow, after: ClassRow) -> float:
    """The gain of recall, -1 to 1; what was not measured comes last."""
    return math.inf if before.recall is None or after.recall is None else after.recall - before.recall


def _changed(before: ClassRow, after: ClassRow, lowest: float) -> list[Field]:
    """Two cells: the change of recall in points, and where it went from and to."""
    if before.recall is None or after.recall is None:
        return [missing(), Field(EMPTY_TEXT, css="none")]
    change = after.recall - before.recall
    stderr = math.sqrt(after.recall * (1 - after.recall) / after.images) if after.images else 0.0
    # Within two standard errors of one measurement a loss is not told from chance.
    bad = -change > 2 * stderr
    text = units.points(after.recall, before.recall)
    picture = svg_vision.recall_plot(before.recall, after.recall, lowest, bad)
    return [
        Field(text, key=repr(change), css="number bad" if bad else "number"),
        Field(key=repr(after.recall), picture=drawn(picture)),
    ]


def _percent(part: float) -> str:
    """A small part as a percentage of two digits: 0.012%, where `units.fraction` would say 0.0%."""
    return f"{units.significant(100 * part, 2)}%"


__all__ = ["activations", "classes", "clipped_fraction", "definitions", "latencies"]
