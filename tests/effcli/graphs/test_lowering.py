"""Lowering: every operator of a graph against the graph itself, and what cannot be lowered by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from effcli.errors import NumericsError, UnsupportedError
from effcli.formats import Affine, AffineWeight
from effcli.graphs import executor
from effcli.graphs.assembly import quantization
from effcli.graphs.fusion import fuse, hoist_activations
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.integer import Convolution, IntegerNetwork, LayerNorm, Table, Weighted
from effcli.graphs.lowering import Lowered, check, lower
from effcli.graphs.rows import rows_of

Build = Callable[[Builder, fx.Node], fx.Node]


def graph_of(shape: tuple[int, ...], build: Build, seed: int = 0) -> Graph:
    torch.manual_seed(seed)
    builder = Builder()
    return builder.finish(build(builder, builder.input("x")), Facts(origin="test", shape=shape))


def inputs_of(graph: Graph, count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, *graph.facts.shape, generator=torch.Generator().manual_seed(seed))


def lowered(graph: Graph, inputs: Tensor, **options: Any) -> Lowered:
    """`graph` with the ranges that its tensors have on `inputs`."""
    fusion = fuse(graph)
    ranges: dict[str, tuple[float, float]] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in fusion.roots:
                group = fusion.groups[n.name]
                low, high = ranges.get(group, (0.0, 0.0))
                ranges[group] = min(low, float(value.min())), max(high, float(value.max()))
            return value

    with torch.inference_mode():
        Watcher(graph.module).run(inputs)
    return lower(graph, ranges, **options)


def decibels(expected: Tensor, found: Any) -> float:
    error = torch.as_tensor(found).double() - expected.double()
    return float(10 * torch.log10(expected.double().square().sum() / error.square().sum()))


def quality(graph: Graph, **options: Any) -> float:
    inputs = inputs_of(graph)
    network = lowered(graph, inputs, **options).network
    return decibels(graph.run(inputs), executor.run_float(network, inputs.numpy()))


def conv(builder: Builder, node: fx.Node, inputs: int, outputs: int, kernel: Any = 3, **options: Any) -> fx.Node:
    name = f"conv{len(builder.graph.nodes)}"
    return builder.module(name, nn.Conv2d(inputs, outputs, kernel, **options), node, source="net.py:7 in forward")


def unary(operator: str, *rest: Any) -> Build:
    return lambda b, x: b.call(operator, conv(b, x, 3, 6), *rest)


def squeeze_and_excite(b: Builder, x: fx.Node) -> fx.Node:
    y = b.call("aten.relu.default", conv(b, x, 3, 8, padding=1))
    s = b.call("aten.mean.dim", y, [2, 3], True)
    s = b.call("aten.relu.default", conv(b, s, 8, 4, 1))
    s = b.call("aten.hardsigmoid.default", conv(b, s, 4, 8, 1))
    return b.call("aten.mul.Tensor", y, s)


def branches(b: Builder, x: fx.Node) -> fx.Node:
    first = b.call("aten.relu.default", conv(b, x, 3, 4, padding=1))
    second = b.call("aten.max_pool2d.default", conv(b, x, 3, 5, padding=1), [3, 3], [1, 1], [1, 1])
    joined = b.call("aten.cat.default", [first, second], 1)
    return conv(b, joined, 9, 5)


def shortcut(b: Builder, x: fx.Node) -> fx.Node:
    """The parameter-free shortcut of CIFAR residual networks: every second pixel, channels of zeros."""
    y = b.call("aten.relu.default", conv(b, x, 3, 4, padding=1))
    z = conv(b, y, 4, 8, stride=2, padding=1)
    for axis in (2, 3):
        y = b.call("aten.slice.Tensor", y, axis, 0, 2**63 - 1, 2)
    y = b.call("aten.constant_pad_nd.default", y, [0, 0, 0, 0, 2, 2], 0.0)
    return b.call("aten.relu.default", b.call("aten.add.Tensor", z, y))


def conv1d_chain(b: Builder, x: fx.Node) -> fx.Node:
    x = b.call("aten.reshape.default", x, [-1, 3, 63])
    x = b.call("aten.relu.default", b.module("one", nn.Conv1d(3, 8, 5, stride=2, padding=2), x))
    x = b.module("two", nn.Conv1d(8, 8, 3, groups=4, dilation=2), b.call("aten.constant_pad_nd.default", x, [1, 3], 0))
    x = b.call("aten.avg_pool1d.default", b.call("aten.max_pool1d.default", x, [2], [2], [1]), [4])
    return b.module("three", nn.Linear(4, 3), x)


def transposed(b: Builder, x: fx.Node) -> fx.Node:
    x = b.call("aten.permute.default", conv(b, x, 3, 6), [0, 2, 3, 1])
    return b.module("fc", nn.Linear(6, 4), x)


def per_channel(b: Builder, x: fx.Node) -> fx.Node:
    factor = b.tensor("gamma", torch.tensor([0.3, -2.0, 1e-6]).reshape(1, 3, 1, 1))
    offset = b.tensor("beta", torch.tensor([0.5, 0, -3]).reshape(3, 1, 1))
    x = b.call("aten.sub.Tensor", offset, b.call("aten.mul.Tensor", x, factor))
    return b.call("aten.relu.default", b.call("aten.add.Tensor", x, b.tensor("one", torch.tensor(0.7))))


def batch_norm(b: Builder, x: fx.Node) -> fx.Node:
    norm, flat = nn.BatchNorm2d(3), nn.BatchNorm1d(3)
    for module in (norm, flat):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        module.running_mean.normal_()  # type: ignore[union-attr]
        module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    x = b.call("aten.relu.default", b.module("norm", norm, x))
    return b.module("flat", flat, b.call("aten.mean.dim", x, [2, 3]))


def arithmetic(b: Builder, x: fx.Node) -> fx.Node:
    y, z = conv(b, x, 3, 4), conv(b, x, 3, 4)
    d = b.call("aten.relu.default", b.call("aten.sub.Tensor", y, z))
    scaled = b.call("aten.div.Tensor", b.call("aten.mul.Tensor", d, -0.3), 2)
    return b.call("aten.add.Tensor", b.call("aten.add.Tensor", scaled, 1.5), b.call("aten.sub.Tensor", 1.0, d))


def normed(width: int, affine: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-3, bias=affine)
    nn.init.normal_(norm.weight)
    if affine:
        nn.init.normal_(norm.bias)
    return norm


def attend(b: Builder, x: fx.Node, axis: int = 3) -> fx.Node:
    """Rows of the three channels, weighed by each other; the softmax along `axis`."""
    keys = b.call("aten.permute.default", b.module("k", nn.Linear(7, 7), x), [0, 1, 3, 2])
    scores = b.call("aten.matmul.default", b.module("q", nn.Linear(7, 7), x), keys)
    return b.call("aten.matmul.default", b.call("aten.softmax.int", scores, axis), b.module("v", nn.Linear(7, 7), x))


def placed(b: Builder, x: fx.Node) -> fx.Node:
    """Positions added and subtracted from, a row of factors, a token at either end."""
    batch = b.call("aten.sym_size.int", x, 0)
    x = b.call("aten.add.Tensor", x, b.tensor("position", torch.randn(1, 3, 9, 7)))
    x = b.call("aten.sub.Tensor", b.tensor("origin", torch.randn(9, 7)), x)
    x = b.call("aten.mul.Tensor", b.tensor("gamma", torch.randn(7)), x)
    first, last = (
        b.call("aten.expand.default", b.tensor(name, torch.randn(1, 3, 1, 7)), [batch, -1, -1, -1])
        for name in ("first", "last")
    )
    return b.call("aten.cat.default", [first, x, last], 2)


NETWORKS: dict[str, Build] = {
    "conv": lambda b, x: conv(b, x, 3, 5, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    "same": lambda b, x: conv(b, x, 3, 5, (3, 5), padding="same", bias=False),
    "depthwise": lambda b, x: conv(b, conv(b, x, 3, 6, groups=3), 6, 6, 5, groups=6, padding=2),
    "padded": lambda b, x: conv(b, b.call("aten.constant_pad_nd.default", x, [0, 1, 2, 0], 0.0), 3, 4, padding=1),
    "pad by one": lambda b, x: conv(b, b.call("aten.constant_pad_nd.default", x, [0, 1], 1.0), 3, 4),
    "pad channels": lambda b, x: conv(b, b.call("aten.constant_pad_nd.default", x, [0, 0, 0, 0, 1, 0], 0.0), 4, 4),
    "relu": lambda b, x: conv(b, b.call("aten.relu.default", conv(b, x, 3, 5)), 5, 4),
    "relu6": lambda b, x: b.call("aten.hardtanh.default", conv(b, x, 3, 5), 0.0, 0.5),
    "clamp": lambda b, x: b.call("aten.hardtanh.default", conv(b, x, 3, 5)),
    "relu of two readers": lambda b, x: b.call(
        "aten.add.Tensor", y := conv(b, x, 3, 3), b.call("aten.relu.default", y)
    ),
    "pooled before relu": lambda b, x: b.call(
        "aten.relu.default", b.call("aten.max_pool2d.default", conv(b, x, 3, 4), [2, 2], [2, 2], [0, 0], [1, 1], True)
    ),
    "average": lambda b, x: b.call("aten.avg_pool2d.default", x, [3, 2], [2, 2], [1, 0]),
    "average divided": lambda b, x: b.call("aten.avg_pool2d.default", x, [3, 3], [], 1, False, True, 5),
    "adaptive": lambda b, x: b.call("aten.relu.default", b.call("aten.adaptive_avg_pool2d.default", x, [3, 1])),
    "mean": lambda b, x: b.call("aten.mean.dim", x, [1, 3]),
    "squeeze and excite": squeeze_and_excite,
    "branches": branches,
    "shortcut": shortcut,
    "conv1d": conv1d_chain,
    "transposed": transposed,
    "per channel": per_channel,
    "batch norm": batch_norm,
    "arithmetic": arithmetic,
    "attention": attend,
    "attention across": lambda b, x: attend(b, x, 2),
    "constants": placed,
    "product with a constant": lambda b, x: b.call("aten.matmul.default", x, b.tensor("m", torch.randn(1, 3, 7, 4))),
    "layer norm": lambda b, x: b.call("aten.relu.default", b.module("norm", normed(7), x)),
    "layer norm without bias": lambda b, x: b.module("norm", normed(5, False), conv(b, x, 3, 5)),
    "selected": lambda b, x: b.call("aten.select.int", b.call("aten.select.int", x, 2, -2), 1, 1),
    "leaky": unary("aten.leaky_relu.default", 0.1),
    **{name: unary(f"aten.{name}.default") for name in ("sigmoid", "tanh", "silu", "gelu", "hardswish", "elu")},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_integer_network_is_the_graph(name: str, tmp_path: Path) -> None:
    """At least 30 dB: a wrong zero point, pad or axis leaves less than 20."""
    graph = graph_of((3, 9, 7), NETWORKS[name])
    hoist_activations(graph)
    check(graph)
    inputs = inputs_of(graph)
    network = lowered(graph, inputs).network
    expected, found = graph.run(inputs), executor.run_float(network, inputs.numpy())
    assert found.shape == expected.shape
    assert decibels(expected, found) > 30
    network.save(tmp_path)
    np.testing.assert_array_equal(executor.run_float(IntegerNetwork.read(tmp_path), inputs.numpy()), found)
    assert executor.run_float(network, np.zeros((0, 3, 9, 7), np.float32)).shape == (0, *expected.shape[1:])


@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 4))
def test_random_networks(seed: int, depth: int) -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        for _ in range(depth):
            x = b.call("aten.relu.default", conv(b, x, 3, 3, padding=1))
        return x

    graph = graph_of((3, 6, 6), build, seed)
    inputs = inputs_of(graph)
    # A network whose ReLUs are all silent has no signal to lose.
    if float(graph.run(inputs).square().mean()) > 1e-3:
        assert quality(graph) > 24


def test_a_layer_worked_by_hand() -> None:
    """Inputs in [0, 2.55] in steps of 0.01, outputs in [0, 127.5] in steps of a half, both with the zero -128."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        layer = nn.Linear(2, 2)
        layer.weight.data = torch.tensor([[127.0, -50.0], [0.0, 0.0]])
        layer.bias.data = torch.tensor([0.5, 3.0])
        return b.call("aten.relu.default", b.module("fc", layer, x))

    network = lower(graph_of((2,), build), {"x": (0, 2.55), "relu": (0, 127.5)}).network
    assert (network.input.zero, network.output.zero) == (-128, -128)
    assert network.output.scale == 0.5
    (step,) = network.program.steps
    assert isinstance(step, Weighted) and (step.low, step.high) == (-128, 127)
    assert network.array(step, "weight").tolist() == [[127, -50], [0, 0]]
    # 0.5 / 0.01 and 128 · 77; the second row is silent, with a scale that keeps its bias to 2^-16 of a step.
    assert network.array(step, "bias").tolist() == [50 + 128 * 77, 6 << 16]
    ratio = network.array(step, "multiplier") / 2.0 ** network.array(step, "shift")
    assert ratio.tolist() == pytest.approx([0.02, 2.0**-16], rel=1e-6)
    # 127 · 1 - 50 · 0.5 + 0.5 = 102.5 and 3.
    assert executor.run_float(network, np.array([[1.0, 0.5]], np.float32)).tolist() == [[102.5, 3.0]]


def test_what_is_fused() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        x = b.call("aten.constant_pad_nd.default", x, [0, 1, 0, 1], 0.0)
        x = b.call("aten.max_pool2d.default", conv(b, x, 3, 4, stride=2), [2, 2])
        return b.call("aten.relu.default", x)

    graph = graph_of((3, 8, 8), build)
    before = graph.run(inputs_of(graph))
    hoist_activations(graph)
    torch.testing.assert_close(graph.run(inputs_of(graph)), before)
    steps = lowered(graph, inputs_of(graph)).network.program.steps
    assert [step.op for step in steps] == ["convolution", "max_pool"]
    assert isinstance(steps[0], Convolution)
    assert steps[0].padding == (0, 1, 0, 1) and steps[0].low == -128 and steps[0].source == "net.py:7 in forward"


def test_neighbouring_one_dimensional_convolutions_share_their_image() -> None:
    graph = graph_of((3, 9, 7), conv1d_chain)
    steps = lowered(graph, inputs_of(graph)).network.program.steps
    kinds = [step.op for step in steps]
    assert kinds.count("convolution") == 2
    assert kinds[kinds.index("convolution") + 1] == "convolution"


def test_tied_tensors_have_one_scale() -> None:
    graph = graph_of((3, 9, 7), branches)
    network = lowered(graph, inputs_of(graph)).network
    cat = next(step for step in network.program.steps if step.op == "concatenate")
    scales = {
        (network.program.values[name].scale, network.program.values[name].zero) for name in (*cat.inputs, cat.output)
    }
    assert len(scales) == 1


@given(low=st.floats(-1e4, 1e4), high=st.floats(-1e4, 1e4))
def test_zero_has_a_code(low: float, high: float) -> None:
    scale, zero = quantization(low, high)
    assert scale > 0 and -128 <= zero <= 127
    for bound in (min(low, 0.0), max(high, 0.0)):
        if max(high, 0.0) - min(low, 0.0) > 1e-20:
            assert -128.51 <= bound / scale + zero <= 127.51


def stored(bits: int, strategy: Any, symmetric: bool, shape: tuple[int, int], seed: int = 0) -> AffineWeight:
    format = Affine(bits, strategy, 9 if strategy == "group" else 0, symmetric)
    generator = torch.Generator().manual_seed(seed)
    size = format.scale_shape(shape)
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(size, generator=generator) * 0.05 + 0.01
    zero = None if symmetric else torch.full(size, 2 ** (bits - 1) - 1, dtype=torch.uint8)
    return AffineWeight(format, codes, scale, zero)


@pytest.mark.parametrize(("bits", "stored_bits"), [(2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_symmetric_weights_keep_codes_and_scales(bits: int, stored_bits: int, strategy: str, tmp_path: Path) -> None:
    graph = graph_of((3, 9, 7), lambda b, x: b.module("conv", nn.Conv2d(3, 5, 3), x))
    weight = stored(bits, strategy, True, (5, 27))
    graph.set_weight("conv", weight)
    inputs = inputs_of(graph)
    found = lowered(graph, inputs)
    (step,) = found.network.program.steps
    assert isinstance(step, Convolution) and step.weight_bits == stored_bits and found.remarks == ()
    codes = found.network.array(step, "weight").reshape(5, 27)
    np.testing.assert_array_equal(codes, weight.codes.numpy().astype(int) - 2 ** (bits - 1))
    ratio = found.network.array(step, "multiplier") / 2.0 ** found.network.array(step, "shift")
    scales = ratio * found.network.output.scale / found.network.input.scale
    np.testing.assert_allclose(scales, np.broadcast_to(weight.scale.numpy().ravel(), 5), rtol=2**-16)
    found.network.save(tmp_path)
    again = IntegerNetwork.read(tmp_path)
    np.testing.assert_array_equal(again.array(step, "weight").reshape(5, 27), codes)
    assert decibels(graph.run(inputs), executor.run_float(found.network, inputs.numpy())) > 35


@pytest.mark.parametrize(("strategy", "symmetric"), [("channel", False), ("group", True), ("group", False)])
def test_other_forms_are_rounded_again_and_say_so(strategy: str, symmetric: bool) -> None:
    graph = graph_of((3, 9, 7), lambda b, x: b.module("conv", nn.Conv2d(3, 5, 3), x))
    graph.set_weight("conv", stored(4, strategy, symmetric, (5, 27)))
    found = lowered(graph, inputs_of(graph))
    assert len(found.remarks) == 1 and found.remarks[0].startswith("conv: rounded again to int8")
    assert found.notes["conv"]["weight_bits"] == 8
    assert quality(graph) > 35


@given(
    magnitudes=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e5]), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_rows(magnitudes: list[float], seed: int) -> None:
    """Codes within ±127, the largest at the end, errors of half a step; clipping never adds to the squared error."""
    scale = np.array(magnitudes)[:, None]
    weight = np.random.default_rng(seed).normal(size=(len(magnitudes), 11)) * scale
    rows = rows_of(weight, None, np.zeros(len(weight)), 0.25, False)
    assert rows.codes.dtype == np.int8 and rows.bits == 8 and rows.raised == 0
    for row, codes, step, magnitude in zip(weight, rows.codes.astype(int), rows.scales, magnitudes, strict=True):
        assert np.abs(codes).max() == (127 if magnitude else 0)
        assert np.abs(codes * step - row).max() <= step * 0.5001
        assert magnitude or step == 0.25
    clipped = rows_of(weight, None, np.zeros(len(weight)), 0.25, True)
    errors = [np.square(each.codes * each.scales[:, None] - weight).sum(1) for each in (clipped, rows)]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-70).all()


def test_a_bias_that_does_not_fit_raises_the_scale() -> None:
    """A bias 10^9 times the weights: fewer codes, and no sum beyond 32 bits."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        layer = nn.Linear(4, 2)
        layer.weight.data = torch.tensor([[1e-8, 2e-8, -1e-8, 1e-9], [1.0, 2.0, 3.0, 4.0]])
        layer.bias.data = torch.tensor([30.0, 0.0])
        return b.module("fc", layer, x)

    graph = graph_of((4,), build)
    found = lowered(graph, inputs_of(graph))
    assert found.notes["fc"] == {"weight_bits": 8, "raised_scales": 1}
    assert quality(graph) > 35


def test_sums_beyond_32_bits_are_refused() -> None:
    """More inputs, with the largest codes, than 32 bits sum up."""
    graph = graph_of((140000,), lambda b, x: b.module("fc", nn.Linear(140000, 1), x))
    graph.module.get_submodule("fc").weight.fill_(1.0)  # type: ignore[union-attr,operator]
    with pytest.raises(NumericsError, match=r"the sums of fc \(Linear\) may leave 32 bits"):
        lowered(graph, inputs_of(graph))


def test_a_silent_tensor() -> None:
    """A ReLU that never opens: a network all the same, and its output is zero."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        layer = nn.Linear(4, 3)
        layer.bias.data[:] = -1000
        return b.module("out", nn.Linear(3, 2, bias=False), b.call("aten.relu.default", b.module("fc", layer, x)))

    graph = graph_of((4,), build)
    inputs = inputs_of(graph)
    assert not executor.run_float(lowered(graph, inputs).network, inputs.numpy()).any()


def test_tables_by_hand() -> None:
    graph = graph_of((3,), lambda b, x: b.call("aten.leaky_relu.default", x, 0.5))
    network = lower(graph, {"x": (-1.28, 1.27), "leaky_relu": (-1.28, 1.27)}).network
    (step,) = network.program.steps
    assert isinstance(step, Table) and step.function == "leaky_relu"
    # Halves of odd codes are halves of a step and go to even.
    assert network.array(step, "table")[[0, 1, 125, 126, 127, 128, 255]].tolist() == [-64, -64, -2, -1, 0, 0, 127]


def test_a_classifier_that_ends_with_probabilities() -> None:
    """In steps of 1/256 since one of few is large, also where they are moved before the end."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        x = b.call("aten.softmax.int", b.module("fc", nn.Linear(6, 5), x), 1)
        return b.call("aten.reshape.default", b.call("aten.slice.Tensor", x, 1, 1, 5), [-1, 2, 2])

    graph = graph_of((6,), build)
    inputs = inputs_of(graph)
    network = lowered(graph, inputs).network
    assert {(value.scale, value.zero) for name, value in network.program.values.items() if name not in ("x", "fc")} == {
        (1 / 256, -128)
    }
    found = executor.run_float(network, inputs.numpy())
    assert np.abs(found - graph.run(inputs).numpy()).max() < 0.02


def test_an_embedding_takes_numbers_as_they_are() -> None:
    """The input's codes are the numbers less 128, however few were seen; the last row fills the table."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.module("rows", nn.Embedding(7, 3), b.call("aten.to.dtype", x, torch.int64))

    graph = graph_of((4,), build)
    network = lower(graph, {"x": (0, 2), "rows": (-3, 3)}).network
    assert (network.input.scale, network.input.zero) == (1.0, -128)
    (step,) = network.program.steps
    table = network.array(step, "table")
    assert table.shape == (256, 3) and step.inputs == ("x",)
    np.testing.assert_array_equal(table[7:], np.broadcast_to(table[6], (249, 3)))
    inputs = torch.tensor([[0.0, 6, 3, 1], [5, 5, 2, 4]])
    found = executor.run_float(network, inputs.numpy())
    assert np.abs(found - graph.run(inputs).numpy()).max() <= network.output.scale / 2 + 1e-6


def test_a_layer_norm_worked_by_hand() -> None:
    """Outputs in steps of 1/64: a weight of 2 is 128 steps, a bias of -½ is -32; ε is that of codes in steps of ½."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        norm = nn.LayerNorm(2, eps=0.25)
        norm.weight.data, norm.bias.data = torch.tensor([2.0, -1.0]), torch.tensor([-0.5, 0.0])
        return b.module("norm", norm, x)

    network = lower(graph_of((2,), build), {"x": (-64, 63.5), "norm": (-2, 127 / 64)}).network
    (step,) = network.program.steps
    assert isinstance(step, LayerNorm) and step.shift == 23
    # ε · n² · 2^16 / scale², and 30 bits for the larger number.
    assert step.epsilon == 4 << 16
    assert network.array(step, "multiplier").tolist() == [128 << 23, -64 << 23]
    assert network.array(step, "bias").tolist() == [-32 << 23, 0]
    # (1, -1) over √(1 + ¼).
    found = executor.run_float(network, np.array([[3.0, 1.0]], np.float32))
    np.testing.assert_allclose(found, [[2 / 1.25**0.5 - 0.5, 1 / 1.25**0.5]], atol=1 / 128)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_a_layer_norm_of_any_size(size: float) -> None:
    """Where ε dwarfs all, the bias is left; where it is nothing, all is as ever."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.module("norm", normed(7), b.call("aten.mul.Tensor", x, size))

    assert quality(graph_of((3, 7), build)) > 30


def test_norms_that_no_multiplier_expresses() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        norm = nn.LayerNorm(4)
        norm.weight.data[0] = 1e9
        return b.module("norm", norm, x)

    with pytest.raises(NumericsError, match=r"norm \(LayerNorm\) scales by"):
        lower(graph_of((4,), build), {"x": (-1, 1), "norm": (-1, 1)})


def looked_up(rows: int, through: str = "") -> Build:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        x = b.call("aten.mul.Tensor", x, 2.0) if through == "mul" else x
        x = b.call("aten.to.dtype", x, torch.int64)
        return b.module("rows", nn.Embedding(rows, 3), x)

    return build


UNSUPPORTED: dict[str, tuple[Build, str]] = {
    "softmax of the batch": (
        lambda b, x: b.call("aten.softmax.int", x, 0, source="net.py:9"),
        r"softmax \(aten.softmax.int, net.py:9\) compares the inputs of a batch",
    ),
    "layer norm of two axes": (
        lambda b, x: b.module("norm", nn.LayerNorm((5, 6)), x),
        r"norm \(LayerNorm\) normalizes over \(5, 6\), not one axis",
    ),
    "long softmax": (
        lambda b, x: b.call("aten.softmax.int", b.module("fc", nn.Linear(6, 65537), x), 3),
        "weighs 65537 numbers",
    ),
    "long layer norm": (
        lambda b, x: b.module("norm", nn.LayerNorm(4097), b.module("fc", nn.Linear(6, 4097), x)),
        "normalizes 4097 numbers",
    ),
    "long product": (
        lambda b, x: b.call(
            "aten.matmul.default",
            y := b.module("fc", nn.Linear(6, 33026), x),
            b.call("aten.permute.default", y, [0, 1, 3, 2]),
        ),
        "sums 33026 products",
    ),
    "product that broadcasts": (
        lambda b, x: b.call("aten.matmul.default", x, b.tensor("m", torch.zeros(6, 5))),
        "no matrices one by one",
    ),
    "many rows": (looked_up(257), "has 257 rows, more than the 256"),
    "rows by computed numbers": (looked_up(5, "mul"), r"rows \(Embedding\) shares its scale with mul"),
    "conversion": (lambda b, x: b.call("aten.to.dtype", x, torch.int64), "to .* has no integer operation"),
    "probabilities and others": (
        lambda b, x: b.call("aten.cat.default", [b.call("aten.softmax.int", x, 3), x], 1),
        r"softmax \(aten.softmax.int\) shares its scale with x",
    ),
    "unknown": (lambda b, x: b.call("aten.cumsum.default", x, 1), "cumsum .* has no integer operation"),
    "size": (
        lambda b, x: b.call("aten.expand.default", x, [b.call("aten.sym_size.int", x, 0), 3, 5, 6]),
        "expand .* has no integer operation",
    ),
    "batch": (lambda b, x: b.call("aten.mean.dim", x, [0], True), "averages over the batch"),
    "batch sliced": (lambda b, x: b.call("aten.slice.Tensor", x, 0, 0, 1), "part of the batch"),
    "batch moved": (lambda b, x: b.call("aten.permute.default", x, [1, 0, 2, 3]), "moves the batch axis"),
    "batch joined": (lambda b, x: b.call("aten.cat.default", [x, x], 0), "joins batches"),
    "batch mixed": (lambda b, x: b.call("aten.reshape.default", x, [-1, 6]), "between the batch and other axes"),
    "odd windows": (lambda b, x: b.call("aten.adaptive_avg_pool2d.default", x, [4, 4]), "windows of different sizes"),
    "ceil": (lambda b, x: b.call("aten.avg_pool2d.default", x, [3, 3], [2, 2], [0, 0], True), "ceil_mode"),
    "uncounted": (
        lambda b, x: b.call("aten.avg_pool2d.default", x, [3, 3], [1, 1], [1, 1], False, False),
        "leaves its padding out",
    ),
    "division": (lambda b, x: b.call("aten.div.Tensor", x, x), "divides tensors"),
    "negative pad": (lambda b, x: b.call("aten.constant_pad_nd.default", x, [-1, 0], 0.0), "pads by"),
    "infinite pad": (lambda b, x: b.call("aten.constant_pad_nd.default", x, [1, 0], -torch.inf), "fills in -inf"),
    "constant of a batch": (
        lambda b, x: b.call("aten.add.Tensor", x, b.tensor("position", torch.zeros(2, 3, 5, 6))),
        r"position \(2, 3, 5, 6\), which does not fit one input",
    ),
    "infinite constant": (
        lambda b, x: b.call("aten.add.Tensor", x, b.tensor("mask", torch.full((5, 6), -torch.inf).triu(1))),
        r"add .* takes mask, which is infinite",
    ),
    "broadcast": (
        lambda b, x: b.call("aten.add.Tensor", x, b.call("aten.mean.dim", x, [1])),
        "broadcasts over the batch axis",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_lowered_says_where(name: str) -> None:
    build, message = UNSUPPORTED[name]
    graph = graph_of((3, 5, 6), build)
    with pytest.raises(UnsupportedError, match=message) as caught:
        check(graph)
    assert caught.value.remedy
