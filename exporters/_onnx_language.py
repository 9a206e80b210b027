"""Export a causal language model to ONNX: one graph for prompt and decoding, its cache among the inputs and outputs.

Compressed layers keep their codes and scales, as `com.microsoft.MatMulNBits` or, with int8 activations, as
`MatMulInteger`. The graph is traced without weights; they follow one by one, so that memory stays small until the
result is compared with the dequantized network in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import MachineError, NumericsError, UnsupportedError, UserError, writing
from effcli.exporters import _onnx_language_layers as layers
from effcli.exporters._onnx_integer_linear import IntegerLinear
from effcli.exporters._onnx_language_layers import Arithmetic, PackedLinear
from effcli.exporters._onnx_language_run import KERNEL, compare, empty_past, forward, generate, latency
from effcli.exporters._onnx_language_trace import OPSET, trace
from effcli.exporters._packed import numbers, pruned, pruned_remarks, quantized
from effcli.files.layout import Stored
from effcli.language import verify
from effcli.language.skeleton import Skeleton
from effcli.language.verify import Agreement
from effcli.language.weights import Weights, open_weights
from effcli.options import Options
from effcli.platform import onnx_session
from effcli.platform.rehearsal import cannot_tell
from effcli.platform.steps import each, expect, tick
from effcli.reports.units import count, size

if TYPE_CHECKING:
    import onnx_ir

MODEL = "model.onnx"
DATA = "model.onnx.data"

# Largest ‖a - b‖ / ‖b‖ over all logits: float32 sums in another order, and what fewer digits may add to it.
_EXACT, _ROUGH = 1e-3, 0.1
_ALIGNMENT = 64
_EXPERTS = "gathered experts"


class Described(Options):
    """What was written, and how its logits compare with the dequantized network in float32."""

    path: Path = Field(description="the folder")
    opset: int
    nbytes: int = Field(description="of model.onnx and model.onnx.data together")
    kernels: dict[str, int] = Field(description="number of layers by what multiplies them")
    prompt: Agreement = Field(description="logits of a prompt")
    step: Agreement = Field(description="logits of one token behind it, from the cache")
    remarks: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The finding in one line."""
        kernels = ", ".join(f"{number} x {name}" for name, number in self.kernels.items())
        return (
            f"{MODEL}, opset {self.opset}, {size(self.nbytes)}, {kernels}; {onnx_session.version()} against float32: "
            f"prompt: {self.prompt}; cached step: {self.step}"
        )


def export_language(
    source: Path,
    folder: Path,
    *,
    dequantize: bool = False,
    precision: Literal["float32", "float16"] = "float32",
    activations: Literal["int8"] | None = None,
    accuracy_level: Literal[0, 4] = 0,
    trust_remote_code: bool = False,
) -> Described:
    """Write the finished checkpoint `source`, dense or compressed, to `folder`/model.onnx and model.onnx.data.

    All tensors of the checkpoint stand in model.onnx.data, whatever their size: a graph over 2 GB could not be read,
    and one rule serves all. dequantize: every layer becomes dense. precision: of activations, scales and dense weights.
    activations: "int8" quantizes the inputs of the layers of 8 bits in every run. accuracy_level: of MatMulNBits; at 4
    it quantizes its inputs to 8 bits by block. When it raises after writing began, what is in `folder` is unfinished.

    Raises `UnsupportedError` for layers without a place and architectures that cannot be traced, before anything is
    written; `UserError` without onnx; `NumericsError` when float16 overflows; `MachineError` when the file computes
    something else than the checkpoint.
    """
    onnx_session.require()
    source, folder = Path(source), Path(folder)
    if dequantize and activations:
        raise UserError("int8 activations need compressed layers, which dequantize removes", "ask for one of the two")
    if accuracy_level not in (0, 4):
        raise UnsupportedError(f"onnxruntime has no accuracy level {accuracy_level} on a CPU", "use 0 or 4")
    arithmetic = Arithmetic(precision, activations, accuracy_level)
    weights = open_weights(source, trust_remote_code, precision)
    packed = {} if dequantize else quantized(weights)
    layers.check(packed, arithmetic)
    kernels = _kernels(weights.skeleton, packed, arithmetic)
    for name, stored in packed.items():
        _replace(weights, name, stored, arithmetic)
    cannot_tell("torch traces the network in one piece")
    expect(1)
    graph = trace(weights.skeleton)
    tick()
    _sign(graph, precision, kernels)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remarks = [
            *layers.remarks(packed, arithmetic),
            *pruned_remarks(pruned(weights)),
            *_write(graph, weights, folder),
        ]
    rounding = layers.rounds_inputs(weights.stored)
    if rounding and dequantize:
        remarks.append("inputs that the checkpoint rounds to int8 stay floating, as the weights do")
    if any(name.startswith(_EXPERTS) for name in kernels):
        remarks.append("the experts of every token are copied together first: long prompts take memory and time")
    _check_file(folder / MODEL)
    prompt, step = _compare(source, folder, arithmetic.exact and not rounding, arithmetic, trust_remote_code)
    return Described(
        path=folder,
        opset=OPSET,
        nbytes=sum((folder / name).stat().st_size for name in (MODEL, DATA)),
        kernels=dict(kernels.most_common()),
        prompt=prompt,
        step=step,
        remarks=tuple(remarks),
    )


def _replace(weights: Weights, name: str, stored: Stored, arithmetic: Arithmetic) -> None:
    """Put the module that multiplies with the codes of layer `name` where the dense one stands."""
    network: Any = weights.skeleton.model
    bias = getattr(network.get_submodule(name), "bias", None) is not None
    (site,) = weights.sites(f"{name}.weight")
    parent, _, own = name.rpartition(".")
    module = layers.replacement(stored, site.shape, arithmetic, weights.skeleton.dtype, bias)
    setattr(network.get_submodule(parent), own, module)


def _kernels(skeleton: Skeleton, packed: Mapping[str, Stored], arithmetic: Arithmetic) -> Counter[str]:
    """What multiplies the weights, and how many layers each."""
    names: Counter[str] = Counter()
    for site in skeleton.sites():
        if site.name in packed:
            names[layers.kernel(packed[site.name], arithmetic)] += 1
        else:
            names[f"{_EXPERTS if site.kind == 'expert' else 'MatMul'} {arithmetic.precision}"] += 1
    return names


def _sign(model: onnx_ir.Model, precision: str, kernels: Counter[str]) -> None:
    """Say in the file who wrote it and what it holds."""
    model.producer_name, model.producer_version = "effcli", version("effcli")
    (kernel, _), *_ = kernels.most_common(1)
    model.metadata_props.update({"effcli.opset": str(OPSET), "effcli.precision": precision, KERNEL: kernel})


def _write(model: onnx_ir.Model, weights: Weights, folder: Path) -> list[str]:
    """Write the tensors of the checkpoint to the data file, one in memory at a time, then the graph.

    Returns what the user should know: scales that the precision rounds.
    """
    import onnx_ir

    @lru_cache(maxsize=1)
    def packed(layer: str) -> dict[str, Tensor]:
        return layers.tensors(weights.skeleton.model.get_submodule(layer), numbers(weights, layer))  # type: ignore[arg-type]

    def tensor(name: str) -> Tensor:
        layer, _, own = name.rpartition(".")
        replaced = weights.skeleton.model.get_submodule(layer)
        if isinstance(replaced, PackedLinear | IntegerLinear) and own != "bias":
            return packed(layer)[own]
        skeleton = weights.skeleton
        return weights.parameter(skeleton.embedding if skeleton.tied and name == f"{skeleton.head}.weight" else name)

    rounded = 0
    state = weights.skeleton.model.state_dict()
    values = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    expect(len(values))
    with (folder / DATA).open("wb") as file:
        for name in each(values):
            value = values[name]
            stored = tensor(name)
            converted = stored.to(state[name].dtype).contiguous()
            if converted.is_floating_point() and not bool(converted.isfinite().all()):
                raise NumericsError(f"{name} is not finite in {state[name].dtype}", "export with precision float32")
            if name.endswith(".weight_scale"):
                rounded += not torch.equal(converted.double(), stored.double())
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            converted.numpy().tofile(file)
            assert value.dtype is not None
            value.const_value = onnx_ir.ExternalTensor(
                DATA,
                offset,
                file.tell() - offset,
                value.dtype,
                shape=onnx_ir.Shape(converted.shape),
                name=name,
                base_dir=folder,
            )
    onnx_ir.save(model, folder / MODEL)
    return [f"{count(rounded, 'layer')} had scales that float16 rounds"] if rounded else []


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise MachineError(
            f"{path} is not valid ONNX: {str(error).splitlines()[0]}", "report it with the network"
        ) from error


def _compare(
    source: Path, folder: Path, exact: bool, arithmetic: Arithmetic, trust_remote_code: bool
) -> tuple[Agreement, Agreement]:
    """Hold the file against the checkpoint in float32, its compressed layers dequantized without rounding.

    exact: whether only the order of sums differs.
    """
    network = verify.restored(source, "float32", trust_remote_code)
    session = onnx_session.open_session(folder, entries=onnx_session.EXACT)
    tolerance = _EXACT if exact else _ROUGH
    prompt, step = compare(session, network, verify.tokens(network.config), tolerance)
    if exact and not (prompt.passed and step.passed):
        raise MachineError(
            f"the exported graph computes something else: prompt: {prompt}; cached step: {step}",
            "do not use this export, and report it with the network",
        )
    if math.isnan(prompt.relative + step.relative):
        raise NumericsError(f"{arithmetic.precision} overflows in this network", "export with precision float32")
    return prompt, step


__all__ = ["Described", "empty_past", "export_language", "forward", "generate", "latency"]
