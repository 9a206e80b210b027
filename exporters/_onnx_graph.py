"""A graph as ONNX, float32 or float16; packed weights stay packed behind `DequantizeLinear`.

torch's exporter translates the operators. Packed layers give way beforehand to modules that restore their weights from
the codes, scales and zero points of the checkpoint, so that the file is small and no weight is merged or transposed.
onnxruntime restores them in every run, or once as it loads with the session entry `RESTORE_AT_LOAD`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Set
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from effcli.errors import MachineError, NumericsError, UnsupportedError, UserError, first_line, writing
from effcli.exporters import _onnx_integer_linear
from effcli.exporters._obstacles import by_reason
from effcli.exporters._onnx_integer_linear import IntegerLinear, input_range, quantize
from effcli.exporters._packed import pruned_remarks
from effcli.formats import AffineWeight
from effcli.graphs.graph import Graph
from effcli.platform import onnx_session
from effcli.platform.steps import each, expect, tick
from effcli.reports.units import count

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_NAME = "model.onnx"
# The first with blocks in DequantizeLinear and 4-bit tensors.
OPSET = 21
RESTORE_AT_LOAD = "session.disable_quant_qdq"
# Sizes of the batches that are compared.
_BATCHES = 1, 3
# Protobuf ends at 2 GiB; with room for the graph itself.
_EXTERNAL = 1_900_000_000
# Largest ‖a - b‖ / ‖b‖ over all outputs when only the order of sums differs, and when that may decide besides which of
# 256 levels an input is rounded to.
_EXACT, _ROUNDED = 1e-3, 5e-2

Precision = Literal["float32", "float16"]


def export_graph(
    source: Path,
    folder: Path,
    *,
    precision: Precision = "float32",
    dequantize: bool = False,
    activations: Literal["int8"] | None = None,
) -> str:
    """Write the graph `source` to `folder/model.onnx`; what onnxruntime makes of it, in one line.

    precision: of inputs, outputs and what is not packed; restored weights are those of the checkpoint rounded once to
    it. dequantize: write all weights dense. activations: "int8" quantizes the inputs of packed linear layers in every
    run and multiplies them in integers.
    Raises `UnsupportedError` for what has no place in ONNX, `NumericsError` when float16 overflows, `MachineError` when
    the file computes something else than the checkpoint.
    """
    if dequantize and activations:
        raise UserError("int8 activations need packed layers, which dequantize removes", "ask for one of the two")
    graph = Graph.read(source)
    stored = {} if dequantize else _packed(graph)
    layers = len(graph.sites())
    pruned = pruned_remarks(sum(graph.mask(site.name) is not None for site in graph.sites()))
    rounding = {name for name, weight in stored.items() if weight.format.rounds_inputs}
    linear = {name for name in rounding if isinstance(graph.layer(name), nn.Linear)}
    integer = linear | (_integer_layers(graph, stored) if activations else set())
    dtype = torch.float16 if precision == "float16" else torch.float32
    graph.module.to(dtype)
    # The graph is translated, its file checked and run.
    expect(len(stored) + 2 + len(_BATCHES))
    for name in each(stored):
        _replace(graph, name, stored[name], name in integer)
    model = _translated(graph, dtype)
    tick()
    _narrow(model)
    with writing(folder):
        external = FILE_NAME + ".data" if _nbytes(model) > _EXTERNAL else None
        onnx_ir.save(model, folder / FILE_NAME, external_data=external)
    _check_file(folder / FILE_NAME)
    tick()
    tolerance = None if precision == "float16" or activations else _ROUNDED if graph.rounds_inputs else _EXACT
    line = _compare(Graph.read(source), folder, tolerance)
    return "; ".join([line, *_described(model, layers, stored, integer), *pruned])


class Restored(nn.Module):
    """A convolution or linear layer whose weight is (q - z) · s, divided by its input scale where that is explicit.

    It computes in the dtype of the layer that it stands for; weights are restored in float32 and rounded once to that.

    weight_codes: (out, in) with groups, else in the shape of the weight; weight_scale float32 and weight_zero_point:
    (), (out,) or (out, groups); input_scale float32 (in,) and bias (out,) or None. Codes and zero points are uint8, or
    int8 where they will be stored in 4 bits: so `_narrow` tells them apart. activation_scale float32 () and
    activation_zero uint8 () where the inputs are rounded to int8 and back, None otherwise.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor | None
    activation_scale: Tensor | None
    activation_zero: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Linear, weight: AffineWeight) -> None:
        super().__init__()
        format = weight.format
        self.shape, self.dtype = tuple(layer.weight.shape), layer.weight.dtype
        self.convolution: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            self.convolution = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        self.attributes: dict[str, Any] = {}
        codes, scale = weight.codes, weight.scale.float()
        zero = torch.full(scale.shape, format.fixed_zero, dtype=torch.uint8) if weight.zero is None else weight.zero
        if format.strategy == "group":
            # Blocks lie along one axis, so that a convolution is restored flat.
            self.attributes = {"axis": 1, "block_size": format.group_size}
        else:
            codes = codes.reshape(self.shape)
            scales: tuple[int, ...] = () if format.strategy == "tensor" else (-1,)
            scale, zero = scale.reshape(scales), zero.reshape(scales)
            if scales:
                self.attributes = {"axis": 0}
        kind = torch.int8 if format.bits <= 4 else torch.uint8
        self.register_buffer("weight_codes", codes.to(kind))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero.to(kind))
        self.register_buffer("input_scale", None if weight.input_scale is None else weight.input_scale.float())
        fixed = input_range(weight)
        self.register_buffer("activation_scale", fixed.get("input_scale"))
        self.register_buffer("activation_zero", fixed.get("input_zero_point"))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def weight(self) -> Tensor:
        restored: Tensor = torch.onnx.ops.symbolic(
            "::DequantizeLinear",
            [self.weight_codes, self.weight_scale, self.weight_zero_point],
            attrs=self.attributes,
            dtype=torch.float32,
            shape=tuple(self.weight_codes.shape),
        )
        if self.input_scale is not None:
            restored = restored.reshape(self.shape[0], -1) / self.input_scale
        return restored.reshape(self.shape).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, channels, ...) of a convolution, (n, ..., in) of a linear layer."""
        if self.activation_scale is not None and self.activation_zero is not None:
            levels = quantize(x.float(), self.activation_scale, self.activation_zero)
            restored: Tensor = torch.onnx.ops.symbolic(
                "::DequantizeLinear",
                [levels, self.activation_scale, self.activation_zero],
                dtype=torch.float32,
                shape=x.shape,
            )
            x = restored.to(x.dtype)
        if self.convolution:
            convolve = functional.conv1d if len(self.shape) == 3 else functional.conv2d
            return convolve(x, self.weight(), self.bias, **self.convolution)
        # As a `Gemm` of two axes: of `MatMul` onnxruntime makes a product with inputs rounded to 8 bits, unasked.
        y = functional.linear(x.reshape(-1, self.shape[1]) if x.dim() > 2 else x, self.weight(), self.bias)
        return y.reshape(-1, *x.shape[1:-1], self.shape[0]) if x.dim() > 2 else y


def _packed(graph: Graph) -> dict[str, AffineWeight]:
    """The quantized layers by name, pruned ones with their zeros; layers that are pruned only are left out.

    `UnsupportedError` names those that ONNX has no arithmetic for.
    """
    filled = {name: weight.filled() for name, weight in graph.stored.items() if not weight.format.floating}
    tables = {
        name: str(graph.stored[name].format.filled)
        for name, weight in filled.items()
        if not isinstance(weight, AffineWeight)
    }
    if tables:
        raise UnsupportedError(
            f"ONNX has no place for weights on no evenly spaced grid: {by_reason(tables)}",
            "--dequantize writes dense weights",
        )
    return {name: weight for name, weight in filled.items() if isinstance(weight, AffineWeight)}


def _integer_layers(graph: Graph, stored: Mapping[str, AffineWeight]) -> set[str]:
    """The linear layers that are multiplied in integers; `UnsupportedError` names packed ones that cannot be."""
    linear = [name for name in stored if isinstance(graph.layer(name), nn.Linear)]
    if not linear:
        raise UnsupportedError(
            "int8 activations need linear layers of 8 bits; this network has none", _onnx_integer_linear.REMEDY
        )
    reasons = {name: _onnx_integer_linear.obstacle(stored[name].format) for name in linear}
    obstacles = {name: reason for name, reason in reasons.items() if reason}
    if obstacles:
        raise UnsupportedError(
            f"int8 activations have no place for {by_reason(obstacles)}", _onnx_integer_linear.REMEDY
        )
    return set(linear)


def _replace(graph: Graph, name: str, weight: AffineWeight, integer: bool) -> None:
    """Put the module that computes with the codes of layer `name` where the dense one stands."""
    layer: Any = graph.layer(name)
    module: nn.Module = Restored(layer, weight)
    if integer:
        scaled = weight.input_scale is not None
        inputs = _onnx_integer_linear.inputs_of(weight.format)
        module = IntegerLinear(
            weight.shape, layer.weight.dtype, bias=layer.bias is not None, scaled=scaled, inputs=inputs
        )
        tensors = IntegerLinear.tensors(weight) | _onnx_integer_linear.input_factor(weight)
        tensors |= {} if layer.bias is None else {"bias": layer.bias}
        for key, value in tensors.items():
            module.register_buffer(key, value.to(module.get_buffer(key).dtype).contiguous())
    graph.module.set_submodule(name, module)


def _translated(graph: Graph, dtype: torch.dtype) -> onnx_ir.Model:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        # What the exporter and its helpers say is of no use to a user who did not call them.
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                graph.module,
                (torch.zeros(2, *graph.facts.shape, dtype=dtype),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["output"],
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # a family of its own
            raise UnsupportedError(
                f"torch cannot export this graph to ONNX: {first_line(error)}", "export it to pt2"
            ) from error
        finally:
            logger.setLevel(level)
    assert program is not None
    model = program.model
    _forget_origin(model)
    model.producer_name, model.producer_version = "effcli", version("effcli")
    model.metadata_props.update({"effcli.origin": graph.facts.origin, "effcli.opset": str(OPSET)})
    return model


def _forget_origin(model: onnx_ir.Model) -> None:
    """Leave out what names files of the machine that exported it."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        value.doc_string = None
        value.metadata_props.clear()
    for whole in (model, graph):
        whole.doc_string = None
        whole.metadata_props.clear()


def _narrow(model: onnx_ir.Model) -> None:
    """Store the int8 codes and zero points behind `DequantizeLinear` in 4 bits, unsigned."""
    for node in _restoring(model):
        if node.inputs[0] is None or node.inputs[0].const_value is None:
            continue  # rounded inputs
        for value in node.inputs:
            if value is not None and value.dtype == onnx_ir.DataType.INT8:
                assert value.const_value is not None
                narrow = value.const_value.numpy().astype(ml_dtypes.uint4)
                value.const_value = onnx_ir.Tensor(narrow, name=value.name)
                value.dtype = onnx_ir.DataType.UINT4


def _restoring(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    return (node for node in model.graph.all_nodes() if node.op_type == "DequantizeLinear")


def _nbytes(model: onnx_ir.Model) -> int:
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise MachineError(f"{path} is not valid ONNX: {first_line(error)}", "report it with the network") from error


def _compare(graph: Graph, folder: Path, tolerance: float | None) -> str:
    """Hold the file against the graph, its layers dequantized without rounding, on batches of random inputs.

    tolerance: the largest ‖a - b‖ / ‖b‖ that passes, None where any does.
    """
    generator = torch.Generator().manual_seed(0)
    session = onnx_session.open_session(folder, entries=onnx_session.EXACT)
    port = session.get_inputs()[0]
    kind = np.float16 if port.type == "tensor(float16)" else np.float32
    ours, theirs = [], []
    for size in _BATCHES:
        inputs = graph.examples(size, generator)
        (found,) = onnx_session.run(session, {port.name: inputs.numpy().astype(kind)}).values()
        theirs.append(torch.from_numpy(found.astype(np.float32)).flatten(1))
        ours.append(graph.run(inputs).flatten(1))
        tick()
    expected, found_all = torch.cat(ours), torch.cat(theirs)
    if not bool(expected.isfinite().all()):
        raise NumericsError("the network's own outputs are NaN or infinite", "start from a sound checkpoint")
    if not bool(found_all.isfinite().all()):
        raise NumericsError(f"{np.dtype(kind)} overflows in this network", "export with precision float32")
    difference = found_all - expected
    if tolerance is not None and float(difference.norm()) > tolerance * float(expected.norm()):
        raise MachineError(
            f"the exported graph computes something else: {float(difference.abs().max()):.2g} off",
            "do not use this export, and report it with the network",
        )
    agreement = float((expected.argmax(1) == found_all.argmax(1)).float().mean())
    found_line = f"top-1 agreement {agreement:.1%}, " if _classifies(graph) else ""
    return (
        f"{onnx_session.version()}, opset {OPSET}, on {len(expected)} random inputs: {found_line}largest difference "
        f"{float(difference.abs().max()):.2g} of {float(expected.abs().max()):.2g}"
    )


def _classifies(graph: Graph) -> bool:
    """Whether the output is a vector of logits, and not of the input's own kind."""
    shape = graph.shapes()[graph.output.name]
    return len(shape) == 1 and shape != graph.facts.shape


def _described(model: onnx_ir.Model, layers: int, stored: Mapping[str, AffineWeight], integer: Set[str]) -> list[str]:
    """What the user should know of how the `layers` are held and run: those `stored` packed, those in integers."""
    lines = []
    if stored:
        dense = f", {layers - len(stored)} dense" if layers > len(stored) else ""
        lines.append(f"{len(stored)} of {count(layers, 'layer')} packed{dense}")
    if integer:
        words = {"run": "of a run with one scale", "token": "with a scale per token", "tensor": "with a fixed scale"}
        found = {_onnx_integer_linear.inputs_of(stored[name].format) for name in integer}
        inputs = " or ".join(words[kind] for kind in words if kind in found)
        lines.append(
            f"{count(len(integer), 'linear layer')} in integers, the inputs {inputs}; "
            f"{count(layers - len(integer), 'layer')} in float"
        )
    rounding = sum(weight.activation_scale is not None for name, weight in stored.items() if name not in integer)
    if rounding:
        lines.append(f"the inputs of {count(rounding, 'convolution')} rounded to int8 and back")
    if len(stored) > len(integer):
        lines.append(f"weights are restored in every run, or once at load with {RESTORE_AT_LOAD}=1")
        apart = sum(node.op_type == "BatchNormalization" for node in model.graph.all_nodes())
        if apart:
            lines.append(f"{count(apart, 'batch norm')} cannot merge into packed weights: `fold` first")
    return lines


__all__ = ["FILE_NAME", "OPSET", "RESTORE_AT_LOAD", "Restored", "export_graph"]
