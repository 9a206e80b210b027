"""Load a graph or an integer network as its users will, and hold the outputs against effcli's own arithmetic.

onnxruntime is the independent reader where it is installed. Stock loaders must refuse the checkpoint itself: a file
that loads with random weights is worse than one that does not load.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import torch
from pydantic import Field

from effcli import exporters, onnx_session
from effcli.contract import Options
from effcli.errors import EffcliError, UnsupportedError
from effcli.graphs import executor
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork, is_integer
from effcli.stock import restoring_verbosity

_ROWS = 4


class GraphVerification(Options):
    """What was found. layout: 'graph' or 'integer'."""

    path: str
    layout: str
    refused: bool = Field(description="whether the stock loader refuses it, as it must")
    checked: str = Field(default="", description="what onnxruntime made of its ONNX export")
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.refused and not self.problem

    @property
    def line(self) -> str:
        """The findings in one line."""
        stock = "transformers refuses it, as it must" if self.refused else "transformers loads it"
        # What is wrong with a checkpoint may be that nothing reads it.
        stock += "" if self.problem or not self.refused else "; effcli.load reads it"
        found = [part for part in (self.problem, stock, self.checked) if part]
        return f"{'verified' if self.passed else 'NOT VERIFIED'}: {'; '.join(found)}"

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, "line": self.line, **self.model_dump(mode="json")}, indent=1)


def verify(path: Path) -> GraphVerification:
    """Read the checkpoint `path` again, run it on a few fixed inputs, and let onnxruntime run its ONNX export."""
    integer = is_integer(path)
    found = {"path": str(path), "layout": "integer" if integer else "graph", "refused": _refused(path)}
    try:
        outputs = _outputs(path)
    except EffcliError as error:
        return GraphVerification(**found, problem=error.cause)
    if not bool(outputs.isfinite().all()):
        return GraphVerification(**found, problem="its outputs are NaN or infinite")
    if not onnx_session.installed():
        return GraphVerification(**found, checked="not run in onnxruntime, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = exporters.load("onnx").export(path, Path(folder) / "onnx")
        except UnsupportedError as error:
            return GraphVerification(**found, checked=f"no ONNX export: {error.cause}")
        except EffcliError as error:
            return GraphVerification(**found, problem=f"its ONNX export fails: {error.cause}")
    return GraphVerification(**found, checked=exported.checked)


def _outputs(path: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if is_integer(path):
        network = IntegerNetwork.read(path)
        inputs = torch.randn(_ROWS, *network.facts.shape, generator=generator)
        return torch.from_numpy(executor.run_float(network, inputs.numpy()))
    graph = Graph.read(path)
    return graph.run(torch.randn(_ROWS, *graph.facts.shape, generator=generator))


def _refused(path: Path) -> bool:
    """Whether transformers refuses to load the checkpoint `path`."""
    from transformers import AutoModelForImageClassification

    with restoring_verbosity(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
        except Exception:  # whatever it raises is its way of refusing
            return True
    return False
