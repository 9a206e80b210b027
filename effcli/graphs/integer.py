"""IntegerNetwork: a network as a list of integer operations, the contract between quantization and every exporter.

`effcli.graphs.operations` defines the operations by integers alone: weights, int32 biases into which the input's zero
point is folded, multipliers, shifts and tables. `effcli.graphs.executor` is their meaning; exporters translate them
without a floating-point decision left to make.

Weights may be entries of a small table, `step.codebook`. They are weights like any others to whoever computes with
them; a file, and whoever wants to save room, holds their numbers in the table instead, `IntegerNetwork.codes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.numpy import load_file, save_file

from effcli.errors import CheckpointError, first_line, writing
from effcli.files.checkpoint import read_config, replacing, write_text
from effcli.files.documents import check_model, read_model
from effcli.files.layout import LAYOUT_VERSION, OWN_TYPE, holds, own_part
from effcli.formats import pack_bits, unpack_bits
from effcli.graphs.graph import Facts
from effcli.graphs.operations import (
    HIGHEST,
    LOWEST,
    Add,
    Array,
    AveragePool,
    Clamped,
    Concatenate,
    Constant,
    Convolution,
    Embedding,
    LayerNorm,
    Linear,
    MatrixProduct,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Pair,
    Reshape,
    Slice,
    Softmax,
    Step,
    Table,
    Transpose,
    Value,
    Weighted,
    addition,
    requantizer,
    rescale,
    softmax_bits,
)
from effcli.graphs.rows import look_up, numbers_in
from effcli.graphs.soundness import check
from effcli.options import Options

FILE_NAME = "integer.json"
WEIGHTS_NAME = "effcli.safetensors"
PROBE_NAME = "probe.npz"
# The suffix of the table that a step's weights may be entries of.
CODEBOOK = "codebook"
_REMEDY = "give a directory that an `int8` step wrote"


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


class _Document(Options):
    """`integer.json`. shapes: of the weights, which are stored packed; codebooks: the steps that have one."""

    program: Program
    shapes: dict[str, list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]]]
    codebooks: tuple[str, ...] = ()


class IntegerNetwork:
    """A program with its constants, by `step.suffix`, and what is to be known of the network.

    A weighted step whose weights are entries of a table has it as a further constant `codebook`, int8 (1, entries) or
    (out, entries); its `weight_bits` are those of the entries' numbers.
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

    def parameters(self) -> list[Array]:
        """The constants that stand for the network's parameters, scales and tables of functions left out."""
        suffixes = ("weight", "bias", "value")
        return [self.array(step, name) for step in self.program.steps for name in suffixes if name in step.arrays]

    @property
    def macs(self) -> int:
        """Multiplications of all layers for one input."""
        weighted = (step for step in self.program.steps if isinstance(step, Weighted))
        return sum(
            math.prod(self.program.values[step.output].shape) * self.array(step, "weight")[0].size for step in weighted
        )

    def codebook(self, step: Weighted) -> Array | None:
        """The table int8 (1 or out, entries) of a step's weights, None where they are stored themselves."""
        return self.arrays.get(f"{step.name}.{CODEBOOK}")

    def codes(self, step: Weighted) -> Array:
        """The numbers uint8 (out, n) of a step's weights in its codebook. `CheckpointError` where it lacks one."""
        table, weight = self.codebook(step), self.array(step, "weight")
        assert table is not None
        try:
            return numbers_in(table, weight.reshape(len(weight), -1))
        except ValueError as error:
            raise CheckpointError(f"{step.name}: {error}", "quantize the network again") from error

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
                if self.codebook(step) is None:
                    weight = self.array(step, "weight").reshape(len(self.array(step, "bias")), -1)
                    codes = torch.from_numpy(weight).short() + 2 ** (step.weight_bits - 1)
                else:
                    codes = torch.from_numpy(self.codes(step))
                stored[f"{step.name}.weight"] = pack_bits(codes, step.weight_bits).numpy()
        shapes = {f"{step.name}.weight": list(self.array(step, "weight").shape) for step in self._weighted()}
        with replacing(folder / WEIGHTS_NAME) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, temporary)
        with writing(folder / PROBE_NAME):
            if self.probe is None:
                (folder / PROBE_NAME).unlink(missing_ok=True)
            else:
                np.savez_compressed(folder / PROBE_NAME, codes=self.probe)
        described: dict[str, object] = {"program": self.program.model_dump(mode="json"), "shapes": shapes}
        looked_up = [step.name for step in self._weighted() if self.codebook(step) is not None]
        if looked_up:
            described["codebooks"] = looked_up
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
            own = own_part(read_config(folder))
            facts = check_model(Facts, own.facts, "effcli.facts in config.json", remedy=_REMEDY)
            described = read_model(_Document, folder / FILE_NAME, remedy=_REMEDY)
            program = described.program
            arrays = load_file(folder / WEIGHTS_NAME)
            for step in program.steps:
                key = f"{step.name}.weight"
                if isinstance(step, Weighted) and step.weight_bits < 8:
                    shape = described.shapes[key]
                    rows, numbers = (shape or [0])[0], math.prod(shape[1:])
                    if arrays[key].dtype != np.int32 or arrays[key].shape != (
                        rows,
                        math.ceil(numbers * step.weight_bits / 32),
                    ):
                        raise ValueError(f"{key} is not packed as {shape}")
                    codes = unpack_bits(torch.from_numpy(arrays[key]), step.weight_bits, numbers).numpy()
                    if step.name in described.codebooks:
                        weight = look_up(arrays[f"{step.name}.{CODEBOOK}"], codes)
                    else:
                        weight = (codes.astype(np.int16) - 2 ** (step.weight_bits - 1)).astype(np.int8)
                    arrays[key] = weight.reshape(shape)
            for step in program.steps:
                constants = {suffix: arrays[f"{step.name}.{suffix}"] for suffix in step.arrays}
                shapes = [program.values[name].shape for name in step.inputs]
                check(step, shapes, program.values[step.output].shape, constants)
            return IntegerNetwork(program, arrays, facts, _read_probe(folder))
        except CheckpointError:
            raise
        except Exception as error:  # whatever JSON, pydantic and safetensors say of a damaged file
            raise CheckpointError(f"{folder} holds no integer network: {first_line(error)}", _REMEDY) from error


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


__all__ = [
    "CODEBOOK",
    "FILE_NAME",
    "HIGHEST",
    "LOWEST",
    "PROBE_NAME",
    "WEIGHTS_NAME",
    "Add",
    "Array",
    "AveragePool",
    "Clamped",
    "Concatenate",
    "Constant",
    "Convolution",
    "Embedding",
    "IntegerNetwork",
    "LayerNorm",
    "Linear",
    "MatrixProduct",
    "MaxPool",
    "Mean",
    "Multiply",
    "Operation",
    "Pad",
    "Pair",
    "Program",
    "Reshape",
    "Slice",
    "Softmax",
    "Step",
    "Table",
    "Transpose",
    "Value",
    "Weighted",
    "addition",
    "is_integer",
    "requantizer",
    "rescale",
    "softmax_bits",
]
