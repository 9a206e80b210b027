"""The options that every training pass shares."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from effcli.options import Options, Share


class TrainingOptions(Options):
    """How long, how fast and on what a pass trains."""

    epochs: int = Field(3, ge=1, description="Times that all calibration inputs are seen.")
    steps: int | None = Field(None, ge=1, description="Steps of the optimizer, in place of epochs.")
    learning_rate: float = Field(
        1e-4, gt=0, le=1000, description="The highest one, of Adam (arXiv:1412.6980) unless it says."
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="How the learning rate goes on after its warm-up: along a cosine to 0, or as it is."
    )
    warmup: int = Field(0, ge=0, description="Steps in which the learning rate rises to its highest.")
    batch_size: int | None = Field(
        None, ge=1, description="Inputs per forward; without it, that of the calibration inputs."
    )
    accumulation: int = Field(1, ge=1, description="Batches whose gradients are summed up for one step.")
    clip: float | None = Field(
        None, gt=0, le=1e30, description="The largest norm of the gradient; longer ones are shortened."
    )
    shuffle: bool = Field(True, description="Take the inputs in another order in each epoch.")
    seed: int | None = Field(
        None, ge=0, description="Seed of the order of the inputs and of other random choices; without it, the recipe's."
    )
    keep_best: bool = Field(
        True, description="Keep the weights of the epoch with the least error on the calibration inputs, not the last."
    )
    hold_out: Share = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the calibration inputs that is not trained on: the error is measured on these alone, "
        "which takes less time and tells what is learned from what is remembered.",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the arithmetic; weights and the optimizer stay float32. float16 needs a GPU."
    )
    track: Literal["tensorboard", "mlflow", "wandb"] | None = Field(
        None,
        description="Where loss, error and learning rate are shown while it trains; the package must be installed.",
    )
    track_folder: str = Field(
        "runs",
        description="The folder for what `track` writes here; mlflow and wandb may be set up to write elsewhere.",
    )

    def held_out(self, inputs: int) -> int:
        """How many of so many inputs are not trained on: the share, rounded up, but one is left to train on."""
        # 7 % of 100 is 7.000000000000001 in floating point.
        return min(math.ceil(self.hold_out * inputs - 1e-9), max(inputs - 1, 0))

    def measured_on(self, inputs: int) -> int:
        """On how many of so many inputs the error is measured."""
        return self.held_out(inputs) or inputs

    def per_epoch(self, inputs: int, batch_size: int) -> int:
        """Steps in which so many inputs are seen once, but for those held out; batch_size: where the options have none.

        1 or more.
        """
        window = (self.batch_size or batch_size) * self.accumulation
        return max(-(-(inputs - self.held_out(inputs)) // window), 1)

    def check_steps(self, steps: int) -> None:
        """Raise `UserError` where a training of so many steps in all is too short for the pass."""

    def total(self, per_epoch: int) -> int:
        """Steps of the whole training, at `per_epoch` steps in an epoch."""
        return self.epochs * per_epoch if self.steps is None else self.steps

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in step `step`, from 0 on, of `total`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(total - self.warmup, 1)))


__all__ = ["TrainingOptions"]
