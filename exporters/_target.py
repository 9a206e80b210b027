"""The directory that an export writes: whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effcli.errors import CheckpointError, OutputError, writing
from effcli.run.workplace import MARK, Workplace, shown_names


@contextmanager
def replacing(source: Path, target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when all went well, and is removed when not.

    Raises `CheckpointError` when `source` is not there; `OutputError` when `target` exists (without `overwrite`), is no
    export, holds `source`, is written by another process, or cannot be written. What a killed export left beside
    `target` goes away.
    """
    if not source.exists():
        # Before anything is made: the target may lie in the source.
        raise CheckpointError(f"{source} does not exist", "give a directory that `effcli compress` wrote")
    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise OutputError(f"{target} holds the checkpoint that is exported", "choose another --output")
    draft, former = (there.with_name(f".{there.name}.effcli-{word}") for word in ("export", "former"))
    with Workplace(there).locked():
        with writing(target):
            _clear(there, draft, former)
        _check(target, overwrite)
        try:
            with writing(target):
                draft.mkdir()
                (draft / MARK).touch()
            yield draft
            with writing(target):
                if there.exists():
                    there.rename(former)
                draft.rename(there)
        finally:
            _clear(there, draft, former)


def _clear(there: Path, draft: Path, former: Path) -> None:
    """Remove what an export leaves beside it; a former one without a new one in its place goes back."""
    shutil.rmtree(draft, ignore_errors=True)
    if former.exists() and not there.exists():
        former.rename(there)
    shutil.rmtree(former, ignore_errors=True)


def _check(target: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless `target` is not there, or is an export that may be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"{target} exists", "choose another --output, or replace it with --overwrite")
    if not target.is_dir():
        raise OutputError(f"{target} is a file and holds no export", "choose another --output")
    if any(target.iterdir()) and not (target / MARK).is_file():
        raise OutputError(
            f"{target} holds no export that effcli wrote, so it is not overwritten: it holds {shown_names(target)}",
            "choose another --output, or move away what is there",
        )


def nbytes(folder: Path) -> int:
    """Size of all files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
