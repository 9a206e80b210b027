"""What a network in training learns from a batch: the loss of its pass, beside the networks that teach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from effcli.layers.contract import Needs, Step, TrainPass
from effcli.layers.returned import Asked
from effcli.training.loop import Batch, Objective


class Learner(Protocol):
    """A network in memory that runs on batches."""

    @property
    def module(self) -> nn.Module: ...

    def run(self, batch: Batch) -> Tensor:
        """What the network returns, float32 (n, ...); of a language model for each token that is learned."""

    def labels(self, batch: Batch) -> Tensor | None:
        """The labels of what `run` returns, int64 (n,); None without."""


@dataclass(frozen=True)
class Learning:
    """A network that learns what `options` say. teachers: by the names of the fields of `Step`.

    set_training: says whether what is trained runs as in training, with its dropout say; the network itself never does.
    """

    network: Learner
    options: TrainPass
    teachers: Mapping[str, Learner] = field(default_factory=dict)
    set_training: Callable[[bool], None] = lambda training: None

    def objective(
        self,
        optimizer: Optimizer,
        advance: Callable[[float], bool] = lambda progress: False,
        counts: Callable[[float], bool] = lambda progress: True,
    ) -> Objective:
        """What the loop trains. advance, counts: see `Objective`."""
        return Objective(
            module=self.network.module,
            optimizer=Asked(self.options, "optimizer").expect(optimizer, Optimizer, "an optimizer of torch"),
            loss=self._loss,
            error=self._error,
            measured=self.options.measured,
            beside=tuple(teacher.module for teacher in self.teachers.values()),
            advance=advance,
            counts=counts,
            fast_forward=self.options.fast_forwards,
        )

    def _loss(self, batch: Batch) -> Tensor:
        loss = self.options.loss(self._step(batch, training=True))
        return Asked(self.options, "loss").check_loss(loss, trains=True)

    def _error(self, batch: Batch) -> tuple[float, float]:
        found = self.options.measure(self._step(batch, training=False))
        return Asked(self.options, "measure").check_measured(found)

    def _step(self, batch: Batch, *, training: bool) -> Step:
        self.set_training(training)
        with torch.no_grad():
            taught = {name: teacher.run(batch) for name, teacher in self.teachers.items()}
        # A layer that runs more than once has one weight.
        with parametrize.cached():
            outputs = self.network.run(batch)
        labels = self.network.labels(batch) if Needs.LABELS in self.options.needs else None
        return Step(batch.inputs, outputs, labels=labels, progress=batch.progress, scale=batch.scale, **taught)


__all__ = ["Learner", "Learning"]
