"""Damaged graphs and integer networks: each is refused with its cause before anything runs or takes memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from effcli.errors import CheckpointError, UnsupportedError
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.operations import Convolution, Softmax
from effcli.graphs.soundness import check


def insert(data: Any, target: str, *args: Any) -> None:
    """Put an operator between the network and its output."""
    node = {"name": "last", "op": "call_function", "target": target, "kwargs": {}}
    data["nodes"].insert(-1, node | {"args": [{"node": data["nodes"][-2]["name"]}, *args]})
    data["nodes"][-1]["args"] = [{"node": "last"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    builder = Builder()
    made = builder.module("c", nn.Conv2d(3, 4, 3, padding=1), builder.input())
    made = builder.call("aten.relu.default", made)
    builder.finish(made, Facts(origin="test", shape=(3, 8, 8))).save(tmp_path)
    return tmp_path


def test_a_sound_graph_is_read(folder: Path) -> None:
    assert Graph.read(folder).run(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda data: data["nodes"][2]["kwargs"].update({"class": 1}), r"torch.fx cannot write"),
        (lambda data: data["nodes"][2].update(args=[{"node": "nothing"}]), "no node before is called nothing"),
        (lambda data: data["nodes"][2].update(args=[{"dtype": "load"}]), "torch has no dtype load"),
        (lambda data: data["nodes"][2].update(args=[]), "relu"),
        (lambda data: data["nodes"][2].pop("name"), "nodes.2.name: missing"),
        (lambda data: data["nodes"].pop(), "one output at its end"),
        (lambda data: data["modules"]["c"].update(padding=[1, {}]), "is damaged"),
        (lambda data: data["modules"]["c"].update(padding=[10**6, 10**6]), "numbers of one input"),
        (lambda data: data["modules"]["c"].update(stride=[0, 0]), "is damaged"),
        (lambda data: data["modules"]["c"].update(padding=[1]), r"a Conv2d whose padding is \(1,\)"),
        (lambda data: data["modules"]["c"].update(out_channels=2**50), "is damaged"),
        (lambda data: data["modules"]["c"].pop("groups"), "without groups"),
        (lambda data: data["modules"]["c"].update(type=[]), "there is no module"),
        (lambda data: data.update(tensors=3), "tensors"),
        (lambda data: insert(data, "aten.reshape.default", [256]), "last .*is invalid for input of size 768"),
        (lambda data: insert(data, "aten.reshape.default", [4, -1]), r"shape \(4, 64\), 3 inputs one of \(4, 192\)"),
        (lambda data: insert(data, "aten.sum.default"), "no axis for the batch"),
        (lambda data: insert(data, "aten.sym_size.int", 0), "no axis for the batch"),
        (lambda data: insert(data, "operator.mul", "x"), "last .*which are no sizes"),
    ],
)
def test_a_damaged_graph(change: Callable[[Any], Any], cause: str, folder: Path) -> None:
    data = json.loads((folder / "graph.json").read_text())
    change(data)
    (folder / "graph.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=cause):
        Graph.read(folder)


def test_what_only_values_show(folder: Path) -> None:
    """Torch takes this axis on shapes alone."""
    data = json.loads((folder / "graph.json").read_text())
    insert(data, "aten.softmax.int", -(2**63))
    (folder / "graph.json").write_text(json.dumps(data))
    graph = Graph.read(folder)
    for run in (graph.shapes, lambda: graph.run(torch.zeros(2, 3, 8, 8))):
        with pytest.raises(CheckpointError, match="does not run: IndexError: Dimension out of range"):
            run()


def test_operators_that_reach_files_are_none(folder: Path) -> None:
    data = json.loads((folder / "graph.json").read_text())
    data["nodes"][2].update(target="aten.from_file.default", args=["x", True, 8])
    (folder / "graph.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match=r"no operator aten.from_file"):
        Graph.read(folder)


CONVOLUTION = Convolution(name="c", inputs=("x",), output="y", layer="c", padding=(1, 1, 1, 1))
ARRAYS = {
    "weight": np.zeros((4, 3, 3, 3), np.int8),
    "bias": np.zeros(4, np.int32),
    "multiplier": np.ones(4, np.int32),
    "shift": np.ones(4, np.uint8),
}


def test_a_sound_step() -> None:
    check(CONVOLUTION, [(3, 8, 8)], (4, 8, 8), ARRAYS)


@pytest.mark.parametrize(
    ("changes", "inputs", "cause"),
    [
        ({"stride": (0, 0)}, 1, "stride"),
        ({"padding": (3000, 3000, 3000, 3000)}, 1, "padding"),
        ({"dilation": (9, 9)}, 1, "a window of 19 over 10"),
        ({}, 3, "has 3 inputs, not 1"),
        ({"groups": 3}, 1, "makes values of shape None"),
        ({"stride": (2, 2)}, 1, r"makes values of shape \(4, 4, 4\), not \(4, 8, 8\)"),
    ],
)
def test_a_step_that_cannot_run(changes: dict[str, Any], inputs: int, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        check(CONVOLUTION.model_copy(update=changes), [(3, 8, 8)] * inputs, (4, 8, 8), ARRAYS)


def test_constants_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"c\.bias is missing"):
        check(CONVOLUTION, [(3, 8, 8)], (4, 8, 8), {"weight": ARRAYS["weight"]})
    with pytest.raises(ValueError, match=r"c\.bias is float64"):
        check(CONVOLUTION, [(3, 8, 8)], (4, 8, 8), {**ARRAYS, "bias": np.zeros(4)})
    with pytest.raises(ValueError, match="shape None"):
        check(Softmax(name="s", inputs=("x",), output="y"), [(4,)], (4,), {"table": np.zeros(256, np.uint32)})
