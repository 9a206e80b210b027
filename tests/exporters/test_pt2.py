from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_architectures
from small_graphs import chain, inputs, residual
from torch import nn

from effcli.errors import MachineError, OutputError, UnsupportedError
from effcli.exporters import pt2
from effcli.graphs.graph import Graph
from effcli.importers import read

MACHINE = b"/work/", b"/root/", b"/home/", b"/tmp/", b"site-packages"


def saved(graph: Graph, folder: Path) -> Path:
    (folder / "graph").mkdir()
    graph.save(folder / "graph")
    return folder / "graph"


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    graph = residual() if name == "residual" else read(vision_architectures.make(name, tmp_path / "source"))
    done = pt2.PT2().export(saved(graph, tmp_path), tmp_path / "out")
    path = tmp_path / "out" / "model.pt2"
    assert done.target == "pt2" and done.nbytes == path.stat().st_size
    assert done.checked.startswith("loaded by torch.export") and "largest difference" in done.checked
    again = read(path)
    assert again.facts.shape == graph.facts.shape
    assert [site.name for site in again.sites()] == [site.name for site in graph.sites()]
    for count in (1, 3):
        values = inputs(graph, count)
        torch.testing.assert_close(again.run(values), graph.run(values), rtol=1e-5, atol=1e-5)
    names = [graph.sites()[0].name, graph.sites()[-1].name]
    for site in names:
        torch.testing.assert_close(again.layer(site).weight, graph.layer(site).weight, rtol=0, atol=0)


def test_nothing_of_the_machine_is_in_the_file(tmp_path: Path) -> None:
    pt2.PT2().export(saved(residual(), tmp_path), tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as file:
        contents = [file.read(name) for name in file.namelist()]
    assert not any(part in content for content in contents for part in MACHINE)


def test_what_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="holds no graph"):
        pt2.PT2().export(tmp_path, tmp_path / "out")


def test_an_output_that_exists(tmp_path: Path) -> None:
    source = saved(chain((3,), nn.Linear(3, 2)), tmp_path)
    pt2.PT2().export(source, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        pt2.PT2().export(source, tmp_path / "out")
    pt2.PT2().export(source, tmp_path / "out", overwrite=True)


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(chain((3,), nn.Linear(3, 2)), tmp_path)
    other = pt2._exported(chain((3,), nn.Linear(3, 2, bias=False)))
    monkeypatch.setattr(pt2, "_exported", lambda graph: other)
    with pytest.raises(MachineError, match="something else"):
        pt2.PT2().export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(UnsupportedError) as caught:
        pt2.PT2().export(saved(chain((3,), nn.Linear(3, 2)), tmp_path), tmp_path / "out")
    assert caught.value.cause == "torch.export cannot record this graph: first"
    assert not (tmp_path / "out").exists()
