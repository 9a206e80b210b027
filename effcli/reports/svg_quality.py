"""Quality over size, as SVG text: one mark for each checkpoint, and what a search tried. Colours as in `svg`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effcli.reports import units
from effcli.reports.escaping import markup as escape
from effcli.reports.short_names import shortened
from effcli.reports.svg import linear_scale, log_scale, logarithmic, opened

_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _FOOT = 58, 20, 30, 40
_LETTER = 6.4  # the mean width of a letter of 12 pixels
_NAME = 22
# Figures that are further apart than this, largest to smallest, stand on a logarithmic axis.
_FAR = 5.0
# A network whose figure is larger is lost, and no axis would hold it beside others.
_LARGEST = 1e100


@dataclass(frozen=True)
class Mark:
    """A checkpoint: its bytes, its quality with a standard error where there is one, and its name.

    shown: both as they are written; tried: whether a search only tried it.
    """

    nbytes: float
    value: float
    name: str
    shown: str
    stderr: float | None = None
    tried: bool = False


def quality_plot(marks: Sequence[Mark], title: str) -> str:
    """The marks over their bytes, from 0 bytes on; those that were not only tried are joined in their order.

    A bar reaches one standard error up and down. Empty text where no value can be drawn; infinite ones are left out.
    """
    marks = [mark for mark in marks if abs(mark.value) < _LARGEST and math.isfinite(mark.nbytes)]
    if not marks:
        return ""
    ends = [end for mark in marks for end in _ends(mark)]
    log = min(ends) > 0 and max(ends) > _FAR * min(ends)
    rise, ticks = log_scale(ends) if log else _around(ends)
    across, sizes = linear_scale([mark.nbytes for mark in marks], most=4)
    bottom, right = _HEIGHT - _FOOT, _WIDTH - _RIGHT

    def x_of(nbytes: float) -> float:
        return _LEFT + (right - _LEFT) * across(nbytes)

    def y_of(value: float) -> float:
        return bottom - (bottom - _TOP) * min(1.0, max(0.0, rise(value)))

    parts = [opened(_WIDTH, _HEIGHT, f"{title}, over the size{', logarithmic axis' if log else ''}")]
    parts.append(f'<text x="{_LEFT}" y="12">{escape(title)}</text>')
    if log:
        parts.append(logarithmic(right - 96, 12))
    for tick, text in ticks:
        y, text = y_of(tick), units.significant(tick) if log else text
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for tick, _ in sizes:
        x = x_of(tick)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{units.size(tick)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 34}" text-anchor="end">size of the weight files</text>')
    path = [f"{x_of(mark.nbytes):.1f},{y_of(mark.value):.1f}" for mark in marks if not mark.tried]
    if len(path) > 1:
        parts.append(f'<polyline class="trend s0" points="{" ".join(path)}"/>')
    for mark in sorted(marks, key=lambda mark: not mark.tried):
        x, y = x_of(mark.nbytes), y_of(mark.value)
        name, radius = ("s1", 2.8) if mark.tried else ("s0", 4.2)
        parts.append(f"<g><title>{escape(f'{mark.name}: {mark.shown}')}</title>")
        if mark.stderr:
            low, high = (y_of(end) for end in _ends(mark))
            parts.append(f'<line class="stderr {name}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(f'<circle class="mark {name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/></g>')
    parts += _labels([(mark.name, x_of(mark.nbytes), y_of(mark.value)) for mark in marks if not mark.tried], right)
    return "".join(parts) + "</svg>"


def _ends(mark: Mark) -> tuple[float, float]:
    error = mark.stderr if mark.stderr is not None and math.isfinite(mark.stderr) else 0.0
    return mark.value - error, mark.value + error


def _around(values: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From the smallest of the values to the largest with some room at both ends, and round ticks among them."""
    low, high = min(values), max(values)
    # Differences far below what is measured must not fill the picture.
    margin = max(0.08 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-9)
    low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= (high - low) / 5)
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: (value - low) / (high - low), [(tick, f"{tick:.6g}") for tick in ticks]


def _labels(marks: Sequence[tuple[str, float, float]], right: float) -> list[str]:
    """The names beside their marks, on the side that has room, one below another where marks are close."""
    found: list[str] = []
    taken: list[tuple[float, float, float]] = []
    short = shortened([name for name, _, _ in marks], _NAME)
    for (name, x, y), text in zip(marks, short, strict=True):
        wide = _LETTER * len(text)
        leftwards = x + 9 + wide > right + _RIGHT
        begin = x - 9 - wide if leftwards else x + 9
        line = y + 4
        while any(abs(line - other) < 13 and begin < end and start < begin + wide for other, start, end in taken):
            line -= 13
        taken.append((line, begin, begin + wide))
        anchor = ' text-anchor="end"' if leftwards else ""
        full = f"<title>{escape(name)}</title>" if text != name else ""
        place = f'x="{x - 9 if leftwards else x + 9:.1f}" y="{line:.1f}"'
        found.append(f'<text class="name" {place}{anchor}>{escape(text)}{full}</text>')
    return found


__all__ = ["Mark", "quality_plot"]
