"""Runs that end early and are given again: what comes out is what an undisturbed run of the present inputs writes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from torch import nn

import effcli
from effcli.errors import CheckpointError, MachineError, OutputError, UnfinishedError, UnsupportedError, UserError
from effcli.exporters import c
from effcli.graphs.network import GraphNetwork
from effcli.kernels import sparse_matmul
from effcli.reports.report import Report
from effcli.run import detect, pipeline, workplace
from effcli.run import recipe as recipes


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


class Heard(pipeline.Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(
    folder: Path, output: str, *export: str, overwrite: bool = False, listener: pipeline.Listener | None = None
) -> Report:
    recipe = recipes.from_arguments(
        str(folder / "net.pt2"),
        passes=["fold", "int8"],
        output=str(folder / output),
        calib=str(folder / "calibration-data.npz"),
        export=export,
        overrides=[f"evaluate.images={folder}/evaluation-data.npz", "evaluate.latency=false"],
    )
    return pipeline.run(recipe, overwrite=overwrite, listener=listener)


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


def test_what_a_language_model_writes_is_the_same_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(output: str) -> Report:
        recipe = recipes.from_arguments(
            "sample:lm",
            passes=["linear:bits=3"],
            output=str(tmp_path / output),
            overrides=["evaluate.samples=3", "evaluate.length=32", "evaluate.prefill=4", "evaluate.decode=1"],
        )
        return pipeline.run(recipe)

    killed_at(monkeypatch, pipeline._Run, "_sweep", lambda: start("out"))
    resumed, whole = start("out"), start("whole")
    written = [stage.continuations for stage in resumed.stages]
    assert written == [stage.continuations for stage in whole.stages]
    before, after = written
    assert [each.prompt for each in before] == [each.prompt for each in after] and len(before) == 3
    assert before != after
    assert resumed.layout == "standard"
    # What was given, and nothing that follows from it.
    assert resumed.given == {
        "model": "sample:lm",
        "output": str(tmp_path / "out"),
        "evaluate": {"samples": 3, "length": 32, "prefill": 4, "decode": 1},
        "passes": [{"linear": {"bits": 3}}],
    }


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
        patch.setattr(c.C, "export", lambda *given, **options: pytest.fail("it is exported again"))
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


@pytest.mark.parametrize(
    ("owner", "name", "suffix"),
    [
        (Path, "rename", ".effcli"),
        (workplace.shutil, "rmtree", ".effcli-removed"),
        (Path, "unlink", ".effcli-lock"),
        (Path, "unlink", ".effcli-placed"),
    ],
)
def test_killed_while_what_is_left_goes_away(
    work: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, suffix: str
) -> None:
    original, killed = getattr(owner, name), False

    def kill(path: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal killed
        if not killed and str(path).endswith(suffix) and (work / "out").exists():
            killed = True
            raise Killed
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            run(work, "out", "c")
    assert list(work.glob(".out*"))
    before = weights(work / "out")
    assert run(work, "out", "c") == Report.read(work / "out")
    assert weights(work / "out") == before and not list(work.glob(".out*"))


def test_a_finished_output_of_another_request_stays(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Workplace, "remove", lambda place: None)
        run(work, "out")
    before = weights(work / "out")
    for again in (lambda: run(work, "out", "c"), lambda: run(work, "out")):
        with pytest.raises(OutputError, match="not empty"):
            again()
        assert weights(work / "out") == before and not list(work.glob(".out*"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": 3}', '{"name": "fold", "ledger": [{}]}'])
@pytest.mark.parametrize("stage", [0, 1])
def test_damaged_unfinished_work_is_begun_anew(
    work: Path, monkeypatch: pytest.MonkeyPatch, stage: int, damage: str
) -> None:
    killed_at(monkeypatch, pipeline._Run, "_finish", lambda: run(work, "out"))
    (work / ".out.effcli" / f"stage-{stage}.json").write_text(damage)
    heard = Heard()
    report = run(work, "out", listener=heard)
    (said,) = [text for text in heard.said if "beginning anew" in text]
    assert f"stage-{stage}.json" in said and "going on" not in " ".join(heard.said)
    assert [made.name for made in report.stages] == ["input", "fold", "int8"]


def test_what_a_pass_cannot_continue_is_begun_anew(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, failed = GraphNetwork.sweep, False

    def sweep(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise UnfinishedError("journal.json is damaged")
        return original(*arguments)

    monkeypatch.setattr(GraphNetwork, "sweep", sweep)
    heard = Heard()
    run(work, "out", listener=heard)
    assert "beginning anew, for unfinished work cannot be continued: journal.json is damaged" in heard.said
    run(work, "whole")
    assert weights(work / "out") == weights(work / "whole")


def test_a_damaged_record_of_an_export(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, pipeline._Run, "_describe", lambda: run(work, "out", "c"))
    (record,) = (work / ".out.effcli").glob("export-c-*.json")
    record.write_text('{"target": "c"}')
    (next(work.glob(".out.effcli/checkpoint-*")) / "exports" / ".c.effcli-lock").touch()
    heard = Heard()
    assert [made.target for made in run(work, "out", "c", listener=heard).exports] == ["c"]
    assert any(text.startswith("exporting to c again") and record.name in text for text in heard.said)
    assert [path.name for path in (work / "out" / "exports").iterdir()] == ["c"]


def test_the_report_records_the_lengths_that_were_used(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model")
    request = {
        "model": str(source),
        "passes": [{"awq": {"bits": 4, "group_size": 32}}],
        "output": str(tmp_path / "out"),
        "calibration": {"samples": 2},
        "evaluate": {"prefill": 16, "decode": 4},
    }
    report = pipeline.run(recipes.check(request, "the request"))
    assert (report.recipe["calibration"]["length"], report.recipe["evaluate"]["length"]) == (128, 128)
    assert Report.read(tmp_path / "out").recipe == report.recipe
    again = recipes.load(tmp_path / "out" / "recipe.yaml")
    assert "length" not in again.calibration.model_fields_set


def test_every_stage_counts_its_own_weights(tmp_path: Path) -> None:
    """Folding takes parameters away, rounding makes zeros, and the network of integers is counted as it runs."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 3, bias=False)
    with torch.no_grad():
        convolution.weight[0] = 0
    network = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    torch.export.save(torch.export.export(network, (torch.zeros(1, 1, 8, 8),)), tmp_path / "net.pt2")
    arrays(tmp_path / "calibration.npz", 0)
    recipe = recipes.from_arguments(
        str(tmp_path / "net.pt2"),
        passes=["fold", {"linear": {"bits": 2, "ignore": ["4"]}}, "int8"],
        output=str(tmp_path / "out"),
        calib=str(tmp_path / "calibration.npz"),
        no_eval=True,
    )
    before, folded, rounded, integer = pipeline.run(recipe).stages
    # The batch norm has a shift of 0, which becomes the convolution's bias.
    assert (before.weights, before.nonzeros) == (36 + 8 + 576 + 4, 27 + 4 + 576 + 4)
    assert (folded.weights, folded.nonzeros) == (36 + 4 + 576 + 4, 27 + 576 + 4)
    assert rounded.weights == folded.weights and rounded.nonzeros is not None and folded.nonzeros is not None
    assert rounded.nonzeros < folded.nonzeros
    assert integer.weights == folded.weights and integer.nonzeros is not None
    # Some small weights of the last layer round to 0, and biases are corrected.
    assert abs(integer.nonzeros - rounded.nonzeros) <= 10
    assert {stage.macs for stage in (before, folded, rounded, integer)} == {36 * 36 + 576}
    for stage in (before, folded, rounded, integer):
        assert stage.bits_per_weight == pytest.approx(8 * stage.nbytes / stage.weights)


def test_a_pruned_network_that_runs_dense_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where kernels leave the zeros out, and not of a speed that nobody measured."""
    source = architectures.make("llama", tmp_path / "model")

    def remarks(name: str, *steps: Any, **evaluate: Any) -> list[str]:
        request = {"model": str(source), "passes": list(steps), "output": str(tmp_path / name)}
        report = pipeline.run(
            recipes.check(
                request | {"evaluate": {"prefill": 4, "decode": 2, "perplexity": False} | evaluate}, "the request"
            )
        )
        return ["; ".join(stage.remarks) for stage in report.stages]

    sparse = {"magnitude": {"sparsity": 0.97}}
    first, pruned, quantized = remarks("half", "magnitude", {"linear": {"bits": 4, "group_size": 32}})
    assert "runs dense" in pruned and "runs dense" not in first + quantized
    assert "runs dense" not in "".join(remarks("untimed", "magnitude", latency=False))
    monkeypatch.setattr(sparse_matmul, "ROWS_WEIGHTS", 1)
    assert "runs dense" not in "".join(remarks("few", sparse))


def test_the_report_tells_data_of_one_name_apart(work: Path) -> None:
    key = f"{work}/evaluation-data.npz"
    one, same = run(work, "one").data, run(work, "same").data
    arrays(work / "evaluation-data.npz", 5)
    two = run(work, "two").data
    assert one == same and one.keys() == {key, str(work / "calibration-data.npz")}
    assert {name for name in one if one[name] != two[name]} == {key}


def test_the_report_holds_the_time_of_each_phase(work: Path) -> None:
    found = run(work, "out", "onnx").phases
    names = [phase.name for phase in found]
    assert names[:2] == ["planning", "reading calibration data"]
    assert names.count("fold") == names.count("int8: accuracy") == names.count("exporting to onnx") == 1
    assert "writing the report" not in names
    assert all(phase.predicted is None and not phase.reason for phase in found)
    assert Report.read(work / "out").phases == found


@pytest.mark.parametrize(("family", "routed"), [("llama", False), ("mixtral", True)])
def test_a_language_model_counts_every_stage(family: str, routed: bool, tmp_path: Path) -> None:
    source = architectures.make(family, tmp_path / "model")
    recipe = recipes.from_arguments(
        str(source), passes=["linear:bits=2,granularity=channel"], output=str(tmp_path / "out"), no_eval=True
    )
    report = pipeline.run(recipe)
    for stage, path in zip(report.stages, (source, tmp_path / "out"), strict=True):
        network = effcli.load(path, packed=False)
        parameters = list(network.parameters())
        assert stage.weights == sum(parameter.numel() for parameter in parameters)
        assert stage.nonzeros == sum(int(torch.count_nonzero(parameter)) for parameter in parameters)
        linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
        assert stage.macs == (None if routed else sum(linear.weight.numel() for linear in linears))
    first, last = report.stages
    assert first.nonzeros is not None and last.nonzeros is not None and last.nonzeros < first.nonzeros


def test_only_what_the_former_run_wrote_is_replaced(work: Path) -> None:
    run(work, "out", "c")
    heard = Heard()
    report = run(work, "out", overwrite=True, listener=heard)
    assert "exports of the former output go with it: c" in heard.said
    assert report == Report.read(work / "out") and "recipe.yaml" in report.files
    (work / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write: thesis\.txt"):
        run(work, "out", overwrite=True)
    assert (work / "out" / "thesis.txt").is_file() and not list(work.glob(".out*"))


def test_data_in_the_output_is_not_replaced(work: Path) -> None:
    run(work, "out")
    data = work / "out" / "calibration-data.npz"
    (work / "calibration-data.npz").rename(data)
    (work / "calibration-data.npz").symlink_to(data)
    with pytest.raises(OutputError, match="is read and lies in"):
        run(work, "out", overwrite=True)
    assert data.is_file()


def test_what_came_during_the_run_stays(work: Path) -> None:
    class Busy(Heard):
        def stage(self, stage: Any) -> None:
            (work / "out").mkdir(exist_ok=True)
            (work / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(OutputError, match="not empty"):
        run(work, "out", listener=Busy())
    assert (work / "out" / "thesis.txt").is_file() and (work / ".out.effcli").is_dir()


def test_after_a_failed_export_nothing_of_the_next_process_is_removed(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise UnsupportedError("c has no place for it")

    original = workplace.Workplace.place

    def place(self: workplace.Workplace, finished: Path) -> None:
        original(self, finished)
        workplace.Workplace(work / "out").begin("of another process")

    monkeypatch.setattr(c.C, "export", fail)
    monkeypatch.setattr(workplace.Workplace, "place", place)
    with pytest.raises(UnsupportedError, match="is finished, but not exported to c"):
        run(work, "out", "c")
    assert workplace.Workplace(work / "out").holds("of another process")


def test_room_for_snapshots(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.from_arguments(
        str(work / "net.pt2"),
        passes=["kmeans:bits=2", "centroids:epochs=1"],
        output=str(work / "out"),
        calib=str(work / "calibration-data.npz"),
        no_eval=True,
    )
    plan = detect.of_run(recipe).plan()
    assert plan.disk_bytes > plan.output_bytes
    usage = SimpleNamespace(free=int(plan.output_bytes * pipeline._DISK_FACTOR) + plan.disk_bytes - 1)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="no space left"):
        pipeline.run(recipe)
    usage.free += 1
    pipeline.run(recipe)


def test_unfinished_work_counts_as_room(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, pipeline._Run, "_finish", lambda: run(work, "out"))
    full = SimpleNamespace(free=0)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match="no space left"):
        run(work, "another")
    run(work, "out")


@pytest.mark.parametrize("kind", [CheckpointError, UnfinishedError])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_failure_of_the_machine_costs_no_finished_pass(
    work: Path, monkeypatch: pytest.MonkeyPatch, kind: type[UserError], code: int
) -> None:
    original = GraphNetwork.sweep

    def sweep(*arguments: Any) -> Any:
        if (work / ".out.effcli" / "stage-1.json").exists():
            try:
                raise OSError(code, os.strerror(code))
            except OSError as error:
                raise kind("cannot read it") from error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GraphNetwork, "sweep", sweep)
        with pytest.raises(MachineError if kind is UnfinishedError else kind):
            run(work, "out")
    assert (work / ".out.effcli" / "stage-1.json").exists()
    heard = Heard()
    run(work, "out", listener=heard)
    assert "going on from the last written block" in heard.said
