"""Plots of a report as SVG text: figures and costs per layer, weights before and after. Colours come from the CSS.

Series k is drawn in the CSS variable --c<k>, lines and text in --line and --faint, so that one drawing serves light
and dark. Every mark carries a <title>, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from effcli.reports import units
from effcli.reports.escaping import markup as escape
from effcli.reports.report import Histogram, LedgerRow
from effcli.reports.short_names import shortened

SERIES = 8
_WIDTH = 960
_LEFT, _RIGHT, _TOP = 64, 16, 14
_FEW = 24  # so many layers can be named below the axis
_NAME, _SLANTED = 12, 17  # characters of a name below the axis
# The part of the width that a layer outside of the blocks needs for its name.
_OUTER = 0.13


@dataclass(frozen=True)
class Place:
    """Where a layer stands along the axis, and to which series it belongs (None: too many series, drawn grey)."""

    x: float
    series: int | None


class Tick(NamedTuple):
    """What stands below an axis at `x`; name: in full, where `text` is short."""

    x: float
    text: str
    name: str = ""


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of all plots of one ledger: blocks of a repeated network, or layers one by one."""

    places: dict[str, Place]
    ticks: tuple[Tick, ...]
    length: float
    title: str
    slanted: bool
    legend: tuple[str, ...]


def layer_axis(rows: Sequence[LedgerRow], drawn: Collection[str] | None = None) -> Axis:
    """Lay out the layers: by block where names count blocks, in the ledger's order otherwise.

    drawn: the names of the layers that have something to be drawn (default: all); others take no room. A series is
    that of all rows, so that plots of one ledger agree on its colour.
    """
    blocks = {name: found for name in (row.name for row in rows) if (found := _block(name)) is not None}
    roles = list(dict.fromkeys(role for _, role in blocks.values()))
    if drawn is not None:
        rows = [row for row in rows if row.name in drawn]
        blocks = {row.name: blocks[row.name] for row in rows if row.name in blocks}
    numbers = sorted({number for number, _ in blocks.values()})
    if len(numbers) < 3 or len(roles) > 2 * len(blocks) / 3 or _numbered_twice(rows):
        return _by_order(rows)
    shown = roles[:SERIES] if len(roles) <= SERIES else roles[: SERIES - 1]
    places: dict[str, Place] = {}
    x = 0.0
    ticks: list[Tick] = []
    outside = [row.name for row in rows if row.name not in blocks]
    short = dict(zip(outside, _shortened(outside, _NAME), strict=True))
    wide = max(1.0, _OUTER * len(numbers))
    first = next((index for index, row in enumerate(rows) if row.name in blocks), 0)
    leading = {row.name for row in rows[:first]}
    for name in outside:
        if name in leading:
            places[name] = Place(x + wide / 2, None)
            ticks.append(Tick(x + wide / 2, short[name], name))
            x += wide
    slot = {number: x + index + 0.5 for index, number in enumerate(numbers)}
    x += len(numbers)
    step = _nice_step(len(numbers) / 14)
    ticks += [Tick(slot[number], str(number)) for number in numbers if number % step == 0]
    for name, (number, role) in blocks.items():
        series = roles.index(role) if role in shown else None
        # Side by side within the block, so that layers of one figure do not hide each other.
        aside = 0.0 if series is None else 0.1 * (series - (len(shown) - 1) / 2)
        places[name] = Place(slot[number] + aside, series)
    for name in outside:
        if name not in leading:
            places[name] = Place(x + wide / 2, None)
            ticks.append(Tick(x + wide / 2, short[name], name))
            x += wide
    return Axis(places, tuple(ticks), x, "block", False, _short_roles(shown))


def figure_plot(
    axis: Axis,
    rows: Sequence[LedgerRow],
    value: Callable[[LedgerRow], float | None],
    text: Callable[[float], str],
    label: str,
    *,
    log: bool,
    height: int,
) -> str:
    """One mark per layer at `value` of its row; rows without one are left out. Empty text when none has one.

    Infinite values and NaN stand as squares at the upper edge; on a logarithmic axis zero stands at the lower one.
    """
    points = [(row, found) for row in rows if (found := value(row)) is not None]
    if not points:
        return ""
    scale = log_scale if log else linear_scale
    to_unit, ticks = scale([found for _, found in points])
    bottom = height - _below(axis)
    tall = bottom - _TOP

    def place(name: str) -> float:
        return _across(axis, axis.places[name].x)

    def rise(found: float) -> float:
        return bottom - tall * min(1.0, max(0.0, to_unit(found)))

    parts = [opened(_WIDTH, height, f"{label}, logarithmic axis" if log else label)]
    parts += [_grid(bottom - tall * to_unit(tick), tick_text) for tick, tick_text in ticks]
    if log:
        parts.append(logarithmic(_LEFT + 6, _TOP))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts += _names(axis, bottom)
    for series in sorted({p.series for p in axis.places.values() if p.series is not None}):
        line = [(place(row.name), rise(found)) for row, found in points if axis.places[row.name].series == series]
        # A line joins one layer of each block; layers of different kinds have nothing between them.
        if axis.legend and len(line) > 2 and len({x for x, _ in line}) == len(line):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
            parts.append(f'<polyline class="trend s{series}" points="{path}"/>')
    for row, found in points:
        index = axis.places[row.name].series
        x, y = place(row.name), rise(found)
        name = "sx" if index is None else f"s{index}"
        kept = " kept" if row.status == "kept" else ""
        title = f"<title>{escape(row.name)}: {escape(text(found))} ({escape(row.format)})</title>"
        if math.isfinite(found):
            parts.append(f'<circle class="mark {name}{kept}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">{title}</circle>')
        else:
            shape = f'x="{x - 4:.1f}" y="{_TOP - 4}" width="8" height="8"'
            parts.append(f'<rect class="mark {name}{kept}" {shape}>{title}</rect>')
    parts.append("</svg>")
    return "".join(parts)


def cost_plot(axis: Axis, rows: Sequence[LedgerRow], height: int) -> str:
    """Multiplications of one input (upwards) and stored bytes (downwards) of each layer, each to its own height.

    Empty text when no row counts multiplications.
    """
    if not any(row.macs for row in rows):
        return ""
    bottom = height - _below(axis)
    half = (bottom - _TOP) / 2
    middle = _TOP + half
    work_to_unit, work_ticks = linear_scale([row.macs or 0 for row in rows], most=3)
    size_to_unit, size_ticks = linear_scale([row.nbytes for row in rows], most=3)
    # A slot is one wide; layers of one block stand a tenth of it apart.
    wide = max((_across(axis, 1) - _across(axis, 0)) * (0.09 if axis.legend else 0.72), 1.0)
    parts = [opened(_WIDTH, height, "Multiplications and stored bytes, per layer")]
    parts += [_grid(middle - half * work_to_unit(tick), units.quantity(tick)) for tick, _ in work_ticks if tick]
    parts += [_grid(middle + half * size_to_unit(tick), units.size(tick)) for tick, _ in size_ticks if tick]
    for row in rows:
        x = _across(axis, axis.places[row.name].x) - wide / 2
        up, down = half * work_to_unit(row.macs or 0), half * size_to_unit(row.nbytes)
        macs = "not counted" if row.macs is None else f"{units.quantity(row.macs)} MACs"
        parts.append(
            f"<g><title>{escape(row.name)}: {macs}, {units.size(row.nbytes)} ({escape(row.format)})</title>"
            f'<rect class="macs" x="{x:.1f}" y="{middle - up:.1f}" width="{wide:.1f}" height="{up:.1f}"/>'
            f'<rect class="bytes" x="{x:.1f}" y="{middle:.1f}" width="{wide:.1f}" height="{down:.1f}"/></g>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{middle}" y2="{middle}"/>')
    parts += _names(axis, bottom)
    return "".join(parts) + "</svg>"


def histogram_plot(histogram: Histogram) -> str:
    """Weights before (upwards) and after (downwards) over the same bins, each to its own height."""
    width, half, gap = 300, 62, 3
    height = 2 * half + gap + 20
    label = f"Weights of {histogram.layer} before and after"
    parts = [opened(width, height, label), f"<title>{escape(label)}</title>"]
    parts.append(_steps(histogram.before, width, half, -half, "before"))
    parts.append(_steps(histogram.after, width, half + gap, half, "after"))
    if histogram.edges:
        low, high = histogram.edges[0], histogram.edges[-1]
        y = height - 4
        parts.append(f'<text x="0" y="{y}">{low:.3g}</text>')
        parts.append(f'<text x="{width}" y="{y}" text-anchor="end">{high:.3g}</text>')
        if low < 0 < high:
            zero = -low / (high - low) * width
            parts.append(f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{2 * half + gap}"/>')
            parts.append(f'<text x="{zero:.1f}" y="{y}" text-anchor="middle">0</text>')
    parts.append("</svg>")
    return "".join(parts)


def _by_order(rows: Sequence[LedgerRow]) -> Axis:
    places = {row.name: Place(index + 0.5, 0) for index, row in enumerate(rows)}
    if len(rows) <= _FEW:
        short = _shortened([row.name for row in rows], _SLANTED)
        ticks = tuple(Tick(index + 0.5, text, rows[index].name) for index, text in enumerate(short))
        return Axis(places, ticks, max(1, len(rows)), "", True, ())
    step = _nice_step(len(rows) / 14)
    ticks = tuple(Tick(index + 0.5, str(index + 1), rows[index].name) for index in range(0, len(rows), step))
    return Axis(places, ticks, len(rows), "layer", False, ())


def _numbered_twice(rows: Sequence[LedgerRow]) -> bool:
    """Whether layers of different shapes would stand in one place: 'layer1.0.conv1' beside 'layer2.0.conv1'.

    Experts of one block do stand in one place: they have one shape.
    """
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    found = ((_block(row.name), row.shape) for row in rows)
    return any(shapes.setdefault(block, shape) != shape for block, shape in found if block)


def _block(name: str) -> tuple[int, str] | None:
    """'model.layers.7.mlp.up_proj' -> (7, 'mlp.up_proj'); numbers within the block, such as experts', become stars."""
    match = re.match(r"(?:[^.]*[^.\d][^.]*\.)*?(\d+)\.(.+)", name)
    return (int(match[1]), re.sub(r"\b\d+\b", "*", match[2])) if match else None


def _short_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the names where these tell all series apart."""
    tails = [role.rsplit(".", 1)[-1] for role in roles]
    return tuple(tails) if len(set(tails)) == len(tails) and "*" not in tails else tuple(roles)


def _shortened(names: Sequence[str], most: int) -> list[str]:
    # An embedding is listed by its parameter; `weight` alone would say nothing of it.
    return shortened([name.removesuffix(".weight") for name in names], most)


def _nice_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... not below `least`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def log_scale(values: Iterable[float]) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From a positive value to 0..1 by its logarithm, and ticks at 1, and where few at 2 and 5, times powers of 10."""
    positive = [value for value in values if 0 < value < math.inf]
    low, high = (math.log10(min(positive)), math.log10(max(positive))) if positive else (-1.0, 0.0)
    margin = max(0.06 * (high - low), 0.08)
    low, high = low - margin, high + margin

    def to_unit(value: float) -> float:
        if not value > 0:
            return 1.0 if value != value else 0.0
        return (math.log10(value) - low) / (high - low) if value < math.inf else 1.0

    decades = range(math.floor(low), math.ceil(high) + 1)
    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    step = max(1, math.ceil((high - low) / 7))
    ticks = [digit * 10.0**power for power in decades if power % step == 0 for digit in digits]
    inside = [(tick, f"{tick:.0e}") for tick in ticks if 0 <= to_unit(tick) <= 1]
    if not inside and positive:
        # Values so close together that no round number lies among them: name the ends.
        inside = [(end, f"{end:.1e}") for end in sorted({min(positive), max(positive)})]
    return to_unit, inside


def logarithmic(x: float, y: float) -> str:
    """What says of an axis that it is logarithmic; its lower left corner."""
    return f'<text class="scale" x="{x}" y="{y}">logarithmic axis</text>'


def linear_scale(values: Iterable[float], most: int = 5) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From 0 at the bottom to a little above the largest value, with at most `most` ticks, that of zero included."""
    largest = max((value for value in values if math.isfinite(value)), default=1.0) or 1.0
    power = 10.0 ** math.floor(math.log10(largest / (most - 1)))
    step = next(digit * power for digit in (1, 2, 4, 5, 10) if digit * power >= largest / (most - 0.5))
    top = largest * 1.08

    def to_unit(value: float) -> float:
        return value / top if math.isfinite(value) else 1.0

    return to_unit, [(k * step, f"{k * step:g}") for k in range(int(top / step) + 1)]


def _below(axis: Axis) -> int:
    """The height of the names below an axis."""
    return 92 if axis.slanted else 26


def _across(axis: Axis, x: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / axis.length


def _grid(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _names(axis: Axis, bottom: float) -> list[str]:
    """What stands below the axis."""
    ticks = [_tick_text(_across(axis, tick.x), bottom, tick, axis.slanted) for tick in axis.ticks]
    return [*ticks, f'<text x="{_LEFT - 8}" y="{bottom + 18}" text-anchor="end">{escape(axis.title)}</text>']


def _tick_text(x: float, bottom: float, tick: Tick, slanted: bool) -> str:
    content = escape(tick.text) + (f"<title>{escape(tick.name)}</title>" if tick.name else "")
    if not slanted:
        return f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{content}</text>'
    turn = f'transform="rotate(-40 {x:.1f} {bottom + 14})"'
    return f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="end" {turn}>{content}</text>'


def _steps(counts: Sequence[int], width: float, base: float, height: float, name: str) -> str:
    """An area of steps from `base`, one per bin; negative height goes upwards."""
    largest = max(counts, default=0)
    if largest <= 0:
        return ""
    step = width / len(counts)
    path = [f"M0 {base}"]
    for index, count in enumerate(counts):
        # Half a pixel for a bin that is not empty: outliers are few, and they are the point.
        y = base + math.copysign(max(abs(height) * count / largest, 0.5), height) if count else base
        path.append(f"V{y:.1f}H{(index + 1) * step:.1f}")
    return f'<path class="{name}" d="{"".join(path)}V{base}Z"/>'


def opened(width: float, height: float, label: str) -> str:
    """The beginning of a picture that fills its place's width; `label` is what a screen reader says."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
