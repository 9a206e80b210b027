"""Remarks that differ in names and numbers alone, gathered into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from effcli.reports.report import Stage

_GAP = "\N{HORIZONTAL ELLIPSIS}"
# Of the words of two remarks so many may differ at most, as a part of them.
_PART = 0.25
# What tells a name or a number from a word.
_NAME = re.compile(r"[\d_]|\w\.\w|/")


@dataclass(frozen=True)
class Gathered:
    """Remarks of one wording. stages: whose; text: of all, with a gap where they differ; differing: what stood there.

    differing: empty for a remark that stands alone.
    """

    stages: tuple[str, ...]
    text: str
    differing: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return max(len(self.differing), 1)


def gather(stages: Sequence[Stage]) -> list[Gathered]:
    """The remarks of all stages in their order; the same one of several stages counts once."""
    owners: dict[str, list[str]] = {}
    for stage in stages:
        for remark in stage.remarks:
            owners.setdefault(remark, []).append(stage.name)
    known = {row.name for stage in stages for row in stage.ledger}
    groups: list[list[tuple[list[str], list[str]]]] = []
    for remark, names in owners.items():
        words = remark.split()
        group = next((group for group in groups if _is_alike(group[0][0], words, known)), None)
        if group is None:
            groups.append([(words, names)])
        else:
            group.append((words, names))
    return [_merged(group) for group in groups]


def _is_alike(one: Sequence[str], two: Sequence[str], known: set[str]) -> bool:
    """Whether two remarks differ in a few words alone, and each time in a name or a number."""
    if len(one) != len(two):
        return False
    differing = [(a, b) for a, b in zip(one, two, strict=True) if a != b]
    named = (_is_name(a, known) or _is_name(b, known) for a, b in differing)
    return len(differing) <= _PART * len(one) and all(named)


def _is_name(word: str, known: set[str]) -> bool:
    return bool(_NAME.search(word)) or word.strip(",;:()") in known


def _merged(group: Sequence[tuple[list[str], list[str]]]) -> Gathered:
    stages = _once(name for _, names in group for name in names)
    if len(group) == 1:
        return Gathered(stages, " ".join(group[0][0]))
    rows = list(zip(*(words for words, _ in group), strict=True))
    gaps = [at for at, words in enumerate(rows) if len(set(words)) > 1]
    # What follows a name, such as a comma, stays where all have it.
    text = " ".join(_gap(words) if at in gaps else words[0] for at, words in enumerate(rows))
    differing = tuple(", ".join(words[at].strip(",;:") for at in gaps) for words, _ in group)
    return Gathered(stages, text, differing)


def _gap(words: Sequence[str]) -> str:
    last = {word[-1] for word in words}
    end = last.pop() if len(last) == 1 else ""
    return _GAP + (end if end in ",;:" else "")


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


__all__ = ["Gathered", "gather"]
