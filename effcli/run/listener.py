"""Whom a run tells how it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from effcli.layers.result import Progress
    from effcli.reports.report import Stage


class Listener(Protocol):
    """Whom a run tells how it goes. unit: what a pass has `total` of."""

    def stage(self, stage: Stage) -> None: ...

    def progress_start(self, name: str, total: int, unit: str = "block") -> None: ...

    def progress(self, done: int) -> None: ...

    def progress_end(self) -> None: ...

    def say(self, text: str) -> None: ...


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
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            listener.progress_start(name, total, unit)
            started = True
        listener.progress(done)

    try:
        yield progress
    finally:
        if started:
            listener.progress_end()


__all__ = ["Listener", "Silent", "told"]
