"""IntegerNetwork: a network as a list of integer operations, the contract between quantization and every exporter.

A tensor of int8 codes q stands for scale · (q - zero). An operation is defined by integers alone: weights, int32 biases
into which the input's zero point is folded, multipliers and shifts. `effcli.graphs.executor` is its meaning; exporters
translate it without a floating-point decision left to make.

Rounding is declared here and nowhere else: `rescale` is the only place where bits are dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors.numpy import load_file, save_file

from effcli.checkpoint import read_config, write_text
from effcli.contract import Options
from effcli.errors import CheckpointError, NumericsError, first_line, writing
from effcli.formats import pack_bits, unpack_bits
from effcli.graphs.graph import Facts
from effcli.storage import LAYOUT_VERSION, OWN_TYPE, holds

FILE_NAME = "integer.json"
WEIGHTS_NAME = "effcli.safetensors"
PROBE_NAME = "probe.npz"
LOWEST, HIGHEST = -128, 127

Array = NDArray[Any]
Pair = tuple[int, int]

# The multipliers of an addition fit 16 bits, so that one dual multiply-accumulate serves both terms; 2^22 keeps a zero
# point times 2^shift inside 32 bits.
_ADD_BITS = 15
_ADD_SHIFT = 22


def rescale(values: Array, multiplier: Array | int, shift: Array | int) -> Array:
    """⌊(v · multiplier + 2^(shift-1)) / 2^shift⌋, the rounding of every operation: to nearest, halves upwards.

    values: integers of 32 bits; multiplier: 0 to 2^31 - 1, shift: 1 to 62, both numbers or shaped to meet the values.
    Computed in int64, in which the product of an int32 and a multiplier is exact; with shift 32 it is the high word of
    a 64-bit product with rounding.
    """
    shifts = np.asarray(shift, dtype=np.int64)
    result: Array = np.multiply(values, np.asarray(multiplier, dtype=np.int64), dtype=np.int64)
    result += np.int64(1) << (shifts - 1)
    result >>= shifts
    return result


def requantizer(scale: float) -> tuple[int, int]:
    """(multiplier, shift) with multiplier / 2^shift next to `scale`, the ratio of accumulator to output scale.

    Shift 32 wherever at least 16 significant bits remain: a core's high-word multiply then rescales in one
    instruction. Elsewhere the multiplier is normalised to 31 bits. Raises `NumericsError` for a scale that is not
    positive, or so large that a single step passes the whole range.
    """
    if not 0 < scale < 2**16:
        raise NumericsError(f"a rescaling by {scale:g} is out of range", "calibrate on data of the network's own kind")
    if 2**-16 <= scale < 0.5 - 2**-33:
        return round(scale * 2**32), 32
    shift = min(30 - math.floor(math.log2(scale)), 62)
    multiplier = round(scale * 2**shift)
    return (multiplier, shift) if multiplier < 2**31 else (multiplier // 2, shift - 1)


def addition(first: float, second: float, zeros: tuple[int, int, int]) -> tuple[Pair, int, int]:
    """(multipliers, offset, shift) of an addition; `first` and `second` are the inputs' scales over the output's.

    zeros: of both inputs and the output. The output is (q₁·m₁ + q₂·m₂ + offset) rescaled by 2^-shift: the zero points
    and the output's own are folded into the offset, and there is one rounding. Every term fits int32.
    """
    largest = max(abs(first), abs(second))
    if not 0 < largest < 2 ** (_ADD_BITS - 2):
        raise NumericsError(f"an addition with the scale ratio {largest:g} is out of range", "calibrate on other data")
    shift = min(_ADD_BITS - 1 - math.floor(math.log2(largest)), _ADD_SHIFT)
    multipliers = round(first * 2**shift), round(second * 2**shift)
    if max(map(abs, multipliers)) >= 2**_ADD_BITS:
        shift -= 1
        multipliers = round(first * 2**shift), round(second * 2**shift)
    offset = (zeros[2] << shift) - zeros[0] * multipliers[0] - zeros[1] * multipliers[1]
    return multipliers, offset, shift


class Value(Options):
    """A tensor of int8 codes. shape: without the batch axis; it stands for scale · (q - zero)."""

    shape: tuple[int, ...]
    scale: float = Field(gt=0)
    zero: int = Field(ge=LOWEST, le=HIGHEST)


class Operation(Options):
    """One step: `inputs` and `output` name values. source: the line or node that it comes from, for messages."""

    name: str
    inputs: tuple[str, ...]
    output: str
    source: str = ""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The suffixes of the constants that belong to it, stored as `name.suffix`."""
        return ()


class Clamped(Operation):
    """An operation whose result is clamped to [low, high], into which a ReLU is fused."""

    low: int = Field(LOWEST, ge=LOWEST, le=HIGHEST)
    high: int = Field(HIGHEST, ge=LOWEST, le=HIGHEST)


class Weighted(Clamped):
    """Σ weight · q + bias, rescaled per output channel, plus the output's zero point, clamped.

    Arrays: weight int8; bias int32 (out,), with - zero · Σ weight of the input folded in; multiplier int32 (out,);
    shift uint8 (out,). layer: the layer it was made from. weight_bits: how its weights are stored.
    """

    layer: str
    weight_bits: Literal[2, 4, 8] = 8

    @property
    def arrays(self) -> tuple[str, ...]:
        return "weight", "bias", "multiplier", "shift"


class Convolution(Weighted):
    """A convolution of (channels, height, width), weight (out, in / groups, kernel height, kernel width).

    A 1-D convolution over (channels, length) has height 1 everywhere. padding: rows above and below, columns left and
    right, filled with the input's zero point.
    """

    op: Literal["convolution"] = "convolution"
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = Field(1, ge=1)


class Linear(Weighted):
    """A matrix product over the last axis, weight (out, in)."""

    op: Literal["linear"] = "linear"


class Add(Clamped):
    """(q₁·m₁ + q₂·m₂ + offset) / 2^shift, see `addition`; inputs broadcast as in NumPy."""

    op: Literal["add"] = "add"
    multipliers: Pair
    offset: int
    shift: int


class Multiply(Clamped):
    """(q₁ - zero₁)(q₂ - zero₂) rescaled, plus the output's zero point; inputs broadcast as in NumPy."""

    op: Literal["multiply"] = "multiply"
    multiplier: int
    shift: int


class MaxPool(Operation):
    """The largest code in each window; padding never wins. Input and output share one scale."""

    op: Literal["max_pool"] = "max_pool"
    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)


class AveragePool(Clamped):
    """Σ (q - zero) of each window rescaled, plus the output's zero point; the multiplier holds 1 / window size.

    Padding counts as zeros.
    """

    op: Literal["average_pool"] = "average_pool"
    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    multiplier: int
    shift: int


class Mean(Clamped):
    """Σ (q - zero) over `axes` (of the shape without batch) rescaled, plus the output's zero point."""

    op: Literal["mean"] = "mean"
    axes: tuple[int, ...]
    keep: bool = Field(False, description="Keep the axes with extent 1.")
    multiplier: int
    shift: int


class Table(Operation):
    """Any function of one number: output code = table[q + 128]. Arrays: table int8 (256,)."""

    op: Literal["table"] = "table"
    function: str = Field(description="what it computes, e.g. 'sigmoid' or 'requantize'")

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("table",)


class Pad(Operation):
    """Constant padding. padding: (before, after) of each axis; value: the code to fill in."""

    op: Literal["pad"] = "pad"
    padding: tuple[Pair, ...]
    value: int


class Concatenate(Operation):
    """Values of one scale, one after the other along `axis`."""

    op: Literal["concatenate"] = "concatenate"
    axis: int


class Slice(Operation):
    """Every `step`-th entry from `start` to before `stop` along `axis`."""

    op: Literal["slice"] = "slice"
    axis: int
    start: int
    stop: int
    step: int = Field(1, ge=1)


class Reshape(Operation):
    """The same codes in the output's shape."""

    op: Literal["reshape"] = "reshape"


class Transpose(Operation):
    """The axes in another order."""

    op: Literal["transpose"] = "transpose"
    axes: tuple[int, ...]


Step = Annotated[
    Convolution
    | Linear
    | Add
    | Multiply
    | MaxPool
    | AveragePool
    | Mean
    | Table
    | Pad
    | Concatenate
    | Slice
    | Reshape
    | Transpose,
    Field(discriminator="op"),
]


class Program(Options):
    """The operations in the order in which they run, and the values between them."""

    input: str
    output: str
    values: dict[str, Value]
    steps: tuple[Step, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Program:
        known = {self.input}
        for step in self.steps:
            for name in step.inputs:
                if name not in known:
                    raise ValueError(f"{step.name} reads {name}, which nothing has written before")
            if step.output in known:
                raise ValueError(f"{step.output} is written twice")
            known.add(step.output)
        if known != self.values.keys() or self.output not in known:
            raise ValueError("values and steps do not fit together")
        return self


class IntegerNetwork:
    """A program with its constants, by `step.suffix`, and what is to be known of the network.

    probe: a few calibration inputs as codes int8 (n, *input shape), on which exports are compared; None without any.
    """

    def __init__(self, program: Program, arrays: Mapping[str, Array], facts: Facts, probe: Array | None = None) -> None:
        self.program = program
        self.arrays = dict(arrays)
        self.facts = facts
        self.probe = probe
        if probe is not None and (probe.dtype != np.int8 or probe.shape[1:] != self.input.shape or not len(probe)):
            raise CheckpointError(
                f"the probe holds {probe.dtype} {probe.shape} for a network that takes int8 {self.input.shape}",
                "quantize the network again",
            )
        for step in program.steps:
            for suffix in step.arrays:
                if f"{step.name}.{suffix}" not in self.arrays:
                    raise CheckpointError(f"the constant {step.name}.{suffix} is missing", "quantize the network again")

    def array(self, step: Operation, suffix: str) -> Array:
        return self.arrays[f"{step.name}.{suffix}"]

    @property
    def input(self) -> Value:
        return self.program.values[self.program.input]

    @property
    def output(self) -> Value:
        return self.program.values[self.program.output]

    def quantize(self, inputs: Array) -> Array:
        """Floating inputs (n, *shape) as int8 codes: x / scale rounded to nearest, halves to even, plus zero."""
        codes = np.rint(inputs / self.input.scale) + self.input.zero
        result: Array = np.clip(codes, LOWEST, HIGHEST).astype(np.int8)
        return result

    def dequantize(self, codes: Array) -> Array:
        """Output codes as float32."""
        result: Array = (codes.astype(np.float32) - self.output.zero) * np.float32(self.output.scale)
        return result

    def save(self, folder: Path) -> None:
        """Write the network as a checkpoint into `folder`, which exists; weights below 8 bits are packed."""
        stored = dict(self.arrays)
        for step in self.program.steps:
            if isinstance(step, Weighted) and step.weight_bits < 8:
                codes = torch.from_numpy(self.array(step, "weight").reshape(len(self.array(step, "bias")), -1))
                packed = pack_bits(codes.short() + 2 ** (step.weight_bits - 1), step.weight_bits)
                stored[f"{step.name}.weight"] = packed.numpy()
        shapes = {f"{step.name}.weight": list(self.array(step, "weight").shape) for step in self._weighted()}
        file = folder / WEIGHTS_NAME
        with writing(file):
            save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, file)
        with writing(folder / PROBE_NAME):
            if self.probe is None:
                (folder / PROBE_NAME).unlink(missing_ok=True)
            else:
                np.savez_compressed(folder / PROBE_NAME, codes=self.probe)
        described = {"program": self.program.model_dump(mode="json"), "shapes": shapes}
        write_text(folder / FILE_NAME, json.dumps(described, indent=1) + "\n")
        own = {
            "version": LAYOUT_VERSION,
            "kind": "integer",
            "facts": self.facts.model_dump(mode="json"),
            "layers": {},
        }
        config = {"model_type": OWN_TYPE, "effcli": own}
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _weighted(self) -> list[Weighted]:
        return [step for step in self.program.steps if isinstance(step, Weighted)]

    @staticmethod
    def read(folder: Path) -> IntegerNetwork:
        """Read the checkpoint in `folder`; `CheckpointError` when it is damaged."""
        try:
            own = read_config(folder)["effcli"]
            described = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
            program = Program.model_validate(described["program"])
            arrays = load_file(folder / WEIGHTS_NAME)
            for step in program.steps:
                key = f"{step.name}.weight"
                if isinstance(step, Weighted) and step.weight_bits < 8:
                    shape = described["shapes"][key]
                    codes = unpack_bits(torch.from_numpy(arrays[key]), step.weight_bits, math.prod(shape[1:]))
                    signed = codes.numpy().astype(np.int16) - 2 ** (step.weight_bits - 1)
                    arrays[key] = signed.astype(np.int8).reshape(shape)
            return IntegerNetwork(program, arrays, Facts.model_validate(own["facts"]), _read_probe(folder))
        except CheckpointError:
            raise
        except Exception as error:  # whatever JSON, pydantic and safetensors say of a damaged file
            raise CheckpointError(
                f"{folder} holds no integer network: {first_line(error)}", "give a directory that an `int8` step wrote"
            ) from error


def _read_probe(folder: Path) -> Array | None:
    """The inputs beside the network in `folder`, None where there are none; never executes a pickle."""
    if not (folder / PROBE_NAME).is_file():
        return None
    with (folder / PROBE_NAME).open("rb") as file, np.load(file, allow_pickle=False) as stored:
        codes: Array = stored["codes"]
    return codes


def is_integer(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that `IntegerNetwork.save` wrote."""
    return holds(folder, FILE_NAME, "integer")
