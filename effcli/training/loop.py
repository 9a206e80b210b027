"""Gradient descent, step by step, on `accelerate`: the loop of every pass that trains.

The same inputs, options and seed give the same weights, bit for bit, whether a training ran through or was killed at
any step and went on from what it last wrote.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from effcli.errors import DataError, NumericsError, UnfinishedError, UnsupportedError, foreign
from effcli.platform.machine import pick_device
from effcli.platform.rehearsal import few
from effcli.reports.report import Training
from effcli.training import snapshot as snapshots
from effcli.training import tracking
from effcli.training.options import TrainingOptions
from effcli.training.snapshot import Point, Snapshot
from effcli.training.tracking import Tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

Rows = NDArray[np.int64]
# Called with (done, total), in steps.
Progress = Callable[[int, int], None]

# Seconds of work that a crash may cost: a snapshot takes about three times the bytes of what is trained.
SNAPSHOT_SECONDS = 30.0
# Seconds for which a rehearsal takes steps.
_REHEARSED = 0.2
# Inputs that a line search is made on, and how often it takes a step at most (arXiv:2409.04206).
PROBED = 32
_FARTHEST = 100
# Points of a curve.
_POINTS = 200
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_TAMER = "take a smaller learning_rate, a warmup, or clip the gradient"


class Examples(Protocol):
    """What is learned from, such as `effcli.inputs.images.Inputs`. labels: int64 (inputs,), None without."""

    @property
    def labels(self) -> Rows | None: ...

    def __len__(self) -> int: ...

    def batches(self, size: int, order: Rows | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs float32 (at most `size`, ...) and labels int64 (at most `size`,), those of `order` in this order."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, on the device. labels: int64 (n,), None without.

    progress: the share of all steps that are done, in [0, 1); scale: the sum of the second numbers that
    `Objective.error` returns before training, as a mean over the batches. `Objective.error` is given 0 and 1.
    """

    inputs: Tensor
    labels: Tensor | None
    progress: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What is trained, and towards what.

    module: its parameters that require gradients are trained; optimizer: over them; loss: a scalar, of which the mean
    over the batches of a step is taken, weighted by their inputs; error: two numbers whose sums over all inputs are
    divided; measured: what that is, for the report; beside: modules that loss and error run, too; advance: called
    after every step with the share of all steps that are done, true where the optimizer begins anew; counts: whether
    weights may be kept at such a share; fast_forward: steps between two line searches, 0 for none.
    """

    module: nn.Module
    optimizer: Optimizer
    loss: Callable[[Batch], Tensor]
    error: Callable[[Batch], tuple[float, float]]
    measured: str = ""
    beside: tuple[nn.Module, ...] = ()
    advance: Callable[[float], bool] = lambda progress: False
    counts: Callable[[float], bool] = lambda progress: True
    fast_forward: int = 0


def train(
    objective: Objective,
    data: Examples,
    options: TrainingOptions,
    *,
    batch_size: int,
    device: str = "cpu",
    folder: Path | None = None,
    key: str = "",
    progress: Progress = lambda done, total: None,
) -> Training:
    """Train `objective.module` in place, on `data`, and leave it on the CPU with the weights that are kept.

    batch_size: where the options name none; device: cpu, cuda, cuda:N or auto; folder: for snapshots, None for none;
    key: tells this training from others whose snapshot may lie there. A loss or an error that is NaN or infinite ends
    it with the best weights so far. Raises `DataError` without inputs, what `TrainingOptions.check_steps` raises,
    `NumericsError` where there are no such weights, `UnfinishedError` for a damaged snapshot, `UnsupportedError` for a
    tracker that is not installed or does not start.
    """
    if not len(data):
        raise DataError("no calibration input reached the network", "give calibration data that is not empty")
    modules = (objective.module, *objective.beside)
    place = pick_device(device)
    with _accelerated(place, options) as accelerator, seeded(options.seed or 0):
        try:
            for module in modules:
                module.to(accelerator.device)
            return _Run(accelerator, objective, data, options, batch_size, folder, key, progress).carry_out()
        finally:
            for module in modules:
                module.to("cpu")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from `seed` on; afterwards they go on as if nothing had happened."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if begun else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class _Run:
    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        data: Examples,
        options: TrainingOptions,
        batch_size: int,
        folder: Path | None,
        key: str,
        progress: Progress,
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.data = data
        self.options = options
        self.folder = folder
        self.key = key
        self.progress = progress
        self.optimizer: Any = accelerator.prepare_optimizer(objective.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        named = objective.module.named_parameters()
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.batch_size = options.batch_size or batch_size
        # Inputs of one step.
        self.window = self.batch_size * options.accumulation
        self.measured_on, self.trained_on = self._divided()
        self.probe = self.measured_on[:PROBED]
        self.per_epoch = options.per_epoch(len(data), batch_size)
        self.total = options.total(self.per_epoch)
        options.check_steps(self.total)
        self.stretch = -(-self.total // _POINTS)
        self.step = 0
        self.scale = 1.0
        self.least, self.kept = math.inf, 0
        self.best: dict[str, Tensor] = {}
        self.pending, self.since = 0.0, 0
        self.curve: list[Point] = []
        self.errors: list[Point] = []
        self.searched: list[tuple[int, int]] = []
        self.saved = time.monotonic()
        self.tracking = Tracking(accelerator, options)

    def _divided(self) -> tuple[Rows, Rows]:
        """The inputs on which the error is measured, and those that are trained on, int64, ascending."""
        every = np.arange(len(self.data), dtype=np.int64)
        held = self.options.held_out(len(every))
        if self.options.hold_out and not held:
            raise DataError(
                "there is one calibration input, which cannot be held out and trained on",
                "give more, or leave hold_out out",
            )
        if not held:
            return every, every
        drawn = np.random.default_rng(self.options.seed or 0).permutation(every)
        return np.sort(drawn[:held]), np.sort(drawn[held:])

    def carry_out(self) -> Training:
        """All steps, from the last snapshot on."""
        try:
            return self._carry_out()
        finally:
            self.tracking.end()

    def _carry_out(self) -> Training:
        if not self._resume():
            self._evaluate()
        self.progress(self.step, self.total)
        begun, epochs = self.step // self.per_epoch, -(-self.total // self.per_epoch)
        stopped = ""
        try:
            # What was killed after its last step has no epoch left, even if that one was not whole.
            for _ in few(range(begun, epochs) if self.step < self.total else ()):
                self._epoch()
        except NumericsError as error:
            if not (self.options.keep_best and self.kept):
                raise
            # What was kept before is as good as it was.
            stopped = f"{error.cause}; {error.remedy}"
        chosen = self.options.keep_best and bool(self.best)
        if chosen:
            self._restore(self.best)
        return Training(
            steps=self.step if stopped else self.total,
            curve=tuple(self.curve),
            errors=tuple(self.errors),
            kept=self.kept if chosen else self.total,
            measured=self.objective.measured,
            stopped=stopped,
            searched=tuple(self.searched),
        )

    def _epoch(self) -> None:
        """The steps that are left of one epoch, and the error after the last one."""
        epoch, done = divmod(self.step, self.per_epoch)
        order = self._order(epoch)[done * self.window :]
        batches, end = self._batches(order), min((epoch + 1) * self.per_epoch, self.total)
        for number in few(range(end - self.step), lasting=_REHEARSED):
            self._update(self._loss(batches, len(order) - number * self.window))
            if self.step < end:
                self._settle()
        # A rehearsal leaves steps out.
        self.step = end
        self._evaluate()
        self._settle()

    def _loss(self, batches: Iterator[Batch], left: int) -> float:
        """The loss of the next step, whose gradients are left behind; left: the inputs that `batches` still holds."""
        wanted, seen, loss = min(self.window, left), 0, 0.0
        while seen < wanted:
            batch = next(batches, None)
            if batch is None:
                missing = f"{left - seen} of {len(self.trained_on)} calibration inputs are missing"
                raise DataError(missing, "check the calibration data")
            share = len(batch.inputs) / wanted
            with self.accelerator.autocast():
                value = self.objective.loss(batch)
            loss += share * float(value.detach())
            if not math.isfinite(loss):
                raise NumericsError(f"the loss is NaN or infinite in step {self.step + 1} of {self.total}", _TAMER)
            self.accelerator.backward(value * share)
            seen += len(batch.inputs)
        return loss

    def _order(self, epoch: int) -> Rows:
        """The inputs in the order of one epoch, int64 (inputs,)."""
        if not self.options.shuffle:
            return self.trained_on
        return np.random.default_rng((self.options.seed or 0, epoch)).permutation(self.trained_on)

    def _batches(self, order: Rows) -> Iterator[Batch]:
        device = self.accelerator.device
        for inputs, labels in self.data.batches(self.batch_size, order):
            labels = None if labels is None else labels.to(device)
            yield Batch(inputs.to(device), labels, self.step / self.total, self.scale)

    def _update(self, loss: float) -> None:
        """Take the step that the gradients ask for."""
        factor = self.options.factor(self.step, self.total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if self.options.clip is not None:
            self.accelerator.clip_grad_norm_(self.trained.values(), self.options.clip)
        searches = self.objective.fast_forward and (self.step + 1) % self.objective.fast_forward == 0
        before = {name: value.detach().clone() for name, value in self.trained.items()} if searches else {}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if searches:
            self._fast_forward(before)
        if self.objective.advance(self.step / self.total):
            self.optimizer.state.clear()
        self.pending, self.since = self.pending + loss, self.since + 1
        self.tracking.log({"loss": loss, "learning_rate": self.optimizer.param_groups[0]["lr"]}, self.step)
        if self.since == self.stretch or self.step == self.total:
            self.curve.append((self.step, self.pending / self.since))
            self.pending, self.since = 0.0, 0

    def _fast_forward(self, before: Mapping[str, Tensor]) -> None:
        """Take the last step again as long as that lowers the error on a few inputs (arXiv:2409.04206).

        before: what is trained as it was before that step.
        """
        with torch.no_grad():
            after = {name: value.detach().clone() for name, value in self.trained.items()}
            least, taken = self._error(self.probe), 0
            while taken < _FARTHEST:
                self._along(before, after, taken + 1)
                error = self._error(self.probe)
                # Written so that NaN ends it.
                if not error < least:
                    self._along(before, after, taken)
                    break
                least, taken = error, taken + 1
        self.searched.append((self.step, taken))

    def _along(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], times: int) -> None:
        """Go to where the step from `before` to `after` leads that is taken `times` more."""
        for name, value in self.trained.items():
            torch.lerp(before[name], after[name], float(1 + times), out=value.data)

    def _settle(self) -> None:
        """What is due after a step."""
        self._save()
        self.progress(self.step, self.total)

    def _evaluate(self) -> None:
        """Measure the error, and remember the weights if it is the least so far."""
        part, whole, batches = self._sums(self.measured_on)
        if not math.isfinite(part + whole):
            if self.step:
                raise NumericsError(f"the outputs are NaN or infinite after step {self.step} of {self.total}", _TAMER)
            raise NumericsError("the outputs are NaN or infinite on the calibration data", "check the network")
        if not self.step:
            self.scale = whole / batches
        error = part / whole if whole > 0 else part
        self.errors.append((self.step, error))
        self.tracking.log({"error": error}, self.step)
        if error < self.least and self.objective.counts(self.step / self.total):
            self.least, self.kept = error, self.step
            if self.options.keep_best:
                self.best = {name: tensor.detach().clone() for name, tensor in self._state().items()}

    def _sums(self, rows: Rows) -> tuple[float, float, int]:
        """The two numbers of the error, summed over these inputs, and how many batches they came in."""
        part, whole, batches = 0.0, 0.0, 0
        with torch.no_grad():
            count = -(-len(rows) // self.batch_size)
            for batch in few(self._batches(rows), count):
                with self.accelerator.autocast():
                    # Errors of different epochs are compared: what an error makes of these must not move.
                    more = self.objective.error(replace(batch, progress=0.0, scale=1.0))
                part, whole, batches = part + more[0], whole + more[1], batches + 1
        return part, whole, batches

    def _error(self, rows: Rows) -> float:
        part, whole, _ = self._sums(rows)
        return part / whole if whole > 0 else part

    def _restore(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._state().items():
                tensor.copy_(values[name])

    def _save(self) -> None:
        """Write a snapshot where one is due: after some time, and at the end, before what follows may be killed."""
        due = time.monotonic() - self.saved >= SNAPSHOT_SECONDS
        if self.folder is None or not (due or self.step == self.total):
            return
        tensors, scalars = snapshots.optimizer_state(self.optimizer)
        parts: dict[str, Mapping[str, Tensor]] = {
            "now": self._state(),
            "best": self.best,
            "optimizer": tensors,
            "random": self._random(),
        }
        record = Snapshot(
            key=self.key,
            step=self.step,
            scale=self.scale,
            least=self.least if math.isfinite(self.least) else None,
            kept=self.kept,
            pending=self.pending,
            since=self.since,
            curve=tuple(self.curve),
            errors=tuple(self.errors),
            searched=tuple(self.searched),
            scalars=scalars,
            scaler={} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        )
        snapshots.save(self.folder, record, {f"{part}/{k}": v for part, own in parts.items() for k, v in own.items()})
        self.saved = time.monotonic()

    def _resume(self) -> bool:
        """Take up the last snapshot, if there is one."""
        found = None if self.folder is None else snapshots.load(self.folder, self.key)
        if found is None:
            return False
        with foreign(lambda cause: UnfinishedError(f"the snapshot in {self.folder} does not fit: {cause}")):
            self._take_up(*found)
        return True

    def _take_up(self, record: Snapshot, tensors: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("now", "best", "optimizer", "random")}
        for name, tensor in tensors.items():
            part, _, own = name.partition("/")
            parts[part][own] = tensor
        self._restore(parts["now"])
        self.best = {name: tensor.to(self.accelerator.device) for name, tensor in parts["best"].items()}
        snapshots.restore_optimizer(self.optimizer, parts["optimizer"], record.scalars)
        torch.set_rng_state(parts["random"]["cpu"])
        if "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(record.scaler)
        self.step, self.scale, self.kept = record.step, record.scale, record.kept
        self.least = math.inf if record.least is None else record.least
        self.pending, self.since = record.pending, record.since
        self.curve, self.errors, self.searched = list(record.curve), list(record.errors), list(record.searched)

    def _state(self) -> dict[str, Tensor]:
        """What a step may change: the parameters that are trained and the buffers of the module's state."""
        state = self.objective.module.state_dict(keep_vars=True)
        buffers = {name: value for name, value in state.items() if not isinstance(value, nn.Parameter)}
        return {**self.trained, **buffers}

    def _random(self) -> dict[str, Tensor]:
        """The states of torch's random numbers."""
        states = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states


@contextmanager
def _accelerated(device: torch.device, options: TrainingOptions) -> Iterator[Accelerator]:
    """An accelerator of its own for one training: accelerate keeps one state for a whole process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    precision = options.precision
    if precision == "float16" and device.type == "cpu":
        raise UnsupportedError("float16 is too narrow to train with on a CPU", "take precision: bfloat16 or float32")
    states = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    kept = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            more = tracking.settings(options)
            yield Accelerator(cpu=device.type == "cpu", mixed_precision=_PRECISIONS[precision], **more)
    finally:
        for state, former in zip(states, kept, strict=True):
            state.clear()
            state.update(former)


__all__ = ["Batch", "Examples", "Objective", "seeded", "train"]
