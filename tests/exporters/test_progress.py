"""How far an export is: every step is told of, and at the end all that were expected are done."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
from small_graphs import residual

from effcli.cli import main
from effcli.exporters import load
from effcli.exporters.onnx import ONNX
from effcli.exporters.pt2 import PT2
from effcli.exporters.safetensors import Safetensors
from effcli.files.exporter import Exporter
from effcli.language.weights import open_weights
from effcli.platform.steps import telling
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.run.rehearse import predict


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    source = architectures.make("llama", folder / "source")
    pipeline.run(
        recipes.from_arguments(
            str(source), passes="linear:bits=4,group_size=32", output=str(folder / "out"), no_eval=True
        )
    )
    return folder / "out"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    residual().save(folder)
    return folder


def steps_of(exporter: Exporter, source: Path, target: Path) -> int:
    """How many steps an export took; each is told of, from none to all."""
    told: list[tuple[int, int]] = []
    with telling(lambda done, total: told.append((done, total))):
        exporter.export(source, target)
    done = [each for each, _ in told]
    assert done == sorted(done) and all(each <= total for each, total in told)
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    return told[-1][1]


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_packed_layouts(target: str, language: Path, tmp_path: Path) -> None:
    weights = open_weights(language)
    # Every tensor is written, and every layer read back.
    expected = len(weights.skeleton.parameters()) + len(weights.stored)
    assert steps_of(load(target)(), language, tmp_path / "out") == expected


def test_dense_weights(language: Path, tmp_path: Path) -> None:
    expected = len(open_weights(language).skeleton.parameters())
    assert steps_of(Safetensors(dequantize=True), language, tmp_path / "dense") == expected
    assert steps_of(Safetensors(), language, tmp_path / "copied") == 2


def test_a_language_model_in_onnx(language: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    assert steps_of(ONNX(), language, tmp_path / "out") > len(open_weights(language).stored)


def test_a_graph(graph: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    assert steps_of(ONNX(), graph, tmp_path / "onnx") >= 3
    assert steps_of(PT2(), graph, tmp_path / "pt2") == 3


def test_a_rehearsal_counts_tensors_for_their_blocks(language: Path, tmp_path: Path) -> None:
    keys = {"passes": ["linear:bits=4,group_size=32"], "output": str(tmp_path / "out"), "evaluate": False}
    recipe = recipes.from_arguments(str(language.parent / "source"), **keys, export=["gptq"])  # type: ignore[arg-type]
    assert predict(recipe).of("exporting to gptq").seconds is not None


def test_on_the_command_line(language: Path, tmp_path: Path) -> None:
    assert main(["export", str(language), "--to", "gptq", "-o", str(tmp_path / "out")]) == 0
