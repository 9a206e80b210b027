"""Long names made short, so that what tells them apart stays."""

from __future__ import annotations

from collections.abc import Sequence

_CUT = "\N{HORIZONTAL ELLIPSIS}"


def shortened(names: Sequence[str], most: int) -> list[str]:
    """The names in at most `most` characters each, in their order.

    Where one is too long, each becomes its last part between dots if that tells all apart. Otherwise all lose the parts
    that they have in common at their start and end; what is still too long loses its middle, there where the most names
    stay different.
    """
    if all(len(name) <= most for name in names):
        return list(names)
    parts = [name.split(".") for name in names]
    tails = [own[-1] for own in parts]
    if len(set(tails)) == len(names) and all(len(tail) <= most and not tail.isdigit() for tail in tails):
        return tails
    if len(set(names)) > 1:
        parts = [own[_common(parts) :] for own in parts]
        backwards = [own[::-1] for own in parts]
        end = _common(backwards)
        names = [".".join(own[: len(own) - end]) for own in parts]
    cuts = [[_without_middle(name, most, head) for name in names] for head in _heads(most)]
    return max(cuts, key=lambda cut: len(set(cut)))


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many parts all begin with, such that at least one is left of each."""
    shortest = min(map(len, parts)) - 1
    return next((at for at in range(shortest) if len({own[at] for own in parts}) > 1), max(shortest, 0))


def _heads(most: int) -> list[int]:
    """How many characters may stand before a cut, about half of them first."""
    return sorted(range(most), key=lambda head: abs(2 * head - (most - 1)))


def _without_middle(name: str, most: int, head: int) -> str:
    if len(name) <= most:
        return name
    tail = most - 1 - head
    return name[:head] + _CUT + name[len(name) - tail :]


__all__ = ["shortened"]
