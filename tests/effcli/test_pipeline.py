"""Runs that end early and are given again: what comes out is what an undisturbed run of the present inputs writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from effcli import pipeline
from effcli import recipe as recipes
from effcli.errors import OutputError
from effcli.exporters import c
from effcli.reports.report import Report


class Killed(BaseException):
    """Ends a run where it stands, as a signal would."""


def arrays(file: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    np.savez(file, images=random.random((8, 1, 8, 8)).astype("f4") * (seed + 1), labels=random.integers(0, 4, 8))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    torch.export.save(torch.export.export(network, (torch.zeros(1, 1, 8, 8),)), tmp_path / "net.pt2")
    arrays(tmp_path / "calibration-data.npz", 0)
    arrays(tmp_path / "evaluation-data.npz", 1)
    return tmp_path


def run(folder: Path, output: str, *export: str, overwrite: bool = False) -> Report:
    recipe = recipes.from_arguments(
        str(folder / "net.pt2"),
        passes=["fold", "int8"],
        output=str(folder / output),
        calib=str(folder / "calibration-data.npz"),
        export=export,
        overrides=[f"evaluate.images={folder}/evaluation-data.npz", "evaluate.latency=false"],
    )
    return pipeline.run(recipe, overwrite=overwrite)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "effcli.safetensors").read_bytes()).hexdigest()


def killed_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, start: Callable[[], Any]) -> None:
    def kill(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, kill)
        with pytest.raises(Killed):
            start()


@pytest.mark.parametrize("changed", ["calibration-data.npz", "evaluation-data.npz"])
def test_data_changed_between_two_tries(work: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    killed_at(monkeypatch, pipeline._Run, "_finish", lambda: run(work, "out"))
    arrays(work / changed, 5)
    resumed, whole = run(work, "out"), run(work, "whole")
    assert weights(work / "out") == weights(work / "whole")
    assert [stage.quality for stage in resumed.stages] == [stage.quality for stage in whole.stages]


def test_killed_while_an_export_is_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, c, "_checked", lambda: run(work, "out", "c"))
    assert not (work / "out").exists()
    leftover = next(work.glob(".out.effcli/checkpoint-*")) / "exports" / ".c-leftover"
    leftover.mkdir(parents=True, exist_ok=True)
    report = run(work, "out", "c")
    assert (
        [made.target for made in report.exports] == ["c"] == [made.target for made in Report.read(work / "out").exports]
    )
    assert [path.name for path in (work / "out" / "exports").iterdir()] == ["c"]
    assert not list(work.glob(".out*"))


def test_a_finished_export_is_not_made_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, pipeline._Run, "_describe", lambda: run(work, "out", "c"))
    with monkeypatch.context() as patch:
        patch.setattr(c, "export", lambda *given, **options: pytest.fail("it is exported again"))
        assert [made.target for made in run(work, "out", "c").exports] == ["c"]


def test_killed_when_all_is_in_place(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*arguments: Any) -> None:
        if (work / "out").exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Workplace, "remove", kill)
        with pytest.raises(Killed):
            run(work, "out")
    assert run(work, "out") == Report.read(work / "out")
    assert not list(work.glob(".out*"))
    with pytest.raises(OutputError, match="not empty"):
        run(work, "out")


def test_work_that_does_not_fit_together_is_begun_anew(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, pipeline._Run, "_finish", lambda: run(work, "out"))
    (work / ".out.effcli" / "checkpoint-2" / "config.json").unlink()
    run(work, "out")
    run(work, "whole")
    assert weights(work / "out") == weights(work / "whole")


def test_weight_files_are_as_readable_as_their_neighbours(work: Path) -> None:
    run(work, "out")
    assert len({file.stat().st_mode for file in (work / "out").iterdir() if file.is_file()}) == 1
