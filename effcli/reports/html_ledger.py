"""The ledger of a pass as HTML: figures per layer as pictures, and one table row per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from effcli.reports import svg, units
from effcli.reports.html_tables import (
    Field,
    Folded,
    Table,
    headings,
    is_positive,
    missing,
    number,
    value_text,
)
from effcli.reports.html_templates import drawn, render
from effcli.reports.report import LedgerRow

# What was drawn of the stages before: for the kind of plot and its figures the name of the stage.
Drawn = dict[tuple[str, tuple[object, ...]], str]


@dataclass(frozen=True)
class _Plot:
    """A picture with its title; costs: whether it has the legend of work and storage."""

    title: str
    note: str
    picture: Markup
    costs: bool = False


def plots(ledger: Sequence[LedgerRow], stage: str = "", before: Drawn | None = None) -> Markup:
    """Error, bits per weight and, where multiplications were counted, work and storage of every layer.

    A figure that all layers have alike, or that was drawn for a stage before (noted in `before`), is said in a line.
    """
    before = {} if before is None else before
    by_output = any(row.output_error is not None for row in ledger)
    kind = "output" if by_output else "weight"
    found: list[_Plot] = []
    lines: list[str] = []

    def error(row: LedgerRow) -> float | None:
        return row.output_error if by_output else row.weight_error

    def stored(row: LedgerRow) -> float | None:
        # A head that reads the embedding's weight stores nothing of its own: 0 bits would be no finding.
        return row.bits_per_weight if row.nbytes else None

    what = f"{kind} error, relative and squared"
    picture = _varied(ledger, error, units.error, what, True, 300, stage, before, lines)
    if picture:
        found.append(_Plot("Error per layer", f"{what}; logarithmic axis", picture))
    picture = _varied(ledger, stored, units.bits, "bits per weight", False, 190, stage, before, lines)
    if picture:
        found.append(_Plot("Bits per weight", "hollow: kept", picture))
    shared = [row.name for row in ledger if not row.nbytes]
    if shared:
        lines.append(f"{_named(shared)} stores no weight of its own")
    if any(row.macs for row in ledger):
        key = ("costs", tuple((row.name, row.macs, row.nbytes) for row in ledger))
        if key in before:
            lines.append(f"Work and storage per layer: as after {before[key]}")
        else:
            before[key] = stage
            macs = units.quantity(sum(row.macs or 0 for row in ledger))
            total = f"{macs} multiplications of one input, {units.size(sum(row.nbytes for row in ledger))}"
            work = svg.cost_plot(svg.layer_axis(ledger), ledger, height=300)
            found.append(_Plot("Work and storage per layer", total, drawn(work), costs=True))
    axis = svg.layer_axis(ledger)
    return render(
        "ledger_plots.html.j2",
        roles=axis.legend,
        others=any(place.series is None for place in axis.places.values()),
        plots=found,
        lines=lines,
    )


def _varied(
    ledger: Sequence[LedgerRow],
    value: Callable[[LedgerRow], float | None],
    text: Callable[[float], str],
    what: str,
    log: bool,
    height: int,
    stage: str,
    before: Drawn,
    lines: list[str],
) -> Markup:
    """A plot of a figure of the layers that have one, or empty and a line where there is nothing to see in a plot."""
    title = what[:1].upper() + what[1:]
    figures = [(row.name, figure) for row in ledger if (figure := value(row)) is not None]
    shown = sorted({text(figure) for _, figure in figures})
    if not figures:
        return Markup()
    if len(shown) == 1:
        whose = f"all {len(figures):,} layers" if len(figures) > 1 else figures[0][0]
        lines.append(f"{title}: {shown[0]} in {whose}")
        return Markup()
    key = (what, tuple(figures))
    if key in before:
        lines.append(f"{title}: as after {before[key]}")
        return Markup()
    before[key] = stage
    axis = svg.layer_axis(ledger, {name for name, _ in figures})
    return drawn(svg.figure_plot(axis, ledger, value, text, f"{title}, per layer", log=log, height=height))


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"each of {', '.join(names)}"


def table(ledger: Sequence[LedgerRow]) -> Folded:
    """One row per layer, with the columns that some layer fills."""
    largest = max((found for row in ledger if is_positive(found := row.output_error or 0.0)), default=0.0)
    by_macs = any(row.macs is not None for row in ledger)
    by_parameters = any(row.parameters is not None for row in ledger)
    by_output = any(row.output_error is not None for row in ledger)
    by_weight = any(row.weight_error is not None for row in ledger)
    titles = ["layer", "kind", "shape", *["MACs"] * by_macs, *["parameters"] * by_parameters, "format", "bits", "size"]
    titles += ["output error"] * by_output + ["weight error"] * by_weight + ["status"]
    numeric = {"shape", "MACs", "parameters", "bits", "size", "output error", "weight error"}
    rows = []
    for row in ledger:
        notes = [row.reason, *(f"{key} {value_text(value)}" for key, value in row.notes.items())]
        rows.append(
            [
                Field(row.name, "; ".join(note for note in notes if note), row=True),
                Field(row.kind),
                number(math.prod(row.shape), units.shape(row.shape)),
                *[missing() if row.macs is None else number(row.macs, units.quantity(row.macs))] * by_macs,
                *[missing() if row.parameters is None else number(row.parameters, f"{row.parameters:,}")]
                * by_parameters,
                Field(row.format),
                number(row.bits_per_weight, units.bits(row.bits_per_weight)) if row.nbytes else missing(),
                number(row.nbytes, units.size(row.nbytes)),
                *[_error(row.output_error, largest)] * by_output,
                *[_error(row.weight_error, 0.0)] * by_weight,
                Field(row.status, css=row.status),
            ]
        )
    shown = Table("Ledger", headings(titles, numeric), rows)
    return Folded("Ledger", units.count(len(ledger), "layer"), shown)


def _error(value: float | None, largest: float) -> Field:
    if value is None:
        return missing()
    bar = f"{100 * value / largest:.1f}%" if largest and is_positive(value) else ""
    return number(value, units.error(value), bar)


__all__ = ["Drawn", "plots", "table"]
