"""Where a run writes: the output, and the hidden folder beside it that holds unfinished work.

One process at a time works on an output. What is unfinished outlives a kill at any moment: a state is written down
before anything that it replaces goes away, and a folder is renamed before it is removed. A marker beside
a finished output names its request; it is removed last.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from effcli.errors import OutputError, UserError, writing
from effcli.files import digest
from effcli.files.checkpoint import write_text
from effcli.files.documents import read_object
from effcli.reports import report

# The folder in an output whose subfolders are exports.
EXPORTS = "exports"
# An empty file that stands in every export: only what holds it is replaced.
MARK = ".effcli-export"
# What an export that is being written has beside it, see `Workplace` and exporters._target.
_BESIDE = re.compile(r"\..+\.effcli(-lock|-removed|-placed|-export|-former)?")
# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_MOUNTS = Path("/proc/self/mountinfo")
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


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise `OutputError` unless `output` can be written without loss.

    inputs: what the run reads; none of it may lie in the output, which goes away when it is replaced.
    """
    named, output = output, resolved(output)
    for path in inputs:
        _check_apart(path, output, named)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file", "choose another --output")
    if _is_mount(output):
        raise OutputError(
            f"{output} is a mount point, which cannot be replaced by a finished output",
            f"choose a folder below it: --output {named / 'NAME'}",
        )
    parent = existing(output.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent}", "choose a writable --output")
    if not output.is_dir() or Workplace(output).placed is not None:
        return
    filled = any(output.iterdir())
    if filled and not overwrite:
        raise OutputError(
            f"{output} exists and is not empty", "choose another --output, or replace it with --overwrite"
        )
    if filled:
        _check_ours(output)


def _is_mount(folder: Path) -> bool:
    """Whether a file system, or a folder of another place, is mounted on `folder`."""
    if folder.is_mount():
        return True
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False  # no Linux
    # Of one file system mounted twice only the kernel's table knows. It writes blanks as octal numbers.
    points = (re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines)
    return str(folder) in points


def _check_apart(path: Path, output: Path, named: Path) -> None:
    """Raise `OutputError` where an input is the output, lies in it, or holds a link that leads there."""
    if not path.exists():
        return
    for each in (path, *(entry for entry in (path.iterdir() if path.is_dir() else ()) if entry.is_symlink())):
        real = each.resolve()
        if real == output:
            what = "the model itself" if (each / "config.json").is_file() else f"{each}, which is read"
            raise OutputError(f"{named} is {what}", "choose another --output; the input is never changed")
        if output in real.parents:
            raise OutputError(
                f"{each} is read and lies in {named}, which would be replaced",
                "choose another --output, or move the input away",
            )


def _check_ours(folder: Path) -> None:
    """Raise `OutputError` unless a run of effcli wrote everything in `folder`."""
    remedy = "choose another --output, or move away what is there"
    try:
        found = read_object(folder / report.FILE_NAME)
    except UserError:
        found = {}
    if not ("effcli_version" in found and "schema_version" in found):
        raise OutputError(
            f"{folder} was not written by effcli, so it is not overwritten: it holds {shown_names(folder)}", remedy
        )
    names = found.get("files")
    known = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    foreign = _foreign(folder, known | {report.FILE_NAME})
    if foreign:
        raise OutputError(
            f"{folder} is not overwritten, for it holds what its run did not write: {_shown(foreign)}", remedy
        )


def _foreign(folder: Path, known: set[str]) -> list[str]:
    """What stands in an output, exports left out, and is not among the `known` files."""
    foreign = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            within = [path]
        elif path.name == EXPORTS:
            foreign += [f"{EXPORTS}/{each.name}" for each in sorted(path.iterdir()) if not _is_of_an_export(each)]
            continue
        else:
            within = [each for each in path.rglob("*") if each.is_symlink() or not each.is_dir()] or [path]
        if any(each.relative_to(folder).as_posix() not in known for each in within):
            foreign.append(path.name)
    return foreign


def _is_of_an_export(path: Path) -> bool:
    """Whether `path` is an export, or what one that was killed has left."""
    if path.is_symlink():
        return False
    return (path / MARK).is_file() or bool(_BESIDE.fullmatch(path.name))


def exports_in(output: Path) -> list[str]:
    """The names of the exports that stand in an output."""
    folder = output / EXPORTS
    return sorted(path.name for path in folder.iterdir() if (path / MARK).is_file()) if folder.is_dir() else []


def files_in(output: Path) -> tuple[str, ...]:
    """The files of an output, exports and the report left out, as its report lists them."""
    names = (path.relative_to(output) for path in output.rglob("*") if not path.is_dir())
    return tuple(
        sorted(name.as_posix() for name in names if name.parts[0] != EXPORTS and str(name) != report.FILE_NAME)
    )


def shown_names(folder: Path) -> str:
    """What stands in a folder, the first few names of it."""
    return _shown(sorted(path.name for path in folder.iterdir()))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


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
        self._marker = output.parent / f".{output.name}.effcli-placed"
        self._former = self.folder / "replaced"
        self._locked = False
        # The marker of an output that this process has finished.
        self._mine: bytes | None = None

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
                except OSError as error:
                    os.close(descriptor)
                    if error.errno not in _NO_LOCKS:
                        raise
                    self._lock.unlink(missing_ok=True)
                    raise OutputError(
                        f"the file system of {self._lock.parent} cannot lock files ({os.strerror(error.errno)}), so "
                        "two processes could write one output",
                        "choose an --output on a local disk, or have it mounted with locks (Lustre: -o flock)",
                    ) from error
                # Its last holder removes the file; a lock on a file without a name keeps nobody away.
                if _same(descriptor, self._lock):
                    break
                os.close(descriptor)
        try:
            with writing(self.output):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            self._locked = True
            yield
        finally:
            self._unlock()
            os.close(descriptor)

    def _unlock(self) -> None:
        """Remove the lock's file, once: after that it may be another process's."""
        if self._locked:
            self._locked = False
            self._lock.unlink(missing_ok=True)

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
        self._give_back()
        with writing(self.output):
            shutil.rmtree(self._removed, ignore_errors=True)
            if self.folder.exists():
                self.folder.rename(self._removed)
                shutil.rmtree(self._removed, ignore_errors=True)
            if self._mine is None:
                self._marker.unlink(missing_ok=True)
                return
            # The marker is the last to go: as long as anything is left, the same command removes it. Without the lock
            # another process may have begun, and may have placed an output of its own.
            self._unlock()
            with suppress(FileNotFoundError):
                if self._marker.read_bytes() == self._mine:
                    self._marker.unlink()

    def _give_back(self) -> None:
        """Put a former output back that was moved away by a process which was killed before the new one came.

        `OutputError` where something else stands there by now: neither may be lost.
        """
        if self.placed is not None:
            shutil.rmtree(self._former, ignore_errors=True)
        if not self._former.exists():
            return
        with writing(self.output):
            if self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()
            if self.output.exists():
                raise OutputError(
                    f"{self.output} is in the place of a former output, which is in {self._former}",
                    "move one of them elsewhere",
                )
            self._former.rename(self.output)

    def finish(self) -> None:
        """Remove everything but the finished output, which stands in its place. The lock ends with it."""
        self._mine = self._marker.read_bytes()
        self.remove()

    def place(self, finished: Path) -> None:
        """Put the finished folder, which holds its report, in the output's place, and remove the rest.

        Nothing of this place may be touched after that: it may be another process's.
        """
        self._give_back()
        request = self._request.read_text(encoding="utf-8")
        write_text(self._marker, f"{request}\n{digest.of_file(finished / report.FILE_NAME)}\n")
        with writing(self.output):
            if self.output.exists():
                self.output.rename(self._former)
            finished.rename(self.output)
        self.finish()

    @property
    def nbytes(self) -> int:
        """What unfinished work takes of the disk; a former output that waits in it is no part of that."""
        found = 0
        for folder in (self.folder, self._removed):
            for root, names, files in os.walk(folder):
                if Path(root) == folder and self._former.name in names:
                    names.remove(self._former.name)
                for name in files:
                    # Another process may be at work there.
                    with suppress(FileNotFoundError):
                        found += os.lstat(os.path.join(root, name)).st_blocks * 512
        return found

    @property
    def placed(self) -> str | None:
        """The request of a finished output that still has temporary files beside it, else None."""
        file = self.output / report.FILE_NAME
        if not self._marker.is_file() or not file.is_file():
            return None
        request, _, written = self._marker.read_text(encoding="utf-8", errors="replace").partition("\n")
        return request if written.strip() == digest.of_file(file) else None


def _same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


__all__ = [
    "EXPORTS",
    "MARK",
    "Workplace",
    "check_output",
    "existing",
    "exports_in",
    "files_in",
    "resolved",
    "shown_names",
]
