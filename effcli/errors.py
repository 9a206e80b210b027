"""What can go wrong, as one tree. Every error carries its cause and a remedy.

EffcliError
├── UserError                 the request or the input is at fault (exit 1)
│   ├── RecipeError           an unknown key, option, pass or value
│   ├── SelectionError        a layer pattern that matches nothing, a group size that divides nothing
│   ├── CheckpointError       a checkpoint that is missing, truncated, or not a checkpoint
│   ├── DataError             calibration or evaluation data that cannot serve
│   ├── NumericsError         NaN or infinity in weights or activations
│   ├── UnfinishedError       unfinished work of an earlier run that cannot be continued
│   ├── OutputError           an output that exists, is read-only, or does not fit on the disk
│   └── UnsupportedError      something this version cannot do, with what it can do instead
├── PluginError               what a pass returned is not what its contract says (exit 2)
└── MachineError              a failure of ours or of the machine (exit 2)
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class EffcliError(Exception):
    """A failure with a one-line `cause` and a one-line `remedy` (may be empty)."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy


class UserError(EffcliError):
    exit_code = 1


class RecipeError(UserError):
    pass


class SelectionError(UserError):
    pass


class CheckpointError(UserError):
    pass


class DataError(UserError):
    pass


class NumericsError(UserError):
    pass


class OutputError(UserError):
    pass


class UnsupportedError(UserError):
    pass


class UnfinishedError(UserError):
    """Unfinished work of an earlier run that cannot be continued; a run begins anew instead."""


class PluginError(EffcliError):
    """An answer of a pass, of effcli or of another package, that the contract does not allow."""


class MachineError(EffcliError):
    pass


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """A sentence naming the entries of `known` nearest to `word`, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word[:60], known, n=most, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {shown}"


def first_line(error: BaseException) -> str:
    """What an exception says first, with the next line where that is announced; or its type's name."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def system_errno(error: BaseException) -> int | None:
    """The operating system's number for what went wrong; libraries in Rust only write it into their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    found = re.search(r"\(os error (\d+)\)", text)
    if found is not None:
        return int(found[1])
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text):
        # What NumPy says of a short write, whose reason it has lost.
        return errno.ENOSPC
    return None


def machine_condition(error: BaseException) -> EffcliError | None:
    """The error to show for a limit of this machine: memory, disk, files, names; None where it is something else."""
    number, text = system_errno(error), str(error)
    name = error.filename if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _is_allocation(error):
        return MachineError("out of memory", "ask for less at a time: --set calibration.batch_size=1, or fewer samples")
    if isinstance(error, UnicodeEncodeError) and any("\ud800" <= letter <= "\udfff" for letter in error.object):
        return not_utf8(error.object)
    if "surrogates not allowed" in text:
        return not_utf8("a file or folder")
    if isinstance(error, OSError) and "No usable temporary directory" in text:
        return MachineError(
            "there is no folder for temporary files that can be written",
            "free some space, or name another folder in the variable TMPDIR",
        )
    if number in _FULL:
        remedy = "free some space, or name another --output, and another folder in the variable TMPDIR"
        return MachineError(_FULL[number] + (f" while writing {name}" if name else ""), remedy)
    if number in _SCARCE:
        return MachineError(*_SCARCE[number])
    if number in _REFUSED:
        return MachineError(f"{name}: {os.strerror(number)}" if name else os.strerror(number), _REFUSED[number])
    if number in _MISNAMED:
        cause = f"{str(name)[:_SHOWN]}: {os.strerror(number)}" if name else os.strerror(number)
        return UserError(cause, _MISNAMED[number])
    return None


def behind(error: BaseException) -> MachineError | None:
    """The machine's failure behind an error, itself or what it came from; None where the machine did not fail."""
    at: BaseException | None = error
    while at is not None:
        found = at if isinstance(at, EffcliError) else machine_condition(at)
        if isinstance(found, MachineError):
            return found
        at = at.__cause__ or at.__context__
    return None


def at_fault(error: OSError) -> bool:
    """Whether the system refuses a file for what it is or is called; else the file may be sound."""
    return error.errno in _AT_FAULT


def not_utf8(name: str) -> UserError:
    """The refusal of a path that is not UTF-8, which reports and weight files cannot hold."""
    return UserError(f"{name!a} has a name that is not UTF-8", "rename it, or reach it through a link in plain letters")


# What the system says of a place that takes no more, of what a process runs out of, of files it does not give, and of
# names that the user chose.
_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left, the disk quota is used up",
    errno.EFBIG: "a file would become larger than the system allows",
}
_SCARCE = {
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n"),
    errno.ENFILE: ("too many open files on this machine", "end other programs"),
    errno.EAGAIN: ("the system has no more threads or processes", "ask for fewer with --threads, or raise ulimit -u"),
}
_REFUSED = {
    errno.EACCES: "look at its permissions",
    errno.EPERM: "look at its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.EIO: "look at the disk, and at what the system's log says of it",
}
_REFUSED |= dict.fromkeys(
    (errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
    "look at the disk or the network that it is reached by, then give the same command again",
)
_MISNAMED = {
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "look at its symbolic links",
}
_AT_FAULT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EACCES, errno.EPERM),
    *_MISNAMED,
}
# Characters of a name that the system does not take.
_SHOWN = 200


def _is_allocation(error: BaseException) -> bool:
    """Whether a library's RuntimeError is its way to say that memory ran out."""
    said = ("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc", "bad allocation")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in said)


@contextmanager
def foreign(refusal: Callable[[str], EffcliError]) -> Iterator[None]:
    """Map what another library raises over an input to `refusal`, given what it says; this machine's limits stay."""
    try:
        yield
    except EffcliError:
        raise
    except Exception as error:  # libraries raise whatever their code happens to trip over
        if machine_condition(error) is not None:
            raise
        raise refusal(f"{type(error).__name__}: {first_line(error)}") from error


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what`, an option and what the user gave for it, before the cause of an error."""
    try:
        yield
    except EffcliError as error:
        raise type(error)(f"{what}: {error.cause}", error.remedy) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Map the operating system's refusals while writing below `path` to an `OutputError`."""
    try:
        yield
    except EffcliError:
        raise
    except Exception as error:
        number = system_errno(error)
        if number in _FULL:
            raise OutputError(
                f"{_FULL[number]} while writing {path}", "free some space or choose another --output"
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OutputError(f"cannot write to {path}: {os.strerror(number)}", "choose a writable --output") from error
        raise
