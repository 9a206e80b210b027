"""Export to `.pt2`, the file of `torch.export`: a network as a graph that needs no Python class, weights dense."""

from __future__ import annotations

from pathlib import Path

import torch

from effcli.contract import Options
from effcli.errors import UnsupportedError, writing
from effcli.exporters._target import nbytes, replacing
from effcli.graphs.graph import Graph, is_graph
from effcli.graphs.integer import is_integer
from effcli.reports.report import Exported

FILE_NAME = "model.pt2"


class Config(Options):
    """Options of a `.pt2` export: none."""


def export(source: Path, target: Path, config: Config | None = None, overwrite: bool = False) -> Exported:
    """Write the graph `source` as `target/model.pt2`, its batch free, whole or not at all.

    Raises `UnsupportedError` for a checkpoint that is no graph, `OutputError` when `target` cannot be written.
    """
    source, target = Path(source), Path(target)
    if is_integer(source):
        raise UnsupportedError(f"{source} is an integer network, which a .pt2 has no place for", "export it to onnx")
    if not is_graph(source):
        raise UnsupportedError(f"{source} is a language model, not a graph", "export it to safetensors or onnx")
    graph = Graph.read(source)
    program = torch.export.export(
        graph.module, (torch.zeros(2, *graph.facts.shape),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    with replacing(source, target, overwrite) as folder, writing(target):
        torch.export.save(program, folder / FILE_NAME)
    module = torch.export.load(target / FILE_NAME).module()
    probe = torch.randn(3, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        largest = float((module(probe) - graph.run(probe)).abs().max())
    return Exported(
        target="pt2", nbytes=nbytes(target), checked=f"loaded by torch.export: largest difference {largest:.2g}"
    )
