"""The curve of a training for TensorBoard, MLflow or Weights & Biases, by way of accelerate's trackers."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import UnsupportedError, first_line, foreign

if TYPE_CHECKING:
    from accelerate import Accelerator

    from effcli.training.options import TrainingOptions

# What runs of a tracker are listed under.
PROJECT = "effcli"
_LOGGER = logging.getLogger("effcli.training")


def require(track: str | None) -> None:
    """Raise `UnsupportedError` unless the package of a tracker is installed."""
    if track is not None and find_spec(track) is None:
        raise UnsupportedError(f"track: the package {track} is not installed", f"pip install {track}, or leave it out")


def settings(options: TrainingOptions) -> dict[str, Any]:
    """What an `Accelerator` is to be given; of TensorBoard each training has a folder of its own."""
    if options.track is None:
        return {}
    folder = Path(options.track_folder).expanduser()
    if options.track == "tensorboard":
        folder /= time.strftime("%Y-%m-%d-%H%M%S")
    return {"log_with": options.track, "project_dir": str(folder)}


class Tracking:
    """What one training tells its tracker, if it has one. A tracker that fails is given up: the training goes on."""

    def __init__(self, accelerator: Accelerator, options: TrainingOptions) -> None:
        self._accelerator = accelerator
        self._on = options.track is not None
        if not self._on:
            return
        require(options.track)
        values = options.model_dump(mode="json")
        config = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}

        def refusal(cause: str) -> UnsupportedError:
            return UnsupportedError(f"track: {options.track} does not start: {cause}", "set it up, or leave it out")

        with foreign(refusal):
            accelerator.init_trackers(PROJECT, config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Figures after a step, by name."""
        if not self._on:
            return
        try:
            self._accelerator.log(values, step=step)
        except Exception as error:  # whatever a tracker and its network say
            self._on = False
            _LOGGER.warning("the training is tracked no longer: %s: %s", type(error).__name__, first_line(error))

    def end(self) -> None:
        """Let the tracker write what it still holds."""
        if self._on:
            self._on = False
            try:
                self._accelerator.end_training()
            except Exception as error:  # as above
                _LOGGER.warning("the tracker did not end well: %s: %s", type(error).__name__, first_line(error))


__all__ = ["PROJECT", "Tracking", "require", "settings"]
