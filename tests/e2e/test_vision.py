"""A convolutional network from its file to what its users run, by the commands that they would give."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import effcli
from effcli.cli import main
from effcli.graphs import executor
from effcli.graphs.integer import IntegerNetwork
from effcli.importers import read
from effcli.platform import onnx_session
from effcli.reports.report import Classification, Report

# Half of a point, in the unit of the report.
HALF_POINT = 0.005


def hashes(folder: Path) -> dict[str, str]:
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("integer.json"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def classification(report: Report, stage: int) -> Classification:
    quality = report.stages[stage].quality
    assert quality is not None and quality.classification is not None
    return quality.classification


def test_second_command_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compress", "sample:cnn", "--pass", "linear", "--bits", "8", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "top-1" in printed
    report = Report.read(out)
    before, after = classification(report, 0), classification(report, 1)
    assert before.images == 1000 and before.top1 is not None and after.top1 is not None
    assert before.top1 > 0.9
    assert after.top1 > before.top1 - HALF_POINT
    assert after.agreement is not None and after.agreement > 0.99
    assert len(before.classes) == 10 and np.sum(before.confusion) == 1000
    assert report.stages[1].nbytes < report.stages[0].nbytes / 3
    assert all(row.macs and row.parameters for row in report.stages[1].ledger if row.status == "compressed")
    assert main(["verify", str(out)]) == 0
    again = tmp_path / "again"
    assert main(["run", str(out / "recipe.yaml"), "-o", str(again), "--no-eval", "--quiet"]) == 0
    assert hashes(again) == hashes(out) != {}
    assert main(["compare", str(out), str(again)]) == 0
    assert main(["report", str(out)]) == 0


@pytest.mark.slow
def test_int8_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    steps = ["--pass=fold", "--pass=equalize", "--pass=adaround:bits=4,iterations=300", "--pass=bias_correction"]
    command = ["compress", "sample:cnn", *steps, "--pass=int8", "-o", str(out), "--export", "onnx"]
    assert main([*command, "--set=calibration.samples=64"]) == 0, capsys.readouterr().err
    report = Report.read(out)
    assert [stage.name for stage in report.stages[1:]] == ["fold", "equalize", "adaround", "bias_correction", "int8"]
    tops = [classification(report, number).top1 for number in range(6)]
    assert tops[1] == tops[2] == tops[0], "folding and equalising change nothing"
    assert tops[5] is not None and tops[0] is not None and tops[5] > tops[0] - 0.02
    assert report.stages[5].activations
    assert report.exports[0].target == "onnx" and "top-1 agreement" in report.exports[0].checked

    network = IntegerNetwork.read(out)
    assert {step.weight_bits for step in network.program.steps if hasattr(step, "weight_bits")} == {4}
    # effcli.load computes what the reference executor does.
    inputs = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(effcli.load(out)(inputs), torch.from_numpy(executor.run_float(network, inputs.numpy())))
    onnx.checker.check_model(out / "exports" / "onnx" / "model.onnx", full_check=True)
    assert main(["verify", str(out)]) == 0
    assert main(["eval", str(out), "--samples", "100", "--json"]) == 1  # an output carries no images of its own
    data = Path(effcli.__file__).parent / "data" / "cnn" / "evaluation.npz"
    capsys.readouterr()
    assert main(["eval", str(out), "--images", str(data), "--reference", "sample:cnn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["classification"]
    assert found["top1"] == tops[5]


@pytest.mark.parametrize("target", ["pt2", "safetensors:dequantize=true", "onnx", "onnx:precision=float16"])
def test_float_exports_compute_the_same(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    steps = ["--pass=fold", "--pass=linear:bits=4"]
    assert main(["compress", "sample:cnn", *steps, "-o", str(out), "--no-eval", "--quiet"]) == 0
    assert main(["export", str(out), "--to", target, "-o", str(tmp_path / "exported")]) == 0, capsys.readouterr().err
    if "safetensors" in target:
        return
    inputs = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = effcli.load(out)(inputs)
    if "float16" in target:
        session = onnx_session.open_session(tmp_path / "exported", entries=onnx_session.EXACT)
        (found,) = onnx_session.run(session, {"input": inputs.half().numpy()}).values()
        torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=2e-2, atol=2e-2)
    else:
        found = read(tmp_path / "exported" / f"model.{target}").run(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packed_weights_stay_packed_in_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    steps = ["--pass=fold", "--pass=linear:bits=4"]
    assert main(["compress", "sample:cnn", *steps, "-o", str(out), "--no-eval", "--quiet", "--export=onnx"]) == 0
    assert "layers packed" in Report.read(out).exports[0].checked
    model = onnx.load(out / "exports" / "onnx" / "model.onnx")
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == len(read(str(out)).sites())


def test_network_of_a_python_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["compress", "mynet:make", "--pass=linear:bits=8", "--set=shape=[1,6,6]", "-o", "out", "--quiet"]
    assert main([*command, "--set=evaluate.latency=false"]) == 0
    assert effcli.load("out")(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


def test_kill_and_run_again(tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    killed = (
        "import os, signal, sys\n"
        "from effcli.graphs import network\n"
        "from effcli.cli import main\n"
        "sweep = network.graph_sweep\n"
        "def killing(source, target, step, *rest):\n"
        "    if step.name == 'int8':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return sweep(source, target, step, *rest)\n"
        "network.graph_sweep = killing\n"
        "main(sys.argv[1:])\n"
    )
    steps = ["--pass=fold", "--pass=int8", "--threads=1", "--no-eval", "--set=calibration.samples=16"]
    command = ["compress", "sample:cnn", *steps]
    done = subprocess.run([sys.executable, "-c", killed, *command, "-o", str(out)], env={**os.environ})
    assert done.returncode == -signal.SIGKILL and not out.exists() and (tmp_path / ".out.effcli").is_dir()
    assert main([*command, "-o", str(out), "--quiet"]) == 0
    assert main([*command, "-o", str(whole), "--quiet"]) == 0
    assert hashes(out) == hashes(whole) != {}


def test_an_export_that_fails_leaves_the_finished_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compress", "sample:cnn", "--pass=int8", "-o", str(out), "--quiet", "--no-eval", "--export=pt2"]
    assert main([*command, "--set=calibration.samples=16"]) == 1
    error = capsys.readouterr().err
    assert f"{out} is finished, but not exported to pt2: {out} is an integer network" in error
    assert Report.read(out).exports == ()
    assert effcli.load(out)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_missing_packages_are_known_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("effcli.exporters.find_spec", lambda name: None)
    command = ["compress", "sample:cnn", "--pass=linear", "-o", str(tmp_path / "out"), "--export=onnx"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "needs onnx and onnxruntime and onnxscript" in captured.err and "effcli[onnx]" in captured.err
    assert "input:" not in captured.err
    assert main(["export", str(tmp_path), "--to", "onnx"]) == 1


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_images_without_labels_measure_no_accuracy_and_that_is_told(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 28, 28), dtype=np.uint8)
    data, labelled = tmp_path / form, tmp_path / "labelled.npz"
    if form == "npz":
        data = tmp_path / "data.npz"
        np.savez(data, images=images)
    else:
        data.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(data / f"{number}.png")
    np.savez(labelled, images=images, labels=np.arange(12) % 10)
    command = ["compress", "sample:cnn", "--pass=linear:bits=8", "--set=evaluate.latency=false", "--overwrite"]
    told = f"{data} has no labels: accuracy is not measured, outputs are only compared with the original's; give one "
    for evaluated in (data, labelled):
        assert main([*command, f"--eval={evaluated}", "-o", str(tmp_path / "out")]) == 0
        first, last = Report.read(tmp_path / "out").stages
        assert any(remark.startswith(told) for remark in first.remarks) == (evaluated == data)
        assert not any("no labels" in remark for remark in last.remarks)
        assert last.quality is not None and last.quality.classification is not None
        found = last.quality.classification
        assert (found.top1 is None) == (evaluated == data) and found.agreement is not None
        shown = " ".join(capsys.readouterr().out.split())
        assert ("accuracy is not measured" in shown) == (evaluated == data)


@pytest.fixture
def refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with one clear line, and leave nothing."""

    def run(*arguments: str, model: str = "sample:cnn") -> str:
        out = tmp_path / "out"
        assert main(["compress", model, "-o", str(out), "--quiet", *arguments]) == 1
        stages, _, error = capsys.readouterr().err.partition("error: ")
        assert error and "Traceback" not in error and error.count("\n") <= 2
        assert all(line.startswith(("input: ", "fold: ")) for line in stages.splitlines())
        assert not out.exists() and not (tmp_path / ".out.effcli").exists()
        return error

    return run


def test_bad_requests(refuses: Callable[..., str], tmp_path: Path) -> None:
    assert "reads no text" in refuses("--pass=linear", "--set=evaluate.perplexity=x.txt")
    assert "reads no text" in refuses("--pass=linear", "--set=calibration.length=64")
    assert "matches no layer" in refuses("--pass=linear:ignore=[nothing]")
    assert "group size 64 does not divide" in refuses("--pass=linear:granularity=group,group_size=64")
    assert "linear cannot follow int8" in refuses("--pass=int8", "--pass=linear")
    assert "put a `fold` step before it" in refuses("--pass=equalize")
    assert "put it after the step that compresses the weights" in refuses("--pass=fold", "--pass=bias_correction")
    assert "is a language model" in refuses("--pass=linear", "--set=evaluate.images=x.npz", model="sample:lm")
    known = (
        "take linear, awq, smoothquant, kmeans, finetune, bitfit, nf4, binary, ternary, gptq, adaround, lora, merge, "
        "channels, blocks, auto, magnitude, wanda, taylor, sparsegpt or alps"
    )
    assert known in refuses("--pass=linear", "--pass=fold", model="sample:lm")


def test_bad_data(refuses: Callable[..., str], tmp_path: Path) -> None:
    def saved(**arrays: np.ndarray) -> str:
        np.savez(tmp_path / "data.npz", **arrays)
        return str(tmp_path / "data.npz")

    images, labels = np.zeros((6, 28, 28), np.uint8), np.arange(6)
    assert "has shape (30, 28)" in refuses("--pass=int8", "--calib", saved(images=np.zeros((6, 30, 28), np.uint8)))
    assert "0" in refuses("--pass=linear", "--eval", saved(images=(images + 200) / 255.0, labels=labels))
    assert "12" in refuses("--pass=linear", "--eval", saved(images=images, labels=labels + 7))
    assert "labels" in refuses("--pass=linear", "--eval", saved(images=images, labels=labels[:5]))


def test_bad_files(refuses: Callable[..., str], tmp_path: Path) -> None:
    for name in ("model.pt2", "model.onnx"):
        (tmp_path / name).write_bytes(b"this is no network")
        assert name in refuses("--pass=linear", model=str(tmp_path / name))
        (tmp_path / name).unlink()
