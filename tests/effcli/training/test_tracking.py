"""What a training tells a tracker, here one of the test's own in the place of TensorBoard's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from small_graphs import Held
from torch import Tensor, nn
from torch.nn import functional as F

from effcli.errors import UnsupportedError
from effcli.reports.report import Training
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.training import loop, tracking
from effcli.training.loop import Batch, Objective
from effcli.training.options import TrainingOptions


class Own(GeneralTracker):  # type: ignore[misc]
    """Remembers what it was told; fails from a step on, if that is set."""

    name = "tensorboard"
    requires_logging_directory = True
    made: ClassVar[list[Own]] = []
    fails_at: ClassVar[int | None] = None

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.folder, self.config = Path(logging_dir) / run_name, dict[str, Any]()
        self.said: list[tuple[int | None, dict[str, float]]] = []
        self.ended = False
        Own.made.append(self)

    @property
    def tracker(self) -> Own:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if Own.fails_at is not None and (step or 0) >= Own.fails_at:
            raise ConnectionError("no server")
        self.said.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type[Own]:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Own)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    Own.made, Own.fails_at = [], None
    return Own


def trained(**options: Any) -> tuple[nn.Module, Training]:
    with loop.seeded(5):
        module = nn.Linear(6, 3)
    generator = torch.Generator().manual_seed(1)
    data = Held(torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator).numpy())

    def loss(batch: Batch) -> Tensor:
        assert batch.labels is not None
        return F.cross_entropy(module(batch.inputs), batch.labels)

    def error(batch: Batch) -> tuple[float, float]:
        return float(loss(batch)) * len(batch.inputs), float(len(batch.inputs))

    objective = Objective(module, torch.optim.SGD(module.parameters(), lr=0.1), loss, error)
    return module, loop.train(objective, data, TrainingOptions(epochs=2, warmup=2, **options), batch_size=5)


def test_a_tracker_is_told_loss_rate_and_error(own: type[Own], tmp_path: Path) -> None:
    module, made = trained(track="tensorboard", track_folder=str(tmp_path / "runs"))
    (told,) = own.made
    assert told.folder.parent.parent == tmp_path / "runs" and told.folder.name == tracking.PROJECT
    assert told.config["epochs"] == 2 and told.config["schedule"] == "cosine" and told.ended
    losses = {step: values["loss"] for step, values in told.said if "loss" in values}
    assert losses == pytest.approx(dict(made.curve))
    assert [values["learning_rate"] for _, values in told.said if "loss" in values][:2] == pytest.approx([0.05, 0.1])
    assert [(step, values["error"]) for step, values in told.said if "error" in values] == list(made.errors)
    alone, _ = trained()
    assert torch.equal(alone.weight, module.weight)
    assert len(own.made) == 1


def test_a_tracker_that_fails_is_given_up_and_the_training_goes_on(
    own: type[Own], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own.fails_at = 2
    with caplog.at_level(logging.WARNING, "effcli"):
        _, made = trained(track="tensorboard", track_folder=str(tmp_path))
    assert made.steps == 4
    assert [record.getMessage() for record in caplog.records] == [
        "the training is tracked no longer: ConnectionError: no server"
    ]


def test_a_tracker_that_does_not_start_is_refused(
    own: type[Own], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Own, values: dict[str, Any]) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr(Own, "store_init_configuration", refuse)
    with pytest.raises(UnsupportedError, match=r"does not start: .*not logged in") as found:
        trained(track="tensorboard", track_folder=str(tmp_path))
    assert found.value.remedy


def test_a_package_that_is_not_installed_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    steps = ["kmeans:bits=4", "centroids:track=mlflow"]
    recipe = recipes.from_arguments("sample:cnn", passes=steps, output=str(tmp_path / "out"))
    with pytest.raises(UnsupportedError, match="the package mlflow is not installed") as found:
        pipeline.run(recipe)
    assert "pip install mlflow" in found.value.remedy
    assert list(tmp_path.iterdir()) == []
