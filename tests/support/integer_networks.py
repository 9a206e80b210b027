"""Integer networks put together step by step with random constants, and random ones as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from effcli.graphs.graph import Facts
from effcli.graphs.integer import (
    Add,
    Array,
    AveragePool,
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
    Program,
    Reshape,
    Slice,
    Softmax,
    Table,
    Transpose,
    Value,
    addition,
    requantizer,
    softmax_bits,
)


class Network:
    """Every method appends a step that reads the value `at` (the last one unless given) and returns its output."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.values: dict[str, Value] = {}
        self.steps: list[Operation] = []
        self.arrays: dict[str, Array] = {}
        self.last = self._value("x", shape)

    def finish(self, probe: int = 3) -> IntegerNetwork:
        """The network with `probe` random inputs."""
        program = Program(input="x", output=self.last, values=self.values, steps=tuple(self.steps))  # type: ignore[arg-type]
        shape = self.values["x"].shape
        codes = self.random.integers(-128, 128, (probe, *shape)).astype(np.int8)
        return IntegerNetwork(program, self.arrays, Facts(origin="test", shape=shape), codes)

    def convolution(
        self,
        out: int,
        kernel: tuple[int, int] = (3, 3),
        at: str | None = None,
        bits: int = 8,
        shifts: bool = False,
        groups: int = 1,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        relu: bool = False,
    ) -> str:
        channels, *size = self._shape(at)
        spans = [size[0] + padding[0] + padding[1], size[1] + padding[2] + padding[3]]
        extents = [
            (span - (k - 1) * d - 1) // s + 1 for span, k, d, s in zip(spans, kernel, dilation, stride, strict=True)
        ]
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        shape = (out, channels // groups, *kernel)
        return self._weighted(Convolution, shape, (out, *extents), at, bits, shifts, relu, options)

    def linear(self, out: int, at: str | None = None, bits: int = 8, shifts: bool = False, relu: bool = False) -> str:
        *rest, inputs = self._shape(at)
        return self._weighted(Linear, (out, inputs), (*rest, out), at, bits, shifts, relu, {})

    def add(self, first: str, second: str) -> str:
        return self._pair(Add, first, second)

    def multiply(self, first: str, second: str) -> str:
        return self._pair(Multiply, first, second)

    def table(self, at: str | None = None) -> str:
        name = self._step(Table, (at or self.last,), self._shape(at), function="random")
        self.arrays[f"{self.steps[-1].name}.table"] = self.random.integers(-128, 128, 256).astype(np.int8)
        return name

    def max_pool(self, at: str | None = None, **options: Any) -> str:
        return self._pool(MaxPool, at, options)

    def average_pool(self, at: str | None = None, **options: Any) -> str:
        multiplier, shift = requantizer(1.3 / math.prod(options["kernel"]))
        return self._pool(AveragePool, at, options | {"multiplier": multiplier, "shift": shift})

    def mean(self, axes: tuple[int, ...], keep: bool = False, at: str | None = None) -> str:
        shape = self._shape(at)
        multiplier, shift = requantizer(1.1 / math.prod(shape[axis] for axis in axes))
        left = tuple(1 if axis in axes else extent for axis, extent in enumerate(shape) if keep or axis not in axes)
        return self._step(Mean, (at or self.last,), left, axes=axes, keep=keep, multiplier=multiplier, shift=shift)

    def pad(self, padding: tuple[tuple[int, int], ...], at: str | None = None) -> str:
        shape = tuple(n + sum(p) for n, p in zip(self._shape(at), padding, strict=True))
        return self._step(Pad, (at or self.last,), shape, padding=padding, value=int(self.random.integers(-128, 128)))

    def concatenate(self, names: tuple[str, ...], axis: int) -> str:
        shape = list(self._shape(names[0]))
        shape[axis] = sum(self._shape(name)[axis] for name in names)
        return self._step(Concatenate, names, tuple(shape), axis=axis)

    def slice(self, axis: int, start: int, stop: int, step: int = 1, at: str | None = None) -> str:
        shape = list(self._shape(at))
        shape[axis] = len(range(start, stop, step))
        return self._step(Slice, (at or self.last,), tuple(shape), axis=axis, start=start, stop=stop, step=step)

    def flatten(self, at: str | None = None) -> str:
        return self.reshape((math.prod(self._shape(at)),), at)

    def reshape(self, shape: tuple[int, ...], at: str | None = None) -> str:
        return self._step(Reshape, (at or self.last,), shape)

    def transpose(self, axes: tuple[int, ...], at: str | None = None) -> str:
        shape = self._shape(at)
        return self._step(Transpose, (at or self.last,), tuple(shape[axis] for axis in axes), axes=axes)

    def matrix_product(self, first: str, second: str) -> str:
        (*batch, rows, inner), columns = self._shape(first), self._shape(second)[-1]
        multiplier, shift = requantizer(0.004 / math.sqrt(inner))
        shape = (*batch, rows, columns)
        return self._step(MatrixProduct, (first, second), shape, multiplier=multiplier, shift=shift)

    def softmax(self, at: str | None = None, bits: int = 8) -> str:
        shape = self._shape(at)
        name = self._step(Softmax, (at or self.last,), shape, bits=bits)
        self.values[name] = Value(shape=shape, scale=2.0**-bits, zero=-128)
        table = np.rint(2.0 ** softmax_bits(shape[-1], bits) * np.exp(-0.03 * np.arange(256))).astype(np.uint32)
        self.arrays[f"{self.steps[-1].name}.table"] = table
        return name

    def layer_norm(self, at: str | None = None, epsilon: int = 1 << 20) -> str:
        shape = self._shape(at)
        name = self._step(LayerNorm, (at or self.last,), shape, epsilon=epsilon, shift=20)
        step = self.steps[-1].name
        self.arrays[f"{step}.multiplier"] = self.random.integers(-60 << 20, 60 << 20, shape[-1]).astype(np.int32)
        self.arrays[f"{step}.bias"] = self.random.integers(-20 << 20, 20 << 20, shape[-1]).astype(np.int32)
        return name

    def embedding(self, width: int, at: str | None = None) -> str:
        name = self._step(Embedding, (at or self.last,), (*self._shape(at), width))
        self.arrays[f"{self.steps[-1].name}.table"] = self.random.integers(-128, 128, (256, width)).astype(np.int8)
        return name

    def constant(self, shape: tuple[int, ...]) -> str:
        name = self._step(Constant, (), shape)
        self.arrays[f"{self.steps[-1].name}.value"] = self.random.integers(-128, 128, shape).astype(np.int8)
        return name

    def _shape(self, at: str | None) -> tuple[int, ...]:
        return self.values[at or self.last].shape

    def _value(self, name: str, shape: tuple[int, ...]) -> str:
        self.values[name] = Value(shape=shape, scale=0.05, zero=int(self.random.integers(-128, 128)))
        return name

    def _step(self, make: type[Operation], inputs: tuple[str, ...], shape: tuple[int, ...], **options: Any) -> str:
        name = f"{make.__name__.lower()}{len(self.steps)}"
        output = self._value(f"v{len(self.steps)}", shape)
        self.steps.append(make(name=name, inputs=inputs, output=output, **options))
        self.last = output
        return output

    def _weighted(
        self,
        make: type[Operation],
        weight: tuple[int, ...],
        shape: tuple[int, ...],
        at: str | None,
        bits: int,
        shifts: bool,
        relu: bool,
        options: dict[str, Any],
    ) -> str:
        source = self.values[at or self.last]
        bounds = {"low": int(self.random.integers(-100, 0)), "high": int(self.random.integers(20, 127))} if relu else {}
        output = self._step(make, (at or self.last,), shape, layer="layer", weight_bits=bits, **options, **bounds)
        bound = 2 ** (bits - 1)
        codes = self.random.integers(-bound + (bits == 8), bound, weight).astype(np.int8)
        rows = codes.reshape(len(codes), -1).astype(np.int64)
        bias = self.random.integers(-3000, 3000, len(codes)) - source.zero * rows.sum(1)
        spread = 60.0 / max(np.abs(rows).sum(1).max() * 128, 1)
        scales = [spread * float(self.random.uniform(0.5, 2)) for _ in codes]
        if shifts:
            # Some channels beyond what a shift of 32 can express, at either end.
            scales[::2] = [scale * 2.0**-14 for scale in scales[::2]]
            scales[1::3] = [min(scale * 2.0**14, 3.0) for scale in scales[1::3]]
        pairs = [requantizer(scale) for scale in scales]
        name = self.steps[-1].name
        self.arrays[f"{name}.weight"] = codes
        self.arrays[f"{name}.bias"] = bias.astype(np.int32)
        self.arrays[f"{name}.multiplier"] = np.array([pair[0] for pair in pairs], np.int32)
        self.arrays[f"{name}.shift"] = np.array([pair[1] for pair in pairs], np.uint8)
        return output

    def _pool(self, make: type[Operation], at: str | None, options: dict[str, Any]) -> str:
        channels, *size = self._shape(at)
        padding = options.get("padding", (0, 0, 0, 0))
        dilation = options.get("dilation", (1, 1))
        spans = [size[0] + padding[0] + padding[1], size[1] + padding[2] + padding[3]]
        each = zip(spans, options["kernel"], dilation, options["stride"], strict=True)
        extents = [(span - (k - 1) * d - 1) // s + 1 for span, k, d, s in each]
        return self._step(make, (at or self.last,), (channels, *extents), **options)

    def _pair(self, make: type[Operation], first: str, second: str) -> str:
        shape = np.broadcast_shapes(self._shape(first), self._shape(second))
        output = self._step(Add, (first, second), shape, multipliers=(0, 0), offset=0, shift=1)
        step = self.steps.pop()
        zeros = self.values[first].zero, self.values[second].zero, self.values[output].zero
        known: dict[str, Any]
        if make is Add:
            multipliers, offset, shift = addition(0.7, -0.4 if self.random.integers(2) else 0.6, zeros)
            known = {"multipliers": multipliers, "offset": offset, "shift": shift}
        else:
            multiplier, shift = requantizer(0.02)
            known = {"multiplier": multiplier, "shift": shift}
        self.steps.append(make(name=step.name, inputs=(first, second), output=output, **known))
        return output


def random_network(seed: int) -> IntegerNetwork:
    """A small image network of random operations: odd shapes, strides, paddings, groups, branches and bits."""
    random = np.random.default_rng(seed)
    channels, height, width = (int(n) for n in (random.integers(1, 9), random.integers(5, 12), random.integers(5, 12)))
    net = Network((channels, height, width), seed)
    for _ in range(int(random.integers(2, 7))):
        _append(net, random)
    if random.integers(2):
        net.flatten()
        net.linear(int(random.integers(1, 9)), bits=int(random.choice([4, 8])), shifts=bool(random.integers(2)))
    return net.finish()


def _append(net: Network, random: np.random.Generator) -> None:
    channels, height, width = net.values[net.last].shape
    flags = {"shifts": bool(random.integers(2)), "relu": bool(random.integers(2)), "bits": int(random.choice([4, 8]))}

    def window() -> dict[str, Any]:
        kernel = int(random.integers(1, min(height, 4) + 1)), int(random.integers(1, min(width, 4) + 1))
        padding = tuple(int(random.integers(0, k)) for k in (kernel[0], kernel[0], kernel[1], kernel[1]))
        return {"kernel": kernel, "stride": tuple(int(n) for n in random.integers(1, 3, 2)), "padding": padding}

    def residual() -> None:
        before = net.last
        net.convolution(channels, (3, 3), padding=(1, 1, 1, 1), **flags)
        net.add(before, net.convolution(channels, (3, 3), padding=(1, 1, 1, 1)))

    def squeeze() -> None:
        before = net.last
        net.mean((1, 2), keep=True)
        net.multiply(before, net.convolution(channels, (1, 1)))

    def depthwise() -> None:
        net.convolution(channels, groups=channels, **window(), **flags)

    def grouped() -> None:
        groups = 2 if channels % 2 == 0 else 1
        net.convolution(groups * int(random.integers(1, 4)), groups=groups, **window(), **flags)

    def joined() -> None:
        before = net.last
        net.concatenate((before, net.table(), before), int(random.integers(0, 3)))

    def cut() -> None:
        axis = int(random.integers(0, 3))
        extent = net.values[net.last].shape[axis]
        net.slice(axis, int(random.integers(0, max(extent - 2, 1))), extent, int(random.integers(1, 3)))

    choices: tuple[Callable[[], object], ...] = (
        lambda: net.convolution(int(random.integers(1, 10)), **window(), **flags),
        lambda: net.convolution(int(random.integers(1, 10)), (1, 1), **flags),
        lambda: net.convolution(int(random.integers(1, 6)), (3, 2), padding=(3, 2, 1, 2), dilation=(2, 2), **flags),
        lambda: net.max_pool(**window()),
        lambda: net.average_pool(**window()),
        lambda: net.pad(tuple((int(random.integers(0, 2)), int(random.integers(0, 3))) for _ in range(3))),
        lambda: net.transpose((0, 2, 1)),
        residual,
        residual,
        squeeze,
        depthwise,
        grouped,
        joined,
        cut,
        net.table,
    )
    choices[int(random.integers(len(choices)))]()
