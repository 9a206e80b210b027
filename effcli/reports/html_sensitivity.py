"""Sensitivities, and what a search found, as one HTML file or as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from effcli.errors import writing
from effcli.reports import svg, units
from effcli.reports.escaping import markup as escape
from effcli.reports.html_tables import Field, Folded, Table, headings, missing, number
from effcli.reports.html_templates import drawn
from effcli.reports.html_templates import render as rendered
from effcli.reports.report import LedgerRow
from effcli.reports.sensitivity import LayerCosts, Point, Search, Sensitivity, Value, valued
from effcli.reports.svg_curves import Curve, curves_plot

_WIDTH, _HEIGHT = 960, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 14, 44


def write(found: Sensitivity | Search, path: Path) -> None:
    """Write `found` to `path`, as a page where it ends in .html and as JSON otherwise."""
    text = render(found) if path.suffix == ".html" else found.model_dump_json(indent=1) + "\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_all(found: Sequence[Search], folder: Path) -> None:
    """Write each search to search.json and search.html in `folder`, or to search-1.json and so on of several."""
    for at, each in enumerate(found, start=1):
        stem = "search" if len(found) == 1 else f"search-{at}"
        for suffix in (".json", ".html"):
            write(each, folder / f"{stem}{suffix}")


def render(found: Sensitivity | Search) -> str:
    """The whole page."""
    layers = found.sensitivity if isinstance(found, Search) else found
    what = (
        f"{layers.option} per {layers.item} for {layers.step}"
        if isinstance(found, Search)
        else f"each {layers.item} alone with {layers.step}"
    )
    values = sorted({option.value for layer in layers.layers for option in layer.options})
    axis = svg.layer_axis([_row(layer, 0) for layer in layers.layers])
    titles = [valued(layers.option, value) for value in values]
    heads = headings((layers.item, "shape", *titles), titles)
    table = Table(f"All {layers.item}s", heads, [_line(layer, values) for layer in layers.layers])
    return rendered(
        "sensitivity.html.j2",
        title=f"{layers.model} \N{MIDDLE DOT} {what}",
        model=layers.model,
        what=what,
        search=choices(found) if isinstance(found, Search) else Markup(),
        explained=layers.explained,
        inputs=f"{layers.inputs:,}",
        unit=layers.unit,
        roles=axis.legend,
        option=layers.option,
        item=layers.item,
        curves=_curves(layers, values, axis),
        plots=[
            (title, _plot(layers, value))
            for title, value in zip(titles, values, strict=True)
            if any(option.cost != 0 for layer in layers.layers for option in layer.options if option.value == value)
        ],
        layers=Folded(f"All {layers.item}s", f"{len(layers.layers)}", table, closed=False),
        remarks=layers.remarks,
    )


def choices(found: Search) -> Markup:
    """The front of a search, and every choice that is drawn in it."""
    unit = found.sensitivity.unit
    rows = []
    for point in found.choices(found.front):
        figures = (point.measured, *((point.limited,) if found.limited else ()))
        rows.append(
            [
                Field(point.name or "front", row=True),
                number(point.nbytes, units.size(point.nbytes)),
                number(point.average, f"{point.average:.2f}"),
                number(point.cost, units.significant(point.cost)),
                *(missing() if value is None else number(value, units.figure(value)) for value in figures),
            ]
        )
    more = (found.limited,) if found.limited else ()
    titles = (
        "choice",
        f"{found.sensitivity.item}s",
        found.sensitivity.option,
        f"cost, {unit}",
        found.measure or "measured",
        *more,
    )
    return rendered(
        "search.html.j2",
        budget=found.budget,
        picture=drawn(front_plot(found)),
        along=found.along,
        item=found.sensitivity.item,
        choices=Folded("Choices", "", Table("Choices", headings(titles, titles[1:]), rows)),
    )


def front_plot(found: Search) -> str:
    """Cost, on a logarithmic axis, over the bytes of all layers. Choices that cost nothing stand at the lower edge."""
    front, uniform, unit, item = found.front, found.uniform, found.sensitivity.unit, found.sensitivity.item
    points = [*front, *uniform, found.chosen]
    low, high = min(point.nbytes for point in points), max(point.nbytes for point in points)
    rise, ticks = svg.log_scale([point.cost for point in points])
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def place(point: Point) -> tuple[float, float]:
        across = 0.04 + 0.92 * (point.nbytes - low) / (high - low) if high > low else 0.5
        up = min(1.0, max(0.0, rise(point.cost)))
        return _LEFT + (right - _LEFT) * across, bottom - (bottom - _TOP) * up

    parts = [svg.opened(_WIDTH, _HEIGHT, f"Cost of the {escape(found.along)} over their size, logarithmic axis")]
    parts.append(svg.logarithmic(right - 96, _TOP))
    parts.append(f'<text x="{_LEFT}" y="{_TOP}">cost, {escape(unit)}</text>')
    for tick, text in ticks:
        y = bottom - (bottom - _TOP) * rise(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front))
    parts.append(f'<polyline class="trend s0" points="{path}"/>')
    for series, shown in ((0, front), (1, uniform), (3, [found.chosen])):
        for point in shown:
            x, y = place(point)
            measured = "" if point.measured is None else f", measured {units.significant(point.measured, 4)}"
            name = f"{point.name}: " if point.name else ""
            title = f"{name}{units.size(point.nbytes)}, {units.significant(point.cost)} {unit}{measured}"
            radius = 5 if series else 3.4
            parts.append(
                f'<circle class="mark s{series}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{escape(title)}</title></circle>"
            )
    for point in uniform:
        x, _ = place(point)
        label = f"{point.name}, {units.size(point.nbytes)}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 36}" text-anchor="end">bytes of the {item}s</text>')
    return "".join(parts) + "</svg>"


def _curves(found: Sensitivity, values: Sequence[Value], axis: svg.Axis) -> list[tuple[str, str, Markup]]:
    """A picture for the layers of each kind, with its title and the layer that costs most; none of a single value.

    Kinds are those of the axis; layers outside of repeated blocks are told apart by what they are.
    """
    kinds: dict[tuple[str, int], list[Curve]] = {}
    for layer in found.layers:
        series = axis.places[layer.name].series
        kind = (layer.kind, 0) if series is None or not axis.legend else (axis.legend[series], series)
        points = tuple((option.value, option.cost) for option in layer.options)
        if sum(cost != 0 for _, cost in points) > 1:
            kinds.setdefault(kind, []).append(Curve(layer.name, points))
    every = [cost for curves in kinds.values() for curve in curves for _, cost in curve.points]
    scale = svg.log_scale(every)
    return [
        (
            f"{kind}, {units.count(len(curves), found.item)}",
            max(curves, key=lambda curve: curve.worst).name,
            drawn(
                curves_plot(curves, values, scale, series, f"Cost of each {found.item}, {kind}, over {found.option}")
            ),
        )
        for (kind, series), curves in kinds.items()
    ]


def _plot(found: Sensitivity, value: Value) -> Markup:
    """The costs of all layers with one value of the option."""
    places = {
        layer.name: at
        for layer in found.layers
        for at, option in enumerate(layer.options)
        if option.value == value and math.isfinite(option.cost)
    }
    costs = {layer.name: layer.options[places[layer.name]].cost for layer in found.layers if layer.name in places}
    rows = [_row(layer, places[layer.name]) for layer in found.layers if layer.name in places]
    axis = svg.layer_axis([_row(layer, 0) for layer in found.layers], costs)
    label = f"Cost of each {found.item} with {valued(found.option, value)}"
    picture = svg.figure_plot(axis, rows, lambda row: costs[row.name], units.significant, label, log=True, height=240)
    return drawn(picture)


def _line(layer: LayerCosts, values: Sequence[Value]) -> list[Field]:
    costs = {option.value: option.cost for option in layer.options}
    cells = (number(costs[each], units.significant(costs[each])) if each in costs else missing() for each in values)
    return [Field(layer.name, row=True), Field(units.shape(layer.shape)), *cells]


def _row(layer: LayerCosts, at: int) -> LedgerRow:
    """A layer with one of its options as a line of a ledger, which is what the plots are drawn from."""
    option = layer.options[at]
    return LedgerRow(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        format=option.format,
        bits_per_weight=8 * option.nbytes / max(layer.shape[0] * layer.shape[1], 1),
        nbytes=option.nbytes,
        status="compressed",
        output_error=option.output_error,
    )


__all__ = ["choices", "front_plot", "render", "write", "write_all"]
