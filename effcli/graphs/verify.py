"""Load a graph or an integer network as its users will, and hold the outputs against effcli's own arithmetic.

onnxruntime is the independent reader where it is installed. The network that it was made from is the measure of what
compression cost. C for a microcontroller is compiled and run, here and in
QEMU, and every layer of it compared. Stock loaders must refuse the checkpoint itself: a file that loads with random
weights is worse than one that does not load.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from effcli import exporters, importers
from effcli.errors import EffcliError, MachineError, UnsupportedError, naming
from effcli.exporters.firmware import targets
from effcli.files import locate as samples
from effcli.graphs import executor
from effcli.graphs.against import compare, moved
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork, is_integer
from effcli.layers.result import Phases, unseen
from effcli.options import Options
from effcli.platform import onnx_session
from effcli.platform.huggingface import restoring_verbosity
from effcli.platform.steps import telling
from effcli.reports.against import Against
from effcli.reports.report import FILE_NAME, Check, Report, Stage
from effcli.reports.units import count

_ROWS = 16
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
    ran: bool = Field(default=False, description="whether onnxruntime ran it")
    firmware: Firmware | None = None
    against: Against | None = Field(default=None, description="its tensors and outputs next to those of its input")
    absent: str = Field(default="", description="the input that it was made from, which is not at hand")
    problem: str = ""

    @property
    def passed(self) -> bool:
        altered = self.against is not None and bool(self.against.problem)
        return self.refused and not self.problem and not altered

    @property
    def layers(self) -> tuple[LayerCount, ...]:
        """What QEMU counted of each layer; empty where nothing ran in it."""
        return self.firmware.emulated.layers if self.firmware is not None and self.firmware.emulated is not None else ()

    @property
    def line(self) -> str:
        """The findings in one line."""
        stock = "transformers refuses it, as it must" if self.refused else "transformers loads it"
        # What is wrong with a checkpoint may be that nothing reads it.
        stock = stock if self.problem or not self.refused else f"effcli.load reads it; {stock}"
        compiled = self.firmware.checked if self.firmware else ""
        found = [part for part in (self.problem, stock, self.checked, compiled) if part]
        if self.against is not None:
            found.append(str(self.against))
        if self.absent:
            found.append(f"not compared with its input {self.absent}, which is not here: name it with --against")
        return f"{'verified' if self.passed else 'NOT VERIFIED'}: {'; '.join(found)}"

    @property
    def checks(self) -> tuple[Check, ...]:
        """The findings one by one, in plain words."""
        found = [Check(text=self.problem, passed=False)] if self.problem else []
        if not self.refused:
            found.append(Check(text="transformers loads it, though its layout is not for transformers", passed=False))
        elif not self.problem:
            found.append(Check(text="effcli.load reads it and runs it", passed=True))
        if self.checked:
            ran = self.ran and not self.problem
            text = "onnxruntime runs its ONNX export; outputs are the same but for rounding" if ran else self.checked
            found.append(Check(text=text, passed=True if ran else None, numbers=self.checked if ran else ""))
        if self.firmware is not None:
            found.append(Check(text=self.firmware.checked, passed=True))
        if self.against is not None:
            found.append(self.against.check)
        if self.absent:
            found.append(Check(text=f"not compared with its input {self.absent}, which is not here; see --against"))
        return tuple(found)

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, "line": self.line, **self.model_dump(mode="json")}, indent=1)


def verify(
    path: Path,
    target: str | None = None,
    *,
    against: str | Path | Graph | None = None,
    stages: Sequence[Stage] | None = None,
    trust_remote_code: bool = False,
    phases: Phases = unseen,
) -> GraphVerification:
    """Read the checkpoint `path` again, run it on a few fixed inputs, and let onnxruntime run its ONNX export.

    target: a processor to which an integer network is also compiled as C, see `_firmware`. against: the network that it
    was made from, or its name; what `report.json` names unless given, where that is a file at hand. stages: of the run
    between the two; those of `report.json` unless given. Raises `UnsupportedError` for a target that there is not or a
    checkpoint that has no C, `UserError` where there is no C compiler, and `against` with what is wrong with it.
    """
    integer = is_integer(path)
    if target is not None:
        _require_compilable(path, target)
    found: dict[str, Any] = {"path": str(path), "layout": "integer" if integer else "graph", "refused": False}
    with phases("loading with transformers"):
        found["refused"] = _refused(path)
    report = Report.read(path) if (path / FILE_NAME).is_file() else None
    source, before = ("", None) if against is None else _given(report, against, trust_remote_code)
    try:
        with phases("comparing with the input") as progress, telling(progress):
            network = IntegerNetwork.read(path) if integer else Graph.read(path)
            inputs, outputs = _outputs(network)
            if against is None:
                source, before = _input_of(report, trust_remote_code)
            if before is not None:
                known = stages if stages is not None else report.stages if report is not None else ()
                found["against"] = _against(network, before, source, known, inputs, outputs)
            else:
                found["absent"] = source
    except EffcliError as error:
        return GraphVerification(**found, problem=error.cause)
    if not bool(outputs.isfinite().all()):
        return GraphVerification(**found, problem="its outputs are NaN or infinite")
    if target is not None:
        try:
            with phases(f"C for {target}") as progress, telling(progress):
                found["firmware"] = _firmware(path, target)
        except MachineError as error:
            return GraphVerification(**found, problem=error.cause)
    if not onnx_session.installed():
        return GraphVerification(**found, checked="not run in onnxruntime, which is not installed")
    with tempfile.TemporaryDirectory() as folder, phases("running in onnxruntime") as progress, telling(progress):
        try:
            exported = exporters.load("onnx")().export(path, Path(folder) / "onnx")
        except UnsupportedError as error:
            return GraphVerification(**found, checked=f"no ONNX export: {error.cause}")
        except EffcliError as error:
            return GraphVerification(**found, problem=f"its ONNX export fails: {error.cause}")
    return GraphVerification(**found, checked=exported.checked, ran=True)


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


def _given(report: Report | None, against: str | Path | Graph, trust_remote_code: bool) -> tuple[str, Graph | None]:
    """The input that the user names, and its name; an error says that it is not the checkpoint that is at fault."""
    if isinstance(against, Graph):
        return against.facts.origin, against
    recipe = report.recipe if report is not None else {}
    weights = recipe.get("weights")
    with naming(f"--against {against}"):
        source = samples.locate(str(against))
        return str(source), _read(
            source, recipe, Path(weights) if isinstance(weights, str) else None, trust_remote_code
        )


def _input_of(report: Report | None, trust_remote_code: bool) -> tuple[str, Graph | None]:
    """The name of the input that a report names, empty where none does, and the input itself where it is at hand.

    A function that report.json names is not called: whoever sent the checkpoint wrote that name.
    """
    if report is None:
        return "", None
    revision = report.recipe.get("revision")
    source = samples.at_hand(report.model, revision if isinstance(revision, str) else None)
    if source is None:
        return report.model, None
    return str(source), _read(source, report.recipe, None, trust_remote_code)


def _read(source: str | Path, recipe: dict[str, Any], weights: Path | None, trust_remote_code: bool) -> Graph:
    """The input `source` of a run; recipe: that of the run, as far as it is known."""
    shape = recipe.get("shape")
    return importers.read(
        source,
        weights=weights,
        shape=tuple(shape) if isinstance(shape, list) else None,
        trust_remote_code=trust_remote_code,
    )


def _against(
    network: Graph | IntegerNetwork,
    before: Graph,
    source: str,
    stages: Sequence[Stage],
    inputs: torch.Tensor,
    outputs: torch.Tensor,
) -> Against:
    """What became of the input `before`, called `source`; outputs: what `network` gives for `inputs`."""
    if before.facts.shape != tuple(inputs.shape[1:]):
        return Against(
            input=source, problem=f"it takes inputs {tuple(inputs.shape[1:])}, its input {before.facts.shape}"
        )
    found = compare(before, network, source, stages) if isinstance(network, Graph) else Against(input=source)
    if found.problem:
        return found
    expected = before.run(inputs)
    if expected.shape != outputs.shape:
        shapes = tuple(outputs.shape[1:]), tuple(expected.shape[1:])
        return found.model_copy(update={"problem": f"its outputs have the shape {shapes[0]}, the input's {shapes[1]}"})
    calibrated = isinstance(network, IntegerNetwork) and network.probe is not None
    kind = "calibration inputs" if calibrated else "random inputs"
    return found.model_copy(update={"moved": moved(before, expected, outputs, kind)})


def _outputs(network: Graph | IntegerNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    """A few fixed inputs, and what the network gives for them."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(network, IntegerNetwork):
        if network.probe is not None:
            # Random numbers lie outside the ranges that it was calibrated for.
            codes = torch.from_numpy(network.probe).float()
            inputs = (codes - network.input.zero) * network.input.scale
        else:
            inputs = torch.randn(_ROWS, *network.facts.shape, generator=generator)
        return inputs, torch.from_numpy(executor.run_float(network, inputs.numpy()))
    inputs = network.examples(_ROWS, generator)
    return inputs, network.run(inputs)


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
