"""Whom a run tells how it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from effcli.layers.result import Phases, Progress
    from effcli.reports.report import Stage


class Listener(Protocol):
    """Whom a run tells how it goes.

    A phase begins with `progress_start` and ends with `progress_end`; there is one at a time. total: how many of `unit`
    it has, 0 while that is not known. It is told again, under the same name, once it is.
    """

    def stage(self, stage: Stage) -> None:
        """What was measured of the input, or after a pass."""

    def progress_start(self, name: str, total: int, unit: str = "block") -> None:
        """The phase `name` begins, or its total is known now."""

    def progress(self, done: int) -> None:
        """So many of the phase's total are done."""

    def progress_end(self) -> None:
        """The phase has ended, or failed."""

    def say(self, text: str) -> None:
        """One line for the reader."""


class Silent:
    """A listener for scripts."""

    def stage(self, stage: Stage) -> None: ...

    def progress_start(self, name: str, total: int, unit: str = "block") -> None: ...

    def progress(self, done: int) -> None: ...

    def progress_end(self) -> None: ...

    def say(self, text: str) -> None: ...


@contextmanager
def told(listener: Listener, name: str, unit: str = "block") -> Iterator[Progress]:
    """Progress as a listener is told of it, under `name`, until the work ends or fails; unit: what is counted."""
    known = 0
    listener.progress_start(name, 0, unit)

    def progress(done: int, total: int) -> None:
        nonlocal known
        if total != known:
            known = total
            listener.progress_start(name, total, unit)
        listener.progress(done)

    try:
        yield progress
    finally:
        listener.progress_end()


def phases(listener: Listener, of: str = "") -> Phases:
    """The phases of a piece of work as a listener is told of them; of: what is worked on, which stands before each."""

    def begin(name: str, unit: str = "step") -> AbstractContextManager[Progress]:
        return told(listener, f"{of}: {name}" if of else name, unit)

    return begin


__all__ = ["Listener", "Silent", "phases", "told"]
