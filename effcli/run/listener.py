"""Whom a run tells how it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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


__all__ = ["Listener", "Silent"]
