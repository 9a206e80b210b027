"""Where a run writes: the output, and the hidden folder beside it that holds unfinished work.

One process at a time works on an output. What is unfinished outlives a kill at any moment: a state is written down
before anything that it replaces goes away, and a folder is renamed before it is removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effcli import digest
from effcli.checkpoint import write_text
from effcli.documents import read_object
from effcli.errors import OutputError, UserError, writing
from effcli.reports import report

_SHOWN = 5


def resolved(output: Path) -> Path:
    """The directory to write, links followed; `OutputError` for a link that leads nowhere."""
    try:
        found = output.resolve(strict=output.is_symlink())
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"{output} is a link to {os.readlink(output)}, which is not there", "make its target, or choose another -o"
        ) from error
    return found


def check_output(output: Path, overwrite: bool, model: Path | None = None) -> None:
    """Raise `OutputError` unless `output` can be written."""
    if model is not None and model.resolve() == output.resolve():
        raise OutputError(f"{output} is the model itself", "choose another --output; the input is never changed")
    output = resolved(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file", "choose another --output")
    parent = existing(output.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent}", "choose a writable --output")
    if not output.is_dir() or Workplace(output).placed:
        return
    names = sorted(path.name for path in output.iterdir())
    if names and not overwrite:
        raise OutputError(
            f"{output} exists and is not empty", "choose another --output, or replace it with --overwrite"
        )
    if names and not _is_ours(output):
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise OutputError(
            f"{output} was not written by effcli, so it is not overwritten: it holds {shown}",
            "choose another --output, or move away what is there",
        )


def _is_ours(folder: Path) -> bool:
    """Whether the report of a run stands in `folder`."""
    try:
        found = read_object(folder / report.FILE_NAME)
    except UserError:
        return False
    return "effcli_version" in found and "schema_version" in found


def existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


class Workplace:
    """The working folder of one output. output: without links, see `resolved`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.parent / f".{output.name}.effcli"
        self._lock = output.parent / f".{output.name}.effcli-lock"
        self._removed = output.parent / f".{output.name}.effcli-removed"
        self._request = self.folder / "request"
        self._placed = self.folder / "placed"
        self._former = self.folder / "replaced"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away; `OutputError` that names the one that is at work already.

        The system gives the lock back when its process ends, however it ends.
        """
        with writing(self.output):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    other = os.read(descriptor, 20).decode(errors="replace").strip()
                    os.close(descriptor)
                    who = f"process {other}" if other.isdigit() else "another process"
                    raise OutputError(
                        f"{who} is writing {self.output}", "wait until it has ended, or choose another --output"
                    ) from error
                except OSError:
                    os.close(descriptor)
                    raise
                # Its last holder removes the file; a lock on a file without a name keeps nobody away.
                if _same(descriptor, self._lock):
                    break
                os.close(descriptor)
        try:
            with writing(self.output):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            self._lock.unlink(missing_ok=True)
            os.close(descriptor)

    def holds(self, request: str) -> bool:
        """Whether work of this request is there."""
        return self._request.is_file() and self._request.read_text(encoding="utf-8", errors="replace") == request

    def begin(self, request: str) -> None:
        """Throw away what is there and begin a request anew."""
        self.remove()
        with writing(self.output):
            self.folder.mkdir(parents=True)
        write_text(self._request, request)

    def remove(self) -> None:
        """Remove the folder: at every moment it is either whole or not there under its name."""
        with writing(self.output):
            shutil.rmtree(self._removed, ignore_errors=True)
            if not self.folder.exists():
                return
            if self.placed:
                # The large part first: killed meanwhile, the markers still say that all is done.
                for path in set(self.folder.iterdir()) - {self._request, self._placed}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if self._former.exists() and not self.output.exists():
                # Killed while it was replaced: without the new one, the former output goes back.
                self._former.rename(self.output)
            self.folder.rename(self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)

    def place(self, finished: Path) -> None:
        """Put the finished folder, which holds its report, in the output's place, and remove the rest."""
        write_text(self._placed, digest.of_file(finished / report.FILE_NAME))
        with writing(self.output):
            if self.output.exists():
                shutil.rmtree(self._former, ignore_errors=True)
                self.output.rename(self._former)
            finished.rename(self.output)
        self.remove()

    @property
    def placed(self) -> bool:
        """Whether the output stands in its place already, and only the working folder was not yet removed."""
        file = self.output / report.FILE_NAME
        if not self._placed.is_file() or not file.is_file():
            return False
        return self._placed.read_text(encoding="utf-8", errors="replace") == digest.of_file(file)


def _same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


__all__ = ["Workplace", "check_output", "existing", "resolved"]
