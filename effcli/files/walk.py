"""One way through a folder and all below it, for those who read the files and those who ask whether they changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from effcli.errors import DataError


def files_below(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder, links followed, in the order of their names, with the sorted names of what is no folder in it.

    `DataError` for a link that leads to a folder in which it lies.
    """
    found: list[tuple[str, list[str]]] = []
    waiting: list[tuple[str, frozenset[str]]] = [(str(folder), frozenset())]
    while waiting:
        root, above = waiting.pop()
        real = os.path.realpath(root)
        if real in above:
            raise DataError(f"{root} is a link to a folder that it lies in", "remove the link")
        with os.scandir(root) as listed:
            entries = list(listed)
        waiting += [(entry.path, above | {real}) for entry in entries if entry.is_dir()]
        found.append((root, sorted(entry.name for entry in entries if not entry.is_dir())))
    yield from sorted(found)
