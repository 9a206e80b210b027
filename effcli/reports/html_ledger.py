"""The ledger of a pass as HTML: figures per layer as pictures, and one table row per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from effcli.reports import svg, units
from effcli.reports.escaping import markup as escape
from effcli.reports.html_parts import folded, headings, is_positive, missing, number, sortable, value_text
from effcli.reports.report import LedgerRow


def plots(ledger: Sequence[LedgerRow]) -> str:
    """Error, bits per weight and, where multiplications were counted, work and storage of every layer."""
    axis = svg.layer_axis(ledger)
    by_output = any(row.output_error is not None for row in ledger)

    def error(row: LedgerRow) -> float | None:
        return row.output_error if by_output else row.weight_error

    kind = "output" if by_output else "weight"
    what = f"{kind} error, relative and squared"
    errors = svg.figure_plot(axis, ledger, error, units.error, f"{what}, per layer", log=True, height=300)
    stored = svg.figure_plot(
        axis,
        ledger,
        lambda row: row.bits_per_weight,
        lambda value: f"{units.bits(value)} bits",
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
    parts.append(f'<h3>Bits per weight <small>hollow: kept</small></h3><div class="scroll">{stored}</div>')
    work = svg.cost_plot(axis, ledger, height=300)
    if work:
        macs = svg.quantity(sum(row.macs or 0 for row in ledger))
        total = f"{macs} multiplications of one input, {units.size(sum(row.nbytes for row in ledger))}"
        key = '<span><i class="macs"></i>MACs, upwards</span><span><i class="bytes"></i>stored bytes, downwards</span>'
        parts.append(f'<h3>Work and storage per layer <small>{total}</small></h3><p class="legend">{key}</p>')
        parts.append(f'<div class="scroll">{work}</div>')
    return "".join(parts) + "</div>"


def table(ledger: Sequence[LedgerRow]) -> str:
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
        remark = "; ".join(note for note in notes if note)
        below = f"<small>{escape(remark)}</small>" if remark else ""
        cells = [
            f'<th scope="row">{escape(row.name)}{below}</th>',
            f"<td>{escape(row.kind)}</td>",
            number(math.prod(row.shape), units.shape(row.shape)),
            *[missing() if row.macs is None else number(row.macs, svg.quantity(row.macs))] * by_macs,
            *[missing() if row.parameters is None else number(row.parameters, f"{row.parameters:,}")] * by_parameters,
            f"<td>{escape(row.format)}</td>",
            number(row.bits_per_weight, units.bits(row.bits_per_weight)),
            number(row.nbytes, units.size(row.nbytes)),
            *[_error(row.output_error, largest)] * by_output,
            *[_error(row.weight_error, 0.0)] * by_weight,
            f'<td class="{row.status}">{row.status}</td>',
        ]
        rows.append("".join(cells))
    shown = sortable(headings(titles, numeric), rows)
    return folded("Ledger", units.count(len(ledger), "layer"), len(ledger), shown)


def _error(value: float | None, largest: float) -> str:
    if value is None:
        return missing()
    bar = ""
    if largest and is_positive(value):
        bar = f'<span class="bar" style="width:{100 * value / largest:.1f}%"></span>'
    # NaN sorts as the worst there is.
    key = "Infinity" if value != value else repr(value).replace("inf", "Infinity")
    return f'<td class="number" data-v="{key}">{units.error(value)}{bar}</td>'
