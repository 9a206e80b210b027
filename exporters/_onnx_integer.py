"""An integer network as ONNX: every arithmetic operation between `DequantizeLinear` and `QuantizeLinear`.

onnxruntime fuses these triples into its integer kernels. Codes are stored unsigned (q + 128), for which its x86 kernels
are made; that changes no number. Every scale follows from multipliers and shifts, so nothing is decided here. What
moves codes without computing works on the codes themselves, as do clamps, and a table is a `Gather`: all exact. Where
onnxruntime computes, it multiplies by scales of float32, with 24 bits, and rounds halves to even, where we multiply by
integers of up to 31 bits and round halves up: of one operation single codes differ, by one.

Weights of 4 and 2 bits are stored as INT4 and cast to INT8. onnxruntime casts once, as it loads, and keeps its integer
kernels; with INT4 directly behind `DequantizeLinear` it falls back to floating convolutions. Weights that are entries
of a table are stored as UINT4 numbers with the table, and looked up as it loads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from effcli.errors import MachineError, UnsupportedError, writing
from effcli.graphs import executor
from effcli.graphs.integer import (
    HIGHEST,
    LOWEST,
    Add,
    AveragePool,
    Clamped,
    Concatenate,
    Constant,
    Convolution,
    Embedding,
    IntegerNetwork,
    LayerNorm,
    Linear,
    MatrixProduct,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Reshape,
    Slice,
    Softmax,
    Table,
    Transpose,
    Value,
    Weighted,
)
from effcli.platform import onnx_session
from effcli.reports.units import count

FILE_NAME = "model.onnx"
# Of 8-bit weights, which more versions of onnxruntime read, and the first with INT4.
OPSET, OPSET_INT4 = 17, 21
REMARK = (
    "x86 processors without VNNI instructions saturate sums of two int8 products: there set session.x64quantprecision=1"
)
_IR, _IR_INT4 = 8, 10
# Random inputs of a comparison, and inputs that run at once: activations of large images fill the memory.
_COMPARED, _BATCH = 64, 16
# Codes are stored as q + 128.
_SHIFT = 128
# Largest ‖a - b‖ / ‖b‖ over all outputs that rounding can explain.
_ROUGH = 0.3

Array = NDArray[Any]


def export_integer(source: Path, folder: Path) -> str:
    """Write the integer network `source` to `folder/model.onnx`; what onnxruntime makes of it, in one line.

    Raises `MachineError` when onnxruntime computes something else than the reference executor.
    """
    network = IntegerNetwork.read(source)
    model = translate(network)
    with writing(folder):
        onnx.save(model, folder / FILE_NAME)
    narrow = sum(step.weight_bits < 8 for step in network.program.steps if isinstance(step, Weighted))
    stored = f"; {count(narrow, 'layer')} of fewer than 8 bits stored as INT4, multiplied as INT8" if narrow else ""
    return compare(network, folder) + stored


def translate(network: IntegerNetwork) -> onnx.ModelProto:
    """The ONNX model of a network: floating inputs and outputs, `input` and `output`, integers between."""
    model = _Writer(network).model()
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(network: IntegerNetwork, folder: Path) -> str:
    """Run the file in onnxruntime and the network in the reference executor, on the same inputs; one line on both.

    The inputs are those of calibration that the network carries, else random codes, far from what it will see.
    """
    value, output = network.input, network.output
    codes, kind = network.probe, "calibration"
    if codes is None:
        generator = np.random.default_rng(0)
        codes, kind = generator.integers(LOWEST, HIGHEST + 1, (_COMPARED, *value.shape), dtype=np.int8), "random"
    session = onnx_session.open_session(folder, entries=onnx_session.EXACT)
    parts = []
    for start in range(0, len(codes), _BATCH):
        inputs = (codes[start : start + _BATCH].astype(np.float32) - value.zero) * np.float32(value.scale)
        (found,) = onnx_session.run(session, {"input": inputs}).values()
        parts.append((executor.run_float(network, inputs), found))
    ours, theirs = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
    difference = np.abs(theirs - ours)
    # One step everywhere is rounding, however small the outputs are.
    allowed = _ROUGH * np.linalg.norm(ours) + output.scale * np.sqrt(ours.size)
    if not np.linalg.norm(difference) <= allowed:
        raise MachineError(
            f"onnxruntime computes something else: outputs differ by up to {difference.max():.2g} of "
            f"{np.abs(ours).max():.2g}",
            REMARK,
        )
    findings = []
    if len(output.shape) == 1 and output.shape != value.shape:
        findings.append(f"top-1 agreement {np.mean(ours.argmax(1) == theirs.argmax(1)):.1%}")
    steps = difference / output.scale
    findings.append(f"largest difference {count(round(steps.max()), 'step')} of {output.scale:.2g}")
    findings.append(f"{np.mean(steps < 0.5):.1%} equal")
    on = f"on {count(len(codes), f'{kind} input')}"
    return f"{onnx_session.version()}, opset {_opset(network)}, {on}: {', '.join(findings)}"


def _opset(network: IntegerNetwork) -> int:
    steps = network.program.steps
    return OPSET_INT4 if any(isinstance(step, Weighted) and step.weight_bits < 8 for step in steps) else OPSET


class _Writer:
    """Translates a program step by step. The codes of a value carry its name, what is made on the way a suffix."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def model(self) -> onnx.ModelProto:
        program = self.network.program
        start, end = self._value(program.input), self._value(program.output)
        self._node("QuantizeLinear", ["input", *self._grid(program.input)], _codes(program.input))
        for step in program.steps:
            self._step(step)
        self._node("DequantizeLinear", [_codes(program.output), *self._grid(program.output)], "output")
        graph = helper.make_graph(
            self.nodes,
            "effcli",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *start.shape])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", *end.shape])],
            list(self.constants.values()),
        )
        opset = _opset(self.network)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            producer_name="effcli",
            producer_version=version("effcli"),
            ir_version=_IR if opset == OPSET else _IR_INT4,
        )
        helper.set_model_props(model, {"effcli.origin": self.network.facts.origin, "effcli.opset": str(opset)})
        return model

    def _step(self, step: Operation) -> None:
        inputs, output = [_codes(name) for name in step.inputs], _codes(step.output)
        match step:
            case Convolution():
                self._convolution(step)
            case Linear():
                self._linear(step)
            case Add():
                # The scales make up for both inputs' own; a difference has a negative one.
                unit = self._value(step.output).scale / 2.0**step.shift
                self._arithmetic(step, "Add", [multiplier * unit for multiplier in step.multipliers])
            case Multiply():
                second = self._value(step.inputs[1]).scale
                self._arithmetic(step, "Mul", [self._unit(step) / second, second])
            case MatrixProduct():
                second = self._value(step.inputs[1]).scale
                self._arithmetic(step, "MatMul", [self._unit(step) / second, second])
            case Softmax():
                self._arithmetic(step, "Softmax", [self._value(step.inputs[0]).scale], axis=-1)
            case LayerNorm():
                self._layer_norm(step)
            case AveragePool():
                data, pads = self._padding(step, self._value(step.inputs[0]).zero)
                windows: dict[str, Any] = {"kernel_shape": step.kernel, "strides": step.stride, "pads": pads}
                scale = self._unit(step) * math.prod(step.kernel)
                self._arithmetic(step, "AveragePool", [scale], [data], count_include_pad=1, **windows)
            case Mean():
                self._mean(step)
            case MaxPool():
                data, pads = self._padding(step, LOWEST)
                windows = {"kernel_shape": step.kernel, "strides": step.stride, "dilations": step.dilation}
                self._node("MaxPool", [data], output, pads=pads, **windows)
            case Table() | Embedding():
                self._look_up(step)
            case Constant():
                self._repeat(step)
            case Pad():
                self._pad(step.name, inputs[0], output, step.padding, step.value)
            case Concatenate():
                self._node("Concat", inputs, output, axis=step.axis + 1)
            case Slice():
                ends = {"starts": step.start, "ends": step.stop, "axes": step.axis + 1, "steps": step.step}
                constants = [self._integers(f"{step.name}.{name}", [number]) for name, number in ends.items()]
                self._node("Slice", [*inputs, *constants], output)
            case Reshape():
                # A zero keeps the extent of the input, here the batch.
                self._reshape(step.name, inputs[0], output, [0, *self._value(step.output).shape])
            case Transpose():
                self._node("Transpose", inputs, output, perm=[0, *(axis + 1 for axis in step.axes)])
            case _:
                raise UnsupportedError(f"ONNX export has no {type(step).__name__} ({step.name})", "report it")

    def _convolution(self, step: Convolution) -> None:
        above, below, left, right = step.padding
        self._arithmetic(
            step,
            "Conv",
            [self._value(step.inputs[0]).scale],
            rest=self._constants_of(step),
            kernel_shape=self.network.array(step, "weight").shape[2:],
            strides=step.stride,
            dilations=step.dilation,
            pads=[above, left, below, right],
            group=step.groups,
        )

    def _linear(self, step: Linear) -> None:
        """A `Gemm`, which has an integer kernel with a bias; further axes are moved into the batch, and back."""
        source, target = self._value(step.inputs[0]), self._value(step.output)
        data, result = _codes(step.inputs[0]), _codes(step.output)
        flat = len(source.shape) == 1
        if not flat:
            data, result = f"{step.name}.rows", f"{step.name}.products"
            self._reshape(data, _codes(step.inputs[0]), data, [-1, source.shape[-1]])
        rest = self._constants_of(step)
        self._arithmetic(step, "Gemm", [source.scale], [data], rest=rest, target=result, transB=1)
        if not flat:
            self._reshape(result, result, _codes(step.output), [-1, *target.shape])

    def _constants_of(self, step: Weighted) -> tuple[str, str]:
        """Names of the dequantized weight and bias; the bias without the input's zero point."""
        source, target = self._value(step.inputs[0]), self._value(step.output)
        weight = self.network.array(step, "weight")
        ratio = self.network.array(step, "multiplier") / np.exp2(self.network.array(step, "shift").astype(np.float64))
        scale = ratio * target.scale / source.scale
        axes = tuple(range(1, weight.ndim))
        # Where |bias| + 128 · Σ|weight| fits 32 bits, as in any sum that stays inside them, so does this.
        unfolded = self.network.array(step, "bias").astype(np.int64) + source.zero * weight.astype(np.int64).sum(axes)
        codes = f"{step.name}.weight.codes"
        if self.network.codebook(step) is not None:
            self._entries(step, codes)
        elif step.weight_bits < 8:
            narrow = f"{step.name}.weight.narrow"
            self.constants[narrow] = _halves(narrow, weight, TensorProto.INT4)
            self._node("Cast", [narrow], codes, to=TensorProto.INT8)
        else:
            self._constant(codes, weight)
        bias = self._constant(f"{step.name}.bias.codes", unfolded.astype(np.int32))
        return (
            self._restored(f"{step.name}.weight", codes, scale, np.int8),
            self._restored(f"{step.name}.bias", bias, scale * source.scale, np.int32),
        )

    def _entries(self, step: Weighted, target: str) -> None:
        """The weights of a step as entries of its table: of one for all channels, or of one for each."""
        table, name = self.network.codebook(step), f"{step.name}.weight"
        assert table is not None
        numbers, index = f"{name}.numbers", f"{name}.index"
        shape = self.network.array(step, "weight").shape
        whole = shape if len(table) == 1 else (shape[0], math.prod(shape[1:]))
        self.constants[numbers] = _halves(numbers, self.network.codes(step).reshape(whole), TensorProto.UINT4)
        self._node("Cast", [numbers], index, to=TensorProto.INT32)
        if len(table) == 1:
            self._node("Gather", [self._constant(f"{name}.table", table[0]), index], target)
            return
        found = f"{name}.found"
        self._node("GatherElements", [self._constant(f"{name}.table", table), index], found, axis=1)
        self._reshape(found, found, target, shape)

    def _restored(self, name: str, codes: str, scale: Array, dtype: type[np.signedinteger[Any]]) -> str:
        """Symmetric codes with one scale for each entry of the first axis, dequantized as `name`."""
        constants = [
            self._constant(f"{name}.scale", scale.astype(np.float32)),
            self._constant(f"{name}.zero", np.zeros(len(scale), dtype)),
        ]
        self._node("DequantizeLinear", [codes, *constants], name, axis=0)
        return name

    def _mean(self, step: Mean) -> None:
        source, target = self._value(step.inputs[0]), self._value(step.output)
        scale = self._unit(step) * math.prod(source.shape[axis] for axis in step.axes)
        if len(source.shape) != 3 or set(step.axes) != {1, 2}:
            axes = [axis + 1 for axis in step.axes]
            self._arithmetic(step, "ReduceMean", [scale], axes=axes, keepdims=int(step.keep))
        elif step.keep:
            # onnxruntime has an integer kernel for this mean, and none for the general one.
            self._arithmetic(step, "GlobalAveragePool", [scale])
        else:
            pooled = f"{step.name}.pooled"
            self._arithmetic(step, "GlobalAveragePool", [scale], target=pooled)
            self._reshape(pooled, pooled, _codes(step.output), [0, *target.shape])

    def _look_up(self, step: Table | Embedding) -> None:
        """A number or a row for each code, exactly."""
        table = self.network.array(step, "table").astype(np.int16) + _SHIFT
        index = f"{step.name}.index"
        self._node("Cast", [_codes(step.inputs[0])], index, to=TensorProto.INT32)
        constant = self._constant(f"{step.name}.table", table.astype(np.uint8))
        self._node("Gather", [constant, index], _codes(step.output), axis=0)

    def _repeat(self, step: Constant) -> None:
        """A constant once for each input of the batch, as `Concat` needs it."""
        batch, shape = f"{step.name}.batch", f"{step.name}.shape"
        self._node("Shape", [_codes(self.network.program.input)], batch, start=0, end=1)
        extents = self._value(step.output).shape
        self._node("Concat", [batch, self._integers(f"{step.name}.extents", extents)], shape, axis=0)
        stored = self.network.array(step, "value").astype(np.int16) + _SHIFT
        value = self._constant(f"{step.name}.value", stored.astype(np.uint8))
        self._node("Expand", [value, shape], _codes(step.output))

    def _layer_norm(self, step: LayerNorm) -> None:
        source, target = self._value(step.inputs[0]), self._value(step.output)
        unit = target.scale / 2.0**step.shift
        parameters = [
            self._constant(f"{step.name}.{name}", (self.network.array(step, name) * unit).astype(np.float32))
            for name in ("multiplier", "bias")
        ]
        epsilon = step.epsilon / 2.0**16 * (source.scale / source.shape[-1]) ** 2
        self._arithmetic(step, "LayerNormalization", [source.scale], rest=parameters, axis=-1, epsilon=epsilon)

    def _padding(self, step: MaxPool | AveragePool, value: int) -> tuple[str, list[int]]:
        """The codes that a pool reads and its `pads`: padded before where onnxruntime's pools would refuse it."""
        above, below, left, right = step.padding
        data = _codes(step.inputs[0])
        if max(above, below) < step.kernel[0] and max(left, right) < step.kernel[1]:
            return data, [above, left, below, right]
        padded = f"{step.name}.padded"
        self._pad(padded, data, padded, ((0, 0), (above, below), (left, right)), value)
        return padded, [0] * 4

    def _pad(self, name: str, data: str, target: str, padding: Sequence[tuple[int, int]], value: int) -> None:
        """Constant padding of codes by (before, after) of each axis but the batch's."""
        before, after = zip((0, 0), *padding, strict=True)
        pads = self._integers(f"{name}.pads", [*before, *after])
        self._node("Pad", [data, pads, self._constant(f"{name}.value", np.array(value + _SHIFT, np.uint8))], target)

    def _reshape(self, name: str, data: str, target: str, shape: Sequence[int]) -> None:
        self._node("Reshape", [data, self._integers(f"{name}.shape", shape)], target)

    def _unit(self, step: Multiply | MatrixProduct | AveragePool | Mean) -> float:
        """What one of the integers that a step sums up is worth, as its multiplier and shift have it."""
        return step.multiplier / 2.0**step.shift * self._value(step.output).scale

    def _arithmetic(
        self,
        step: Clamped | Softmax,
        operator: str,
        scales: Sequence[float],
        data: Sequence[str] = (),
        *,
        rest: Sequence[str] = (),
        target: str = "",
        **attributes: Any,
    ) -> None:
        """A floating operator on dequantized codes, its result quantized and clamped.

        scales: of each input; data: their codes (default: the step's inputs); rest: further inputs, floating; target:
        codes of the result (default: the step's output).
        """
        target = target or _codes(step.output)
        given = data or [_codes(name) for name in step.inputs]
        inputs = []
        for index, (codes, name, scale) in enumerate(zip(given, step.inputs, scales, strict=True)):
            inputs.append(f"{step.name}.input{index}")
            self._node("DequantizeLinear", [codes, self._scale(scale), self._zero(name)], inputs[-1])
        result = f"{step.name}.result"
        self._node(operator, [*inputs, *rest], result, **attributes)
        low, high = (step.low, step.high) if isinstance(step, Clamped) else (LOWEST, HIGHEST)
        whole = (low, high) == (LOWEST, HIGHEST)
        quantized = target if whole else f"{step.name}.whole"
        self._node("QuantizeLinear", [result, *self._grid(step.output)], quantized)
        if not whole:
            # On the codes: clamped before, a result leaves no triple to fuse.
            bounds = [
                self._constant(f"{step.name}.{name}", np.array(bound + _SHIFT, np.uint8))
                for name, bound in (("low", low), ("high", high))
            ]
            self._node("Clip", [quantized, *bounds], target)

    def _grid(self, name: str) -> list[str]:
        return [self._scale(self._value(name).scale), self._zero(name)]

    def _scale(self, scale: float) -> str:
        """A constant of no axes, as fusing demands; equal ones are stored once."""
        return self._constant(f"scale:{scale!r}", np.array(scale, np.float32))

    def _zero(self, name: str) -> str:
        """The zero point of a value, of no axes."""
        zero = self._value(name).zero
        return self._constant(f"zero:{zero}", np.array(zero + _SHIFT, np.uint8))

    def _integers(self, name: str, numbers: Sequence[int]) -> str:
        return self._constant(name, np.array(numbers, np.int64))

    def _constant(self, name: str, array: Array) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def _value(self, name: str) -> Value:
        return self.network.program.values[name]

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        given: dict[str, Any] = {
            name: list(item) if isinstance(item, tuple) else item for name, item in attributes.items()
        }
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=f"{output}:{operator}", **given))


def _halves(name: str, codes: Array, kind: int) -> onnx.TensorProto:
    """Codes of `kind` INT4, from -8 to 7, or UINT4, from 0 to 15: two to a byte, the first in the low half."""
    halves = np.append(codes.reshape(-1).view(np.uint8) & 15, np.zeros(codes.size % 2, np.uint8))
    packed = halves[::2] | halves[1::2] << 4
    return helper.make_tensor(name, kind, codes.shape, packed.tobytes(), raw=True)


def _codes(name: str) -> str:
    """The codes of a value in the file, where no name of the network meets one of ours."""
    return f"{name}:codes"
