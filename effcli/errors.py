"""What can go wrong, as one tree. Every error carries its cause and a remedy.

EffcliError
├── UserError                 the request or the input is at fault (exit 1)
│   ├── RecipeError           an unknown key, option, pass or value
│   ├── SelectionError        a layer pattern that matches nothing, a group size that divides nothing
│   ├── CheckpointError       a checkpoint that is missing, truncated, or not a checkpoint
│   ├── DataError             calibration or evaluation data that cannot serve
│   ├── NumericsError         NaN or infinity in weights or activations
│   ├── OutputError           an output that exists, is read-only, or does not fit on the disk
│   └── UnsupportedError      something this version cannot do, with what it can do instead
└── MachineError              a failure of ours or of the machine (exit 2)
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
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


class MachineError(EffcliError):
    pass


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """A sentence naming the entries of `known` nearest to `word`, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=most, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {shown}"


def first_line(error: BaseException) -> str:
    """What an exception says first, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Map the operating system's refusals while writing below `path` to an `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left on the disk while writing {path}", "free some space or choose another --output"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OutputError(f"cannot write to {path}: {error.strerror}", "choose a writable --output") from error
        raise
