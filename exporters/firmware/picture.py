"""The arena as a picture: addresses upwards, layers from left to right, a rectangle for as long as memory is taken."""

from __future__ import annotations

from effcli.exporters.firmware.arena import Plan
from effcli.exporters.firmware.program import Program
from effcli.reports.escaping import markup as escape

_WIDTH, _HEIGHT = 960, 420
_LEFT, _TOP, _BOTTOM = 70, 30, 120
_COLOURS = {"tensor": "#4c78a8", "ring": "#f58518", "scratch": "#bab0ac"}
_MEANING = {"tensor": "a whole tensor", "ring": "a few rows of one", "scratch": "scratch memory"}
# Names below the axis stay readable up to so many.
_NAMED = 40


def arena_svg(program: Program, plan: Plan) -> str:
    """SVG of 960 × 570; every rectangle says what it is in its title."""
    bands, total = len(plan.bands), max(plan.nbytes, 1)
    across = (_WIDTH - _LEFT - 10) / max(bands, 1)
    marks = []
    for piece, offset in plan.pieces:
        x, width = _LEFT + piece.start * across, (piece.end - piece.start + 1) * across
        height = piece.nbytes / total * _HEIGHT
        y = _TOP + _HEIGHT - (offset + piece.nbytes) / total * _HEIGHT
        label = f"{_MEANING[piece.kind]}: {piece.name}, {piece.nbytes} bytes at {offset}"
        marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0.5):.1f}" '
            f'fill="{_COLOURS[piece.kind]}" fill-opacity="0.55" stroke="#333" stroke-width="0.6">'
            f"<title>{escape(label)}</title></rect>"
        )
    ticks = []
    for step in range(5):
        y = _TOP + _HEIGHT - step / 4 * _HEIGHT
        ticks.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc" stroke-width="0.5"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{round(total * step / 4)}</text>'
        )
    names = []
    for number, band in enumerate(plan.bands if bands <= _NAMED else ()):
        first, last = program.tasks[band.start].layer, program.tasks[band.end - 1].layer
        name = first if band.size == 1 else f"{first} … {last}"
        x = _LEFT + (number + 0.5) * across
        y = _TOP + _HEIGHT + 14
        names.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="end" transform="rotate(-40 {x:.1f} {y})">{escape(name)}</text>'
        )
    legend = [
        f'<rect x="{_LEFT + 190 * k}" y="8" width="12" height="12" fill="{_COLOURS[kind]}" fill-opacity="0.55"/>'
        f'<text x="{_LEFT + 190 * k + 17}" y="18">{meaning}</text>'
        for k, (kind, meaning) in enumerate(_MEANING.items())
    ]
    body = "\n".join([*ticks, *marks, *names, *legend])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_TOP + _HEIGHT + _BOTTOM}" '
        f'font-family="sans-serif" font-size="11" role="img">\n'
        f"<title>Arena of {plan.nbytes} bytes</title>\n{body}\n</svg>\n"
    )
