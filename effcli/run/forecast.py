"""How long a run will take: what a rehearsal of it says of each phase."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from effcli.options import Options
from effcli.reports.report import PhaseTime


class Expected(Options):
    """What a phase is expected to take."""

    phase: str
    seconds: Annotated[float, Field(ge=0)] | None = Field(default=None, description="None: not predicted")
    reason: str = Field(default="", description="why it was not predicted")


class Forecast(Options):
    """What the phases of a run are expected to take, in their order.

    ended: why the rehearsal ended before the run would have, empty where it did not.
    """

    phases: tuple[Expected, ...] = ()
    ended: str = ""

    @property
    def seconds(self) -> float:
        """Of all phases that were predicted."""
        return sum(each.seconds or 0.0 for each in self.phases)

    def of(self, phase: str) -> Expected:
        """What is expected of the phase called `phase`."""
        known = (each for each in self.phases if each.phase == phase)
        return next(known, Expected(phase=phase, reason=self.ended or "the rehearsal had no such phase"))

    def beside(self, phases: Iterable[PhaseTime]) -> tuple[PhaseTime, ...]:
        """Phases that were measured, with what was expected of each."""
        found = ((phase, self.of(phase.name)) for phase in phases)
        return tuple(
            phase.model_copy(update={"predicted": expected.seconds, "reason": expected.reason})
            for phase, expected in found
        )

    def left(self, over: Iterable[str], phase: str, spent: float, own: float | None = None) -> float:
        """Seconds that are left in `phase` after `spent` ones, and in all that are not `over` by then.

        own: what the phase itself says is left of it.
        """
        done = {*over, phase}
        rest = max(0.0, (self.of(phase).seconds or 0.0) - spent) if own is None else own
        return rest + sum(each.seconds or 0.0 for each in self.phases if each.phase not in done)


__all__ = ["Expected", "Forecast"]
