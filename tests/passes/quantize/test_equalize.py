"""The `equalize` pass: the network computes the same, with ranges that are alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import chain
from torch import Tensor, nn

from effcli.errors import UserError
from effcli.formats import Affine
from effcli.graphs.channels import links
from effcli.graphs.graph import Graph, operation
from effcli.layers.contract import Observed, Pass, Transformed
from effcli.passes.quantize import equalize, fold
from effcli.passes.quantize._affine import encode, extremes


def observed(graph: Graph, *ignored: str) -> Observed:
    chosen: dict[str, Pass] = {site.name: equalize.Equalize() for site in graph.sites() if site.name not in ignored}
    return Observed(chosen=chosen)


def equalized(graph: Graph, *ignored: str, **options: Any) -> Transformed:
    return equalize.Equalize(**options).transform(graph, observed(graph, *ignored))


def uneven(graph: Graph, seed: int = 0) -> Graph:
    """Rows of every weight times factors over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    for site in graph.sites():
        weight: Any = graph.layer(site.name).weight
        with torch.no_grad():
            weight.mul_((torch.randn(len(weight), generator=generator) * 2).exp().view(-1, *(1,) * (weight.ndim - 1)))
    return graph


def rows(graph: Graph, name: str) -> Tensor:
    weight: Any = graph.layer(name).weight
    return weight.flatten(1).abs().amax(1)


def test_by_hand() -> None:
    """Ranges (8, 2) of rows and (2, 8) of columns: s = √(8 · 2) / 2 = 2 and √(2 · 8) / 8 = 1/2, all ranges 4."""
    graph = chain((1,), nn.Linear(1, 2), "relu.default", nn.Linear(2, 1))
    graph.set_weight("layer0", torch.tensor([[8.0], [-2.0]]))
    graph.set_bias("layer0", torch.tensor([1.0, 3.0]))
    graph.set_weight("layer2", torch.tensor([[2.0, -8.0]]))
    made = equalized(graph)
    first, second = graph.layer("layer0"), graph.layer("layer2")
    torch.testing.assert_close(first.weight, torch.tensor([[4.0], [-4]]))
    torch.testing.assert_close(first.bias, torch.tensor([0.5, 6]))
    torch.testing.assert_close(second.weight, torch.tensor([[4.0, -4]]))
    assert made.notes["layer0"] == {"range_ratio": [4.0, 1.0]}
    assert graph.facts.rescaled == ("layer0",)


@given(seed=st.integers(0, 1000))
def test_the_outputs_stay_and_the_ranges_meet(seed: int) -> None:
    """Conv, depthwise and pointwise, linear behind a flattening: every channel ends with one range on both sides."""
    graph = uneven(small_graphs.separable(), seed)
    inputs = small_graphs.inputs(graph, 4, seed)
    before = graph.run(inputs)
    equalized(graph)
    torch.testing.assert_close(graph.run(inputs), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    for link in links(graph):
        ((name, channel),) = link.consumers.items()
        ranges = equalize.input_ranges(graph, name, len(channel))
        expected = torch.zeros(link.channels).scatter_reduce(0, channel, ranges, "amax")
        torch.testing.assert_close(rows(graph, link.producer), expected, rtol=1e-3, atol=0)


def test_channels_that_nothing_makes_or_reads() -> None:
    graph = chain((3,), nn.Linear(3, 4), "relu.default", nn.Linear(4, 2))
    first: Any = graph.layer("layer0")
    second: Any = graph.layer("layer2")
    with torch.no_grad():
        first.weight[1] = 0
        second.weight[:, 2] = 0
    inputs = small_graphs.inputs(graph)
    before = graph.run(inputs)
    equalized(graph)
    torch.testing.assert_close(graph.run(inputs), before)
    assert torch.isfinite(first.weight).all() and torch.isfinite(second.weight).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ranges_of_the_inputs(groups: int) -> None:
    graph = chain((4, 5, 5), nn.Conv2d(4, 8, 3, groups=groups))
    weight: Any = graph.layer("layer0").weight
    expected = [
        max(
            float(weight[out, channel % (4 // groups)].abs().max())
            for out in range(8)
            if out // (8 // groups) == channel // (4 // groups)
        )
        for channel in range(4)
    ]
    torch.testing.assert_close(equalize.input_ranges(graph, "layer0", 4), torch.tensor(expected))


def test_a_batch_norm_must_be_folded_first() -> None:
    graph = small_graphs.residual()
    with pytest.raises(UserError, match="stem_norm is not folded into its layer") as caught:
        equalized(graph)
    assert caught.value.remedy == "put a `fold` step before it"
    fold.Fold().transform(graph, observed(graph))
    assert set(equalized(graph).notes) == {"block.a", "block.b"}


def test_a_batch_norm_that_cannot_be_folded_is_no_obstacle() -> None:
    graph = chain((2, 6, 6), nn.Conv2d(2, 3, 1), "relu.default", nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))
    assert equalized(graph).remarks == ("there are no neighbouring layers to equalize",)


def test_a_relu6_is_kept_unless_it_may_go() -> None:
    graph = small_graphs.separable(clip=True)
    inputs = small_graphs.inputs(graph) * 0.1
    before = graph.run(inputs)
    made = equalized(graph)
    assert made.notes == {}
    assert made.remarks[0] == (
        "layer0 and layer2 stay as they are: a ReLU6 stands between, hardtanh; with relu6: relu a ReLU takes its place"
    )
    torch.testing.assert_close(graph.run(inputs), before, rtol=0, atol=0)
    made = equalized(graph, relu6="relu")
    assert made.remarks == ("a ReLU stands in the place of 3 ReLU6: the network computes something else",)
    assert "aten.hardtanh.default" not in [operation(node) for node in graph.nodes]
    # Inputs so small that no bound was reached.
    torch.testing.assert_close(graph.run(inputs), before, rtol=1e-4, atol=1e-4)


def test_layers_that_are_left_alone() -> None:
    graph = small_graphs.separable()
    made = equalized(graph, "layer2")
    assert set(made.notes) == {"layer4", "layer7"}
    assert "layer0 and layer2 stay as they are: layer2 is left alone" in made.remarks


def test_compressed_layers_stay() -> None:
    graph = small_graphs.separable()
    weight: Any = graph.layer("layer4").weight
    format = Affine(8, "channel", 0, True)
    packed = encode(weight.flatten(1), *extremes(weight.flatten(1), format), format, torch.float32)
    graph.set_weight("layer4", packed)
    made = equalized(graph)
    assert set(made.notes) == {"layer0", "layer2"}
    assert (
        "layer4 and layer7 stay as they are: layer4 is compressed already; equalize before compressing" in made.remarks
    )
    assert graph.stored["layer4"] is packed


def test_it_ends_when_nothing_moves() -> None:
    graph = uneven(small_graphs.separable())
    equalized(graph)
    first = rows(graph, "layer0")
    equalized(graph)
    torch.testing.assert_close(rows(graph, "layer0"), first, rtol=1e-3, atol=0)
    assert math.isfinite(float(first.max()))
