"""Integer networks in onnxruntime, against the reference executor: operation by operation, and whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import inputs, residual, separable

pytest.importorskip("onnx", exc_type=ImportError)
pytest.importorskip("onnxruntime", exc_type=ImportError)

import onnx
import onnxruntime
from onnx import numpy_helper

from effcli.errors import MachineError, UnsupportedError
from effcli.exporters import _onnx_integer as exporter
from effcli.graphs import executor
from effcli.graphs.graph import Facts, Graph
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
from effcli.layers.contract import Observed
from effcli.passes.quantize import int8
from effcli.platform import onnx_session

# Scales whose quotients are no short fractions, so that ties, which both sides round differently, are rare.
GRIDS = {"x": (0.0371, -5), "w": (0.0913, 17), "y": (0.0457, 11)}
Shape = tuple[int, ...]


def step_of(make: Any, *names: str, **options: Any) -> Operation:
    step: Operation = make(name="op", inputs=names or ("x",), output="y", **options)
    return step


def network_of(
    steps: Sequence[Any], shapes: Mapping[str, Shape], arrays: Mapping[str, Array] | None = None, like: bool = False
) -> IntegerNetwork:
    """From the value x to the value y; like: all values on the grid of x, as what moves codes demands."""
    values = {}
    for name, shape in shapes.items():
        scale, zero = GRIDS["x" if like else name]
        values[name] = Value(shape=shape, scale=scale, zero=zero)
    program = Program(input="x", output="y", values=values, steps=tuple(steps))
    return IntegerNetwork(program, dict(arrays or {}), Facts(origin="a test", shape=shapes["x"]))


def codes_of(batch: int, shape: Shape, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-128, 128, (batch, *shape), dtype=np.int8)


def exported(network: IntegerNetwork, folder: Path) -> str:
    """Write the network, read it again, export it; the line on it."""
    (folder / "net").mkdir(parents=True)
    (folder / "onnx").mkdir()
    network.save(folder / "net")
    line = exporter.export_integer(folder / "net", folder / "onnx")
    onnx.checker.check_model(folder / "onnx" / "model.onnx", full_check=True)
    return line


def floats(network: IntegerNetwork, codes: Array) -> Array:
    values: Array = (codes.astype(np.float32) - network.input.zero) * np.float32(network.input.scale)
    return values


def differences(network: IntegerNetwork, codes: Array, folder: Path) -> Array:
    """onnxruntime's output minus the executor's, in codes."""
    session = onnx_session.open_session(folder / "onnx", 1, onnx_session.EXACT)
    (theirs,) = onnx_session.run(session, {"input": floats(network, codes)}).values()
    assert theirs.dtype == np.float32 and theirs.shape == (len(codes), *network.output.shape)
    steps = theirs / network.output.scale + network.output.zero
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    result: Array = np.rint(steps).astype(int) - executor.run(network, codes)
    return result


def exact(network: IntegerNetwork, folder: Path, seed: int = 0) -> None:
    exported(network, folder)
    for batch in (1, 3):
        assert not differences(network, codes_of(batch, network.input.shape, seed), folder).any()


def close(network: IntegerNetwork, folder: Path, seed: int = 0) -> None:
    """One operation: no code differs by more than one, and one in fifty at most differs at all."""
    exported(network, folder)
    for batch in (1, 3):
        codes = codes_of(batch, network.input.shape, seed)
        found = differences(network, codes, folder)
        assert np.abs(found).max() <= 1
        assert np.count_nonzero(found) <= max(1, found.size // 50)
        # The numbers leave the ends of the range: the comparison is about something.
        assert len(np.unique(executor.run(network, codes))) >= min(6, found.size // 2)


def weights(shape: Shape, seed: int = 1, bits: int = 8) -> dict[str, Array]:
    """Constants of the layer `op` with weight (out, ...), whose outputs spread over the codes; both ends are there."""
    generator = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = generator.integers(low, high + 1, shape).astype(np.int8)
    weight.reshape(-1)[:2] = low, high
    spread = 74 * np.sqrt(np.square(weight.reshape(len(weight), -1).astype(float)).sum(1) + 1)
    pairs = [requantizer(float(ratio)) for ratio in generator.uniform(20, 60, len(weight)) / spread]
    return {
        "op.weight": weight,
        "op.bias": np.rint(generator.normal(0, 1, len(weight)) * spread).astype(np.int32),
        "op.multiplier": np.array([multiplier for multiplier, _ in pairs], np.int32),
        "op.shift": np.array([shift for _, shift in pairs], np.uint8),
    }


CONVOLUTIONS = [
    # channels, outputs, kernel, stride, padding (above, below, left, right), dilation, groups, height, width
    (3, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 7, 9),
    (3, 4, (3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1, 8, 8),
    (4, 6, (2, 3), (2, 3), (0, 2, 3, 1), (1, 1), 2, 11, 5),
    (6, 6, (3, 3), (1, 2), (1, 0, 2, 1), (1, 1), 6, 5, 7),
    (4, 12, (3, 1), (1, 1), (2, 2, 0, 0), (2, 1), 4, 6, 3),
    (1, 3, (5, 4), (2, 2), (2, 2, 1, 1), (1, 2), 1, 13, 10),
    (7, 5, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 3, 1),
    (5, 2, (1, 7), (1, 3), (0, 0, 3, 3), (1, 1), 1, 1, 23),
    (5, 5, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 5, 5, 4),
    (2, 3, (2, 2), (1, 1), (4, 3, 5, 4), (1, 1), 1, 3, 3),
]


def convolution(geometry: Any, bits: Literal[2, 4, 8] = 8, **clamps: int) -> IntegerNetwork:
    channels, out, kernel, stride, padding, dilation, groups, height, width = geometry
    extents = [
        (length + before + after - (size - 1) * apart - 1) // pace + 1
        for length, before, after, size, apart, pace in zip(
            (height, width), padding[::2], padding[1::2], kernel, dilation, stride, strict=True
        )
    ]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "weight_bits": bits}
    step = step_of(Convolution, layer="op", **options, **clamps)
    shapes = {"x": (channels, height, width), "y": (out, *extents)}
    return network_of([step], shapes, weights((out, channels // groups, *kernel), bits=bits))


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_convolution(geometry: Any, tmp_path: Path) -> None:
    close(convolution(geometry), tmp_path)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8)])
def test_linear(shape: Shape, tmp_path: Path) -> None:
    step = step_of(Linear, layer="op", low=-100, high=99)
    close(network_of([step], {"x": shape, "y": (*shape[:-1], 7)}, weights((7, 8))), tmp_path)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("odd", [False, True])
def test_narrow_weights(bits: Literal[2, 4], odd: bool, tmp_path: Path) -> None:
    """Stored as INT4, two to a byte; an odd number of them fills the last byte."""
    geometry = (3, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3 if odd else 1, 7, 9)
    network = convolution(geometry, bits)
    close(network, tmp_path)
    assert "1 layer of fewer than 8 bits stored as INT4" in exported(network, tmp_path / "again")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert model.opset_import[0].version == 21 and properties(model)["effcli.opset"] == "21"
    (stored,) = (tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4)
    weight = network.array(network.program.steps[0], "weight")
    np.testing.assert_array_equal(numpy_helper.to_array(stored).astype(np.int8), weight)
    assert len(stored.raw_data) == math.ceil(weight.size / 2)


def test_a_channel_that_its_multiplier_silences(tmp_path: Path) -> None:
    network = convolution(CONVOLUTIONS[0])
    network.arrays["op.multiplier"][1] = 0
    close(network, tmp_path)


@pytest.mark.parametrize("second", [(4, 3, 5), (4, 1, 1), (1, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("ratio", [0.8, -0.8, 0.0])
def test_sums_and_differences(second: Shape, ratio: float, tmp_path: Path) -> None:
    """Of a value and a part of it, which broadcasts; a ratio of zero leaves the second out."""
    (_, zero), (_, other), (_, end) = GRIDS["x"], GRIDS["w"], GRIDS["y"]
    multipliers, offset, shift = addition(0.613, ratio, (zero, other, end))
    add = step_of(Add, "x", "w", multipliers=multipliers, offset=offset, shift=shift, low=-90, high=101)
    close(with_part(add, second), tmp_path)


@pytest.mark.parametrize("second", [(4, 3, 5), (4, 1, 1), (1, 3, 5)])
def test_products(second: Shape, tmp_path: Path) -> None:
    multiplier, shift = requantizer(0.0117)
    close(with_part(step_of(Multiply, "x", "w", multiplier=multiplier, shift=shift), second), tmp_path)


def with_part(step: Operation, shape: Shape) -> IntegerNetwork:
    """The step on x (4, 3, 5) and on a table of those of its numbers that stand first, in another shape."""
    steps: list[Any] = []
    shapes: dict[str, Shape] = {"x": (4, 3, 5), "y": (4, 3, 5)}
    name = "x"
    for axis, length in enumerate(shape):
        if length < shapes[name][axis]:
            target = f"part{axis}"
            steps.append(Slice(name=target, inputs=(name,), output=target, axis=axis, start=0, stop=length))
            extents = list(shapes[name])
            extents[axis] = length
            shapes[target] = tuple(extents)
            name = target
    steps.append(Table(name="table", inputs=(name,), output="w", function="shuffle"))
    shapes["w"] = shape
    values = {
        key: Value(shape=extents, scale=GRIDS.get(key, GRIDS["x"])[0], zero=GRIDS.get(key, GRIDS["x"])[1])
        for key, extents in shapes.items()
    }
    program = Program(input="x", output="y", values=values, steps=(*steps, step))
    table = np.random.default_rng(3).permutation(np.arange(-128, 128)).astype(np.int8)
    return IntegerNetwork(program, {"table.table": table}, Facts(origin="a test", shape=(4, 3, 5)))


POOLS = [
    # kernel, stride, padding, output height and width of (3, 8, 7)
    ((2, 2), (2, 2), (0, 0, 0, 0), (4, 3)),
    ((3, 2), (1, 2), (1, 2, 1, 0), (9, 4)),
    ((3, 3), (2, 2), (0, 1, 1, 1), (4, 4)),
    # Padding as wide as the kernel, which onnxruntime's pools refuse.
    ((2, 2), (1, 1), (2, 0, 0, 3), (9, 9)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "out"), POOLS)
def test_max_pool(kernel: Any, stride: Any, padding: Any, out: Any, tmp_path: Path) -> None:
    step = step_of(MaxPool, kernel=kernel, stride=stride, padding=padding)
    exact(network_of([step], {"x": (3, 8, 7), "y": (3, *out)}, like=True), tmp_path)


def test_max_pool_with_gaps(tmp_path: Path) -> None:
    step = step_of(MaxPool, kernel=(3, 2), stride=(1, 2), padding=(1, 1, 0, 1), dilation=(2, 3))
    exact(network_of([step], {"x": (3, 8, 7), "y": (3, 6, 3)}, like=True), tmp_path)


@pytest.mark.parametrize(("kernel", "stride", "padding", "out"), POOLS)
@pytest.mark.parametrize("divisor", [None, 5])
def test_average_pool(kernel: Any, stride: Any, padding: Any, out: Any, divisor: int | None, tmp_path: Path) -> None:
    """The multiplier holds the divisor, which need not be the number of entries of a window."""
    scale = GRIDS["x"][0] / GRIDS["y"][0] / (divisor or math.prod(kernel))
    multiplier, shift = requantizer(scale)
    options = {"kernel": kernel, "stride": stride, "padding": padding, "multiplier": multiplier, "shift": shift}
    close(network_of([step_of(AveragePool, **options, low=-99)], {"x": (3, 8, 7), "y": (3, *out)}), tmp_path)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((6, 4, 5), (1, 2)), ((6, 4, 5), (2, 1)), ((6, 4, 5), (0,)), ((6, 4, 5), (0, 2)), ((9, 8), (1,)), ((9, 8), (0,))],
)
def test_mean(shape: Shape, axes: tuple[int, ...], keep: bool, tmp_path: Path) -> None:
    multiplier, shift = requantizer(1.7 / math.prod(shape[axis] for axis in axes))
    step = step_of(Mean, axes=axes, keep=keep, multiplier=multiplier, shift=shift)
    out = [(1,) if index in axes else (length,) for index, length in enumerate(shape) if keep or index not in axes]
    close(network_of([step], {"x": shape, "y": tuple(length for (length,) in out)}), tmp_path)


def test_table(tmp_path: Path) -> None:
    table = np.random.default_rng(0).permutation(np.arange(-128, 128)).astype(np.int8)
    network = network_of([step_of(Table, function="shuffle")], {"x": (256,), "y": (256,)}, {"op.table": table})
    exact(network, tmp_path)
    assert not differences(network, np.arange(-128, 128, dtype=np.int8)[None], tmp_path).any()


@pytest.mark.parametrize("leading", [(), (2,)])
def test_matrix_products(leading: Shape, tmp_path: Path) -> None:
    """Of a value and its table, transposed."""
    first, second, out = (*leading, 5, 9), (*leading, 9, 5), (*leading, 5, 5)
    axes = (*range(len(leading)), len(leading) + 1, len(leading))
    multiplier, shift = requantizer(0.003)
    steps = [
        step_of(Table, function="shuffle").model_copy(update={"name": "table", "output": "t"}),
        Transpose(name="turn", inputs=("t",), output="w", axes=axes),
        step_of(MatrixProduct, "x", "w", multiplier=multiplier, shift=shift, low=-90, high=100),
    ]
    shapes = {"x": first, "w": second, "y": out}
    values = {name: Value(shape=shape, scale=GRIDS[name][0], zero=GRIDS[name][1]) for name, shape in shapes.items()}
    values["t"] = values["w"].model_copy(update={"shape": first})
    table = np.random.default_rng(3).permutation(np.arange(-128, 128)).astype(np.int8)
    program = Program(input="x", output="y", values=values, steps=tuple(steps))
    close(IntegerNetwork(program, {"table.table": table}, Facts(origin="a test", shape=first)), tmp_path)


@pytest.mark.parametrize(
    ("shape", "bits"), [((10,), 8), ((3, 7), 8), ((2, 3, 5), 8), ((4, 1), 8), ((3, 300), 12), ((2, 5000), 15)]
)
def test_softmax(shape: Shape, bits: int, tmp_path: Path) -> None:
    powers = np.exp(-np.arange(256) * GRIDS["x"][0])
    table = np.rint(2.0 ** softmax_bits(shape[-1], bits) * powers).astype(np.uint32)
    network = network_of([step_of(Softmax, bits=bits)], {"x": shape, "y": shape}, {"op.table": table})
    program = network.program
    values = {**program.values, "y": Value(shape=shape, scale=2.0**-bits, zero=-128)}
    network = IntegerNetwork(program.model_copy(update={"values": values}), network.arrays, network.facts)
    exported(network, tmp_path)
    found = differences(network, codes_of(20, shape), tmp_path)
    assert np.abs(found).max() <= 1 and np.mean(found != 0) < 0.02


@pytest.mark.parametrize("shape", [(64,), (3, 7), (2, 3, 5)])
@pytest.mark.parametrize("epsilon", [0, 2**30])
def test_layer_norm(shape: Shape, epsilon: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "op.multiplier": np.rint(random.normal(0, 30, shape[-1]) * 2**20).astype(np.int32),
        "op.bias": np.rint(random.normal(0, 10, shape[-1]) * 2**20).astype(np.int32),
    }
    step = step_of(LayerNorm, epsilon=epsilon, shift=20, low=-100, high=101)
    close(network_of([step], {"x": shape, "y": shape}, arrays), tmp_path)


def test_embedding(tmp_path: Path) -> None:
    """Exact, as a table is."""
    table = np.random.default_rng(0).integers(-128, 128, (256, 3)).astype(np.int8)
    exact(network_of([step_of(Embedding)], {"x": (2, 5), "y": (2, 5, 3)}, {"op.table": table}), tmp_path)


@pytest.mark.parametrize("alone", [False, True])
def test_constants(alone: bool, tmp_path: Path) -> None:
    """Joined to what is computed, or all that there is: once for each input."""
    value = np.random.default_rng(0).integers(-128, 128, (2, 3)).astype(np.int8)
    steps: list[Any] = [Constant(name="constant", output="y" if alone else "c")]
    shapes: dict[str, Shape] = {"x": (4, 3), "y": (2, 3)} if alone else {"x": (4, 3), "c": (2, 3), "y": (6, 3)}
    if not alone:
        steps.append(step_of(Concatenate, "c", "x", axis=0))
    exact(network_of(steps, shapes, {"constant.value": value}, like=True), tmp_path)


MOVES = [
    (step_of(Pad, padding=((0, 1), (2, 0), (3, 4)), value=-77), (3, 4, 5), (4, 6, 12)),
    (step_of(Pad, padding=((1, 2),), value=127), (3,), (6,)),
    (step_of(Concatenate, "x", "x", axis=0), (2, 3), (4, 3)),
    (step_of(Concatenate, "x", "x", "x", axis=2), (2, 3, 4), (2, 3, 12)),
    (step_of(Slice, axis=1, start=1, stop=6, step=2), (2, 7), (2, 3)),
    (step_of(Slice, axis=0, start=3, stop=4), (4, 2, 2), (1, 2, 2)),
    (step_of(Reshape), (2, 3, 4), (4, 6)),
    (step_of(Reshape), (6,), (1, 2, 3)),
    (step_of(Transpose, axes=(2, 0, 1)), (2, 3, 4), (4, 2, 3)),
    (step_of(Transpose, axes=(1, 0)), (5, 2), (2, 5)),
]


@pytest.mark.parametrize(
    ("step", "before", "after"), MOVES, ids=[f"{type(step).__name__}{before}" for step, before, _ in MOVES]
)
def test_moves(step: Operation, before: Shape, after: Shape, tmp_path: Path) -> None:
    exact(network_of([step], {"x": before, "y": after}, like=True), tmp_path)


@settings(max_examples=15)
@given(
    zero=st.integers(-128, 127),
    bounds=st.tuples(st.integers(-128, 127), st.integers(-128, 127)).map(sorted),
    scale=st.floats(1e-5, 1e3),
)
def test_any_grid(tmp_path_factory: pytest.TempPathFactory, zero: int, bounds: list[int], scale: float) -> None:
    """Whatever the scales, zero points and bounds of a convolution."""
    network = convolution(CONVOLUTIONS[0], low=bounds[0], high=bounds[1])
    grids = {"x": {"scale": scale, "zero": zero}, "y": {"zero": -zero - 1}}
    program = network.program
    values = {name: value.model_copy(update=grids[name]) for name, value in program.values.items()}
    network = IntegerNetwork(program.model_copy(update={"values": values}), network.arrays, network.facts)
    folder = tmp_path_factory.mktemp("grid")
    exported(network, folder)
    found = differences(network, codes_of(2, network.input.shape), folder)
    assert np.abs(found).max() <= 1 and np.mean(found != 0) < 0.02


@st.composite
def chains(draw: st.DrawFn) -> IntegerNetwork:
    """Up to five operations that compute nothing, over values of one to three axes."""
    scale, zero = GRIDS["x"]
    shapes: list[Shape] = [tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))]
    steps: list[Any] = []
    for number in range(draw(st.integers(1, 5))):
        shape = shapes[-1]
        axis = draw(st.integers(0, len(shape) - 1))
        step, after = draw(st.sampled_from([table, pad, part, reshape, transpose, join, largest]))(draw, shape, axis)
        named = {"name": f"op{number}", "output": f"v{number + 1}"}
        steps.append(step.model_copy(update={**named, "inputs": tuple(f"v{number}" for _ in step.inputs)}))
        shapes.append(after)
    values = {f"v{number}": Value(shape=shape, scale=scale, zero=zero) for number, shape in enumerate(shapes)}
    program = Program(input="v0", output=f"v{len(steps)}", values=values, steps=tuple(steps))
    codes = np.random.default_rng(0).permutation(np.arange(-128, 128)).astype(np.int8)
    tables = {f"{step.name}.table": codes for step in steps if isinstance(step, Table)}
    return IntegerNetwork(program, tables, Facts(origin="a test", shape=shapes[0]))


Move = tuple[Operation, Shape]


def table(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    return step_of(Table, function="shuffle"), shape


def pad(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    padding = draw(st.tuples(*(st.tuples(st.integers(0, 2), st.integers(0, 2)) for _ in shape)))
    after = tuple(length + sum(amounts) for length, amounts in zip(shape, padding, strict=True))
    return step_of(Pad, padding=padding, value=draw(st.integers(-128, 127))), after


def part(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    start = draw(st.integers(0, shape[axis] - 1))
    stop, pace = draw(st.integers(start + 1, shape[axis])), draw(st.integers(1, 3))
    after = (*shape[:axis], len(range(start, stop, pace)), *shape[axis + 1 :])
    return step_of(Slice, axis=axis, start=start, stop=stop, step=pace), after


def reshape(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    count = math.prod(shape)
    return step_of(Reshape), draw(st.sampled_from([(count,), (1, count), shape[::-1], (count, 1, 1)]))


def transpose(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    axes = tuple(draw(st.permutations(range(len(shape)))))
    return step_of(Transpose, axes=axes), tuple(shape[source] for source in axes)


def join(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    return step_of(Concatenate, "x", "x", axis=axis), (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def largest(draw: st.DrawFn, shape: Shape, axis: int) -> Move:
    if len(shape) < 3:
        return reshape(draw, shape, axis)
    return step_of(MaxPool, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1)), shape


@settings(max_examples=30)
@given(network=chains())
def test_any_chain_of_moves_is_exact(tmp_path_factory: pytest.TempPathFactory, network: IntegerNetwork) -> None:
    exact(network, tmp_path_factory.mktemp("chain"))


@st.composite
def geometries(draw: st.DrawFn) -> Any:
    """As in `CONVOLUTIONS`."""
    small, pairs = st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups, kernel, stride = draw(small), draw(pairs), draw(pairs)
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    spans = [(size - 1) * apart + 1 for size, apart in zip(kernel, dilation, strict=True)]
    height, width = (span + draw(st.integers(0, 4)) for span in spans)
    # Two weights at least, for both ends of their range.
    channels, out = groups * draw(small), groups * draw(st.integers(2, 3))
    return channels, out, kernel, stride, padding, dilation, groups, height, width


@settings(max_examples=30)
@given(geometry=geometries(), bits=st.sampled_from([2, 4, 8]), clamps=st.booleans())
def test_any_convolution(
    tmp_path_factory: pytest.TempPathFactory, geometry: Any, bits: Literal[2, 4, 8], clamps: bool
) -> None:
    network = convolution(geometry, bits, **({"low": -60, "high": 50} if clamps else {}))
    folder = tmp_path_factory.mktemp("convolution")
    exported(network, folder)
    found = differences(network, codes_of(2, network.input.shape), folder)
    assert np.abs(found).max() <= 1 and np.count_nonzero(found) <= max(2, found.size // 20)


def test_halves_go_up_here_and_to_even_there(tmp_path: Path) -> None:
    """Half of every code: the difference between the two roundings, and all of it."""
    arrays = {
        "op.weight": np.ones((1, 1), np.int8),
        "op.bias": np.zeros(1, np.int32),
        "op.multiplier": np.ones(1, np.int32),
        "op.shift": np.ones(1, np.uint8),
    }
    values = {name: Value(shape=(1,), scale=0.5, zero=0) for name in "xy"}
    program = Program(input="x", output="y", values=values, steps=(step_of(Linear, layer="op"),))  # type: ignore[arg-type]
    network = IntegerNetwork(program, arrays, Facts(origin="a test", shape=(1,)))
    exported(network, tmp_path)
    codes = np.arange(-128, 128, dtype=np.int8)
    found = differences(network, codes[:, None], tmp_path)[:, 0]
    assert found.tolist() == [round(code / 2) - math.floor(code / 2 + 0.5) for code in range(-128, 128)]
    assert np.count_nonzero(found) == 64


def test_an_operation_that_onnx_does_not_have() -> None:
    values = {name: Value(shape=(3,), scale=1.0, zero=0) for name in "xy"}
    step: Any = Operation(name="op", inputs=("x",), output="y")
    program = Program.model_construct(input="x", output="y", values=values, steps=(step,))
    with pytest.raises(UnsupportedError, match=r"no Operation \(op\)"):
        exporter.translate(IntegerNetwork(program, {}, Facts(origin="", shape=(3,))))


@pytest.mark.parametrize("names", [("input", "output"), ("output", "input"), ("a/b.c", "op.weight")])
def test_names_of_values_do_not_meet_those_of_the_file(names: tuple[str, str], tmp_path: Path) -> None:
    network = convolution(CONVOLUTIONS[0])
    values = dict(zip(names, network.program.values.values(), strict=True))
    step = network.program.steps[0].model_copy(update={"inputs": names[:1], "output": names[1]})
    program = Program(input=names[0], output=names[1], values=values, steps=(step,))
    close(IntegerNetwork(program, network.arrays, network.facts), tmp_path)


def test_a_network_without_steps(tmp_path: Path) -> None:
    value = Value(shape=(4,), scale=0.5, zero=3)
    program = Program(input="x", output="x", values={"x": value}, steps=())
    exact(IntegerNetwork(program, {}, Facts(origin="a test", shape=(4,))), tmp_path)


def quantized(graph: Graph) -> IntegerNetwork:
    calibration = inputs(graph, 48, 1)
    network = int8.Int8().transform(graph, Observed(batches=lambda: iter(calibration.split(16)))).network
    assert isinstance(network, IntegerNetwork)
    return network


def properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def optimized(folder: Path) -> Counter[str]:
    """Operators by name after onnxruntime has fused what it can."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_residual_network_runs_in_integers(bits: Literal[4, 8], tmp_path: Path) -> None:
    network = quantized(residual())
    if bits == 4:
        steps = tuple(
            step.model_copy(update={"weight_bits": 4}) if isinstance(step, Convolution | Linear) else step
            for step in network.program.steps
        )
        arrays = {name: array // 16 if name.endswith(".weight") else array for name, array in network.arrays.items()}
        program = network.program.model_copy(update={"steps": steps})
        network = IntegerNetwork(program, arrays, network.facts, network.probe)
    line = exported(network, tmp_path)
    assert line.startswith(f"onnxruntime {onnxruntime.__version__}, opset {17 if bits == 8 else 21}, on 16 calibration")
    found = optimized(tmp_path)
    integer = {"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert {name: found[name] for name in integer} == integer
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
    # Nothing else but moves of codes.
    assert found.keys() - integer.keys() <= {"QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Squeeze"}
    assert np.abs(differences(network, network.quantize(inputs(residual(), 9).numpy()), tmp_path)).max() <= 3


@pytest.mark.parametrize("clip", [False, True])
def test_depthwise_convolutions_and_bounds_run_in_integers(clip: bool, tmp_path: Path) -> None:
    exported(quantized(separable(clip)), tmp_path)
    found = optimized(tmp_path)
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1
    assert not found.keys() & {"Conv", "Gemm", "MatMul", "Relu"}


def test_a_bound_keeps_the_integer_kernel(tmp_path: Path) -> None:
    exported(convolution(CONVOLUTIONS[0], low=-60, high=50), tmp_path)
    found = optimized(tmp_path)
    assert found["QLinearConv"] == found["Clip"] == 1 and not found["Conv"]


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8)])
def test_few_bits_and_several_axes_keep_the_integer_kernel(bits: Literal[2, 4], shape: Shape, tmp_path: Path) -> None:
    step = step_of(Linear, layer="op", weight_bits=bits)
    exported(network_of([step], {"x": shape, "y": (*shape[:-1], 7)}, weights((7, 8), bits=bits)), tmp_path)
    found = optimized(tmp_path)
    assert found["QGemm"] == 1 and not found.keys() & {"Gemm", "MatMul", "Cast"}


@pytest.mark.parametrize("axes", [(1, 2), (2, 1)])
def test_a_mean_over_an_image_has_an_integer_kernel(axes: tuple[int, int], tmp_path: Path) -> None:
    multiplier, shift = requantizer(0.07)
    step = step_of(Mean, axes=axes, multiplier=multiplier, shift=shift)
    exported(network_of([step], {"x": (6, 4, 5), "y": (6,)}), tmp_path)
    found = optimized(tmp_path)
    assert found["QLinearGlobalAveragePool"] == 1 and not found["ReduceMean"]


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    network = quantized(residual())
    exported(network, tmp_path)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert model.producer_name == "effcli" and model.opset_import[0].version == 17
    assert properties(model) == {"effcli.origin": "test", "effcli.opset": "17"}
    ports = [
        (port.name, [axis.dim_param or axis.dim_value for axis in port.type.tensor_type.shape.dim])
        for port in (*model.graph.input, *model.graph.output)
    ]
    assert ports == [("input", ["batch", 3, 9, 7]), ("output", ["batch", 5])]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    grids = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    # Of activations, one number without axes: onnxruntime fuses no other.
    for node in grids:
        ranks = [len(constants[name].dims) for name in node.input[1:]]
        assert ranks == [1, 1] if node.attribute else ranks == [0, 0]
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    for path in (tmp_path, Path.cwd(), Path.home(), Path(exporter.__file__).parent):
        assert str(path).encode() not in content
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_exporting_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    network = quantized(residual())
    for name in "ab":
        exported(network, tmp_path / name)
    first, second = ((tmp_path / name / "onnx" / "model.onnx").read_bytes() for name in "ab")
    assert first == second


def test_compared_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    run = onnx_session.run

    def watching(session: Any, given: Any) -> Any:
        sizes.append(len(given["input"]))
        return run(session, given)

    monkeypatch.setattr(onnx_session, "run", watching)
    network = convolution(CONVOLUTIONS[0])
    line = exported(network, tmp_path / "random")
    assert "on 64 random inputs: largest difference " in line and line.endswith("% equal")
    assert sizes == [16] * 4
    sizes.clear()
    network.probe = codes_of(17, network.input.shape)
    assert "on 17 calibration inputs: " in exported(network, tmp_path / "probe")
    assert sizes == [16, 1]


def test_agreement_is_that_of_classifiers(tmp_path: Path) -> None:
    """A vector of logits has a likeliest class; an image, or a vector of the input's own shape, has none."""
    linear = {
        size: network_of([step_of(Linear, layer="op")], {"x": (8,), "y": (size,)}, weights((size, 8)))
        for size in (5, 8)
    }
    assert "top-1 agreement " in exported(linear[5], tmp_path / "classes")
    assert "top-1" not in exported(linear[8], tmp_path / "codes")
    assert "top-1" not in exported(convolution(CONVOLUTIONS[0]), tmp_path / "image")


def test_a_file_that_computes_something_else(tmp_path: Path) -> None:
    network = convolution(CONVOLUTIONS[0])
    exported(network, tmp_path)
    network.arrays["op.weight"] = network.arrays["op.weight"][:, ::-1]
    with pytest.raises(MachineError, match="computes something else"):
        exporter.compare(network, tmp_path / "onnx")


def test_outputs_are_those_of_the_floating_network(tmp_path: Path) -> None:
    """Not only the executor's: input and output are floating numbers of the graph's own kind."""
    graph = residual()
    exported(quantized(graph), tmp_path)
    given = inputs(graph, 30, 2)
    session = onnx_session.open_session(tmp_path / "onnx", 1, onnx_session.EXACT)
    (found,) = onnx_session.run(session, {"input": given.numpy()}).values()
    expected = graph.run(given)
    error = float((torch.from_numpy(found) - expected).norm() / expected.norm())
    assert error < 0.1
