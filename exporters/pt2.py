"""Export to `.pt2`, the file of `torch.export`: a network as a graph that needs no Python class, weights dense."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from effcli.errors import MachineError, OutputError, UnsupportedError, first_line, writing
from effcli.exporters._target import nbytes, replacing
from effcli.files.exporter import Exporter
from effcli.graphs.graph import Graph, is_graph
from effcli.graphs.integer import is_integer
from effcli.platform.steps import expect, tick
from effcli.reports.report import Exported

FILE_NAME = "model.pt2"

# Sizes of the batches that are compared.
_BATCHES = 1, 3
# Largest ‖a - b‖ / ‖b‖ over all outputs when only the order of sums differs.
_EXACT = 1e-3


class PT2(Exporter):
    """A `.pt2` export."""

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the graph `source` as `target/model.pt2`, its batch free, whole or not at all.

        Raises `UnsupportedError` for a checkpoint that is no graph, `OutputError` when `target` exists (without
        `overwrite`) or cannot be written, `MachineError` when the file computes something else than the checkpoint.
        """
        if is_integer(source):
            raise UnsupportedError(
                f"{source} is an integer network, which a .pt2 has no place for", "export it to onnx"
            )
        if not is_graph(source):
            raise UnsupportedError(f"{source} holds no graph that effcli wrote", "export it to safetensors or onnx")
        graph = Graph.read(source)
        with replacing(source, target, overwrite) as folder:
            # Recorded, saved, compared.
            expect(3)
            program = _exported(graph)
            tick()
            with writing(target):
                _save(program, folder / FILE_NAME)
            tick()
            checked = _compare(graph, folder / FILE_NAME)
            tick()
        return Exported(target="pt2", nbytes=nbytes(target), checked=checked)


def _exported(graph: Graph) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            # What torch says of its own code is of no use to a user who did not call it.
            warnings.simplefilter("ignore")
            program = torch.export.export(
                graph.module, (torch.zeros(2, *graph.facts.shape),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    except Exception as error:  # whatever torch.export finds wrong
        raise UnsupportedError(
            f"torch.export cannot record this graph: {first_line(error)}", "export it to onnx or safetensors"
        ) from error
    for node in program.graph.nodes:
        # It names files of this machine.
        node.meta.pop("stack_trace", None)
    return program


def _save(program: ExportedProgram, path: Path) -> None:
    try:
        torch.export.save(program, path)
    except RuntimeError as error:
        # torch's own writer keeps the system's error to itself.
        raise OutputError(f"cannot write {path.name}: {first_line(error)}", "is there room on the disk?") from error


def _compare(graph: Graph, path: Path) -> str:
    """Load the file again and hold it against the graph, on batches of random inputs."""
    module = torch.export.load(path).module()
    generator = torch.Generator().manual_seed(0)
    batches = [graph.examples(size, generator) for size in _BATCHES]
    expected = torch.cat([graph.run(inputs) for inputs in batches])
    with torch.inference_mode():
        difference = torch.cat([module(inputs) for inputs in batches]) - expected
    # Not finite is not below either.
    if not float(difference.norm()) <= _EXACT * float(expected.norm()):
        raise MachineError(
            f"the exported graph computes something else: {float(difference.abs().max()):.2g} off",
            "do not use this export, and report it with the network",
        )
    return (
        f"loaded by torch.export {torch.__version__}: largest difference {float(difference.abs().max()):.2g} of "
        f"{float(expected.abs().max()):.2g}"
    )
