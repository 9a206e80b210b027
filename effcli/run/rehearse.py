"""Predict how long a run takes: carry it out on a part of the network and of the data, with a clock for the whole.

The code is that of the run, so that whatever a pass or an export of another package does is done here too. See
`effcli.platform.rehearsal` for what is left out.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

from effcli.errors import EffcliError, first_line
from effcli.layers.contract import TrainPass
from effcli.platform.rehearsal import Rehearsal
from effcli.run import detect, pipeline
from effcli.run.forecast import Expected, Forecast
from effcli.run.listener import Silent
from effcli.run.recipe import PassStep, Recipe
from effcli.run.timed import Timed
from effcli.search import stage as searching

_LOGGER = logging.getLogger(__name__)
# What says nothing of how it grows with the network, and need not.
_ONCE = ("reading ", "writing the report")
_PLANNING = "planning"


class _Rehearsed(Timed):
    """A listener by the clock of a rehearsal, which keeps why phases cannot be predicted."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__(Silent(), rehearsal.now)
        self._rehearsal = rehearsal
        self.unknown: dict[str, str] = {}
        # The phase that ended last.
        self.last = ""

    def begun(self, name: str) -> None:
        self._rehearsal.unknown, self._rehearsal.reached = "", False

    def ended(self, name: str, seconds: float) -> None:
        self.last, found = name, self._rehearsal
        if found.unknown:
            self.unknown[name] = found.unknown
        elif found.blocks and not found.reached and not name.startswith(_ONCE):
            self.unknown[name] = "it does not say how it grows with the number of blocks"


def predict(recipe: Recipe) -> Forecast:
    """What each phase of a run of `recipe` will take on this machine.

    Raises what a run would raise over the model; what the rehearsal itself ends with stands in the forecast.
    """
    network = detect.of_run(recipe)
    begin = time.perf_counter()
    searching.plan(network)
    # Of the whole network, which costs little.
    planning = time.perf_counter() - begin
    with tempfile.TemporaryDirectory(prefix="effcli-") as temporary:
        folder, ended = Path(temporary), ""
        rehearsal = Rehearsal()
        listener = _Rehearsed(rehearsal)
        try:
            model, rehearsal.blocks = network.miniature(folder / "model")
            passes = tuple(map(_untracked, recipe.passes))
            changed = {"model": model, "revision": None, "output": str(folder / "out"), "passes": passes}
            with rehearsal:
                pipeline.run(recipe.model_copy(update=changed), listener=listener)
        except EffcliError as error:
            ended = error.cause
        except Exception as error:
            # A part of a network is no network that anybody made: whatever goes wrong with it, the whole may be sound.
            _LOGGER.debug("the rehearsal failed", exc_info=True)
            ended = f"the rehearsal failed: {first_line(error)}"
    if ended:
        # It may not have come to its end.
        listener.unknown[listener.last] = ended
    found = {phase.name: Expected(phase=phase.name, seconds=phase.seconds) for phase in listener.phases}
    found |= {name: Expected(phase=name, reason=why) for name, why in listener.unknown.items() if name}
    found[_PLANNING] = Expected(phase=_PLANNING, seconds=planning)
    return Forecast(phases=tuple(found.values()), ended=ended)


def _untracked(step: PassStep) -> PassStep:
    """The step without a tracker: only what is really trained is shown there."""
    if not isinstance(step.config, TrainPass):
        return step
    return step.model_copy(update={"config": step.config.model_copy(update={"track": None})})


__all__ = ["predict"]
