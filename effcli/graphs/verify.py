"""Load a graph or an integer network as its users will, and hold the outputs against effcli's own arithmetic.

onnxruntime is the independent reader where it is installed. C for a microcontroller is compiled and run, here and in
QEMU, and every layer of it compared. Stock loaders must refuse the checkpoint itself: a file that loads with random
weights is worse than one that does not load.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from effcli import exporters
from effcli.errors import EffcliError, MachineError, UnsupportedError
from effcli.exporters.firmware import targets
from effcli.graphs import executor
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork, is_integer
from effcli.options import Options
from effcli.platform import onnx_session
from effcli.platform.huggingface import restoring_verbosity
from effcli.reports.human import count

_ROWS = 4
# Inputs on which the C is compared.
_CODES = 16


class LayerCount(Options):
    """Instructions of one layer."""

    layer: str
    instructions: int


class Emulated(Options):
    """What QEMU counted for one input. Sizes in bytes; text: code and constants; stack: below the caller's."""

    instructions: int
    stack: int
    text: int
    data: int
    bss: int
    layers: tuple[LayerCount, ...]


class Firmware(Options):
    """What became of the emitted C, in words and, where it ran in QEMU, in numbers."""

    target: str
    checked: str
    emulated: Emulated | None = None


class GraphVerification(Options):
    """What was found. layout: 'graph' or 'integer'."""

    path: str
    layout: str
    refused: bool = Field(description="whether the stock loader refuses it, as it must")
    checked: str = Field(default="", description="what onnxruntime made of its ONNX export")
    firmware: Firmware | None = None
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
        compiled = self.firmware.checked if self.firmware else ""
        found = [part for part in (self.problem, stock, self.checked, compiled) if part]
        return f"{'verified' if self.passed else 'NOT VERIFIED'}: {'; '.join(found)}"

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, "line": self.line, **self.model_dump(mode="json")}, indent=1)


def verify(path: Path, target: str | None = None) -> GraphVerification:
    """Read the checkpoint `path` again, run it on a few fixed inputs, and let onnxruntime run its ONNX export.

    target: a processor to which an integer network is also compiled as C, see `_firmware`. Raises `UnsupportedError`
    for a target that there is not or a checkpoint that has no C, `UserError` where there is no C compiler.
    """
    integer = is_integer(path)
    if target is not None:
        _require_compilable(path, target)
    found: dict[str, Any] = {"path": str(path), "layout": "integer" if integer else "graph", "refused": _refused(path)}
    try:
        outputs = _outputs(path)
    except EffcliError as error:
        return GraphVerification(**found, problem=error.cause)
    if not bool(outputs.isfinite().all()):
        return GraphVerification(**found, problem="its outputs are NaN or infinite")
    if target is not None:
        try:
            found["firmware"] = _firmware(path, target)
        except MachineError as error:
            return GraphVerification(**found, problem=error.cause)
    if not onnx_session.installed():
        return GraphVerification(**found, checked="not run in onnxruntime, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = exporters.load("onnx")().export(path, Path(folder) / "onnx")
        except UnsupportedError as error:
            return GraphVerification(**found, checked=f"no ONNX export: {error.cause}")
        except EffcliError as error:
            return GraphVerification(**found, problem=f"its ONNX export fails: {error.cause}")
    return GraphVerification(**found, checked=exported.checked)


def _require_compilable(path: Path, target: str) -> None:
    """Raise unless `path` holds what C is made from, `target` is known, and this machine has a C compiler."""
    targets.find(target)
    if not is_integer(path):
        raise UnsupportedError(
            f"{path} holds no integer network, which C is made from",
            "verify it without --target, or let `int8` be the last pass",
        )
    targets.require(targets.find("host"))


def _firmware(path: Path, name: str) -> Firmware:
    """Compare every layer of the emitted C with the executor: compiled for this machine, and in QEMU where it is there.

    Raises `MachineError` when the C does not compile or computes something else.
    """
    from effcli.exporters.firmware import check
    from effcli.exporters.firmware.generate import generate, inputs

    network, target = IntegerNetwork.read(path), targets.find(name)
    generated = generate(network, "network")
    codes = inputs(network, _CODES)
    absent = targets.missing(target)
    emulated = None
    with tempfile.TemporaryDirectory(prefix="effcli-") as temporary:
        folder = Path(temporary)
        check.write_sources(folder, generated, "network")
        check.compare(network, generated.program, folder, "network", targets.find("host"), codes)
        if not absent and target.board is not None:
            measured = check.compare(network, generated.program, folder, "network", target, codes)
            assert measured is not None
            counts = zip((task.layer for task in generated.program.tasks), measured.layer_instructions, strict=True)
            emulated = Emulated(
                instructions=measured.instructions,
                stack=measured.stack,
                layers=tuple(LayerCount(layer=layer, instructions=count) for layer, count in counts),
                **measured.sizes._asdict(),
            )
    layers, given = count(len(generated.program.tasks), "layer"), count(len(codes), "input")
    checked = f"its C gives the same {layers} to the byte for {given}, compiled here"
    if emulated is not None:
        checked += f" and for {target.core} in QEMU ({emulated.instructions:,} instructions)"
    elif absent:
        needed = f"{target.core} needs {' and '.join(absent)}: {targets.remedy(absent)}"
        checked += f"; not run in QEMU, {needed}"
    return Firmware(target=name, checked=checked, emulated=emulated)


def _outputs(path: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if is_integer(path):
        network = IntegerNetwork.read(path)
        inputs = torch.randn(_ROWS, *network.facts.shape, generator=generator)
        return torch.from_numpy(executor.run_float(network, inputs.numpy()))
    graph = Graph.read(path)
    return graph.run(graph.examples(_ROWS, generator))


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
