"""What stands in the way of an export, for an error of one line."""

from __future__ import annotations

from collections.abc import Mapping

_SHOWN = 3


def by_reason(obstacles: Mapping[str, str]) -> str:
    """Layers and why each has no place: 'a, b, c and 2 more (a Conv1D stores its weight transposed); d (...)'."""
    reasons: dict[str, list[str]] = {}
    for name, reason in obstacles.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{some(names)} ({reason})" for reason, names in reasons.items())


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
