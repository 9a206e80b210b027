"""The ONNX target: which graph a checkpoint becomes, what is refused, and what is left on the disk."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from architectures import make
from small_graphs import batches, residual

pytest.importorskip("onnx", exc_type=ImportError)
pytest.importorskip("onnxruntime", exc_type=ImportError)
pytest.importorskip("onnxscript", exc_type=ImportError)

import onnx
from pydantic import ValidationError

from effcli import exporters
from effcli.errors import CheckpointError, OutputError, UnsupportedError, UserError
from effcli.exporters import _onnx_integer
from effcli.exporters import onnx as exporter
from effcli.exporters._target import MARK
from effcli.language.sweep import sweep
from effcli.layers.contract import Observed
from effcli.passes.quantize import int8
from effcli.platform import onnx_session
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

KINDS = ("graph", "integer", "language")
Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A small checkpoint of each kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder / "out"
            if kind == "language":
                make("llama", folder / "source", num_hidden_layers=1)
                made[kind].mkdir()
                step = PassStep.model_validate(parse_pass("linear:bits=4,group_size=16"))
                sweep(folder / "source", made[kind], step, None, folder / "work")
            else:
                made[kind].mkdir()
                graph = residual()
                if kind == "integer":
                    network = int8.Int8().transform(graph, Observed(batches=batches(graph))).network
                    network.save(made[kind])
                else:
                    graph.save(made[kind])
        return made[kind]

    return get


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def operators(folder: Path) -> set[str]:
    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


def ports(folder: Path) -> list[str]:
    return [port.name for port in onnx.load(folder / "model.onnx").graph.input]


def test_a_graph_stays_floating(source: Source, tmp_path: Path) -> None:
    found = exporter.ONNX().export(source("graph"), tmp_path / "new" / "target")
    assert found.target == "onnx" and "largest difference" in found.checked and found.remarks == ()
    assert ports(tmp_path / "new" / "target") == ["input"]
    assert not operators(tmp_path / "new" / "target") & {"QuantizeLinear", "DequantizeLinear"}
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "target"]


def test_an_integer_network_becomes_int8(source: Source, tmp_path: Path) -> None:
    found = exporter.ONNX().export(source("integer"), tmp_path / "target")
    assert "on 12 calibration inputs: top-1 agreement" in found.checked
    assert re.search("largest difference (0 steps|1 step|[2-9] steps) of ", found.checked)
    # What the user must know where the file runs, and cannot see in it.
    assert found.remarks == (_onnx_integer.REMARK,) and "session.x64quantprecision" in found.remarks[0]
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(tmp_path / "target")
    assert files(tmp_path / "target").keys() == {"model.onnx", MARK}
    assert found.nbytes == (tmp_path / "target" / "model.onnx").stat().st_size


def test_a_language_model_brings_its_companions(source: Source, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    target = tmp_path / "target"
    found = exporter.ONNX().export(source("language"), target)
    assert "input_ids" in ports(target) and "MatMulNBits" in operators(target)
    given, written = files(source("language")), files(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert written[name] == given[name]
    # The architecture's own config: what says how the weights are packed stays with the checkpoint.
    config = json.loads(written["config.json"])
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert "quantization_config" not in config and "effcli" not in config
    assert AutoConfig.from_pretrained(target).vocab_size == config["vocab_size"]
    assert AutoTokenizer.from_pretrained(target)("a word")["input_ids"]
    assert not any(name.endswith(".safetensors") for name in written)
    assert found.nbytes == sum(map(len, written.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_never_touched(kind: str, source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "out"
    shutil.copytree(source(kind), folder)
    before = files(folder)
    exporter.ONNX().export(folder, tmp_path / "target")
    for target in (folder, folder.parent):
        with pytest.raises(OutputError, match="holds the checkpoint"):
            exporter.ONNX().export(folder, target, overwrite=True)
    # Inside the checkpoint is where a run puts it.
    exporter.ONNX().export(folder, folder / "exports" / "onnx")
    exporter.ONNX().export(folder, folder / "exports" / "onnx", overwrite=True)
    after = {name: content for name, content in files(folder).items() if not name.startswith("exports")}
    assert after == before and list(folder.parent.iterdir()) == [folder]
    assert list((folder / "exports").iterdir()) == [folder / "exports" / "onnx"]


OTHER: dict[str, Any] = {"precision": "float16", "dequantize": True, "activations": "int8", "accuracy_level": 4}


@pytest.mark.parametrize(("kind", "option"), [*(("integer", name) for name in OTHER), ("graph", "accuracy_level")])
def test_options_without_a_meaning_are_named(kind: str, option: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"onnx\.{option} says nothing of a") as caught:
        exporter.ONNX(**{option: OTHER[option]}).export(source(kind), tmp_path / "target")
    assert caught.value.remedy == "leave the option out"
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_tried_above() -> None:
    assert OTHER.keys() == exporter.ONNX.model_fields.keys()
    defaults = exporter.ONNX().model_dump()
    assert all(defaults[name] != value for name, value in OTHER.items())


@pytest.mark.parametrize("options", [{"precison": "float16"}, {"precision": "int8"}, {"accuracy_level": 1}])
def test_options_that_do_not_exist(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        exporter.ONNX(**options)


def test_half_precision_reaches_the_graph(source: Source, tmp_path: Path) -> None:
    exporter.ONNX(precision="float16").export(source("graph"), tmp_path / "target")
    session = onnx_session.open_session(tmp_path / "target", entries=onnx_session.EXACT)
    assert [port.type for port in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float16)"] * 2


@pytest.mark.parametrize("kind", ["graph", "language"])
def test_activations_and_dense_weights_exclude_each_other(kind: str, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers, which dequantize removes"):
        exporter.ONNX(activations="int8", dequantize=True).export(source(kind), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(source: Source, tmp_path: Path) -> None:
    target = tmp_path / "target"
    exporter.ONNX().export(source("integer"), target)
    before = files(target)
    (target / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        exporter.ONNX().export(source("integer"), target)
    assert (target / "note.txt").read_text() == "mine"
    exporter.ONNX().export(source("integer"), target, overwrite=True)
    assert files(target) == before and list(tmp_path.iterdir()) == [target]


def test_overwrite_spares_what_is_no_export(source: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds no export"):
        exporter.ONNX().export(source("integer"), tmp_path, overwrite=True)
    assert files(tmp_path).keys() == {"thesis.tex"}


@pytest.mark.parametrize("missing", [("onnx",), ("onnxruntime", "onnxscript")])
def test_missing_packages(
    missing: tuple[str, ...], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(UserError, match=rf"^ONNX needs {' and '.join(missing)}, not installed here") as caught:
        exporter.ONNX().export(source("integer"), tmp_path / "target")
    assert "effcli[onnx]" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_both_lists_of_packages_are_the_same() -> None:
    assert exporters.TARGETS["onnx"].packages == onnx_session.PACKAGES


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_export_leaves_nothing(
    kind: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the file is written already, and what was there before stays."""
    folder, target = source(kind), tmp_path / "target"
    exporter.ONNX().export(source("integer"), target)
    before = files(target)
    written = []

    def fail(path: Any, *_: Any, **__: Any) -> None:
        written.extend(Path(path).glob("*.onnx") if Path(path).is_dir() else [Path(path)])
        raise CheckpointError("damaged")

    monkeypatch.setattr(onnx_session, "open_session", fail)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError if overwrite else OutputError):
            exporter.ONNX().export(folder, target, overwrite=overwrite)
    with pytest.raises(CheckpointError):
        exporter.ONNX().export(folder, tmp_path / "other")
    assert len(written) == 2 and not any(file.exists() for file in written)
    assert files(target) == before and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write to")])
def test_a_disk_that_fails(
    number: int, message: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, "the disk")

    monkeypatch.setattr(_onnx_integer.onnx, "save", fail)
    with pytest.raises(OutputError, match=message):
        exporter.ONNX().export(source("integer"), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        exporter.ONNX().export(tmp_path / "empty", tmp_path / "target")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
