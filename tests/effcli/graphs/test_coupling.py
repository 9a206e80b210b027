"""Channels that are cut leave what the network computes with those channels set to zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from coupled_cuts import random_cuts, zero
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import chain, inputs, residual, seeded, separable
from torch import Tensor, fx, nn

from effcli.errors import UnsupportedError, UserError
from effcli.formats import Affine
from effcli.graphs.coupling import coupled, cut
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.layers.coupling import Cut
from effcli.passes.quantize._affine import encode, extremes


def groups_of(graph: Graph) -> dict[str, int]:
    return {group.name: group.count for group in coupled(graph) if not group.reason}


def reasons_of(graph: Graph) -> dict[str, str]:
    return {group.name: group.reason for group in coupled(graph) if group.reason}


def check(graph: Graph, cuts: list[Cut]) -> None:
    """The cut graph, in float64, computes what the graph with zeros does."""
    assert cuts
    silent = copy.deepcopy(graph)
    zero(silent.module.state_dict(), cuts)
    before = graph.weights()
    given = inputs(graph, 3).double()
    untouched = graph.module.double()(given)
    graph.module.float()
    cut(graph, cuts)
    assert graph.weights() < before
    expected = silent.module.double()(given)
    torch.testing.assert_close(graph.module.double()(given), expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(expected, untouched, rtol=1e-6, atol=1e-9)
    graph.module.float()


def built(shape: tuple[int, ...], make: Callable[[Builder, fx.Node], fx.Node]) -> Graph:
    builder = Builder()
    return builder.finish(make(builder, builder.input()), Facts(origin="test", shape=shape))


def layer(builder: Builder, name: str, module: nn.Module, node: fx.Node) -> fx.Node:
    return builder.module(name, seeded(module, len(name)), node)


def concatenated() -> Graph:
    """Two convolutions of one input side by side, a norm over both, and a flattened linear."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        left = layer(builder, "left", nn.Conv2d(2, 3, 3, padding=1), x)
        right = layer(builder, "right", nn.Conv2d(2, 5, 1), x)
        both = builder.call("aten.cat.default", [left, builder.call("aten.silu.default", right)], 1)
        both = layer(builder, "norm", nn.BatchNorm2d(8), both)
        flat = builder.call("aten.reshape.default", builder.call("aten.relu.default", both), [-1, 8 * 6])
        return layer(builder, "head", nn.Linear(48, 4), flat)

    return built((2, 3, 2), make)


def split_and_shuffled() -> Graph:
    """One half of the channels passes a convolution, then the channels of both halves are interleaved."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        trunk = layer(builder, "trunk", nn.Conv2d(2, 12, 1), x)
        first = builder.call("aten.slice.Tensor", trunk, 1, 0, 6, 1)
        second = builder.call("aten.slice.Tensor", trunk, 1, 6, 12, 1)
        second = layer(builder, "branch", nn.Conv2d(6, 6, 3, padding=1), second)
        both = builder.call("aten.cat.default", [first, second], 1)
        apart = builder.call("aten.reshape.default", both, [-1, 2, 6, 3, 3])
        mixed = builder.call("aten.permute.default", apart, [0, 2, 1, 3, 4])
        together = builder.call("aten.reshape.default", mixed, [-1, 12, 3, 3])
        return layer(builder, "last", nn.Conv2d(12, 2, 1), together)

    return built((2, 3, 3), make)


def attention(kind: str = "plain") -> Graph:
    """Two tokens' worth of heads: queries, keys and values of one layer or three, with fewer keys, or as products."""
    width, heads, keys = 6, 4, 2 if kind == "grouped" else 4

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        def split(node: fx.Node, count: int) -> fx.Node:
            apart = builder.call("aten.reshape.default", node, [-1, 5, count, 3])
            return builder.call("aten.permute.default", apart, [0, 2, 1, 3])

        if kind == "fused":
            all_three = layer(builder, "qkv", nn.Linear(width, 3 * 12), x)
            apart = builder.call("aten.reshape.default", all_three, [-1, 5, 3, heads, 3])
            apart = builder.call("aten.permute.default", apart, [2, 0, 3, 1, 4])
            parts = [builder.call("aten.select.int", apart, 0, at) for at in range(3)]
        else:
            parts = [
                split(layer(builder, name, nn.Linear(width, count * 3), x), count)
                for name, count in (("q", heads), ("k", keys), ("v", keys))
            ]
        if kind == "products":
            turned = builder.call("aten.permute.default", parts[1], [0, 1, 3, 2])
            scores = builder.call("aten.matmul.default", parts[0], turned)
            scores = builder.call("aten.add.Tensor", scores, builder.tensor("slopes", torch.randn(4, 1, 1)))
            scores = builder.call("aten.add.Tensor", scores, builder.tensor("places", torch.randn(1, 5, 5)))
            found = builder.call("aten.matmul.default", builder.call("aten.softmax.int", scores, 3), parts[2])
        else:
            name = "aten.scaled_dot_product_attention.default"
            found = builder.call(name, *parts, None, 0.0, False, scale=0.4, enable_gqa=kind == "grouped")
        found = builder.call("aten.permute.default", found, [0, 2, 1, 3])
        found = builder.call("aten.reshape.default", found, [-1, 5, 12])
        return builder.call("aten.add.Tensor", layer(builder, "out", nn.Linear(12, width), found), x)

    return built((5, width), make)


def gated() -> Graph:
    """A gated feed-forward over tokens, once with gate and up apart and once as two halves of one layer."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        gate = builder.call("aten.silu.default", layer(builder, "gate", nn.Linear(4, 7), x))
        up = layer(builder, "up", nn.Linear(4, 7, bias=False), x)
        x = layer(builder, "down", nn.Linear(7, 4), builder.call("aten.mul.Tensor", gate, up))
        both = layer(builder, "both", nn.Linear(4, 10), x)
        first, second = (builder.call("aten.slice.Tensor", both, 2, at, at + 5, 1) for at in (0, 5))
        product = builder.call("aten.mul.Tensor", first, builder.call("aten.gelu.default", second))
        return layer(builder, "back", nn.Linear(5, 3), product)

    return built((3, 4), make)


def excited() -> Graph:
    """A squeeze and excitation, a gate for each place, and a scale that belongs to no layer."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        x = layer(builder, "conv", nn.Conv2d(2, 6, 3), x)
        pooled = builder.call("aten.adaptive_avg_pool2d.default", x, [1, 1])
        inner = builder.call("aten.relu.default", layer(builder, "reduce", nn.Conv2d(6, 3, 1), pooled))
        gate = builder.call("aten.sigmoid.default", layer(builder, "expand", nn.Conv2d(3, 6, 1), inner))
        x = builder.call("aten.mul.Tensor", x, gate)
        place = builder.call("aten.sigmoid.default", layer(builder, "place", nn.Conv2d(6, 1, 1), x))
        x = builder.call("aten.mul.Tensor", x, place)
        x = builder.call("aten.mul.Tensor", x, builder.tensor("scale", torch.rand(6, 1, 1) + 0.5))
        return layer(builder, "head", nn.Conv2d(6, 2, 1), x)

    return built((2, 5, 4), make)


def in_windows() -> Graph:
    """Pairs of tokens as inputs of their own, with an embedding that is computed from tensors of no layer."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        x = layer(builder, "first", nn.Linear(4, 6), x)
        x = builder.call("aten.reshape.default", x, [-1, 2, 6])
        scale = builder.call("aten.exp.default", builder.tensor("scale", torch.randn(6)))
        x = builder.call("aten.mul.Tensor", x, scale)
        x = builder.call("aten.reshape.default", layer(builder, "inner", nn.Linear(6, 5), x), [-1, 4, 5])
        return layer(builder, "last", nn.Linear(5, 3), x)

    return built((4, 4), make)


def shared() -> Graph:
    """One layer that is called twice."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        first = nn.Linear(4, 6)
        inner, again = seeded(nn.Linear(6, 6), 3), seeded(nn.Linear(6, 2), 5)
        x = layer(builder, "first", first, x)
        once = builder.call("aten.relu.default", builder.module("inner", inner, x))
        twice = builder.call("aten.relu.default", builder.module("inner", inner, once))
        return builder.module("again", again, twice)

    return built((4,), make)


GRAPHS: dict[str, tuple[Callable[[], Graph], dict[str, int]]] = {
    "residual": (residual, {"stem": 8, "block.a": 8}),
    "depthwise": (separable, {"layer0": 6, "layer4": 10}),
    "grouped": (
        lambda: chain((2, 5, 5), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(9, 2, 1)),
        {"layer0": 3},
    ),
    "wider depthwise": (
        lambda: chain((2, 5, 5), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 2, 1)),
        {"layer0": 3},
    ),
    "group norm": (
        lambda: chain((2, 4, 4), nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), "silu.default", nn.Conv2d(6, 2, 1)),
        {"layer0": 3},
    ),
    "one dimension": (
        lambda: chain((2, 9), nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), "tanh.default", nn.Conv1d(5, 2, 1)),
        {"layer0": 5},
    ),
    "shuffled in space": (
        lambda: chain((2, 3, 3), nn.Conv2d(2, 12, 1), ("pixel_shuffle.default", 2), nn.Conv2d(3, 2, 1)),
        {"layer0": 3},
    ),
    "padded in space": (
        lambda: chain(
            (2, 3, 3), nn.Conv2d(2, 4, 1), ("constant_pad_nd.default", [1, 2, 0, 1], 1.0), nn.Conv2d(4, 2, 2)
        ),
        {"layer0": 4},
    ),
    "halves": (
        lambda: chain((3, 4), nn.Linear(4, 10), ("glu.default", 2), nn.Linear(5, 3)),
        {"layer0": 5},
    ),
    "concatenated": (concatenated, {"left": 3, "right": 5}),
    "interleaved": (split_and_shuffled, {"trunk": 12}),
    "attention": (attention, {"q": 4}),
    "fused attention": (lambda: attention("fused"), {"qkv": 4}),
    "grouped heads": (lambda: attention("grouped"), {"q": 2}),
    "products": (lambda: attention("products"), {"q": 4}),
    "gated": (gated, {"gate": 7, "down": 4, "both": 5}),
    "excited": (excited, {"conv": 6, "reduce": 3}),
    "windows": (in_windows, {"first": 6, "inner": 5}),
    "called twice": (shared, {"first": 6}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_cut_channels_are_as_channels_of_zeros(name: str) -> None:
    make, expected = GRAPHS[name]
    graph = make()
    assert groups_of(graph) == expected
    check(graph, random_cuts(coupled(graph)))


@pytest.mark.parametrize("name", GRAPHS)
def test_each_group_alone(name: str) -> None:
    make, expected = GRAPHS[name]
    for number in range(len(expected)):
        graph = make()
        check(graph, [random_cuts(coupled(graph), seed=number, share=0.4)[number]])


@cache
def small_residual() -> Graph:
    return residual()


@settings(max_examples=6)
@given(st.lists(st.booleans(), min_size=16, max_size=16), st.lists(st.booleans(), min_size=16, max_size=16))
def test_twice_is_once(first: list[bool], second: list[bool]) -> None:
    """Cutting some channels, and then some of those that are left, leaves what cutting all of them at once does."""
    one, two = (torch.tensor(kept).view(2, 8) for kept in (first, second))
    one[:, 3] = two[:, 3] = True
    graph, again = copy.deepcopy(small_residual()), copy.deepcopy(small_residual())
    kept = dict(zip(("stem", "block.a"), zip(one, two, strict=True), strict=True))

    def cuts(of: Graph, which: Callable[[Tensor, Tensor], Tensor]) -> list[Cut]:
        return [Cut(group, which(*kept[group.name])) for group in coupled(of) if not group.reason]

    cut(graph, cuts(graph, lambda one, two: one))
    # A single channel that is left is no group any more.
    cut(graph, cuts(graph, lambda one, two: two[one]))
    cut(again, cuts(again, lambda one, two: one & two))
    assert graph.digest() == again.digest()


def test_nothing_cut_leaves_the_same_bytes() -> None:
    graph = concatenated()
    before = graph.digest()
    cut(graph, [])
    cut(graph, [Cut(group, torch.ones(group.count, dtype=torch.bool)) for group in coupled(graph) if not group.reason])
    assert graph.digest() == before


def test_a_cut_graph_is_saved_and_read(tmp_path: Path) -> None:
    graph = attention("fused")
    cut(graph, random_cuts(coupled(graph)))
    graph.save(tmp_path)
    given = inputs(graph, 3)
    torch.testing.assert_close(Graph.read(tmp_path).run(given), graph.run(given), rtol=0, atol=0)


UNCUT: dict[str, tuple[tuple[Any, ...], str]] = {
    "output": ((), "layer0 is the network's output"),
    "unknown": (
        (("cumsum.default", 1), nn.Conv2d(6, 2, 1)),
        "cumsum (aten.cumsum.default, net.py:1) also reads the channels",
    ),
    "averaged": ((("mean.dim", [1], True), nn.Conv2d(1, 2, 1)), "mean (aten.mean.dim, net.py:1) mixes them"),
    "normalized": ((("softmax.int", 1), nn.Conv2d(6, 2, 1)), "softmax (aten.softmax.int, net.py:1) mixes them"),
    "in the batch": (
        (("reshape.default", [-1, 25]), nn.Linear(25, 2), ("reshape.default", [-1, 12])),
        "reshape (aten.reshape.default, net.py:1) moves them into the batch",
    ),
    "every second": (
        (("slice.Tensor", 1, 0, 6, 2), nn.Conv2d(3, 2, 1)),
        "slice_1 (aten.slice.Tensor, net.py:1) takes some of them",
    ),
    "one of them": (
        (("select.int", 1, 2), nn.Linear(5, 2)),
        "select (aten.select.int, net.py:1) takes some of them",
    ),
}


@pytest.mark.parametrize("name", UNCUT)
def test_what_cannot_be_followed_is_not_cut(name: str) -> None:
    steps, expected = UNCUT[name]
    graph = chain((2, 5, 5), nn.Conv2d(2, 6, 1), *steps)
    group = coupled(graph)[0]
    assert (group.count, group.members) == (0, ())
    assert group.reason == expected
    with pytest.raises(UserError, match="cannot be cut"):
        Cut(group, torch.ones(0, dtype=torch.bool))


def test_norms_over_channels_and_padded_channels() -> None:
    graph = chain((3, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert reasons_of(graph)["layer0"] == "layer1 (LayerNorm, net.py:1) normalizes over them"
    graph = chain(
        (2, 3, 3), nn.Conv2d(2, 4, 1), ("constant_pad_nd.default", [0, 0, 0, 0, 1, 1], 0.0), nn.Conv2d(6, 2, 1)
    )
    # What is added stays, and the rest may go.
    assert groups_of(graph) == {"layer0": 4}
    check(graph, random_cuts(coupled(graph)))


def test_the_input_fixes_what_is_added_to_it() -> None:
    graph = attention()
    assert reasons_of(graph) == {"out": "input_1 is the network's input"}


def test_tokens_are_no_channels() -> None:
    """A layer over tokens, as in an MLP mixer, leaves channels to be cut and is not cut itself."""
    graph = chain(
        (5, 4),
        nn.Linear(4, 6),
        ("permute.default", [0, 2, 1]),
        nn.Linear(5, 5),
        ("permute.default", [0, 2, 1]),
        nn.Linear(6, 3),
    )
    assert groups_of(graph) == {"layer0": 6}
    check(graph, random_cuts(coupled(graph)))


def test_groups_of_another_graph_and_compressed_layers_are_refused() -> None:
    graph = residual()
    cuts = random_cuts(coupled(graph))
    cut(graph, cuts)
    with pytest.raises(UserError, match="is not coupled in this graph as it was"):
        cut(graph, cuts)
    graph = separable()
    weight = graph.layer("layer4").weight
    assert isinstance(weight, torch.Tensor)
    site = next(site for site in graph.sites() if site.name == "layer4")
    rows = site.view(weight.detach())
    graph.set_weight("layer4", encode(rows, *extremes(rows, Affine(8, "channel")), Affine(8, "channel"), torch.float32))
    before = graph.digest()
    with pytest.raises(UserError, match="layer4 is stored as"):
        cut(graph, random_cuts(coupled(graph)))
    assert graph.digest() == before


def branches(*step: Any) -> Graph:
    """Both halves of a layer's channels take one step, then stand together again."""

    def make(builder: Builder, x: fx.Node) -> fx.Node:
        trunk = layer(builder, "trunk", nn.Conv2d(2, 8, 1), x)
        halves = (builder.call("aten.slice.Tensor", trunk, 1, at, at + 4, 1) for at in (0, 4))
        both = builder.call("aten.cat.default", [builder.call(step[0], half, *step[1:]) for half in halves], 1)
        return layer(builder, "last", nn.Conv2d(8, 2, 1), both)

    return built((2, 4, 4), make)


def described(graph: Graph) -> tuple[list[tuple[str, str]], dict[str, Tensor]]:
    """The nodes with their arguments, and the tensors."""
    nodes = [(node.name, str((node.target, node.args, node.kwargs))) for node in graph.nodes]
    return nodes, {name: value.clone() for name, value in graph.module.state_dict().items()}


@pytest.mark.parametrize(
    "step", [("aten.silu.default",), ("aten.max_pool2d.default", [2, 2]), ("aten.avg_pool2d.default", [2, 2])]
)
def test_a_cut_that_leaves_nothing_of_a_part_changes_nothing(step: tuple[Any, ...]) -> None:
    graph = branches(*step)
    nodes, tensors = described(graph)
    (group,) = (group for group in coupled(graph) if not group.reason)
    with pytest.raises(UserError, match=r"nothing would be left of slice_1 \(aten.slice.Tensor"):
        cut(graph, [Cut(group, torch.arange(8) >= 4)])
    after, left = described(graph)
    assert after == nodes
    torch.testing.assert_close(left, tensors, rtol=0, atol=0)
    cut(graph, [Cut(group, torch.arange(8) >= 3)])
    assert graph.run(inputs(graph, 2)).shape[1] == 2


def test_a_cut_after_which_the_network_does_not_run_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = concatenated()
    nodes, tensors = described(graph)
    monkeypatch.setattr("effcli.graphs.coupling._Following.resize", lambda following, node, gone: None)
    with pytest.raises(UnsupportedError, match="does not run with these sizes: reshape"):
        cut(graph, random_cuts(coupled(graph)))
    after, left = described(graph)
    assert after == nodes
    torch.testing.assert_close(left, tensors, rtol=0, atol=0)


def test_tensors_that_stay_are_not_copied() -> None:
    graph = residual()
    before = {name: tensor.data_ptr() for name, tensor in graph.module.state_dict().items()}
    cut(graph, random_cuts(coupled(graph))[:1])
    after = {name: tensor.data_ptr() for name, tensor in graph.module.state_dict().items()}
    same = [name for name in before if after[name] == before[name]]
    assert "head.bias" in same and "stem.weight" not in same
