"""How long the phases of a run took, next to what was predicted, as every renderer shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from effcli.reports import units
from effcli.reports.report import Report


class PhaseRow(NamedTuple):
    """One line; predicted, ratio: empty where nothing was predicted."""

    name: str
    took: str
    predicted: str = ""
    ratio: str = ""


def phase_rows(report: Report) -> list[PhaseRow]:
    """Every phase, then all together: of the predicted ones where there are any. Empty of a report without phases."""
    rows = []
    for phase in report.phases:
        rows.append(_row(phase.name, phase.seconds, phase.predicted, phase.reason))
    known = [phase for phase in report.phases if phase.predicted is not None]
    summed = known or report.phases
    if len(summed) > 1:
        name = "all together" if len(summed) == len(report.phases) else "all that were predicted"
        predicted = sum(phase.predicted or 0.0 for phase in known) if known else None
        rows.append(_row(name, sum(phase.seconds for phase in summed), predicted))
    return rows


def phase_titles(rows: Iterable[PhaseRow]) -> tuple[str, ...]:
    """The heads of the columns that `rows` fill, from the first one on."""
    titles = ("phase", "took", "predicted", "took / predicted")
    return titles if any(row.predicted for row in rows) else titles[:2]


def _row(name: str, seconds: float, predicted: float | None, reason: str = "") -> PhaseRow:
    took = units.duration(seconds)
    if predicted is None:
        return PhaseRow(name, took, f"not predicted: {reason}" if reason else "")
    return PhaseRow(name, took, units.duration(predicted), units.ratio(seconds / predicted) if predicted else "")


__all__ = ["PhaseRow", "phase_rows", "phase_titles"]
