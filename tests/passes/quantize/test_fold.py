"""The `fold` pass: no batch norm is left that could be folded, and the outputs are what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import chain
from torch import Tensor, nn

from effcli import importers
from effcli.formats import Affine
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.layers.contract import Observed, Pass, Transformed
from effcli.passes.quantize import fold
from effcli.passes.quantize._affine import encode, extremes


def folded(graph: Graph, *ignored: str) -> Transformed:
    chosen: dict[str, Pass] = {site.name: fold.Fold() for site in graph.sites() if site.name not in ignored}
    return fold.Fold().transform(graph, Observed(chosen=chosen))


def norms(graph: Graph) -> list[str]:
    return [
        name for name, module in graph.module.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    ]


def exact(graph: Graph, inputs: Tensor) -> Tensor:
    """The outputs in float64."""
    graph.module.double()
    with torch.no_grad():
        outputs: Tensor = graph.module(inputs.double())
    graph.module.float()
    return outputs


def check_same(graph: Graph, *ignored: str) -> Transformed:
    inputs = small_graphs.inputs(graph, 6)
    before = exact(graph, inputs)
    made = folded(graph, *ignored)
    torch.testing.assert_close(exact(graph, inputs), before, rtol=1e-5, atol=1e-6 * float(before.abs().max()))
    return made


def test_by_hand() -> None:
    """Weight 3, bias 1, mean 2, variance 4, scale 6, shift 5: a = 6 / 2, so 3 a x + (1 - 2) a + 5."""
    graph = chain((1,), nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0))
    values = {"layer0.weight": 3.0, "layer0.bias": 1.0, "layer1.running_mean": 2.0, "layer1.running_var": 4.0}
    values |= {"layer1.weight": 6.0, "layer1.bias": 5.0}
    state = graph.module.state_dict()
    for key, value in values.items():
        state[key].fill_(value)
    folded(graph)
    layer: Any = graph.layer("layer0")
    assert (layer.weight.item(), layer.bias.item()) == (9, 2)
    assert norms(graph) == []


@given(
    bias=st.booleans(),
    affine=st.booleans(),
    groups=st.sampled_from([1, 3]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_behind_a_layer(bias: bool, affine: bool, groups: int, last: bool, seed: int) -> None:
    conv = nn.Conv2d(3, 6, 3, padding=1, groups=groups, bias=bias)
    rest = () if last else ("relu.default", nn.Conv2d(6, 2, 1))
    graph = chain((3, 5, 4), conv, nn.BatchNorm2d(6, affine=affine), *rest)
    small_graphs.seeded(conv, seed)
    made = check_same(graph)
    assert made.notes == {"layer0": {"folded": ["layer1"]}}
    assert made.remarks == ()
    assert not norms(graph)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(4, 3, 1, bias=False)])
def test_in_front_of_a_layer_that_pads_nothing(layer: nn.Conv2d) -> None:
    graph = chain((4, 7, 7), nn.BatchNorm2d(4), layer)
    assert check_same(graph).notes == {"layer1": {"folded": ["layer0"]}}
    assert not norms(graph)


def test_in_front_of_two_layers_and_of_a_linear() -> None:
    builder = Builder()
    normed = builder.module("norm", small_graphs.seeded(nn.BatchNorm1d(4), 0), builder.input())
    left = builder.module("a", small_graphs.seeded(nn.Linear(4, 3), 1), normed)
    right = builder.module("b", small_graphs.seeded(nn.Linear(4, 3), 2), normed)
    graph = builder.finish(builder.call("aten.mul.Tensor", left, right), Facts(origin="test", shape=(4,)))
    assert set(check_same(graph).notes) == {"a", "b"}
    assert not norms(graph)


def test_one_after_the_other() -> None:
    graph = chain((2, 4, 4), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    assert check_same(graph).notes == {"layer0": {"folded": ["layer1", "layer2"]}}
    assert not norms(graph)


STAYING: dict[str, tuple[Callable[[], Graph], tuple[str, ...], str]] = {
    "zero padding": (
        lambda: chain((2, 4, 4), "relu.default", nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)),
        (),
        "layer1 stays: no layer stands before it, but relu (aten.relu.default, net.py:0)",
    ),
    "ignored": (
        lambda: chain((2, 4, 4), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)),
        ("layer0",),
        "layer1 stays: layer0 is ignored",
    ),
    "other axis": (
        lambda: chain((3, 4), nn.Linear(4, 5), nn.BatchNorm1d(3)),
        (),
        "layer1 stays: layer0 has its channels on another axis",
    ),
    "compressed": (
        lambda: compressed(chain((2, 4, 4), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))),
        (),
        "layer1 stays: layer0 is compressed already; fold before compressing",
    ),
    "two readers": (
        lambda: two_readers(),
        (),
        "norm stays: add (aten.add.Tensor) also reads the output of conv",
    ),
    "two calls": (lambda: two_calls(), (), "norm stays: it is called more than once"),
}


def compressed(graph: Graph) -> Graph:
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    format = Affine(8, "channel", 0, True)
    graph.set_weight("layer0", encode(weight, *extremes(weight, format), format, torch.float32))
    return graph


def two_readers() -> Graph:
    builder = Builder()
    conv = builder.module("conv", small_graphs.seeded(nn.Conv2d(2, 2, 1), 0), builder.input())
    norm = builder.module("norm", small_graphs.seeded(nn.BatchNorm2d(2), 1), conv)
    return builder.finish(builder.call("aten.add.Tensor", norm, conv), Facts(origin="test", shape=(2, 3, 3)))


def two_calls() -> Graph:
    builder = Builder()
    norm = small_graphs.seeded(nn.BatchNorm2d(2), 1)
    node = builder.module("norm", norm, builder.module("conv", nn.Conv2d(2, 2, 1), builder.input()))
    return builder.finish(builder.module("norm", norm, node), Facts(origin="test", shape=(2, 3, 3)))


@pytest.mark.parametrize("name", STAYING)
def test_what_cannot_be_folded_stays_with_the_reason(name: str) -> None:
    make, ignored, remark = STAYING[name]
    graph = make()
    made = check_same(graph, *ignored)
    assert made.notes == {}
    assert remark in made.remarks
    assert len(norms(graph)) == 1


def test_no_batch_norm_at_all() -> None:
    graph = chain((2, 4, 4), nn.Conv2d(2, 3, 1))
    assert check_same(graph).remarks == ("there is no batch norm to fold",)


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet20_jpegft",
        "cifar10_resnet56",
        "tiny_dscnn_kws",
        "tiny_fc_autoencoder_toycar",
        "tiny_resnet8_cifar10",
    ],
)
def test_real_networks(name: str, asset: Callable[[str], Path]) -> None:
    graph = importers.read(asset(name))
    assert norms(graph)
    assert check_same(graph).remarks == ()
    assert norms(graph) == []
