from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_graphs import batches, chain, residual
from torch import nn

from effcli import exporters
from effcli.errors import CheckpointError
from effcli.graphs import timing
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork
from effcli.layers.contract import Observed
from effcli.passes.quantize import int8
from effcli.platform import onnx_session
from effcli.reports.report import Latency


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)


@pytest.fixture
def floating(tmp_path: Path) -> Path:
    folder = tmp_path / "floating"
    folder.mkdir()
    residual().save(folder)
    return folder


@pytest.fixture
def integer(tmp_path: Path) -> Path:
    folder = tmp_path / "integer"
    folder.mkdir()
    graph = chain((6,), nn.Linear(6, 5), "relu.default", nn.Linear(5, 3))
    chosen = {site.name: int8.Int8() for site in graph.sites()}
    made = int8.Int8().transform(graph, Observed(batches(graph), None, chosen)).network
    assert isinstance(made, IntegerNetwork)
    made.save(folder)
    return folder


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a package from whoever asks whether it is installed."""
    find = importlib.util.find_spec

    def hide(package: str) -> None:
        def found(name: str, *rest: Any) -> Any:
            return None if name == package else find(name, *rest)

        monkeypatch.setattr(onnx_session, "find_spec", found)

    return hide


def sound(latency: Latency) -> bool:
    return 0 < latency.fastest <= latency.milliseconds and latency.repetitions >= 3 and latency.device != ""


def test_a_floating_network_in_both(floating: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    threads = torch.get_num_threads()
    found = timing.of_checkpoint(floating, 2)
    assert [latency.runtime for latency in found] == ["torch float32", "onnxruntime float32"]
    assert all(sound(latency) and latency.threads == 2 for latency in found)
    assert torch.get_num_threads() == threads
    assert timing.remarks() == ()
    assert [latency.runtime for latency in timing.of_checkpoint(floating, 1, onnx=False)] == ["torch float32"]


def test_an_integer_network_in_onnxruntime_alone(integer: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    for onnx in (True, False):
        (found,) = timing.of_checkpoint(integer, 1, onnx=onnx)
        assert found.runtime == "onnxruntime int8" and sound(found)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_a_package(package: str, floating: Path, integer: Path, without: Callable[[str], None]) -> None:
    without(package)
    assert [latency.runtime for latency in timing.of_checkpoint(floating, 1)] == ["torch float32"]
    assert timing.of_checkpoint(integer, 1) == ()
    (remark,) = timing.remarks()
    assert "pip install 'effcli[onnx]'" in remark


def test_exports(floating: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    exporter = exporters.load("onnx")
    exporter.model_validate({"precision": "float16"}).export(floating, tmp_path / "half")
    found = timing.of_onnx(tmp_path / "half", 1)
    assert found.runtime == "onnxruntime float16" and found.threads == 1 and sound(found)
    assert timing.of_onnx(tmp_path / "half").threads == torch.get_num_threads()


def test_any_source_is_timed(floating: Path, tmp_path: Path, without: Callable[[str], None]) -> None:
    without("onnx")
    exporters.load("pt2")().export(floating, tmp_path / "pt2")
    for model in (str(floating), str(tmp_path / "pt2" / "model.pt2"), "sample:cnn"):
        (found,) = timing.measure(model, threads=1)
        assert found.runtime == "torch float32" and sound(found)


def test_a_damaged_checkpoint(floating: Path) -> None:
    (floating / "graph.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        timing.of_checkpoint(floating)


def test_one_input_at_a_time(floating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, sizes = Graph.read(floating), []
    monkeypatch.setattr(timing.Graph, "read", lambda path: graph)
    graph.module.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape)))
    (found,) = timing.of_checkpoint(floating, 1, onnx=False)
    # One more, to warm up.
    assert sizes == [(1, 3, 9, 7)] * (found.repetitions + 1)
