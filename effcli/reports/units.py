"""Numbers as people read them: bytes, seconds, ratios, percentages. All renderers use these and no others.

Every function takes a finite number, NaN or an infinity, and returns a short text. Bytes go by powers of 1000, as
disks and file listings do.
"""

from __future__ import annotations

import math


def significant(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, without an exponent from 0.001 up: 29.4, 0.0312, 1234, 2.1e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -3 or exponent > 6:
        return f"{rounded:.{min(digits, 2) - 1}e}"
    if exponent >= digits - 1:
        return f"{value:.0f}"
    return f"{rounded:.{digits - 1 - exponent}f}"


def figure(value: float) -> str:
    """A measured figure to four significant digits, all of them from ten thousand up: 93.20, 5,985,696."""
    return f"{value:,.0f}" if value >= 10_000 else significant(value, 4)


def size(nbytes: float) -> str:
    """269 MB, 1.23 GB, 512 B: powers of 1000, three digits."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    # 999.6 rounds to 1000, which the next unit says shorter.
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{significant(value)} {units[0]}"


def duration(seconds: float) -> str:
    """0.42s, 45s, 3m20s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 9.95:
        return f"{significant(seconds, 2)}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02}h"


def ratio(value: float) -> str:
    """2.51x, 0.98x, 12.0x."""
    return f"{value:.2f}x" if abs(value) < 9.995 else f"{significant(value)}x"


def change(value: float, reference: float) -> str:
    """The relative change from `reference` to `value`, signed: +15.5%, -0.3%, 0.0%."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
        return ""
    percent = 100 * (value / reference - 1)
    text = f"{percent:+.1f}" if abs(percent) < 99.95 else f"{percent:+.0f}"
    return f"{'0.0' if text in ('+0.0', '-0.0') else text}%"


def points(value: float, reference: float) -> str:
    """The change between two fractions in percentage points, signed: -1.3 pt."""
    text = f"{100 * (value - reference):+.1f}"
    return f"{'0.0' if text in ('+0.0', '-0.0') else text} pt"


def fraction(value: float, error: float | None = None) -> str:
    """A fraction as a percentage, with its standard error where there is one: 41.2%, 41.2±0.9%."""
    return f"{100 * value:.1f}%" if error is None else f"{100 * value:.1f}±{100 * error:.1f}%"


def percent(value: float) -> str:
    """A small fraction as a percentage of two digits, without an error: 0.38%, 4.6%, 0.0021%."""
    return f"{significant(100 * value, 2)}%"


def error(value: float) -> str:
    """A relative squared error, which spans many powers of ten: 4.2e-03."""
    return "0" if value == 0 else f"{value:.1e}"


def bits(value: float) -> str:
    """Bits per weight: 16.0, 4.25, 0.53."""
    return significant(value)


def count(number: int, noun: str) -> str:
    """1 layer, 2 layers, 3 batches, 1,024 tokens."""
    hissed = noun.endswith(("ch", "sh", "s", "x")) and not noun.endswith("epoch")
    ending = "es" if hissed else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def quantity(number: float) -> str:
    """A count by powers of 1000: 512, 2.36 k, 40.6 M, 4.09 G."""
    return size(number).removesuffix("B").rstrip()


def shape(sizes: tuple[int, ...]) -> str:
    """576 x 1536."""
    return " x ".join(str(n) for n in sizes)
