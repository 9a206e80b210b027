"""Which layers read exactly the channels of another: found by structure, held by scaling them and running the graph."""

from __future__ import annotations

from typing import Any

import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import chain
from torch import nn

from effcli import importers
from effcli.graphs.channels import (
    Pair,
    _follow,
    _produced,
    column_factors,
    divide_outputs,
    links,
    multiply_inputs,
    pairs,
)
from effcli.graphs.graph import Builder, Facts, Graph


def reason(graph: Graph, producer: str) -> str:
    return next(link.reason for link in links(graph) if link.producer == producer)


def check_pair(graph: Graph, pair: Pair) -> None:
    """Scaling the producer's channels by random factors and the consumers' back leaves the outputs as they were."""
    inputs = small_graphs.inputs(graph)
    before = graph.run(inputs)
    scale = torch.rand(pair.channels, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
    divide_outputs(graph, pair.producer, scale)
    assert not torch.allclose(graph.run(inputs), before, rtol=1e-3, atol=1e-3)
    for name, channel in pair.consumers.items():
        multiply_inputs(graph, name, scale[channel])
    torch.testing.assert_close(graph.run(inputs), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_by_hand() -> None:
    """Three channels of 2 × 1 pixels, flattened: features 0 and 1 are the first channel's."""
    graph = chain((1, 2, 1), nn.Conv2d(1, 3, 1), "relu.default", ("reshape.default", [-1, 6]), nn.Linear(6, 2))
    (pair,) = pairs(graph)
    assert (pair.producer, pair.channels) == ("layer0", 3)
    assert {name: channel.tolist() for name, channel in pair.consumers.items()} == {"layer3": [0, 0, 1, 1, 2, 2]}


def test_conv_depthwise_conv_linear() -> None:
    graph = small_graphs.separable()
    found = pairs(graph)
    assert [(pair.producer, *pair.consumers) for pair in found] == [
        ("layer0", "layer2"),
        ("layer2", "layer4"),
        ("layer4", "layer7"),
    ]
    for pair in found:
        check_pair(graph, pair)
    assert set(graph.facts.rescaled) == {"layer0", "layer2", "layer4"}


STEPS: dict[str, tuple[Any, ...]] = {
    "leaky": (("leaky_relu.default", 0.1),),
    "padded": (("constant_pad_nd.default", [1, 0, 2, 1], 0.0),),
    "max": (("max_pool2d.default", [2, 2], [2, 2]),),
    "average": (("avg_pool2d.default", [3, 3], [1, 1], [1, 1]),),
    "adaptive": (("adaptive_avg_pool2d.default", [2, 3]),),
    "number": (("mul.Tensor", -0.5), ("div.Tensor", 3)),
    "sliced": (("slice.Tensor", 2, 1, 5, 2),),
    "some channels": (("slice.Tensor", 1, 1, 4, 1),),
    "there and back": (("permute.default", [0, 2, 3, 1]), ("permute.default", [0, 3, 1, 2])),
    "nothing": (),
}


@pytest.mark.parametrize("name", STEPS)
def test_homogeneous_operators(name: str) -> None:
    steps = STEPS[name]
    channels = 3 if name == "some channels" else 5
    graph = chain((2, 6, 6), nn.Conv2d(2, 5, 1), *steps, nn.Conv2d(channels, 3, 1))
    (pair,) = pairs(graph)
    check_pair(graph, pair)


def test_pooled_features_and_channels_last() -> None:
    graph = chain((2, 4, 4), nn.Conv2d(2, 5, 3), "relu.default", ("mean.dim", [2, 3], False), nn.Linear(5, 3))
    check_pair(graph, *pairs(graph))
    last = chain((2, 4, 4), nn.Conv2d(2, 5, 3), ("permute.default", [0, 2, 3, 1]), nn.Linear(5, 3))
    check_pair(last, *pairs(last))


def test_linears_over_tokens_and_one_dimension() -> None:
    graph = chain((7, 4), nn.Linear(4, 6), "relu.default", nn.Linear(6, 3))
    check_pair(graph, *pairs(graph))
    graph = chain((3, 20), nn.Conv1d(3, 4, 5), "relu.default", nn.Conv1d(4, 4, 3, groups=2))
    check_pair(graph, *pairs(graph))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=["batch", "group"])
def test_a_norm_takes_the_place_of_the_layer_before_it(norm: nn.Module) -> None:
    graph = chain((2, 5, 5), nn.Conv2d(2, 4, 3), norm, "relu.default", nn.Conv2d(4, 3, 1))
    (pair,) = pairs(graph)
    assert pair.producer == "layer1"
    check_pair(graph, pair)


def test_a_layer_norm() -> None:
    graph = chain((6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    check_pair(graph, *pairs(graph))


def test_several_readers() -> None:
    """Both branches must follow a scale of the channels that they share."""
    builder = Builder()
    trunk = builder.module("a", small_graphs.seeded(nn.Conv2d(2, 4, 1), 0), builder.input())
    trunk = builder.call("aten.relu.default", trunk)
    left = builder.module("b", small_graphs.seeded(nn.Conv2d(4, 3, 3, padding=1), 1), trunk)
    pooled = builder.call("aten.max_pool2d.default", trunk, [3, 3], [1, 1], [1, 1])
    right = builder.module("c", small_graphs.seeded(nn.Conv2d(4, 3, 1), 2), pooled)
    graph = builder.finish(builder.call("aten.add.Tensor", left, right), Facts(origin="test", shape=(2, 5, 5)))
    (pair,) = pairs(graph)
    assert list(pair.consumers) == ["b", "c"]
    check_pair(graph, pair)


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "sigmoid": (("sigmoid.default", nn.Conv2d(5, 3, 1)), "sigmoid (aten.sigmoid.default, net.py:1) reads them"),
    "added": ((("add.Tensor", 1.0), nn.Conv2d(5, 3, 1)), "add (aten.add.Tensor, net.py:1) reads them"),
    "ones around": (
        (("constant_pad_nd.default", [1, 1, 1, 1], 1.0), nn.Conv2d(5, 3, 1)),
        "constant_pad_nd (aten.constant_pad_nd.default, net.py:1) reads them",
    ),
    "channels padded": ((("constant_pad_nd.default", [0, 0, 0, 0, 1, 1], 0.0), nn.Conv2d(7, 3, 1)), "reads them"),
    "channels averaged": ((("mean.dim", [1], True), nn.Conv2d(1, 3, 1)), "reads them"),
    "mixed": ((("reshape.default", [-1, 9, 20]), nn.Conv1d(9, 3, 1)), "reads them"),
    "pooled over channels": (
        (("permute.default", [0, 2, 3, 1]), ("max_pool2d.default", [1, 2], [1, 2]), nn.Conv2d(6, 3, 1)),
        "reads them",
    ),
    "last axis": ((nn.Linear(6, 2),), "mixes other axes than the channels of layer0"),
    "batch norm": ((nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)), "layer1 (BatchNorm2d, net.py:1) stands between"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_no_pair(name: str) -> None:
    steps, text = REFUSED[name]
    graph = chain((2, 6, 6), nn.Conv2d(2, 5, 1), *steps)
    assert "layer0" not in [pair.producer for pair in pairs(graph)]
    shapes = graph.shapes()
    flow = _produced(graph, graph.nodes[1], shapes)
    assert flow is not None
    assert text in _follow(graph, "layer0", flow, shapes).reason


def test_residual_connections_and_the_output() -> None:
    graph = small_graphs.residual()
    assert [(pair.producer, *pair.consumers) for pair in pairs(graph)] == [("block.a_norm", "block.b")]
    assert "aten.add.Tensor" in reason(graph, "stem_norm")
    check_pair(graph, *pairs(graph))


def test_a_relu6_is_named() -> None:
    graph = small_graphs.separable(clip=True)
    assert pairs(graph) == []
    assert [[node.name for node in link.clipped] for link in links(graph)] == [
        ["hardtanh"],
        ["hardtanh_1"],
        ["hardtanh_2"],
    ]
    assert all(not link.reason for link in links(graph))


def test_a_layer_that_is_called_twice() -> None:
    builder = Builder()
    shared, other = (small_graphs.seeded(nn.Linear(4, 4), seed) for seed in (0, 1))
    node = builder.module("a", shared, builder.input())
    node = builder.module("b", other, node)
    node = builder.module("a", shared, node)
    graph = builder.finish(node, Facts(origin="test", shape=(4,)))
    assert pairs(graph) == []
    assert reason(graph, "b") == "a is called more than once"


@given(groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_factors_of_a_grouped_convolution(groups: int, seed: int) -> None:
    """Scaling the inputs and scaling the weights by `column_factors` are one."""
    graph = chain((4, 5, 5), nn.Conv2d(4, 8, (3, 2), groups=groups))
    factor = torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.5
    inputs = small_graphs.inputs(graph, 3, seed)
    expected = graph.run(inputs * factor.view(-1, 1, 1))
    assert column_factors(graph, "layer0", factor).shape == (8, 4 // groups * 6)
    multiply_inputs(graph, "layer0", factor)
    torch.testing.assert_close(graph.run(inputs), expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_find() -> None:
    assert links(chain((3,), "relu.default")) == []
    assert links(chain((3,), nn.Linear(3, 2))) == []


@pytest.mark.parametrize("name", ["cifar10_resnet20_jpegft", "tiny_dscnn_kws", "tiny_fc_autoencoder_toycar"])
def test_real_networks(name: str, asset: Any) -> None:
    graph = importers.read(asset(name))
    found = pairs(graph)
    assert len(found) >= 8
    for pair in found[:2] + found[-1:]:
        check_pair(graph, pair)
