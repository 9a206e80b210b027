"""How long the phases of a run take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from effcli.reports.report import PhaseTime

if TYPE_CHECKING:
    from effcli.reports.report import Stage
    from effcli.run.listener import Listener


class Timed:
    """A listener that passes on what it hears, and keeps how long each phase took, by the clock `now` in seconds."""

    def __init__(self, listener: Listener, now: Callable[[], float] = time.perf_counter) -> None:
        self._listener = listener
        self._now = now
        self._phase, self._started = "", 0.0
        self._seconds: dict[str, float] = {}

    @property
    def phases(self) -> tuple[PhaseTime, ...]:
        """The phases that have ended, in the order in which they first began."""
        return tuple(PhaseTime(name=name, seconds=seconds) for name, seconds in self._seconds.items())

    def stage(self, stage: Stage) -> None:
        self._listener.stage(stage)

    def progress_start(self, name: str, total: int, unit: str = "block") -> None:
        if name != self._phase:
            self._phase, self._started = name, self._now()
            self.begun(name)
        self._listener.progress_start(name, total, unit)

    def progress(self, done: int) -> None:
        self._listener.progress(done)

    def progress_end(self) -> None:
        seconds = max(0.0, self._now() - self._started)
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + seconds
        self.ended(self._phase, seconds)
        self._phase = ""
        self._listener.progress_end()

    def say(self, text: str) -> None:
        self._listener.say(text)

    def begun(self, name: str) -> None:
        """A phase begins; for subclasses."""

    def ended(self, name: str, seconds: float) -> None:
        """A phase has ended after so many seconds; for subclasses."""


__all__ = ["Timed"]
