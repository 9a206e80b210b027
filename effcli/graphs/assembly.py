"""An integer network while it is put together from a graph: its values, steps and constants so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from effcli.errors import NumericsError, UnsupportedError
from effcli.graphs.fusion import PROBABILITIES, Grid, bounds, fuse, is_constant, probabilities
from effcli.graphs.graph import Graph, where
from effcli.graphs.integer import (
    CODEBOOK,
    HIGHEST,
    LOWEST,
    Array,
    Constant,
    Operation,
    Pair,
    Program,
    Reshape,
    Value,
    Weighted,
    requantizer,
)
from effcli.graphs.rows import Rows, rows_of

Range = tuple[float, float]
Numbers = NDArray[np.float64]

REMEDY = "quantize its weights only, with `linear` or `awq`, or change the network"
# A range below this is as good as none: its scale would leave float32.
_NARROWEST = 1e-30
# The scale of a channel whose weights are all zero, in units that leave its bias 16 bits below one output code.
_SILENT = 2.0**-16
# Half of the range of int32 for the bias, the other half for the products.
_LARGEST_BIAS = 2.0**30


def quantization(low: float, high: float) -> tuple[float, int]:
    """(scale, zero) of codes that cover [low, high], with 0 exactly representable; the scale is a float32."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < _NARROWEST:
        return 1.0, LOWEST
    scale = float(np.float32((high - low) / (HIGHEST - LOWEST)))
    return scale, min(max(round(LOWEST - low / scale), LOWEST), HIGHEST)


class Assembly:
    """The steps so far, their constants by `step.suffix`, the values between them, and notes by layer.

    values: every value that a step has written, by name; a tensor of the graph has the name of its node.
    rounded_again: layers whose compressed weights had to be rounded again.
    """

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], clip_weights: bool) -> None:
        self.graph = graph
        self.fusion = fuse(graph)
        self.shapes = graph.shapes()
        self.values: dict[str, Value] = {}
        self.steps: list[Operation] = []
        self.arrays: dict[str, Array] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.rounded_again: list[str] = []
        self._clip_weights = clip_weights
        grouped = {self.fusion.groups[name]: found for name, found in ranges.items()}
        self._scales = {name: self._grid(group, grouped) for name, group in self.fusion.groups.items()}

    def _grid(self, group: str, ranges: Mapping[str, Range]) -> Grid:
        """Scale and zero point of a group of tensors, from what an operation demands or from its range."""
        demanded = self.fusion.grids.get(group)
        if demanded == PROBABILITIES and group in ranges:
            return probabilities(ranges[group][1])
        return demanded or quantization(*self.fusion.covering(group, *ranges[group]))

    def declare(self, name: str, shape: tuple[int, ...], like: str | None = None) -> Value:
        """A new value, with the scale of the tensor `name` of the graph, or that of the value `like`."""
        scale, zero = (self.values[like].scale, self.values[like].zero) if like else self._scales[name]
        self.values[name] = Value(shape=shape, scale=scale, zero=zero)
        return self.values[name]

    def source(self, node: fx.Node, index: int = 0) -> str:
        """The name of the value that `node` reads as its argument `index`."""
        return self._known(node, node.args[index])

    def _known(self, node: fx.Node, given: object) -> str:
        if not isinstance(given, fx.Node) or given.name not in self.values:
            raise UnsupportedError(f"{where(node)} takes {given}, which is no tensor of activations", REMEDY)
        return given.name

    def operand(self, node: fx.Node, given: object, axes: int) -> str:
        """The name of the value `given`, an argument of `node`; a constant becomes one with so many axes."""
        if isinstance(given, fx.Node) and is_constant(given):
            return self._constant(node, given, axes)
        return self._known(node, given)

    def _constant(self, node: fx.Node, given: fx.Node, axes: int) -> str:
        """A tensor of the network as a value without inputs: in the scale of its group, or of all its numbers."""
        tensor = self.tensor(given)
        shape = (1,) * (axes + 1 - tensor.ndim) + tuple(tensor.shape)
        if not bool(tensor.isfinite().all()):
            raise UnsupportedError(
                f"{where(node)} takes {given.name}, which is infinite in places",
                "mask scores with a finite number next to them, such as -30",
            )
        if shape[0] != 1 or len(shape) != axes + 1:
            raise UnsupportedError(
                f"{where(node)} takes {given.name} {tuple(tensor.shape)}, which does not fit one input of a batch",
                REMEDY,
            )
        name = given.name if given.name in self._scales else f"{node.name}.{given.name}"
        if name not in self.values:
            if name not in self._scales:
                self._scales[name] = quantization(float(tensor.min()), float(tensor.max()))
            value = self.declare(name, shape[1:])
            self.steps.append(Constant(name=name, output=name, source=origin(given)))
            self.arrays[f"{name}.value"] = codes_of(value, numbers(tensor).reshape(shape[1:]))
        return name

    def tensor(self, node: fx.Node) -> Tensor:
        """The tensor that a constant node stands for, before it is repeated for a batch."""
        held = node if node.op == "get_attr" else node.all_input_nodes[0]
        owner, _, own = str(held.target).rpartition(".")
        found: Tensor = getattr(self.graph.module.get_submodule(owner), own)
        return found

    def result(self, node: fx.Node) -> tuple[str, Value, dict[str, int]]:
        """Name and value of what the operation of `node` returns, and the bounds in codes of what is fused into it."""
        last = self.fusion.result(node)
        value = self.declare(last.name, self.shapes[last.name])
        if last is node:
            return last.name, value, {}
        low, high = (min(max(code(value, bound), LOWEST), HIGHEST) for bound in bounds(last))
        return last.name, value, {"low": low, "high": high}

    def on_image(self, node: fx.Node, source: str, target: str, append: Callable[[str, str], None]) -> None:
        """Let `append(input, output)` add a step on (channels, height, width), whatever the shapes of the values."""
        if len(self.values[target].shape) > 3:
            raise UnsupportedError(f"{where(node)} works on more than two axes besides channels", REMEDY)
        entry = self._reshaped(source, image(self.values[source].shape), f"{node.name}.input")
        output = target if len(self.values[target].shape) == 3 else f"{node.name}.output"
        if output != target:
            self.declare(output, image(self.values[target].shape), like=target)
        append(entry, output)
        if output != target:
            self.steps.append(Reshape(name=f"{node.name}.reshape", inputs=(output,), output=target))

    def _reshaped(self, name: str, shape: tuple[int, ...], target: str) -> str:
        """The value `name` in another shape: a new one called `target`, or what it was itself reshaped from."""
        if self.values[name].shape == shape:
            return name
        maker = next((step for step in self.steps if step.output == name), None)
        if isinstance(maker, Reshape) and self.values[maker.inputs[0]].shape == shape:
            return maker.inputs[0]
        self.declare(target, shape, like=name)
        self.steps.append(Reshape(name=target, inputs=(name,), output=target))
        return target

    def rows(
        self, name: str, weight: Numbers, bias: Numbers, source: str, target: str, module: nn.Module | None = None
    ) -> Rows:
        """Integer weights in the shape of `weight` (out, ...), of the layer `module` or of none; bias: (out,)."""
        scale = self.values[source].scale
        stored = self.graph.stored.get(name) if module is not None else None
        least = np.abs(bias) / (scale * _LARGEST_BIAS)
        rows = rows_of(weight, stored, least, self.values[target].scale / scale * _SILENT, self._clip_weights)
        if rows.rounded_again:
            self.rounded_again.append(name)
        return rows

    def weighted(
        self, node: fx.Node, layer: str, make: type[Weighted], rows: Rows, bias: Numbers, options: dict[str, Any]
    ) -> None:
        """Append a convolution or a linear with `rows` of codes; `options`: what `make` takes besides."""
        source, target = self.values[options["inputs"][0]], self.values[options["output"]]
        codes = rows.codes.reshape(len(bias), -1).astype(np.int64)
        biases = np.rint(bias / (source.scale * rows.scales)) - source.zero * codes.sum(1)
        if np.max(np.abs(biases) - LOWEST * np.abs(codes).sum(1), initial=0) >= 2**31:
            raise NumericsError(
                f"the sums of {where(node)} may leave 32 bits",
                "its bias is far larger than its weights times its inputs, or it has too many inputs",
            )
        multipliers = [multiplier(node, float(ratio)) for ratio in source.scale * rows.scales / target.scale]
        self.steps.append(make(name=node.name, layer=layer, weight_bits=rows.bits, source=origin(node), **options))
        arrays = {
            "weight": rows.codes,
            "bias": biases.astype(np.int32),
            "multiplier": np.array([factor for factor, _ in multipliers], dtype=np.int32),
            "shift": np.array([shift for _, shift in multipliers], dtype=np.uint8),
        }
        self.notes[layer] = {"weight_bits": rows.bits}
        if rows.table is not None:
            arrays[CODEBOOK] = rows.table
            self.notes[layer]["tables"] = len(rows.table)
        if rows.unrolled:
            self.notes[layer]["table_unrolled"] = True
        self.arrays.update({f"{node.name}.{suffix}": array for suffix, array in arrays.items()})
        if rows.raised:
            self.notes[layer]["raised_scales"] = rows.raised

    def program(self) -> tuple[Program, dict[str, Array]]:
        """What the output needs, and its constants."""
        start, output = self.graph.input.name, self.graph.output.name
        needed, steps = {start, output}, []
        for step in reversed(self.steps):
            if step.output in needed:
                needed.update(step.inputs)
                steps.append(step)
        values = {name: value for name, value in self.values.items() if name in needed}
        program = Program(input=start, output=output, values=values, steps=tuple(reversed(steps)))
        wanted = [f"{step.name}.{suffix}" for step in steps for suffix in (*step.arrays, CODEBOOK)]
        return program, {name: self.arrays[name] for name in wanted if name in self.arrays}


def code(value: Value, number: float) -> int:
    """The code nearest to `number`, which may lie outside of int8; infinity becomes a code beyond the end."""
    return round(max(min(number / value.scale, 2.0**20), -(2.0**20))) + value.zero


def codes_of(value: Value, given: Numbers) -> Array:
    """The codes int8 nearest to `given`, halves to even, clamped."""
    codes: Array = np.clip(np.rint(given / value.scale) + value.zero, LOWEST, HIGHEST).astype(np.int8)
    return codes


def multiplier(node: fx.Node, scale: float) -> Pair:
    """`requantizer` for an operation; its error names the node."""
    try:
        return requantizer(scale)
    except NumericsError as error:
        raise NumericsError(f"{where(node)}: {error.cause}", error.remedy) from error


def image(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without batch as (channels, height, width)."""
    return (shape[0], *(1,) * (3 - len(shape)), *shape[1:])


def pair(number: Any) -> Pair:
    """(vertical, horizontal) of a number, of a pair, or of the one number of a 1-D operation."""
    if isinstance(number, int):
        return number, number
    return (1, int(number[0])) if len(number) == 1 else (int(number[0]), int(number[1]))


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument of an operator, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def numbers(tensor: Tensor) -> Numbers:
    """float64 with the shape of `tensor`."""
    return tensor.detach().double().numpy()


def origin(node: fx.Node) -> str:
    """The line or the ONNX node that a node comes from."""
    return str(node.meta.get("source", ""))
