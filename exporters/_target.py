"""The directory that an export writes: whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effcli.checkpoint import umask
from effcli.errors import OutputError, writing

# One of these stands in every export.
_WRITTEN = ("config.json", "model.onnx", "model.pt2", "model.safetensors", "plan.json")


@contextmanager
def replacing(source: Path, target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when all went well, and is removed when not.

    Raises `OutputError` when `target` exists (without `overwrite`), holds `source`, or cannot be written.
    """
    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise OutputError(f"{target} holds the checkpoint that is exported", "choose another --output")
    if target.exists():
        if not overwrite:
            raise OutputError(f"{target} exists", "choose another --output, or replace it with --overwrite")
        ours = target.is_dir() and (not any(target.iterdir()) or any((target / name).is_file() for name in _WRITTEN))
        if not ours:
            raise OutputError(f"{target} holds no export, so it is not overwritten", "choose another --output")
    with writing(target):
        there.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{there.name}-", dir=there.parent))
        # mkdtemp makes it private; an output has the permissions of any other directory.
        folder.chmod(0o777 & ~umask())
    try:
        yield folder
        with writing(target):
            if there.exists():
                former = folder.with_name(folder.name + "-former")
                there.replace(former)
                folder.replace(there)
                shutil.rmtree(former)
            else:
                folder.replace(there)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nbytes(folder: Path) -> int:
    """Size of all files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
