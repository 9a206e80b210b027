"""Plots of a classifier's report as SVG text: confusion matrices, recall per class, and activations with their range.

Colours come from the page's CSS, as in `effcli.reports.svg`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from effcli.reports.escaping import markup as escape
from effcli.reports.report import ActivationRange
from effcli.reports.short_names import shortened
from effcli.reports.svg import opened

# A matrix of more classes is drawn for the most confused ones, and of more than these without its counts.
MOST_CLASSES = 20
_COUNTED = 12
_SIDE = 480
_LETTER = 6.4  # the mean width of a letter of 12 pixels
_LONGEST = 16


def most_confused(confusion: Sequence[Sequence[int]], most: int = MOST_CLASSES) -> list[int]:
    """The `most` classes with the most images missed or wrongly taken for them, in the order of the classes.

    confusion: images by class (row) and by what they were taken for (column), square.
    """
    taken = [sum(column) for column in zip(*confusion, strict=True)]
    wrong = [sum(row) + taken[k] - 2 * row[k] for k, row in enumerate(confusion)]
    return sorted(sorted(range(len(confusion)), key=lambda k: -wrong[k])[:most])


def confusion_plot(confusion: Sequence[Sequence[int]], names: Sequence[str], shown: Sequence[int], label: str) -> str:
    """A matrix of the classes `shown`: their rows, and what their images were taken for.

    A cell's shade is the square root of its share of all images of its class, since most confusions are rare ones.
    confusion: square, with one of `names` per row; shown: indices of rows.
    """
    if not shown:
        return ""
    counted = len(shown) <= _COUNTED
    short = shortened([names[k] for k in shown], _LONGEST)
    longest = 14 + _LETTER * max(map(len, short))
    # Narrow columns have no room for slanted names; the last slanted one reaches beyond its column.
    angle = 45 if counted else 90
    left, above = longest, longest * math.sin(math.radians(angle))
    size = (_SIDE - left - (0.5 * above if counted else 0)) / len(shown)
    whole = size * len(shown)
    parts = [opened(_SIDE, round(above + whole + 2), label)]
    parts.append(f'<rect class="field" x="{left:.1f}" y="{above:.1f}" width="{whole:.1f}" height="{whole:.1f}"/>')
    for place, k in enumerate(shown):
        middle = (place + 0.5) * size
        x, y = left + middle, above + middle
        full = f"<title>{escape(names[k])}</title>" if names[k] != short[place] else ""
        name = escape(short[place]) + full
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        x += 0 if counted else 4
        turn = f'transform="rotate(-{angle} {x:.1f} {above - 8:.1f})"'
        parts.append(f'<text x="{x:.1f}" y="{above - 8:.1f}" {turn}>{name}</text>')
    for down, k in enumerate(shown):
        images = sum(confusion[k])
        for across, j in enumerate(shown):
            count = confusion[k][j]
            if count:
                what = "recognised" if j == k else f"taken for {names[j]}"
                title = f"{names[k]} {what}: {count:,} of {images:,} ({100 * count / images:.1f}%)"
                x, y = left + across * size, above + down * size
                text = f"{count:,}" if counted else ""
                parts.append(_shaded(x, y, size, math.sqrt(count / images), j == k, title, text))
    return "".join(parts) + "</svg>"


def recall_plot(before: float, after: float, lowest: float, bad: bool) -> str:
    """From a hollow mark at `before` to a full one at `after`, on an axis from `lowest` to 1; all of them 0 to 1."""
    width, middle, margin = 180, 8, 5

    def place(value: float) -> float:
        return margin + (width - 2 * margin) * (value - lowest) / ((1 - lowest) or 1)

    a, b = place(before), place(after)
    tone = "bad" if bad else "s0"
    return (
        f'<svg viewBox="0 0 {width} {2 * middle}" aria-hidden="true">'
        f'<line class="grid" x1="{margin}" x2="{width - margin}" y1="{middle}" y2="{middle}"/>'
        f'<line class="way {tone}" x1="{a:.1f}" x2="{b:.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="mark from {tone}" cx="{a:.1f}" cy="{middle}" r="3.2"/>'
        f'<circle class="mark {tone}" cx="{b:.1f}" cy="{middle}" r="4"/></svg>'
    )


def activation_plot(activation: ActivationRange) -> str:
    """Values of an activation by the logarithm of their count, with one line per power of ten, and the range kept.

    What lies outside the range is drawn in the colour of a warning. Where the range is wider than the values, so is
    the axis.
    """
    width, tall, foot = 300, 96, 18
    parts = [opened(width, tall + foot, f"Values of {activation.name}, and the range that is kept")]
    parts.append(f"<title>{escape(activation.name)}</title>")
    ends = [*activation.edges[:1], *activation.edges[-1:], activation.low, activation.high]
    if not activation.counts or not all(map(math.isfinite, ends)) or min(ends) == max(ends):
        return "".join(parts) + f'<text x="0" y="{tall}">no values to draw</text></svg>'
    low, high = min(ends), max(ends)

    def place(value: float) -> float:
        return width * (value - low) / (high - low)

    largest = max(activation.counts)
    for power in range(1, len(str(largest))):
        y = tall * (1 - math.log1p(10**power) / math.log1p(largest))
        if y > 0:
            parts.append(f'<line class="grid" x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
    outline = f"M{place(activation.edges[0]):.1f} {tall}"
    for end, count in zip(activation.edges[1:], activation.counts, strict=False):
        outline += f"V{tall * (1 - math.log1p(count) / math.log1p(max(largest, 1))):.1f}H{place(end):.1f}"
    area = f'<path d="{outline}V{tall}Z"/>'
    left, right = place(activation.low), place(activation.high)
    for x, end, name in ((0.0, left, "clipped"), (left, right, "after"), (right, float(width), "clipped")):
        if end > x:
            # A nested picture shows only what lies inside it.
            view = f'x="{x:.1f}" y="0" width="{end - x:.1f}" height="{tall}" viewBox="{x:.1f} 0 {end - x:.1f} {tall}"'
            parts.append(f'<svg class="{name}" {view}>{area}</svg>')
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{tall}" y2="{tall}"/>')
    parts += [f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="-4" y2="{tall}"/>' for x in (left, right)]
    parts.append(f'<text x="0" y="{tall + 14}">{low:.3g}</text>')
    parts.append(f'<text x="{width}" y="{tall + 14}" text-anchor="end">{high:.3g}</text>')
    return "".join(parts) + "</svg>"


def _shaded(x: float, y: float, size: float, shade: float, right: bool, title: str, text: str) -> str:
    name = "right" if right else "wrong"
    # One pixel of the background between the cells.
    place = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
    cell = f'<rect class="{name}" {place} fill-opacity="{shade:.3f}"/>'
    if text:
        light = " light" if shade > 0.6 else ""
        middle = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}"'
        cell += f'<text class="count{light}" {middle} text-anchor="middle">{text}</text>'
    return f"<g><title>{escape(title)}</title>{cell}</g>"
