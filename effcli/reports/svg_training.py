"""How a training went, as SVG text: its loss as a line, the error on all inputs as marks. Colours as in `svg`."""

from __future__ import annotations

from effcli.reports import units
from effcli.reports.report import Training
from effcli.reports.svg import log_scale, logarithmic, opened

_WIDTH, _HEIGHT = 480, 170
_LEFT, _RIGHT, _TOP, _FOOT = 58, 8, 10, 20


def training_plot(training: Training) -> str:
    """Loss and error over the steps, on one logarithmic axis; empty text where neither was recorded."""
    points = [*training.curve, *training.errors]
    if not points:
        return ""
    to_unit, ticks = log_scale([value for _, value in points])
    bottom = _HEIGHT - _FOOT

    def place(step: int, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(training.steps, 1)
        return x, bottom - (bottom - _TOP) * min(1.0, max(0.0, to_unit(value)))

    parts = [opened(_WIDTH, _HEIGHT, "Loss and error over the steps of the training, logarithmic axis")]
    parts.append(logarithmic(_WIDTH - _RIGHT - 96, _TOP + 2))
    for tick, text in ticks:
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in training.curve)
    parts.append(f'<polyline class="loss s0" points="{line}"/>')
    for step, value in training.errors:
        x, y = place(step, value)
        title = f"<title>step {step:,}: {units.significant(value)}{' (kept)' if step == training.kept else ''}</title>"
        size = 5 if step == training.kept else 3.2
        parts.append(f'<circle class="mark s1" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{title}</circle>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">0</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">step {training.steps:,}</text>')
    return "".join(parts) + "</svg>"


__all__ = ["training_plot"]
