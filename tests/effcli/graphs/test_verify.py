from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from firmware_tools import need_target
from safetensors.torch import load_file, save_file
from small_graphs import batches, chain, residual
from torch import Tensor, nn

import effcli
from effcli import exporters
from effcli.cli import main
from effcli.errors import MachineError, UnsupportedError, UserError
from effcli.exporters.firmware import check, targets
from effcli.files.checkpoint import read_header
from effcli.graphs import verify
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.integer import IntegerNetwork
from effcli.layers.contract import Observed
from effcli.layers.result import Progress
from effcli.passes.quantize import int8
from effcli.platform import onnx_session
from effcli.reports.report import Report


def integer(folder: Path) -> Path:
    folder.mkdir()
    graph = chain((6,), nn.Linear(6, 5), "relu.default", nn.Linear(5, 3))
    chosen = {site.name: int8.Int8() for site in graph.sites()}
    made = int8.Int8().transform(graph, Observed(batches(graph), None, chosen)).network
    assert isinstance(made, IntegerNetwork)
    made.save(folder)
    return folder


def floating(folder: Path, graph: Graph | None = None) -> Path:
    folder.mkdir()
    (graph or residual()).save(folder)
    return folder


@pytest.mark.parametrize(("make", "layout"), [(floating, "graph"), (integer, "integer")])
def test_sound(make: Callable[[Path], Path], layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    path = make(tmp_path / "out")
    found = verify.verify(path)
    assert found.passed and found.layout == layout and found.refused
    assert found.line.startswith("verified: ") and "onnxruntime" in found.checked
    assert "effcli.load reads it" in found.line
    assert main(["verify", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is True and printed["layout"] == layout and printed["path"] == str(path)


@pytest.mark.parametrize("make", [floating, integer])
def test_how_far_it_is(make: Callable[[Path], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    told: dict[str, tuple[int, int]] = {}

    @contextmanager
    def phases(name: str, unit: str = "step") -> Iterator[Progress]:
        yield lambda done, total: told.update({name: (done, total)})

    path = make(tmp_path / "out")
    graph = residual() if make is floating else chain((6,), nn.Linear(6, 5), "relu.default", nn.Linear(5, 3))
    verify.verify(path, against=graph, stages=(), phases=phases)
    counted = {"running in onnxruntime"} | ({"comparing with the input"} if make is integer else set())
    assert counted <= told.keys()
    for name in counted:
        done, total = told[name]
        assert done == total > 1


def cut(path: Path) -> None:
    (path / "effcli.safetensors").write_bytes((path / "effcli.safetensors").read_bytes()[:-40])


def remove(path: Path) -> None:
    (path / "effcli.safetensors").unlink()


def rename(path: Path) -> None:
    name = "graph.json" if (path / "graph.json").exists() else "integer.json"
    (path / name).write_text((path / name).read_text().replace("head", "tail").replace('"steps"', '"stops"'))


@pytest.mark.parametrize("damage", [cut, remove, rename])
@pytest.mark.parametrize("make", [floating, integer])
def test_a_damaged_file_is_not_verified(
    make: Callable[[Path], Path],
    damage: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(tmp_path / "out")
    damage(path)
    assert main(["verify", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("NOT VERIFIED: ") and captured.out.count("\n") == 1
    assert "effcli.load reads it" not in captured.out
    assert "Traceback" not in captured.out + captured.err


def test_a_network_of_tokens(tmp_path: Path) -> None:
    """Its inputs are numbers of rows, here and in what it is exported to."""
    builder = Builder()
    numbers = builder.call("aten.to.dtype", builder.input(), torch.int64)
    rows = builder.module("rows", nn.Embedding(5, 3), numbers)
    graph = builder.finish(builder.call("aten.mean.dim", rows, [1]), Facts(origin="test", shape=(4,)))
    path = floating(tmp_path / "out", graph)
    assert verify.verify(path).passed
    assert exporters.load("pt2")().export(path, tmp_path / "pt2").checked.startswith("loaded by torch.export")


def test_outputs_that_are_no_numbers(tmp_path: Path) -> None:
    graph = chain((4,), nn.Linear(4, 3))
    graph.set_bias("layer0", torch.tensor([0.0, float("nan"), 0.0]))
    found = verify.verify(floating(tmp_path / "out", graph))
    assert not found.passed and "NaN" in found.problem and found.line.startswith("NOT VERIFIED: its outputs")


def test_a_checkpoint_that_transformers_would_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_refused", lambda path: False)
    found = verify.verify(floating(tmp_path / "out"))
    assert not found.passed and "NOT VERIFIED: transformers loads it" in found.line


@pytest.mark.parametrize(
    ("error", "passed"),
    [(UnsupportedError("no such operator"), True), (MachineError("computes something else"), False)],
)
def test_an_export_that_fails(error: Exception, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise error

    path = floating(tmp_path / "out")
    monkeypatch.setattr(exporters.load("onnx"), "export", fails)
    found = verify.verify(path)
    assert found.passed is passed and str(error) in found.line


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "find_spec", lambda name: None)
    found = verify.verify(floating(tmp_path / "out"))
    assert found.passed and "not installed" in found.checked


def test_the_weights_are_where_no_stock_loader_looks(tmp_path: Path) -> None:
    path = floating(tmp_path / "out")
    assert "head.weight" in read_header(path / "effcli.safetensors")
    assert not (path / "model.safetensors").exists() and verify._refused(path)
    assert np.isfinite(verify._outputs(Graph.read(path))[1].numpy()).all()


def test_c_for_a_microcontroller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_target(targets.find("host"))
    need_target(targets.find("cortex-m4"))
    path = integer(tmp_path / "out")
    assert main(["verify", str(path), "--target", "cortex-m4"]) == 0
    printed = capsys.readouterr().out
    lines, table = printed.splitlines(), printed[printed.index("layer ") :].splitlines()
    assert lines[0] == "verified:"
    assert any("to the byte for 12 inputs, compiled here and for Arm Cortex-M4 in QEMU (" in line for line in lines)
    assert table[0].split() == ["layer", "instructions"] and len(table) >= 4
    assert main(["verify", str(path), "--target", "cortex-m4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    counted = printed["firmware"]["emulated"]
    assert printed["passed"] is True and printed["firmware"]["target"] == "cortex-m4"
    assert 0 < sum(layer["instructions"] for layer in counted["layers"]) <= counted["instructions"]
    assert counted["text"] > 0 and counted["stack"] > 0


def test_c_where_there_is_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_target(targets.find("host"))
    which = targets.shutil.which
    monkeypatch.setattr(targets.shutil, "which", lambda name: None if "qemu" in name else which(name))
    found = verify.verify(integer(tmp_path / "out"), "rv32imc")
    assert found.passed and found.firmware is not None and found.firmware.emulated is None
    assert "compiled here; not run in QEMU, RISC-V RV32IMC needs qemu-system-riscv32" in found.line
    assert "apt-get install qemu-system-misc" in found.line and "\n" not in found.line


def test_c_where_there_is_no_compiler(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(targets.shutil, "which", lambda name: None)
    path = integer(tmp_path / "out")
    with pytest.raises(UserError, match="C for this machine needs cc, not installed here"):
        verify.verify(path, "cortex-m4")
    assert main(["verify", str(path), "--target", "cortex-m4"]) == 1
    assert "apt-get install gcc" in capsys.readouterr().err


def test_c_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MachineError("the C computes something else on this machine: layer0 differs")

    need_target(targets.find("host"))
    monkeypatch.setattr(check, "compare", fails)
    found = verify.verify(integer(tmp_path / "out"), "cortex-m4")
    assert not found.passed and found.line.startswith("NOT VERIFIED: the C computes something else")


def test_c_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = floating(tmp_path / "out")
    assert main(["verify", str(path), "--target", "cortex-m4"]) == 1
    assert "holds no integer network" in capsys.readouterr().err
    assert main(["verify", str(path), "--target", "cortex-m9"]) == 1
    printed = capsys.readouterr().err
    assert "there is no target 'cortex-m9'" in printed and "did you mean" in printed and "Traceback" not in printed


def run(tmp_path: Path, *steps: str) -> Path:
    out = tmp_path / "out"
    effcli.compress(
        "sample:cnn", passes=list(steps), output=str(out), no_eval=True, overrides=["calibration.samples=16"]
    )
    return out


def test_the_tensors_and_outputs_of_the_input_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(tmp_path, "linear:bits=8")
    found = verify.verify(out)
    assert found.passed and found.against is not None and found.against.moved is not None
    assert found.against.compressed == sum(row.status == "compressed" for row in Report.read(out).stages[1].ledger)
    assert found.against.equal > 0 and found.against.changed == 0
    assert 0 < found.against.moved.relative < 0.1 and found.against.moved.top1 is not None
    assert "against its input: " in found.line and "the passes changed the logits by" in found.line
    assert main(["verify", str(out), "--against", "sample:cnn"]) == 0
    assert "against its input: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.pt2", "org/missing", "sample:cmm", "."])
def test_an_input_that_cannot_be_read_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = floating(tmp_path / "out")
    assert main(["verify", str(path), "--against", name]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: --against {name}: ") and "VERIFIED" not in printed.out


def change(path: Path, key: str, how: Callable[[Tensor], Tensor]) -> None:
    file = path / "effcli.safetensors"
    tensors = load_file(file)
    tensors[key] = how(tensors[key])
    save_file(tensors, file)


def test_what_no_pass_was_to_touch_is_found(tmp_path: Path) -> None:
    out = run(tmp_path, "linear:bits=8")
    tensors = load_file(out / "effcli.safetensors")
    layers = [row.name for row in Report.read(out).stages[1].ledger if row.status == "compressed"]
    other = next(
        key
        for key, t in tensors.items()
        if t.ndim == 1 and key.rpartition(".")[0] not in layers and t.is_floating_point()
    )
    change(out, other, lambda tensor: tensor + 1e-3)
    found = verify.verify(out)
    assert not found.passed and "was altered, which no pass was to touch" in found.line


def test_a_layer_further_off_than_its_error_is_found(tmp_path: Path) -> None:
    out = run(tmp_path, "linear:bits=8")
    key = next(key for key in load_file(out / "effcli.safetensors") if key.endswith("weight_scale"))
    change(out, key, lambda tensor: tensor * 1.1)
    found = verify.verify(out)
    assert not found.passed and "lies further from the input than the ledger says" in found.line


def test_an_integer_network_is_compared_by_its_outputs(tmp_path: Path) -> None:
    found = verify.verify(run(tmp_path, "int8"))
    assert found.passed and found.against is not None and found.against.moved is not None
    assert found.against.equal == found.against.compressed == 0
    assert found.against.moved.relative < 0.2


def test_a_function_that_a_report_names_is_not_called(tmp_path: Path) -> None:
    out = run(tmp_path, "linear:bits=8")
    data = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**data, "model": "os:getcwd"}))
    found = verify.verify(out)
    assert found.passed and found.against is None and found.absent == "os:getcwd"
    assert "name it with --against" in found.line


def test_outputs_of_another_shape_are_told(tmp_path: Path) -> None:
    """The report of one network beside the checkpoint of another."""
    source, out = tmp_path / "source", tmp_path / "out"
    for folder, features in ((source, 6), (out, 4)):
        folder.mkdir()
        chain((5,), nn.Linear(5, features)).save(folder)
    made = verify.verify(out, against=source)
    assert not made.passed and "its outputs have the shape (4,), the input's (6,)" in made.line
