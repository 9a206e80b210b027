"""An integer network as ONNX: every arithmetic operation between `DequantizeLinear` and `QuantizeLinear`.

onnxruntime fuses these triples into its integer kernels. Codes are stored unsigned (q + 128), for which its x86 kernels
are made; that changes no number. Weight scales follow from multipliers and shifts, so nothing is decided here. What
moves codes without computing works on the codes themselves, and a table is a `Gather`: both are exact. Elsewhere
onnxruntime multiplies by a float32 scale and rounds halves to even, where we use integers and round halves up, so that
single codes may differ by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from effcli import onnx_session
from effcli.errors import UnsupportedError, writing
from effcli.graphs import executor
from effcli.graphs.integer import (
    HIGHEST,
    LOWEST,
    Add,
    AveragePool,
    Clamped,
    Concatenate,
    Convolution,
    IntegerNetwork,
    Linear,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Reshape,
    Slice,
    Table,
    Transpose,
    Value,
    Weighted,
)

FILE_NAME = "model.onnx"
OPSET = 17
_IR = 8
_COMPARED = 256
# Codes are stored as q + 128.
_SHIFT = 128

Array = NDArray[Any]


def export_integer(source: Path, folder: Path) -> str:
    """Write the integer network `source` to `folder/model.onnx`; what onnxruntime makes of it, in one line."""
    network = IntegerNetwork.read(source)
    model = _Writer(network).model()
    onnx.checker.check_model(model, full_check=True)
    with writing(folder):
        onnx.save(model, folder / FILE_NAME)
    return compare(network, folder)


def compare(network: IntegerNetwork, folder: Path) -> str:
    """Run the file in onnxruntime and the network in the reference executor, on the same inputs."""
    generator = np.random.default_rng(0)
    value = network.input
    codes = generator.integers(LOWEST, HIGHEST + 1, (_COMPARED, *value.shape))
    inputs = ((codes - value.zero) * value.scale).astype(np.float32)
    session = onnx_session.open_session(folder)
    (theirs,) = onnx_session.run(session, {session.get_inputs()[0].name: inputs}).values()
    ours = executor.run_float(network, inputs)
    steps = np.abs(theirs - ours) / network.output.scale
    flat = ours.reshape(_COMPARED, -1), theirs.reshape(_COMPARED, -1)
    agreement = float(np.mean(flat[0].argmax(1) == flat[1].argmax(1)))
    return (
        f"{onnx_session.version()}, opset {OPSET}, on {_COMPARED} random inputs: top-1 agreement {agreement:.1%}, "
        f"largest difference {steps.max():.0f} steps of {network.output.scale:.2g}, {np.mean(steps < 0.5):.1%} equal"
    )


class _Writer:
    """Translates a program step by step. Values carry their own names, dequantized ones a suffix."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def model(self) -> Any:
        program, values = self.network.program, self.network.program.values
        self._quantize(_float(program.input), program.input, program.input)
        for step in program.steps:
            self._step(step)
        self._node("DequantizeLinear", [program.output, *self._grid(program.output)], _float(program.output))
        graph = helper.make_graph(
            self.nodes,
            "effcli",
            [self._port(_float(program.input), values[program.input])],
            [self._port(_float(program.output), values[program.output])],
            list(self.constants.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="effcli", ir_version=_IR
        )
        model.producer_version = version("effcli")
        helper.set_model_props(model, {"effcli.origin": self.network.facts.origin, "effcli.opset": str(OPSET)})
        return model

    def _step(self, step: Operation) -> None:
        match step:
            case Convolution():
                self._convolution(step)
            case Linear():
                self._linear(step)
            case Add():
                self._add(step)
            case Multiply():
                self._arithmetic(step, "Mul", self._dequantized(step.inputs))
            case AveragePool():
                pooled: dict[str, Any] = {"kernel_shape": step.kernel, "strides": step.stride}
                pooled["pads"] = _pads(step.padding)
                self._arithmetic(step, "AveragePool", self._dequantized(step.inputs), count_include_pad=1, **pooled)
            case Mean():
                self._mean(step)
            case MaxPool():
                windows = {"kernel_shape": step.kernel, "strides": step.stride, "dilations": step.dilation}
                self._node("MaxPool", step.inputs, step.output, pads=_pads(step.padding), **windows)
            case Table():
                self._table(step)
            case Pad():
                self._pad(step)
            case Concatenate():
                self._node("Concat", step.inputs, step.output, axis=step.axis + 1)
            case Slice():
                ends = [[step.start], [step.stop], [step.axis + 1], [step.step]]
                constants = [
                    self._constant(f"{step.name}.{name}", np.array(end, dtype=np.int64))
                    for name, end in zip(("starts", "ends", "axes", "steps"), ends, strict=True)
                ]
                self._node("Slice", [*step.inputs, *constants], step.output)
            case Reshape():
                shape = np.array([-1, *self._value(step.output).shape], dtype=np.int64)
                self._node("Reshape", [*step.inputs, self._constant(f"{step.name}.shape", shape)], step.output)
            case Transpose():
                self._node("Transpose", step.inputs, step.output, perm=[0, *(axis + 1 for axis in step.axes)])
            case _:
                raise UnsupportedError(f"ONNX export has no {type(step).__name__} ({step.name})", "report it")

    def _convolution(self, step: Convolution) -> None:
        spatial = len(self._value(step.inputs[0]).shape) - 1
        weight = self.network.array(step, "weight")
        # One-dimensional values are convolved as such: the reference's height of 1 goes.
        weight = weight if spatial == 2 else weight[:, :, 0]
        pads = _pads(step.padding) if spatial == 2 else [step.padding[2], step.padding[3]]
        self._arithmetic(
            step,
            "Conv",
            self._weighted(step, weight),
            kernel_shape=weight.shape[2:],
            strides=step.stride[-spatial:],
            dilations=step.dilation[-spatial:],
            pads=pads,
            group=step.groups,
        )

    def _linear(self, step: Linear) -> None:
        data, weight, bias = self._weighted(step, self.network.array(step, "weight"))
        if len(self._value(step.inputs[0]).shape) == 1:
            self._arithmetic(step, "Gemm", [data, weight, bias], transB=1)
            return
        transposed, product = f"{step.name}.transposed", f"{step.name}.product"
        self._node("Transpose", [weight], transposed, perm=[1, 0])
        self._node("MatMul", [data, transposed], product)
        self._arithmetic(step, "Add", [product, bias])

    def _weighted(self, step: Weighted, weight: Array) -> list[str]:
        """Names of the dequantized input, weight and bias; the bias without the input's zero point."""
        source, target = self._value(step.inputs[0]), self._value(step.output)
        steps = self.network.array(step, "shift").astype(np.float64)
        ratio = self.network.array(step, "multiplier").astype(np.float64) / np.exp2(steps)
        scale = ratio * target.scale / source.scale
        axes = tuple(range(1, weight.ndim))
        unfolded = self.network.array(step, "bias").astype(np.int64) + source.zero * weight.astype(np.int64).sum(axes)
        (data,) = self._dequantized(step.inputs)
        return [
            data,
            self._dequantized_constant(f"{step.name}.weight", weight.astype(np.int8), scale),
            self._dequantized_constant(f"{step.name}.bias", unfolded.astype(np.int32), scale * source.scale),
        ]

    def _dequantized_constant(self, name: str, codes: Array, scale: Array) -> str:
        constants = [
            self._constant(f"{name}.codes", codes),
            self._constant(f"{name}.scale", scale.astype(np.float32)),
            self._constant(f"{name}.zero", np.zeros(len(scale), dtype=codes.dtype)),
        ]
        self._node("DequantizeLinear", constants, name, axis=0)
        return name

    def _add(self, step: Add) -> None:
        first, second = self._dequantized(step.inputs)
        # A difference has a negative multiplier.
        self._arithmetic(step, "Add" if step.multipliers[1] > 0 else "Sub", [first, second])

    def _mean(self, step: Mean) -> None:
        inputs = self._dequantized(step.inputs)
        if len(self._value(step.inputs[0]).shape) == 3 and step.axes == (1, 2):
            # onnxruntime has an integer kernel for this mean, and none for the general one.
            self._global_mean(step, inputs)
        else:
            self._arithmetic(step, "ReduceMean", inputs, axes=[axis + 1 for axis in step.axes], keepdims=int(step.keep))

    def _global_mean(self, step: Mean, inputs: Sequence[str]) -> None:
        if step.keep:
            self._arithmetic(step, "GlobalAveragePool", inputs)
            return
        value = self._value(step.output)
        pooled = f"{step.output}.pooled"
        shape = self._constant(f"{step.name}.shape", np.array([-1, *value.shape], dtype=np.int64))
        self._arithmetic(step, "GlobalAveragePool", inputs, target=pooled)
        self._node("Reshape", [pooled, shape], step.output)

    def _table(self, step: Table) -> None:
        table = self.network.array(step, "table").astype(np.int16) + _SHIFT
        index = f"{step.name}.index"
        self._node("Cast", step.inputs, index, to=TensorProto.INT32)
        constant = self._constant(f"{step.name}.table", table.astype(np.uint8))
        self._node("Gather", [constant, index], step.output, axis=0)

    def _pad(self, step: Pad) -> None:
        before, after = zip((0, 0), *step.padding, strict=True)
        pads = self._constant(f"{step.name}.pads", np.array([*before, *after], dtype=np.int64))
        filled = self._constant(f"{step.name}.value", np.array(step.value + _SHIFT, dtype=np.uint8))
        self._node("Pad", [*step.inputs, pads, filled], step.output)

    def _arithmetic(
        self, step: Clamped, operator: str, inputs: Sequence[str], *, target: str = "", **attributes: Any
    ) -> None:
        """A floating operator whose result is clamped and quantized; `target` names it (default: the step's output)."""
        value = self._value(step.output)
        made = f"{step.output}.made"
        self._node(operator, inputs, made, **attributes)
        if (step.low, step.high) != (LOWEST, HIGHEST):
            bounds = [
                self._constant(f"{step.name}.{name}", np.array((code - value.zero) * value.scale, dtype=np.float32))
                for name, code in (("low", step.low), ("high", step.high))
            ]
            self._node("Clip", [made, *bounds], f"{step.output}.clipped")
            made = f"{step.output}.clipped"
        self._quantize(made, step.output, target or step.output)

    def _quantize(self, name: str, value: str, target: str) -> None:
        self._node("QuantizeLinear", [name, *self._grid(value)], target)

    def _dequantized(self, names: Sequence[str]) -> list[str]:
        made = []
        for name in names:
            target = f"{_float(name)}.{len(self.nodes)}"
            self._node("DequantizeLinear", [name, *self._grid(name)], target)
            made.append(target)
        return made

    def _grid(self, name: str) -> list[str]:
        """Names of the scale and the zero point of a value; values on one grid share them."""
        value = self._value(name)
        scale, zero = f"scale.{value.scale!r}", f"zero.{value.zero}"
        return [
            self._constant(scale, np.array(value.scale, dtype=np.float32)),
            self._constant(zero, np.array(value.zero + _SHIFT, dtype=np.uint8)),
        ]

    def _value(self, name: str) -> Value:
        return self.network.program.values[name]

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        given: dict[str, Any] = {
            name: list(item) if isinstance(item, tuple) else item for name, item in attributes.items()
        }
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{output}:{operator}", **given))

    def _constant(self, name: str, array: Array) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    @staticmethod
    def _port(name: str, value: Value) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *value.shape])


def _float(name: str) -> str:
    return f"{name}.float"


def _pads(padding: tuple[int, int, int, int]) -> list[int]:
    """(above, below, left, right) in ONNX's order: starts, then ends."""
    above, below, left, right = padding
    return [above, left, below, right]
