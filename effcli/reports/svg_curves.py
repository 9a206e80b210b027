"""Costs of single layers over the values of an option, as SVG text: one small picture for layers of one kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effcli.reports import units
from effcli.reports.escaping import markup as escape
from effcli.reports.svg import opened

_WIDTH, _HEIGHT = 300, 190
_LEFT, _RIGHT, _TOP, _FOOT = 46, 12, 10, 24
# The least distance of two values below the axis.
_APART = 24


@dataclass(frozen=True)
class Curve:
    """A layer. points: a value of the option and the cost of that, in the order of the values."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def worst(self) -> float:
        """Its largest cost."""
        return max((cost for _, cost in self.points if math.isfinite(cost)), default=0.0)


# From a cost to 0..1, and what stands beside the axis.
Scale = tuple[Callable[[float], float], Sequence[tuple[float, str]]]


def curves_plot(curves: Sequence[Curve], values: Sequence[float], scale: Scale, series: int, label: str) -> str:
    """A line for each layer, the dearest one heavy, over the values of the option.

    scale: of the costs, logarithmic and the same in all pictures; series: whose colour the lines have. Costs of 0 have
    no place on it and are left out; infinite ones and NaN stand at the upper edge.
    """
    rise, ticks = scale
    bottom, right = _HEIGHT - _FOOT, _WIDTH - _RIGHT
    low, high = min(values), max(values)

    def x_of(value: float) -> float:
        return _LEFT + 6 + (right - _LEFT - 12) * ((value - low) / (high - low) if high > low else 0.5)

    def y_of(cost: float) -> float:
        return bottom - (bottom - _TOP) * min(1.0, max(0.0, rise(cost)))

    parts = [opened(_WIDTH, _HEIGHT, f"{label}, logarithmic axis")]
    for tick, text in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    last = -math.inf
    for value in values:
        x = x_of(value)
        if x - last >= _APART:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
            last = x
    # The dearest one last, over all others.
    for number, curve in enumerate(sorted(curves, key=lambda curve: curve.worst), start=1):
        points = [(value, cost) for value, cost in curve.points if cost != 0]
        path = " ".join(f"{x_of(value):.1f},{y_of(cost):.1f}" for value, cost in points)
        costs = ", ".join(f"{value:g}: {units.significant(cost)}" for value, cost in curve.points)
        how = "loss" if number == len(curves) else "trend"
        title = f"<title>{escape(f'{curve.name}: {costs}')}</title>"
        parts.append(f'<polyline class="{how} s{series}" points="{path}">{title}</polyline>')
    return "".join(parts) + "</svg>"


__all__ = ["Curve", "Scale", "curves_plot"]
