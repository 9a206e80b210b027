"""Runs that are rehearsed: each phase has its prediction, and counts scale as they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import make
from plain_passes import Halve, asking
from torch import nn

import effcli
from effcli.cli import main
from effcli.errors import OutputError
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.layers.contract import Layer, Needs, Outcome, Statistics
from effcli.platform.rehearsal import FEW, Rehearsal
from effcli.reports.report import Report
from effcli.run import pipeline, rehearse
from effcli.run import recipe as recipes
from effcli.run.forecast import Forecast
from effcli.run.recipe import PassStep


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Slow(Halve):
    """Takes as many seconds as a layer has rows, by the clock of the test."""

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        CLOCK.seconds += len(layer.weight)
        return super().apply(layer, seen)


CLOCK = Clock()


@pytest.fixture
def language(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "model", num_hidden_layers=4)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    torch.export.save(torch.export.export(network, (torch.zeros(1, 1, 8, 8),)), tmp_path / "net.pt2")
    random = np.random.default_rng(0)
    for name in ("calibration", "evaluation"):
        images = random.random((300, 1, 8, 8)).astype("f4")
        np.savez(tmp_path / f"{name}.npz", images=images, labels=random.integers(0, 4, 300))
    return tmp_path / "net.pt2"


def recipe_of(model: Path, *passes: Any, **more: Any) -> recipes.Recipe:
    output = str(model.parent / "out")
    return recipes.check({"model": str(model), "passes": list(passes), "output": output, **more}, "the test")


def same_phases(recipe: recipes.Recipe) -> Report:
    """The report of a run that was rehearsed, in whose forecast each of its phases stands."""
    forecast = rehearse.predict(recipe)
    assert forecast.ended == ""
    report = pipeline.run(recipe, forecast=forecast)
    assert [each.phase for each in forecast.phases] == [*(each.name for each in report.phases), "writing the report"]
    assert Report.read(recipe.target).phases == report.phases
    assert [(each.predicted, each.reason) for each in report.phases] == [
        (each.seconds, each.reason) for each in forecast.phases[:-1]
    ]
    return report


def test_a_language_model(language: Path) -> None:
    texts = {"calibration": {"samples": 9, "length": 32, "batch_size": 2}, "evaluate": {"samples": 4, "length": 32}}
    texts["evaluate"] |= {"prefill": 8, "decode": 8}
    steps = ({"awq": {"bits": 4, "group_size": 32}}, {"gptq": {"bits": 3, "group_size": 32}})
    report = same_phases(recipe_of(language, *steps, **texts, export=["safetensors"]))
    unknown = {each.name for each in report.phases if each.predicted is None}
    assert not unknown & {"awq", "gptq", "input: perplexity", "gptq: speed", "gptq: texts", "planning"}
    assert "verifying: loading with transformers" in unknown


def test_a_graph(graph: Path) -> None:
    report = same_phases(recipe_of(graph, {"gptq": {"bits": 4}}, "int8", evaluate={"latency": False}, export=["onnx"]))
    assert all(each.predicted is not None for each in report.phases)


def test_training(graph: Path) -> None:
    same_phases(recipe_of(graph, "kmeans", {"centroids": {"epochs": 9}}, evaluate={"latency": False}))


def test_training_whose_best_weights_are_those_of_its_end(graph: Path) -> None:
    pruning = {"gradual": {"epochs": 9, "towards": "original"}}
    same_phases(recipe_of(graph, pruning, evaluate={"latency": False}))


def test_no_tracker_hears_of_a_rehearsal(graph: Path, tmp_path: Path) -> None:
    track = {"track": "tensorboard", "track_folder": str(tmp_path / "curves")}
    options = {"epochs": 1, **track}
    found = rehearse.predict(recipe_of(graph, "kmeans", {"centroids": options}, evaluate=False))
    assert found.of("centroids").seconds is not None
    assert not (tmp_path / "curves").exists()


def test_from_python(graph: Path) -> None:
    report = effcli.compress(graph, "linear:bits=4", graph.parent / "out", evaluate=False, predict=True)
    assert any(phase.name == "linear" and phase.predicted is not None for phase in report.phases)


def test_a_search(graph: Path) -> None:
    search = {"auto": {"using": "linear", "average_bits": 4}}
    same_phases(recipe_of(graph, search, evaluate={"latency": False}))


def test_a_search_that_carries_choices_out(language: Path) -> None:
    search = {
        "auto": {"using": "linear", "group_size": 32, "bits": [4, 8], "by": "fisher", "perplexity_increase": "50%"}
    }
    texts = {"samples": 4, "length": 16}
    found = rehearse.predict(recipe_of(language, search, calibration=texts, evaluate={**texts, "latency": False}))
    assert found.of("auto: sensitivity").seconds is not None
    assert "depends on what is found" in found.of("auto: linear").reason
    assert "depends on what is found" in found.of("auto: perplexity").reason


def test_the_time_of_a_pass_grows_with_the_blocks(language: Path, tmp_path: Path) -> None:
    """Of a pass that nobody knows: each layer of a shape once, as many times as there are layers."""
    (tmp_path / "out").mkdir()
    CLOCK.seconds = 0.0
    blocks = {f"model.layers.{k}": share for k, share in enumerate((1, 1, 1, 7))}
    with Rehearsal(blocks, CLOCK) as going:
        sweep(language, tmp_path / "out", PassStep(name="slow", config=Slow()), None, tmp_path / "work")
    rows = 2 * 64 + 2 * 32 + 2 * 128 + 64
    # The queries and the outputs of a block have one shape, so have its keys and values, its gates and ups.
    assert CLOCK.seconds == 64 + 32 + 128 + 64
    assert going.now() == rows * (1 + 1 + 1 + 7)


def test_the_time_of_forwards_grows_with_the_windows(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    CLOCK.seconds = 0.0
    add = Statistics.add

    def slowly(self: Statistics, inputs: torch.Tensor) -> None:
        CLOCK.seconds += 1
        add(self, inputs)

    monkeypatch.setattr(Statistics, "add", slowly)
    blocks = {f"model.layers.{k}": 2.0 for k in range(4)}
    windows = Windows([torch.ones(2, 16, dtype=torch.int64)] * 20)
    with Rehearsal(blocks, CLOCK) as going:
        sweep(language, tmp_path / "out", asking(Needs.GRAM), windows, tmp_path / "work")
    # Four inputs of each block are gathered: of attention, of its output, of the feed-forward, and within it.
    assert CLOCK.seconds == 4 * 4 * FEW
    assert going.now() == 4 * 4 * 2 * 20


def test_what_a_run_refuses_is_refused_before_a_rehearsal(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (graph.parent / "out").mkdir()
    (graph.parent / "out" / "mine.txt").touch()
    with pytest.raises(OutputError, match="not empty"):
        pipeline.check(recipe_of(graph, "linear"))

    def predict(recipe: recipes.Recipe) -> Forecast:
        raise AssertionError("rehearsed")

    monkeypatch.setattr(rehearse, "predict", predict)
    arguments = ["compress", str(graph), "--pass", "linear", "-o", str(graph.parent / "out"), "--predict"]
    assert main(arguments) == 1


def test_a_rehearsal_that_ends_early_says_why(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(graph, {"gptq": {"bits": 4}}, calibration={"data": str(graph.parent / "none.npz")})
    forecast = rehearse.predict(recipe)
    assert "none.npz" in forecast.ended
    assert [(each.phase, each.seconds is None) for each in forecast.phases] == [
        ("planning", False),
        ("reading calibration data", True),
    ]
    calib = ["--calib", str(graph.parent / "none.npz")]
    assert main(["plan", str(graph), "--pass", "gptq:bits=4", *calib]) == 0
    assert "no further phase is predicted" in capsys.readouterr().out


def test_a_phase_that_does_not_scale_is_not_predicted(language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effcli.language.model import LanguageModel
    from effcli.run.network import Counts

    monkeypatch.setattr(LanguageModel, "count", lambda self, checkpoint: Counts(1, 1, None))
    found = rehearse.predict(recipe_of(language, "linear", evaluate=False))
    assert "does not say how it grows" in found.of("input: counting weights").reason
    assert found.of("linear").seconds is not None


def test_on_the_command_line(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = graph.parent / "out"
    common = [str(graph), "--pass", "linear:bits=4"]
    assert main(["plan", *common, "--no-time"]) == 0
    assert "linear: accuracy" not in capsys.readouterr().out
    assert main(["plan", *common]) == 0
    assert "all together" in capsys.readouterr().out
    assert main(["compress", *common, "-o", str(output), "--no-eval", "--predict", "--verbose"]) == 0
    assert "took / predicted" in capsys.readouterr().out
    assert Report.read(output).phases[-1].predicted is not None


def test_whatever_goes_wrong_in_a_rehearsal_a_plan_is_made(
    language: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effcli.language import miniature

    def fail(*given: Any) -> None:
        raise IndexError("no such block")

    monkeypatch.setattr(miniature, "write", fail)
    assert main(["plan", str(language), "--pass", "linear:bits=4,group_size=32"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "down_proj" in printed and "the rehearsal failed: no such block" in printed
