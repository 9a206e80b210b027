"""`--log-file` and `--log-level`: what a command does, written to a file beside what it shows."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from effcli.errors import OutputError, RecipeError
from effcli.reports.escaping import terminal

LOGGER = logging.getLogger("effcli")


class _Lines(logging.Formatter):
    """A record as lines without a character that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record), lines=True)


class _File(logging.FileHandler):
    """A file whose disk may be full: what cannot be logged must not end a run."""

    def handleError(self, record: logging.LogRecord) -> None: ...

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def recording(file: Path | None, level: str | None) -> Iterator[None]:
    """Append what is logged meanwhile to `file`, from `level` on; without a file it goes nowhere.

    `OutputError` for a file that cannot be written.
    """
    if file is None:
        if level is not None:
            raise RecipeError("--log-level says what goes into a log, and there is none", "add --log-file FILE")
        yield
        return
    try:
        handler = _File(file.expanduser(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}", "choose another --log-file") from error
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    former = LOGGER.level
    LOGGER.setLevel((level or "info").upper())
    LOGGER.addHandler(handler)
    try:
        from effcli import __version__

        LOGGER.info("effcli %s: %s", __version__, shlex.join(sys.argv[1:]))
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(former)
        handler.close()


__all__ = ["LOGGER", "recording"]
