"""What a run tells its listener, written to the log of the package as well."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from effcli.reports import units
from effcli.run.timed import Timed

if TYPE_CHECKING:
    from effcli.reports.report import Stage

_LOGGER = logging.getLogger("effcli.run")
# Phases that take less are of interest to those alone who look for something.
_LONG = 2.0


class Logged(Timed):
    """A listener that logs what it passes on: lines, stages and phases that take more than two seconds.

    The beginnings of phases, and short ones, are on the level DEBUG, the rest on INFO.
    """

    def stage(self, stage: Stage) -> None:
        _LOGGER.info("%s: %s", stage.name, _figures(stage))
        for remark in stage.remarks:
            _LOGGER.info("%s: %s", stage.name, remark)
        super().stage(stage)

    def say(self, text: str) -> None:
        _LOGGER.info("%s", text)
        super().say(text)

    def begun(self, name: str) -> None:
        _LOGGER.debug("%s begins", name)

    def ended(self, name: str, seconds: float) -> None:
        _LOGGER.log(logging.INFO if seconds > _LONG else logging.DEBUG, "%s: %.1f s", name, seconds)


def _figures(stage: Stage) -> str:
    """The size of a stage, and its quality where it was measured."""
    found = [units.size(stage.nbytes), f"{units.bits(stage.bits_per_weight)} bits per weight"]
    quality = stage.quality
    if quality is not None and quality.perplexity is not None:
        found.append(f"perplexity {units.significant(quality.perplexity, 4)}")
    if quality is not None and quality.accuracy is not None:
        found.append(f"accuracy {units.fraction(quality.accuracy)}")
    if quality is not None and quality.classification is not None and quality.classification.top1 is not None:
        found.append(f"top-1 {units.fraction(quality.classification.top1)}")
    if stage.seconds is not None:
        found.append(f"in {units.duration(stage.seconds)}")
    return ", ".join(found)


__all__ = ["Logged"]
