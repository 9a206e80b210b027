"""Reading ONNX files: each operator, whole networks and every refusal, with onnxruntime as the judge."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from effcli.errors import CheckpointError, UnsupportedError, UserError
from effcli.graphs.graph import Graph, operation, where
from effcli.importers.onnx import read_onnx
from effcli.platform.onnx_session import open_session, run

Array = NDArray[Any]
INT_MAX = 2**63 - 1


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return np.abs(floats(*shape)) + np.float32(0.5)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def number(value: float) -> Array:
    return np.array(value, dtype=np.float32)


def node(kind: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node; `_` in `inputs` stands for one that is left out."""
    names = ["" if item == "_" else item for item in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), name=name, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str | None],
    constants: dict[str, Array] | None = None,
    opset: int = 17,
    batch: int | str = "n",
    domain: str = "",
    **options: Any,
) -> onnx.ModelProto:
    """A network from `x` (batch, *shape) to `y`."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    network = helper.make_model(graph, opset_imports=opsets, ir_version=10, **options)
    inferred = onnx.shape_inference.infer_shapes(network) if opset in range(1, 27) else network
    # The checker wants a shape of every output.
    inferred.graph.output[0].type.tensor_type.shape.SetInParent()
    return inferred


def written(folder: Path, network: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(network, path)
    return path


def agrees(path: Path, batches: Sequence[int] = (1, 5), positive_inputs: bool = False) -> Graph:
    """The graph in the file `path`, after it gave what onnxruntime gives."""
    graph = read_onnx(path)
    session = open_session(path, threads=1)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    for batch in batches:
        inputs = floats(batch, *graph.facts.shape, seed=batch)
        inputs = np.abs(inputs) if positive_inputs else inputs
        expected = torch.from_numpy(run(session, {name: inputs})[output])
        torch.testing.assert_close(graph.run(torch.from_numpy(inputs)), expected, rtol=1e-4, atol=1e-5)
    return graph


def steps(graph: Graph) -> list[str]:
    """What a graph does, without its input and output: layers by type, operators by name."""
    return [operation(item).removeprefix("aten.") for item in graph.nodes if item.op not in ("placeholder", "output")]


class Case:
    """One operator on an activation `x` (batch, *shape), with its other inputs as constants."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], *others: Array | None, opset: int = 17, outputs: int = 1, **found: Any
    ) -> None:
        self.id = f"{kind}-{opset}-{found}" if found else f"{kind}-{opset}-{len(others)}"
        self.positive = found.pop("positive", False)
        constants = {f"c{k}": value for k, value in enumerate(others) if value is not None}
        inputs = " ".join(["x", *("_" if value is None else f"c{k}" for k, value in enumerate(others))])
        names = ["y", *(f"y{k}" for k in range(1, outputs))]
        self.model = model([node(kind, inputs, " ".join(names), **found)], shape, constants, opset)


WEIGHT, BIAS = floats(6, 3, 3, 2), floats(6)
MAPS = (3, 7, 9)
CASES = [
    Case("Conv", MAPS, WEIGHT),
    Case("Conv", MAPS, WEIGHT, BIAS, strides=[2, 1], pads=[1, 0, 1, 0], dilations=[2, 3]),
    Case("Conv", MAPS, WEIGHT, BIAS, pads=[0, 1, 2, 0], strides=[2, 2]),
    Case("Conv", MAPS, WEIGHT, BIAS, auto_pad="SAME_UPPER", strides=[2, 2]),
    Case("Conv", MAPS, WEIGHT, BIAS, auto_pad="SAME_LOWER", strides=[2, 3]),
    Case("Conv", MAPS, WEIGHT, BIAS, auto_pad="VALID"),
    Case("Conv", MAPS, floats(6, 1, 3, 3), BIAS, group=3, pads=[1, 1, 1, 1]),
    Case("Conv", (4, 11), floats(6, 2, 3), BIAS, group=2, pads=[2, 1], strides=[2]),
    Case("Gemm", (7,), floats(7, 5)),
    Case("Gemm", (7,), floats(5, 7), floats(5), transB=1, alpha=0.5, beta=2.0),
    Case("Gemm", (7,), floats(5, 7), floats(1, 5), transB=1),
    Case("Gemm", (7,), floats(7, 5), number(0.25)),
    Case("MatMul", (7,), floats(7, 5)),
    Case("MatMul", (3, 7), floats(7, 5)),
    Case("MatMul", (2, 3, 7), floats(2, 7, 5)),
    Case("BatchNormalization", (5,), floats(5), floats(5), floats(5), positive(5), epsilon=0.01),
    Case("BatchNormalization", (5, 3), floats(5), floats(5), floats(5), positive(5)),
    Case("BatchNormalization", (5, 3, 2), floats(5), floats(5), floats(5), positive(5), opset=11),
    Case("LayerNormalization", (3, 7), floats(7), floats(7), epsilon=0.01),
    Case("LayerNormalization", (3, 7), floats(3, 7), axis=1),
    *(Case(kind, (3, 5)) for kind in ("Relu", "Sigmoid", "Tanh", "HardSwish", "Erf", "Abs", "Neg", "Exp", "Identity")),
    *(Case(kind, (3, 5), positive=True) for kind in ("Sqrt", "Log", "Reciprocal")),
    Case("Elu", (3, 5), alpha=0.5),
    Case("LeakyRelu", (3, 5), alpha=0.2),
    Case("LeakyRelu", (3, 5)),
    Case("HardSigmoid", (3, 5)),
    Case("HardSigmoid", (3, 5), alpha=1 / 6, beta=0.5),
    Case("Gelu", (3, 5), opset=20),
    Case("Gelu", (3, 5), opset=20, approximate="tanh"),
    Case("Clip", (3, 5), number(0), number(6)),
    Case("Clip", (3, 5), number(0)),
    Case("Clip", (3, 5), None, number(0.5)),
    Case("Clip", (3, 5), number(-0.5), None),
    Case("Clip", (3, 5)),
    *(Case(kind, (3, 5), floats(3, 1)) for kind in ("Add", "Sub", "Mul", "Div")),
    *(Case(kind, (3, 5), number(1.5)) for kind in ("Add", "Sub", "Mul", "Div")),
    Case("Pow", (3, 5), number(2)),
    Case("Pow", (3, 5), np.array([0.5], np.float32), positive=True),
    Case("MaxPool", MAPS, kernel_shape=[3, 2]),
    Case("MaxPool", MAPS, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], dilations=[2, 1]),
    Case("MaxPool", MAPS, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    Case("MaxPool", MAPS, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
    Case("MaxPool", MAPS, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("MaxPool", MAPS, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER"),
    Case("MaxPool", MAPS, kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID"),
    Case("MaxPool", (3, 9), kernel_shape=[4], strides=[3], pads=[1, 2]),
    Case("AveragePool", MAPS, kernel_shape=[3, 2]),
    Case("AveragePool", MAPS, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    Case("AveragePool", MAPS, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    Case("AveragePool", MAPS, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0]),
    Case("AveragePool", MAPS, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0], count_include_pad=1),
    Case("AveragePool", MAPS, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1, opset=19),
    Case("AveragePool", MAPS, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    Case("AveragePool", (3, 9), kernel_shape=[4], strides=[3], pads=[1, 2]),
    Case("GlobalAveragePool", MAPS),
    Case("GlobalAveragePool", (3, 9)),
    Case("GlobalMaxPool", MAPS),
    Case("GlobalMaxPool", (3, 9)),
    Case("ReduceMean", MAPS, axes=[2, 3], keepdims=0),
    Case("ReduceMean", MAPS, axes=[-1], opset=11),
    Case("ReduceMean", MAPS, ints(-1, 1), opset=18),
    Case("ReduceMean", MAPS, opset=18, noop_with_empty_axes=1),
    Case("ReduceSum", MAPS, ints(1), keepdims=0, opset=13),
    Case("ReduceMax", MAPS, axes=[3]),
    Case("Pad", MAPS, ints(0, 0, 1, 2, 0, 0, 3, 4)),
    Case("Pad", MAPS, ints(0, 2, 0, 0, 0, 1, 0, 0), number(1.5)),
    Case("Pad", MAPS, ints(1, -2), number(-1), ints(-2), opset=18),
    Case("Pad", MAPS, ints(0, 0, 0, 0, 0, 0, 0, 0)),
    Case("Slice", MAPS, ints(1, -4), ints(INT_MAX, -1), ints(2, 3)),
    Case("Slice", MAPS, ints(0, 0, 1, 0), ints(INT_MAX, 3, 6, 9), None, ints(1, 2, 3, 1)),
    Case("Slice", MAPS, ints(5), ints(2), ints(2)),
    Case("Split", MAPS, axis=3, outputs=3),
    Case("Split", MAPS, axis=2, split=[3, 4], outputs=2, opset=11),
    Case("Split", MAPS, ints(5, 4), axis=-1, outputs=2),
    Case("Split", MAPS, axis=3, num_outputs=2, outputs=2, opset=18),
    Case("Reshape", MAPS, ints(0, -1)),
    Case("Reshape", MAPS, ints(0, 0, 9, 7)),
    Case("Reshape", MAPS, ints(-1, 3, 63), allowzero=1),
    Case("Reshape", MAPS, ints(-1, 9)),
    Case("Flatten", MAPS),
    Case("Flatten", (1, 7, 9), axis=2),
    Case("Flatten", (7, 9), axis=-2),
    Case("Transpose", MAPS, perm=[0, 2, 3, 1]),
    Case("Squeeze", (3, 1, 5, 1), ints(2, -1)),
    Case("Squeeze", (3, 1, 5), axes=[2], opset=11),
    Case("Unsqueeze", (3, 5), ints(1, -1)),
    Case("Unsqueeze", (3, 5), axes=[2], opset=11),
    Case("Softmax", (3, 5)),
    Case("Softmax", (3, 5, 2), axis=1),
    Case("Softmax", (3, 5, 2), opset=11),
    Case("Softmax", (3, 5, 2), opset=12, axis=-1),
    Case("LogSoftmax", (3, 5), axis=1),
    Case("Dropout", (3, 5), number(0.5), np.array(False)),
    Case("Cast", (3, 5), to=TensorProto.FLOAT),
    Case("Gather", MAPS, np.array(-1), axis=2),
    Case("Gather", MAPS, ints(2, 3, 4), axis=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_operator(tmp_path: Path, case: Case) -> None:
    agrees(written(tmp_path, case.model), positive_inputs=case.positive)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("Clip", (3,), number(0), number(6)), ["hardtanh.default"]),
        (Case("Clip", (3,), number(0)), ["relu.default"]),
        (Case("Clip", (3,), number(0), number(3e38)), ["hardtanh.default"]),
        (Case("Clip", (3,), number(0), np.array(np.finfo(np.float32).max)), ["relu.default"]),
        (Case("HardSigmoid", (3,), alpha=1 / 6), ["hardsigmoid.default"]),
        (Case("Sub", (3, 5), floats(5)), ["get_attr", "sub.Tensor"]),
        (Case("Conv", MAPS, WEIGHT, pads=[0, 0, 1, 1]), ["constant_pad_nd.default", "Conv2d"]),
        (Case("Conv", (3, 9), floats(6, 3, 3), auto_pad="SAME_UPPER"), ["Conv1d"]),
        (Case("Split", MAPS, axis=3, outputs=3), ["slice.Tensor"]),
        (Case("Softmax", (3, 5, 2), opset=11), ["reshape.default", "softmax.int", "reshape.default"]),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_canonical_forms(tmp_path: Path, case: Case, expected: list[str]) -> None:
    assert steps(read_onnx(written(tmp_path, case.model))) == expected


def test_arguments_of_a_slice_a_pad_and_a_reshape(tmp_path: Path) -> None:
    """Negative numbers are resolved, whole ranges vanish, the batch is -1."""
    nodes = [
        node("Slice", "x starts stops axes", "s"),
        node("Pad", "s pads", "p"),
        node("Reshape", "p shape", "y"),
    ]
    constants = {"starts": ints(0, -4), "stops": ints(INT_MAX, -1), "axes": ints(0, -1), "shape": ints(0, 0, -1)}
    graph = agrees(written(tmp_path, model(nodes, MAPS, {**constants, "pads": ints(0, 0, 1, 0, 0, 0, 2, 0)})))
    first, second, third = (item.args[1:] for item in graph.nodes[1:-1])
    assert first == (3, 5, 8, 1)
    assert second == ([0, 0, 1, 2], 0.0)
    assert third == ([-1, 3, 30],)


@pytest.mark.parametrize("kind", ["Sub", "Div", "Add", "Mul"])
@pytest.mark.parametrize("constant", [number(2), floats(5)], ids=["number", "vector"])
def test_a_constant_may_come_first(tmp_path: Path, kind: str, constant: Array) -> None:
    graph = agrees(written(tmp_path, model([node(kind, "c x", "y")], (5,), {"c": constant})), positive_inputs=True)
    assert all(step in {"mul.Tensor", "add.Tensor", "reciprocal.default", "get_attr"} for step in steps(graph))


@pytest.mark.parametrize("order", ["x s", "s x"])
@pytest.mark.parametrize(("kind", "gated"), [("Sigmoid", "silu.default"), ("HardSigmoid", "hardswish.default")])
def test_a_value_times_its_sigmoid_is_one_operator(tmp_path: Path, order: str, kind: str, gated: str) -> None:
    attributes: dict[str, Any] = {"alpha": 1 / 6} if kind == "HardSigmoid" else {}
    nodes = [node(kind, "x", "s", **attributes), node("Mul", order, "y")]
    assert steps(agrees(written(tmp_path, model(nodes, (3, 5))))) == [gated]


def test_a_gate_from_elsewhere_stays(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "r"), node("Sigmoid", "r", "s"), node("Mul", "x s", "y")]
    assert steps(agrees(written(tmp_path, model(nodes, (3, 5))))) == ["relu.default", "sigmoid.default", "mul.Tensor"]


def test_products_and_sums_of_activations(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("MatMul", "x t", "m"),
        node("Concat", "m x", "c", axis=-1),
        node("Sub", "c c", "d"),
        node("Add", "c d", "y"),
    ]
    graph = agrees(written(tmp_path, model(nodes, (3, 5))))
    assert steps(graph) == ["permute.default", "matmul.default", "cat.default", "sub.Tensor", "add.Tensor"]


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
def test_rows_that_the_input_picks_are_an_embedding(tmp_path: Path, kind: int) -> None:
    """Two tables under one index are two layers, one table twice is one."""
    nodes = [
        node("Cast", "x", "i", to=kind),
        node("Gather", "first.weight i", "a"),
        node("Gather", "second.weight i", "b"),
        node("Gather", "first.weight i", "c"),
        node("Add", "a b", "d"),
        node("Mul", "c d", "y"),
    ]
    tables = {"first.weight": floats(9, 4), "second.weight": floats(9, 4, seed=1)}
    graph = agrees(written(tmp_path, model(nodes, (5,), tables)), positive_inputs=True)
    assert steps(graph) == ["to.dtype", *["Embedding"] * 3, "add.Tensor", "mul.Tensor"]
    assert graph.weights() == 2 * 9 * 4
    torch.testing.assert_close(graph.layer("second").weight.data, torch.from_numpy(tables["second.weight"]))


def test_rows_of_more_than_a_matrix_are_refused(tmp_path: Path) -> None:
    nodes = [node("Cast", "x", "i", to=TensorProto.INT64), node("Gather", "t i", "y")]
    network = model(nodes, (5,), {"t": floats(9, 4, 2)})
    assert "looks up other than the rows of a matrix" in refused(tmp_path, network).cause


@pytest.mark.parametrize("order", ["m fc.bias", "fc.bias m"])
def test_the_constant_after_a_product_is_its_bias(tmp_path: Path, order: str) -> None:
    nodes = [node("MatMul", "x fc.weight", "m"), node("Add", order, "y")]
    graph = agrees(written(tmp_path, model(nodes, (3, 7), {"fc.weight": floats(7, 5), "fc.bias": floats(5)})))
    assert steps(graph) == ["Linear"]
    assert [site.name for site in graph.sites()] == ["fc"]
    assert graph.weights() == 7 * 5 + 5
    torch.testing.assert_close(graph.layer("fc").bias.data, torch.from_numpy(floats(5)))


def test_a_bias_by_channel_after_a_convolution(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c b", "y")]
    graph = agrees(written(tmp_path, model(nodes, MAPS, {"w": WEIGHT, "b": floats(1, 6, 1, 1)})))
    assert steps(graph) == ["Conv2d"]


@pytest.mark.parametrize(
    ("shape", "constant"), [((3, 7), floats(3, 1)), ((3, 7), floats(3, 5)), ((5, 7), floats(5, 1))]
)
def test_what_is_no_bias_stays_a_sum(tmp_path: Path, shape: tuple[int, ...], constant: Array) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "y")]
    graph = agrees(written(tmp_path, model(nodes, shape, {"w": floats(7, 5), "b": constant})))
    assert steps(graph) == ["Linear", "get_attr", "add.Tensor"]


def test_a_product_with_two_readers_keeps_its_sum(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Mul", "a m", "y")]
    graph = agrees(written(tmp_path, model(nodes, (7,), {"w": floats(7, 5), "b": floats(5)})))
    assert steps(graph) == ["Linear", "get_attr", "add.Tensor", "mul.Tensor"]


def test_a_weight_with_two_readers_is_one_layer(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x net.0.weight b", "m"), node("Relu", "m", "r"), node("Gemm", "r net.0.weight b", "y")]
    graph = agrees(written(tmp_path, model(nodes, (5,), {"net.0.weight": floats(5, 5), "b": floats(5)})))
    assert [item.target for item in graph.nodes if item.op == "call_module"] == ["net.0", "net.0"]
    assert graph.weights() == 30


@pytest.mark.parametrize(
    ("weight", "name", "expected"),
    [
        ("layer1.0.conv1.weight", "/anything/Gemm", "layer1.0.conv1"),
        ("onnx::Gemm_7", "/layer1/layer1.0/head/fc/Gemm", "layer1.0.head.fc"),
        ("onnx::Gemm_7", "/net/net.3/Gemm_2", "net.3"),
        ("val_3", "node_Gemm_4", "node_Gemm_4"),
        ("w:0", "model/dense/MatMul;bias", "model.dense.MatMul_bias"),
        ("w", "", "Gemm"),
        ("w", "/", "Gemm"),
        ("a.forward.weight", "", "a.forward_"),
        ("class.weight", "", "class_"),
        ("0.weight", "", "0"),
    ],
)
def test_names_of_layers(tmp_path: Path, weight: str, name: str, expected: str) -> None:
    network = model([node("Gemm", f"x {weight}", "y", name)], (5,), {weight: floats(5, 3)})
    graph = agrees(written(tmp_path, network))
    assert [site.name for site in graph.sites()] == [expected]
    graph.save(tmp_path)
    assert [site.name for site in Graph.read(tmp_path).sites()] == [expected]


def test_names_are_unique_and_never_inside_each_other(tmp_path: Path) -> None:
    weights = ["fc.weight", "fc.0.weight", "fc_0.weight", "fc.kernel", "a.b.weight", "a.weight"]
    values = ["x", *(f"v{k}" for k in range(1, len(weights))), "y"]
    nodes = [node("Gemm", f"{values[k]} {name}", values[k + 1]) for k, name in enumerate(weights)]
    graph = agrees(
        written(tmp_path, model(nodes, (4,), {name: floats(4, 4, seed=k) for k, name in enumerate(weights)}))
    )
    assert [site.name for site in graph.sites()] == ["fc", "fc_0", "fc_0_1", "fc_1", "a.b", "a_1"]


def test_where_names_the_onnx_node(tmp_path: Path) -> None:
    graph = read_onnx(written(tmp_path, model([node("Relu", "x", "y", "/act/Relu")], (5,))))
    assert where(graph.output) == "relu (aten.relu.default, ONNX Relu /act/Relu)"
    assert graph.facts.shape == (5,)
    assert graph.facts.origin == "ONNX file"


def test_shapes_that_are_computed(tmp_path: Path) -> None:
    """Shape, Gather, Concat and their like leave nothing behind."""
    nodes = [
        node("Constant", "", "axis", value=numpy_helper.from_array(ints(0))),
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "batch"),
        node("Unsqueeze", "batch axis", "first"),
        node("Gather", "shape one", "channels"),
        node("Mul", "channels two", "doubled"),
        node("Unsqueeze", "doubled axis", "second"),
        node("ConstantOfShape", "axis_count", "rest", value=numpy_helper.from_array(ints(-1))),
        node("Concat", "first second rest", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    constants = {"zero": np.array(0), "one": np.array(1), "two": np.array(2), "axis_count": ints(1)}
    graph = agrees(written(tmp_path, model(nodes, (3, 4), constants)))
    assert steps(graph) == ["reshape.default"]
    assert graph.output.args[1] == [-1, 6, 2]


def test_shape_of_some_axes(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "batch", end=1),
        node("Shape", "x", "last", start=-1),
        node("Concat", "batch last minus", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    graph = agrees(written(tmp_path, model(nodes, (3, 4, 5), {"minus": ints(-1)})))
    assert graph.output.args[1] == [-1, 5, 12]


def test_reshapes_and_transposes_in_a_row_are_one(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "a", perm=[0, 2, 3, 1]),
        node("Transpose", "a", "b", perm=[0, 3, 1, 2]),
        node("Flatten", "b", "c"),
        node("Reshape", "c shape", "y"),
    ]
    graph = agrees(written(tmp_path, model(nodes, MAPS, {"shape": ints(-1, 21, 9)})))
    assert steps(graph) == ["reshape.default"]


def test_channels_last(tmp_path: Path) -> None:
    """As tf2onnx writes it: channels last outside, transposes around the layers, biases and pads apart."""
    nodes = [
        node("Transpose", "x", "a", "model/conv2d/Conv2D__6", perm=[0, 3, 1, 2]),
        node("Conv", "a k", "b", "model/conv2d/Conv2D", auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[3, 2]),
        node("Add", "b bias", "c", "model/conv2d/BiasAdd"),
        node("Clip", "c low high", "d", "model/re_lu/Relu6"),
        node("Transpose", "d", "e", perm=[0, 2, 3, 1]),
        node("Mul", "e gain", "f", "model/mul"),
        node("ReduceMean", "f", "g", "model/mean", axes=[1, 2], keepdims=0),
        node("MatMul", "g w", "h", "model/dense/MatMul"),
        node("Add", "h wb", "i", "model/dense/BiasAdd"),
        node("Softmax", "i", "y", "model/softmax"),
    ]
    constants = {"k": WEIGHT, "bias": floats(1, 6, 1, 1), "low": number(0), "high": number(6), "gain": floats(6)}
    graph = agrees(written(tmp_path, model(nodes, (7, 9, 3), {**constants, "w": floats(6, 4), "wb": floats(4)})))
    assert [site.name for site in graph.sites()] == ["model.conv2d", "model.dense"]
    assert graph.facts.shape == (7, 9, 3)


def test_old_files_list_weights_among_the_inputs(tmp_path: Path) -> None:
    network = model([node("Gemm", "x w", "y")], (5,), {"w": floats(5, 3)})
    network.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 3]))
    agrees(written(tmp_path, network))


def test_a_function_of_the_file_itself(tmp_path: Path) -> None:
    twice = helper.make_function("own", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 17)])
    network = model([helper.make_node("Twice", ["x"], ["y"], domain="own")], (5,), domain="own", functions=[twice])
    assert steps(agrees(written(tmp_path, network))) == ["add.Tensor"]


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    network = model([node("Gemm", "x w", "y")], (64,), {"w": floats(64, 8)})
    onnx.save(network, path, save_as_external_data=True, location="model.data", size_threshold=0)
    assert (tmp_path / "model.data").is_file()
    agrees(path)
    (tmp_path / "model.data").unlink()
    with pytest.raises(CheckpointError, match=r"lacks its weights: .*model\.data") as caught:
        read_onnx(path)
    assert caught.value.remedy == "put the data file beside it, under its own name"


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_becomes_any_batch(tmp_path: Path, batch: int) -> None:
    """The file has its batch in a reshape; the graph takes other batches too, each input as it was alone."""
    nodes = [node("Conv", "x w", "c"), node("Reshape", "c shape", "r"), node("Gemm", "r g", "y")]
    constants = {"w": WEIGHT, "shape": ints(batch, 6 * 5 * 8), "g": floats(240, 5)}
    graph = agrees(written(tmp_path, model(nodes, MAPS, constants, batch=batch)), [batch])
    inputs = torch.from_numpy(floats(5, *MAPS))
    alone = torch.cat([graph.run(inputs[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(graph.run(inputs), alone)


def test_constants_are_read_as_float32_from_other_types(tmp_path: Path) -> None:
    """Weights in int8 with a scale, and in float16, are float32 once they are folded."""
    nodes = [
        node("DequantizeLinear", "q scale", "w"),
        node("Gemm", "x w", "h"),
        node("Cast", "b", "c", to=TensorProto.FLOAT),
        node("Add", "h c", "y"),
    ]
    codes = np.random.default_rng(0).integers(-128, 127, (5, 3)).astype(np.int8)
    constants = {"q": codes, "scale": number(0.25), "b": floats(3).astype(np.float16)}
    graph = read_onnx(written(tmp_path, model(nodes, (5,), constants, opset=19)))
    assert steps(graph) == ["Linear"]
    # Against NumPy: onnxruntime would quantize the activations of such a product as well.
    inputs = floats(4, 5)
    expected = inputs @ (codes * np.float32(0.25)) + constants["b"].astype(np.float32)
    torch.testing.assert_close(graph.run(torch.from_numpy(inputs)), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_a_layer_norm_in_its_parts(tmp_path: Path) -> None:
    """Before operator set 17: mean, difference, square, mean, root and quotient, then scale and shift."""
    nodes = [
        node("ReduceMean", "x", "mean", axes=[-1]),
        node("Sub", "x mean", "centred"),
        node("Pow", "centred two", "square"),
        node("ReduceMean", "square", "variance", axes=[-1]),
        node("Add", "variance eps", "safe"),
        node("Sqrt", "safe", "deviation"),
        node("Div", "centred deviation", "normal"),
        node("Mul", "normal gain", "scaled"),
        node("Add", "scaled shift", "y"),
    ]
    constants = {"two": number(2), "eps": number(1e-5), "gain": floats(7), "shift": floats(7)}
    agrees(written(tmp_path, model(nodes, (3, 7), constants, opset=13)))


@st.composite
def windows(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int]]:
    """Attributes of a convolution or pooling over (height, width), and the size of its input."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))}
    mode = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        most = [extent - 1 for extent in kernel] * 2
        found["pads"] = [draw(st.integers(0, extent)) for extent in most]
    else:
        found["auto_pad"] = mode
    return found, (draw(st.integers(4, 11)), draw(st.integers(4, 11)))


@settings(max_examples=60)
@given(window=windows(), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_convolutions_of_any_geometry(
    tmp_path_factory: pytest.TempPathFactory, window: tuple[dict[str, Any], tuple[int, int]], groups: int, seed: int
) -> None:
    found, size = window
    weight = floats(8, 4 // groups, *found["kernel_shape"], seed=seed)
    network = model([node("Conv", "x w", "y", group=groups, **found)], (4, *size), {"w": weight})
    agrees(written(tmp_path_factory.mktemp("conv"), network), [2])


@settings(max_examples=60)
@given(window=windows(), kind=st.sampled_from(["MaxPool", "AveragePool"]), counted=st.booleans())
def test_pooling_of_any_geometry(
    tmp_path_factory: pytest.TempPathFactory, window: tuple[dict[str, Any], tuple[int, int]], kind: str, counted: bool
) -> None:
    found, size = window
    # onnxruntime refuses to pool automatically padded windows that leave gaps.
    assume(
        "pads" in found
        or all(step <= width for step, width in zip(found["strides"], found["kernel_shape"], strict=True))
    )
    if kind == "AveragePool":
        found = {**found, "count_include_pad": int(counted)}
    network = model([node(kind, "x", "y", **found)], (3, *size))
    agrees(written(tmp_path_factory.mktemp("pool"), network), [2])


class Squeezed(nn.Module):
    """Channels weighted by what is in them, as in squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.wide(torch.relu(self.narrow(pooled))))


class Attention(nn.Module):
    """Two heads over (batch, tokens, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).chunk(3, -1)
        query, key, value = (part.view(part.shape[0], -1, 2, 4).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)


class Mobile(nn.Module):
    """The parts that small networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
            nn.Hardswish(),
            Squeezed(8),
            nn.SiLU(),
        )
        self.attention, self.norm, self.mix, self.head = Attention(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.features(x).flatten(2).transpose(1, 2)
        tokens = self.norm(tokens + self.attention(tokens))
        mixed = functional.gelu(self.mix(tokens))
        found: Tensor = self.head(mixed.mean(1))
        return found.softmax(-1)


LAYERS = ["features.0", "features.3", "features.5.narrow", "features.5.wide", "attention.project", "mix", "head"]


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The network above as torch's two exporters write it."""
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    torch.manual_seed(0)
    network, example = Mobile().eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        network.get_buffer("features.1.running_mean").uniform_(-1, 1)
    with warnings.catch_warnings():
        # The exporters' own deprecations.
        warnings.simplefilter("ignore")
        if request.param == "dynamo":
            batch = torch.export.Dim("n")
            torch.onnx.export(network, (example,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        else:
            torch.onnx.export(network, (example,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    return path, network


def test_files_of_torch(exported: tuple[Path, nn.Module]) -> None:
    path, network = exported
    graph = agrees(path)
    assert [site.name for site in graph.sites()] == LAYERS
    assert {"hardtanh.default", "hardswish.default", "silu.default", "gelu.default"} <= set(steps(graph))
    assert graph.layer("norm").weight.shape == (8,)
    inputs = torch.from_numpy(floats(3, 3, 9, 9))
    torch.testing.assert_close(graph.run(inputs), network(inputs).detach(), rtol=1e-4, atol=1e-5)


def test_a_graph_from_onnx_is_saved_and_read(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    graph = read_onnx(exported[0])
    graph.save(tmp_path)
    again = Graph.read(tmp_path)
    assert steps(again) == steps(graph)
    assert again.facts == graph.facts
    assert [where(item) for item in again.nodes] == [where(item) for item in graph.nodes]
    inputs = torch.from_numpy(floats(3, 3, 9, 9))
    torch.testing.assert_close(again.run(inputs), graph.run(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("tiny_resnet8_cifar10", "stem.0"),
        ("tiny_dscnn_kws", "features.1"),
        ("tiny_fc_autoencoder_toycar", "net.0"),
        ("cifar10_resnet20_jpegft", "conv1"),
    ],
)
def test_real_networks(asset: Callable[[str], Path], name: str, first: str) -> None:
    graph = agrees(asset(name) / "model.onnx")
    assert graph.sites()[0].name == first
    assert "get_attr" not in steps(graph)


def refused(folder: Path, network: onnx.ModelProto, kind: type[UserError] = UnsupportedError) -> UserError:
    with pytest.raises(kind) as caught:
        read_onnx(written(folder, network))
    assert "\n" not in caught.value.cause
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        (Case("Conv", (3, 5, 5, 5), floats(2, 3, 1, 1, 1)), "works on 3 axes of a tensor with 5"),
        (Case("Gemm", (5,), floats(3, 4), transA=1), "transposes its input, the batch axis included"),
        (Case("Gemm", (5,), floats(5, 3), floats(997, 3)), "adds another bias to each input of a batch"),
        (Case("BatchNormalization", (5,), *[positive(5)] * 4, training_mode=1), "is in training mode"),
        (Case("Dropout", (5,), number(0.5), np.array(True)), "is in training mode"),
        (Case("Pow", (5,), floats(5)), "has an exponent of several numbers"),
        (Case("Clip", (5,), number(2), number(1)), "has a range from 2 to 1"),
        (Case("Cast", (5,), to=TensorProto.FLOAT16), "makes float16 of float32"),
        (Case("AveragePool", MAPS, kernel_shape=[2, 2], dilations=[2, 2], opset=19), "has dilations"),
        (Case("MaxPool", MAPS, kernel_shape=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1), "pads unevenly and rounds"),
        (Case("AveragePool", MAPS, kernel_shape=[3, 3], pads=[0, 0, 1, 1], ceil_mode=1), "pads unevenly and rounds"),
        (Case("MaxPool", MAPS, kernel_shape=[2, 2], strides=[2]), "has 1 strides for 2 axes"),
        (Case("AveragePool", MAPS, kernel_shape=[2, 2], strides=[2, 2, 2]), "has 3 strides for 2 axes"),
        (Case("Conv", MAPS, WEIGHT, dilations=[2]), "has 1 dilations for 2 axes"),
        (Case("ReduceMean", MAPS), "works along the batch axis"),
        (Case("Pad", MAPS, ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), "pads in mode 'reflect'"),
        (Case("Pad", (5,), ints(1, 0, 0, 0)), "works along the batch axis"),
        (Case("Slice", MAPS, ints(-1), ints(-9), ints(2), ints(-1)), "steps backwards, by -1"),
        (Case("Slice", MAPS, ints(0), ints(1), ints(0)), "works along the batch axis"),
        (Case("Gather", MAPS, ints(0, 2), axis=2), "picks entries that are not in a row"),
        (Case("Split", MAPS, ints(5, 3), axis=-1, outputs=2), "splits 9 entries into 5, 3"),
        (Case("Split", MAPS, ints(11, -2), axis=-1, outputs=2), "splits 9 entries into 11, -2"),
        (
            Case("MaxPool", MAPS, kernel_shape=[3, 3], pads=[-1, 0, 0, 0]),
            r"cannot be translated: .*pads must not contain negative",
        ),
        (Case("Transpose", MAPS), "moves the batch axis"),
        (Case("Softmax", (5,), axis=0), "works along the batch axis"),
        (Case("Softmax", (5,), axis=3), "names axis 3 of a tensor with 2 axes"),
        (Case("Squeeze", (5, 1), ints(0)), "works along the batch axis"),
        (Case("Squeeze", (5, 1)), "names no axes, so that it would drop a batch of one"),
        (Case("Flatten", (5, 3), axis=0), r"reshapes \(batch, 5, 3\) to \(1, 14955\), which does not keep the batch"),
        (Case("Reshape", (5, 3), ints(1, 15)), r"reshapes to \(1, 15\), which holds for one batch size only"),
        (Case("Add", (5,), floats(1, 1, 5)), "makes a tensor whose first axis is not the batch"),
        (Case("Conv", MAPS, floats(2, 4, 1, 1)), "cannot be translated: "),
        (Case("Resize", MAPS, None, np.array([1, 1, 2, 2], np.float32)), "is not supported"),
        (Case("Bernoulli", (5,)), "is not supported"),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_what_an_operator_cannot_do(tmp_path: Path, case: Case, cause: str) -> None:
    kind = case.model.graph.node[0].op_type
    case.model.graph.node[0].name = "/here"
    assert re.match(f"ONNX {kind} /here {cause}", refused(tmp_path, case.model).cause)


@pytest.mark.parametrize(
    ("nodes", "cause"),
    [
        ([node("Conv", "x v", "y")], "computes its input 1 at run time, where effcli needs a constant"),
        ([node("Concat", "x c", "y", axis=1)], "takes a constant as input 1, where effcli needs an activation"),
        (
            [node("MaxPool", "x", "m i", kernel_shape=[2, 2]), node("Add", "m i", "y")],
            "reads i, which effcli does not compute",
        ),
    ],
    ids=["activation", "constant", "second output"],
)
def test_inputs_of_the_wrong_kind(tmp_path: Path, nodes: list[onnx.NodeProto], cause: str) -> None:
    network = model([node("Relu", "x", "v"), *nodes], (2, 4, 4), {"c": floats(1, 2, 4, 4)})
    assert cause in refused(tmp_path, network).cause


def test_all_unsupported_operators_at_once(tmp_path: Path) -> None:
    nodes = [
        node("Relu", "x", "r"),
        node("Ceil", "r", "a", "up"),
        node("Floor", "a", "b", "down"),
        helper.make_node("FusedGelu", ["b"], ["y"], name="fused", domain="com.other"),
    ]
    found = refused(tmp_path, model(nodes, (5,), domain="com.other")).cause
    assert found == "ONNX Ceil up is not supported (neither are ONNX Floor down, ONNX com.other.FusedGelu fused)"


def test_a_branch_is_named(tmp_path: Path) -> None:
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Relu", "x", "o")], "branch", [], [output])
    network = model(
        [node("If", "c", "y", "choice", then_branch=branch, else_branch=branch)], (5,), {"c": np.array(True)}
    )
    assert refused(tmp_path, network).cause == "ONNX If choice is not supported"


@pytest.mark.parametrize(("opset", "cause"), [(10, "operator set 10, effcli reads 11 and above"), (99, "set 99 and")])
def test_operator_sets(tmp_path: Path, opset: int, cause: str) -> None:
    error = refused(tmp_path, model([node("Relu", "x", "y")], (5,), opset=opset))
    assert cause in error.cause
    assert ("version_converter" if opset == 10 else "pip install -U onnx") in error.remedy


def test_a_newer_format(tmp_path: Path) -> None:
    network = model([node("Relu", "x", "y")], (5,))
    network.ir_version = 99
    assert "format 99" in refused(tmp_path, network).cause


@pytest.mark.parametrize("kind", ["input", "output"])
def test_several_inputs_or_outputs(tmp_path: Path, kind: str) -> None:
    network = model([node("Relu", "x", "y"), node("Relu", "y", "z")], (5,))
    getattr(network.graph, kind).append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 5]))
    if kind == "input":
        network = model([node("Add", "x z", "y")], (5,))
        network.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 5]))
    assert re.search(rf"has 2 {kind}s \([xy], z\)", refused(tmp_path, network).cause)


@pytest.mark.parametrize(("axis", "shown"), [("height", "height"), (None, "without a name")])
def test_a_dynamic_axis_besides_the_batch(tmp_path: Path, axis: str | None, shown: str) -> None:
    error = refused(tmp_path, model([node("Relu", "x", "y")], (3, axis, 5)))
    assert error.cause.endswith(f"is dynamic ({shown})")
    assert "axis 2 of input x" in error.cause


def test_inputs_that_are_no_batches_of_float32(tmp_path: Path) -> None:
    assert "has too few axes" in refused(tmp_path, model([node("Relu", "x", "y")], ())).cause
    network = model([node("Cast", "x", "y", to=TensorProto.FLOAT)], (5,))
    network.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    assert "input x of" in refused(tmp_path, network).cause
    assert refused(tmp_path, network).cause.endswith("is uint8")


@pytest.mark.parametrize(("number", "said"), [(TensorProto.UINT8, "is uint8"), (2**31 - 1, "unknown type 2147483647")])
def test_an_output_of_another_type(tmp_path: Path, number: int, said: str) -> None:
    network = model([node("Relu", "x", "y")], (6,))
    network.graph.output[0].type.tensor_type.elem_type = number
    assert f"output y of {tmp_path}" in (cause := refused(tmp_path, network).cause)
    assert said in cause


def test_inputs_of_a_batch_that_depend_on_each_other(tmp_path: Path) -> None:
    """Another constant for each input, and a product along an axis into which the batch is folded."""
    network = model([node("Add", "x c", "y")], (6,), {"c": floats(4, 6)}, batch=4)
    assert "does not work on batches of any size" in refused(tmp_path, network).cause
    nodes = [
        node("Reshape", "x tokens", "t"),
        node("MatMul", "left t", "m"),
        node("Reshape", "m back", "y"),
    ]
    constants = {"tokens": ints(6, 2), "left": floats(6, 6), "back": ints(1, 12)}
    assert "does not work on batches of any size" in refused(tmp_path, model(nodes, (12,), constants, batch=1)).cause


@pytest.mark.parametrize("into", ["number", "vector", "shape"])
def test_a_network_that_computes_with_the_size_of_its_batch(tmp_path: Path, into: str) -> None:
    nodes = [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Cast", "n", "f", to=TensorProto.FLOAT)]
    constants = {"zero": np.array(0), "ones": floats(5)}
    if into == "number":
        nodes.append(node("Div", "x f", "y"))
    elif into == "vector":
        nodes += [node("Mul", "ones f", "v"), node("Add", "x v", "y")]
    else:
        nodes += [
            node("Reshape", "n one", "size"),
            node("Concat", "none none none size", "pads", axis=0),
            node("Pad", "x pads", "y"),
        ]
        constants.update(one=ints(1), none=ints(0))
    assert refused(tmp_path, model(nodes, (5,), constants)).cause.endswith("computes with the size of its batch")


def test_an_output_that_is_constant(tmp_path: Path) -> None:
    network = model([node("Relu", "c", "y")], (5,), {"c": floats(5)})
    assert "does not depend on its input" in refused(tmp_path, network).cause


def test_sparse_weights(tmp_path: Path) -> None:
    network = model([node("Gemm", "x w", "y")], (5,))
    values = numpy_helper.from_array(floats(2), "w")
    places = numpy_helper.from_array(ints(0, 3), "w_indices")
    network.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5, 3]))
    assert "stores weights as sparse tensors" in refused(tmp_path, network).cause


@pytest.mark.parametrize("content", [b"", b"no protobuf at all, but a text", bytes(range(256)) * 4])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged or no ONNX file: ") as caught:
        read_onnx(path)
    assert "\n" not in caught.value.cause


def test_a_truncated_and_a_missing_file(tmp_path: Path) -> None:
    path = written(tmp_path, model([node("Gemm", "x w", "y")], (64,), {"w": floats(64, 8)}))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="is damaged or no ONNX file: "):
        read_onnx(path)
    with pytest.raises(CheckpointError, match="there is no "):
        read_onnx(tmp_path / "other.onnx")


def test_an_invalid_file(tmp_path: Path) -> None:
    """Sound protobuf, but a node reads what nobody writes, or no such operator exists."""
    assert "damaged" in refused(tmp_path, model([node("Relu", "nothing", "y")], (5,)), CheckpointError).cause
    assert "damaged" in refused(tmp_path, model([node("Relux", "x", "y")], (5,)), CheckpointError).cause


def test_onnx_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effcli.platform.onnx_session.find_spec", lambda name: None)
    with pytest.raises(UserError, match="ONNX needs onnx, not installed here") as caught:
        read_onnx(tmp_path / "model.onnx")
    assert caught.value.remedy == "pip install 'effcli[onnx]'"


def test_nothing_is_drawn_from_the_random_state(tmp_path: Path) -> None:
    path = written(tmp_path, model([node("Conv", "x w", "y")], MAPS, {"w": WEIGHT}))
    before = torch.get_rng_state()
    read_onnx(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_negative_infinity_pads_a_maximum(tmp_path: Path) -> None:
    """Uneven padding becomes an operator of its own, whose value no maximum takes; it survives the file."""
    nodes = [node("MaxPool", "x", "p", kernel_shape=[3, 3], pads=[0, 0, 1, 1]), node("Conv", "p w", "y")]
    graph = agrees(written(tmp_path, model(nodes, MAPS, {"w": WEIGHT})))
    assert graph.nodes[1].args[2] == -math.inf
    graph.save(tmp_path)
    assert Graph.read(tmp_path).nodes[1].args[2] == -math.inf


@pytest.mark.parametrize("beside", [False, True])
def test_an_output_without_a_declared_shape(tmp_path: Path, beside: bool) -> None:
    network = model([node("Gemm", "x w", "y")], (64,), {"w": floats(64, 8)})
    network.graph.output[0].type.tensor_type.ClearField("shape")
    path = tmp_path / "model.onnx"
    onnx.save(network, path, save_as_external_data=beside, location="model.data", size_threshold=0)
    agrees(path)


def test_an_input_without_a_declared_shape(tmp_path: Path) -> None:
    network = model([node("Relu", "x", "y")], (5,))
    network.graph.input[0].type.tensor_type.ClearField("shape")
    assert "input x" in refused(tmp_path, network).cause
    assert "declares no shape" in refused(tmp_path, network).cause


@pytest.mark.parametrize("opset", [13, 17, 19, 21])
def test_weights_behind_a_dequantization(tmp_path: Path, opset: int) -> None:
    stored = {
        "q": np.arange(-20, 20, dtype=np.int8).reshape(8, 5),
        "s": positive(8),
        "z": np.arange(8, dtype=np.int8),
    }
    nodes = [node("DequantizeLinear", "q s z", "w", axis=0), node("Gemm", "x w", "y", transB=1)]
    assert steps(agrees(written(tmp_path, model(nodes, (5,), stored, opset=opset)))) == ["Linear"]


def test_constants_that_grow_without_end(tmp_path: Path) -> None:
    doubled = [node("Concat", f"e{k} e{k}", f"e{k + 1}", axis=0) for k in range(20)]
    nodes = [*doubled, node("ReduceMax", "e20", "m", keepdims=0), node("Add", "x m", "y")]
    network = model(nodes, (5,), {"e0": floats(4096)})
    assert "makes constants larger than effcli computes" in refused(tmp_path, network).cause


def test_a_constant_of_forty_gigabytes(tmp_path: Path) -> None:
    nodes = [node("ConstantOfShape", "s", "big"), node("ReduceSum", "big", "m", keepdims=0), node("Add", "x m", "y")]
    network = model(nodes, (5,), {"s": ints(200_000, 50_000)})
    assert refused(tmp_path, network).cause == "ONNX ConstantOfShape big makes constants larger than effcli computes"


def test_an_activation_of_forty_gigabytes(tmp_path: Path) -> None:
    nodes = [node("Pad", "x p", "y")]
    network = model(nodes, (5,), {"p": ints(0, 0, 0, 10**10)})
    assert "makes 10,000,000,005 numbers of one input" in refused(tmp_path, network).cause


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A function of the domain `own` that calls these in turn."""
    values = ["a", *(f"v{k}" for k in range(len(calls) - 1)), "b"]
    nodes = [
        helper.make_node(kind, [values[k]], [values[k + 1]], domain="own" if kind.startswith("F") else "")
        for k, kind in enumerate(calls)
    ]
    return helper.make_function("own", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17), OWN])


OWN = helper.make_opsetid("own", 1)


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    called = helper.make_node("F0", ["x"], ["y"], domain="own")
    rounds = [function("F0", "F1"), function("F1", "Relu", "F0")]
    network = model([called], (5,), domain="own")
    network.functions.extend(rounds)
    assert "calls itself" in refused(tmp_path, network, CheckpointError).cause


def test_functions_that_grow_without_end(tmp_path: Path) -> None:
    called = helper.make_node("F0", ["x"], ["y"], domain="own")
    doubled = [function(f"F{k}", f"F{k + 1}", f"F{k + 1}") for k in range(40)]
    network = model([called], (5,), domain="own")
    network.functions.extend([*doubled, function("F40", "Relu")])
    assert f"come to {2**40:,} nodes" in refused(tmp_path, network).cause
