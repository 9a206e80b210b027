"""The training loop: against a loop written out, with gradients summed up, and killed at every step."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import Held
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from effcli.errors import DataError, NumericsError, UnfinishedError, UnsupportedError
from effcli.reports.report import Training
from effcli.training import loop
from effcli.training.loop import Batch, Objective
from effcli.training.options import TrainingOptions


class Killed(Exception):
    """In place of a signal."""


def network() -> nn.Module:
    with loop.seeded(5):
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))


def data(count: int = 22) -> Held:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return Held(inputs, torch.randint(3, (count,), generator=generator).numpy())


def objective(module: nn.Module, rate: float = 0.05, **more: Any) -> Objective:
    def loss(batch: Batch) -> Tensor:
        assert batch.labels is not None
        return F.cross_entropy(module(batch.inputs), batch.labels)

    def error(batch: Batch) -> tuple[float, float]:
        module.eval()
        found = float(loss(batch)) * len(batch.inputs), float(len(batch.inputs))
        module.train()
        return found

    fields = {"loss": loss, "error": error, **more}
    return Objective(module, torch.optim.Adam(module.parameters(), lr=rate), measured="loss", **fields)


def trained(options: TrainingOptions, given: Held | None = None, **more: Any) -> tuple[nn.Module, Training]:
    module = network()
    made = loop.train(objective(module), data() if given is None else given, options, batch_size=4, **more)
    return module, made


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_against_a_loop_written_out() -> None:
    """Bit for bit: order, dropout, clipping, and a rate that rises and then falls along a cosine."""
    options = TrainingOptions(epochs=3, learning_rate=0.05, warmup=4, clip=0.5, seed=7, keep_best=False)
    made, record = trained(options)
    module, given = network(), data()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses, step, total = [], 0, 3 * 6
    assert given.labels is not None
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for epoch in range(3):
            order = np.random.default_rng((7, epoch)).permutation(22)
            for rows in (order[k : k + 4] for k in range(0, 22, 4)):
                warm = (step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / (total - 4)))
                optimizer.param_groups[0]["lr"] = 0.05 * warm
                optimizer.zero_grad()
                loss = F.cross_entropy(module(given.inputs[rows]), torch.from_numpy(given.labels[rows]))
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
                losses.append(float(loss.detach()))
                step += 1
    assert same(made, module)
    assert record.curve == tuple(enumerate(losses, start=1))
    assert record.steps == record.kept == total and [at for at, _ in record.errors] == [0, 6, 12, 18]


def test_summed_gradients_are_those_of_a_larger_batch() -> None:
    """Also where the last batch is smaller: 22 inputs in batches of 3 and 12."""
    found = []
    for batch_size, accumulation in ((12, 1), (3, 4)):
        module = network().eval()
        options = TrainingOptions(epochs=4, batch_size=batch_size, accumulation=accumulation, learning_rate=0.05)
        made = loop.train(objective(module), data(), options, batch_size=99)
        found.append((module, made))
    (one, first), (other, second) = found
    assert first.steps == second.steps == 8
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(first.curve), torch.tensor(second.curve), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_killed_at_any_step_it_ends_with_the_same_weights(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainingOptions(steps=11, learning_rate=0.05, accumulation=accumulation)
    whole, record = trained(options)
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    for at in (0, 1, 5, 6, 10, 11):
        folder = tmp_path / f"at-{at}"

        def kill(done: int, total: int, at: int = at) -> None:
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            trained(options, folder=folder, progress=kill)
        told: list[int] = []
        again, second = trained(options, folder=folder, progress=lambda done, total, told=told: told.append(done))
        assert same(whole, again) and second == record, at
        assert told == list(range(at, 12)), "it went on from where it was"


def test_killed_again_and_again_and_between_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainingOptions(epochs=4, learning_rate=0.05)
    whole, record = trained(options)
    clock = itertools.count()
    # A snapshot after every third step.
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 3.0)
    begun = []
    for at in (5, 11, 12, 20):

        def kill(done: int, total: int, at: int = at, own: list[int] = begun) -> None:
            own.append(done)
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            trained(options, folder=tmp_path, progress=kill)
        del begun[:]
    again, second = trained(options, folder=tmp_path, progress=lambda done, total: begun.append(done))
    assert same(whole, again) and second == record and 0 < begun[0] < 20


def test_a_snapshot_of_another_training_does_not_count(tmp_path: Path) -> None:
    options = TrainingOptions(epochs=1, learning_rate=0.05)
    one, _ = trained(options, folder=tmp_path, key="one")
    told: list[int] = []
    other, _ = trained(options, folder=tmp_path, key="other", progress=lambda done, total: told.append(done))
    assert told[0] == 0 and same(one, other)


def test_a_snapshot_that_does_not_fit(tmp_path: Path) -> None:
    options = TrainingOptions(epochs=1)
    trained(options, folder=tmp_path)
    module = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(UnfinishedError, match="does not fit"):
        loop.train(objective(module), data(), options, batch_size=4, folder=tmp_path)


def test_the_best_weights_are_kept() -> None:
    """A rate far too high spoils what the first epoch gained."""
    module, before = network().eval(), network().eval()
    task = objective(module, rate=3.0)
    made = loop.train(task, data(), TrainingOptions(epochs=5, schedule="constant"), batch_size=4)
    least = min(made.errors, key=lambda point: point[1])
    assert made.kept == least[0] and made.kept < made.steps

    def error(of: nn.Module) -> float:
        given = data()
        with torch.no_grad():
            return float(F.cross_entropy(of(given.inputs), torch.from_numpy(given.labels)))

    module.eval()
    assert error(module) == pytest.approx(least[1], rel=1e-5)
    assert made.errors[0][1] == pytest.approx(error(before), rel=1e-5)


def test_inputs_that_are_held_out_are_measured_and_never_trained_on() -> None:
    """A fifth of 22, rounded up: 5 are measured before and after each epoch, 17 make five steps of it."""
    given, module = data(), network().eval()
    own = objective(module)
    learned: list[Tensor] = []
    measured: list[Tensor] = []

    def loss(batch: Batch) -> Tensor:
        learned.append(batch.inputs)
        return own.loss(batch)

    def error(batch: Batch) -> tuple[float, float]:
        measured.append(batch.inputs)
        return own.error(batch)

    options = TrainingOptions(epochs=2, hold_out="20%", learning_rate=0.05)
    made = loop.train(objective(module, loss=loss, error=error), given, options, batch_size=4)
    assert [at for at, _ in made.errors] == [0, 5, 10]
    rows = {tuple(row.tolist()) for row in torch.cat(learned)}
    held = {tuple(row.tolist()) for row in torch.cat(measured)}
    assert (len(rows), len(held)) == (17, 5) and not rows & held
    assert len(torch.cat(measured)) == 3 * 5 and len(torch.cat(learned)) == 2 * 17
    assert rows | held == {tuple(row.tolist()) for row in given.inputs}


@pytest.mark.parametrize(
    ("share", "inputs", "held"), [(0, 10, 0), (0.05, 10, 1), (0.99, 10, 9), (0.5, 1, 0), (0.5, 0, 0)]
)
def test_one_input_is_left_to_train_on(share: float, inputs: int, held: int) -> None:
    assert TrainingOptions(hold_out=share).held_out(inputs) == held


def test_a_curve_of_many_steps_has_few_points() -> None:
    _, made = trained(TrainingOptions(steps=450, schedule="constant"))
    assert len(made.curve) == 150 and made.curve[-1][0] == 450
    assert [at for at, _ in made.curve] == list(range(3, 451, 3))


def test_steps_end_in_the_middle_of_an_epoch() -> None:
    _, made = trained(TrainingOptions(steps=8))
    assert [at for at, _ in made.errors] == [0, 6, 8] and made.steps == 8


def test_only_what_requires_gradients_is_trained() -> None:
    module = network()
    module[0].requires_grad_(False)  # type: ignore[operator]
    before = copy.deepcopy(module)
    loop.train(objective(module), data(), TrainingOptions(epochs=1, learning_rate=0.1), batch_size=4)
    assert torch.equal(module[0].weight, before[0].weight)  # type: ignore[index]
    assert not torch.equal(module[3].weight, before[3].weight)  # type: ignore[index]


def test_other_random_numbers_go_on_as_if_nothing_had_happened() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    trained(TrainingOptions(epochs=1))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("at", "shown"), [(0, 1), (4, 5)])
def test_a_loss_that_is_nan(at: int, shown: int) -> None:
    module = network()
    task = objective(module)
    steps = iter(range(99))

    def loss(batch: Batch) -> Tensor:
        return task.loss(batch) * (math.nan if next(steps) == at else 1)

    spoilt = Objective(module, task.optimizer, loss, task.error)
    with pytest.raises(NumericsError, match=f"NaN or infinite in step {shown} of 18") as raised:
        loop.train(spoilt, data(), TrainingOptions(epochs=3), batch_size=4)
    assert "learning_rate" in raised.value.remedy


def test_fast_forward_goes_on_as_long_as_it_gets_better() -> None:
    """By hand: from 0 a step of 1 towards 10, taken again nine times; then it stands in the minimum."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.zero_()

    def loss(batch: Batch) -> Tensor:
        return (module.weight - 10).square().sum()

    def error(batch: Batch) -> tuple[float, float]:
        return float(loss(batch)) * len(batch.inputs), float(len(batch.inputs))

    sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    found = Objective(module, sgd, loss, error, fast_forward=1)
    options = TrainingOptions(steps=2, schedule="constant", hold_out=0.25, keep_best=False)
    training = loop.train(found, data(), options, batch_size=4)
    assert training.searched == ((1, 9), (2, 0)) and float(module.weight.detach()) == 10
    assert training.errors[-1][1] == 0
    # Every second step, from where the one before has led.
    module.weight.data.zero_()
    found = Objective(module, torch.optim.SGD(module.parameters(), lr=0.05), loss, error, fast_forward=2)
    training = loop.train(found, data(), options, batch_size=4)
    # 0, 1, 1.9, and then steps of 0.9: 10 is 9 of them away.
    assert training.searched == ((2, 9),) and float(module.weight.detach()) == pytest.approx(10)


def test_fast_forward_looks_at_few_inputs_and_no_more_than_is_held_out() -> None:
    module = network()
    task = objective(module)
    seen: list[int] = []

    def error(batch: Batch) -> tuple[float, float]:
        seen.append(len(batch.inputs))
        return task.error(batch)

    found = Objective(module, task.optimizer, task.loss, error, fast_forward=1)
    loop.train(found, data(200), TrainingOptions(steps=1, hold_out=0.5), batch_size=200)
    assert seen[0] == seen[-1] == 100 and set(seen[1:-1]) == {32}


def test_after_an_epoch_that_was_better_a_nan_ends_it_with_that() -> None:
    module = network()
    task = objective(module)
    steps = iter(range(99))
    states: list[dict[str, Tensor]] = []

    def loss(batch: Batch) -> Tensor:
        number = next(steps)
        if number == 6:
            states.append({name: value.clone() for name, value in module.state_dict().items()})
        return task.loss(batch) * (math.nan if number == 9 else 1)

    spoilt = Objective(module, task.optimizer, loss, task.error)
    found = loop.train(spoilt, data(), TrainingOptions(epochs=3), batch_size=4)
    assert (found.steps, found.kept) == (9, 6)
    assert found.stopped.startswith("the loss is NaN or infinite in step 10 of 18; take a smaller learning_rate")
    assert_close(module.state_dict(), states[0], rtol=0, atol=0)
    steps = iter(range(99))
    with pytest.raises(NumericsError):
        loop.train(spoilt, data(), TrainingOptions(epochs=3, keep_best=False), batch_size=4)


@pytest.mark.parametrize(
    ("errors", "message"), [([math.nan], "on the calibration data"), ([1.0, math.inf], "after step 6 of 18")]
)
def test_an_error_that_is_not_finite(errors: list[float], message: str) -> None:
    module = network()
    task = objective(module)
    values = [value for value in errors for _ in range(6)]
    found = Objective(module, task.optimizer, task.loss, lambda batch: (values.pop(0), 1.0))
    with pytest.raises(NumericsError, match=message):
        loop.train(found, data(), TrainingOptions(epochs=3), batch_size=4)


def test_the_scale_of_the_error_reaches_the_loss() -> None:
    module = network()
    seen: list[tuple[float, float]] = []
    task = objective(module)

    def loss(batch: Batch) -> Tensor:
        seen.append((batch.scale, batch.progress))
        return task.loss(batch)

    def error(batch: Batch) -> tuple[float, float]:
        return 1.0, 3.0 * len(batch.inputs)

    loop.train(Objective(module, task.optimizer, loss, error), data(), TrainingOptions(epochs=1), batch_size=4)
    assert seen == [(11.0, k / 6) for k in range(6)], "66 of 6 batches"


def test_errors_of_different_epochs_can_be_compared() -> None:
    module = network()
    seen: list[tuple[float, float]] = []
    task = objective(module)

    def error(batch: Batch) -> tuple[float, float]:
        seen.append((batch.scale, batch.progress))
        return 1.0, 3.0 * len(batch.inputs)

    made = loop.train(Objective(module, task.optimizer, task.loss, error), data(), TrainingOptions(), batch_size=4)
    assert seen == [(1.0, 0.0)] * 24 and len({value for _, value in made.errors}) == 1


def test_nothing_to_learn_from() -> None:
    with pytest.raises(DataError, match="no calibration input") as raised:
        trained(TrainingOptions(), Held(torch.zeros(0, 6)))
    assert "not empty" in raised.value.remedy


def test_inputs_that_are_missing() -> None:
    class Short(Held):
        def batches(self, size: int, order: Any = None) -> Any:
            yield from itertools.islice(super().batches(size, order), 3)

    given = data()
    with pytest.raises(DataError, match="10 of 22 calibration inputs are missing"):
        trained(TrainingOptions(epochs=1), Short(given.inputs, given.labels))


def test_bfloat16_is_near(recwarn: pytest.WarningsRecorder) -> None:
    seen: list[torch.dtype] = []
    module = network().eval()
    task = objective(module)

    def loss(batch: Batch) -> Tensor:
        assert batch.labels is not None
        outputs = module(batch.inputs)
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs, batch.labels)

    narrow = TrainingOptions(epochs=2, learning_rate=0.01, precision="bfloat16")
    made = loop.train(Objective(module, task.optimizer, loss, task.error), data(), narrow, batch_size=4)
    wide = network().eval()
    other = loop.train(objective(wide, 0.05), data(), narrow.model_copy(update={"precision": "float32"}), batch_size=4)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in module.parameters()} == {torch.float32}
    assert made.curve[-1][1] == pytest.approx(other.curve[-1][1], rel=0.05)
    with pytest.raises(UnsupportedError, match="float16 is too narrow"):
        trained(TrainingOptions(precision="float16"))


def test_an_accelerator_of_the_caller_stays_as_it_is() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    try:
        trained(TrainingOptions(epochs=1))
        assert own.mixed_precision == "bf16" and own.state.mixed_precision == "bf16"
        assert own.gradient_accumulation_steps == 3
    finally:
        AcceleratorState._reset_state(True)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UnsupportedError, match="no device cuda:99"):
        trained(TrainingOptions(), device="cuda:99")


def test_accelerate_waits_for_a_training() -> None:
    code = "import effcli.layers.contract, effcli.training.loop, sys; print('accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
