"""Gradients of weights: those of plain autograd, input by input, and a pass that reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import small_graphs
import torch
from small_graphs import chain
from torch import Tensor, nn
from torch.nn import functional

from effcli.errors import DataError, UnsupportedError
from effcli.files import locate as samples
from effcli.formats import Affine
from effcli.graphs.backward import gradients
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.network import GraphNetwork
from effcli.graphs.sweep import Labelled, graph_sweep
from effcli.layers.contract import Group, Layer, LayerPass, Needs, Outcome, ScalingPass
from effcli.layers.input_rounding import keep_inputs
from effcli.layers.statistics import Statistics
from effcli.passes.quantize._affine import encode, extremes
from effcli.run.recipe import PassStep, from_arguments

BOTH = Needs.GRADIENTS | Needs.SQUARED_GRADIENTS


def classifier() -> Graph:
    """With a grouped convolution that is called twice."""
    builder, shared = Builder(), small_graphs.seeded(nn.Conv2d(6, 6, 3, padding=1, groups=2), 1)
    node = builder.module("first", small_graphs.seeded(nn.Conv2d(3, 6, 3, stride=2), 0), builder.input())
    for _ in range(2):
        node = builder.module("twice", shared, builder.call("aten.silu.default", node))
    node = builder.call("aten.mean.dim", node, [2, 3], False)
    output = builder.module("last", small_graphs.seeded(nn.Linear(6, 4), 2), node)
    return builder.finish(output, Facts(origin="test", shape=(3, 6, 5)))


def data(graph: Graph, count: int = 7, size: int = 3) -> Labelled:
    inputs = small_graphs.inputs(graph, count)
    labels = torch.arange(count) % 4
    return lambda: zip(inputs.split(size), labels.split(size), strict=True)


def plain(graph: Graph, batches: Labelled) -> dict[str, tuple[Tensor, Tensor]]:
    """By autograd on the whole network in float64, one input after the other."""
    module = copy.deepcopy(graph.module).double().requires_grad_()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for inputs, labels in batches():
        assert labels is not None
        for x, y in zip(inputs, labels, strict=True):
            module.zero_grad()
            functional.cross_entropy(module(x.unsqueeze(0).double()), y.unsqueeze(0)).backward()
            for site in graph.sites():
                gradient = module.get_parameter(site.parameter).grad
                assert gradient is not None
                own = gradient.reshape(site.shape).clone()
                total, squares = found.get(site.name, (torch.zeros(site.shape), torch.zeros(site.shape)))
                found[site.name] = total + own, squares + own.square()
    return found


@pytest.mark.parametrize("needs", [Needs.GRADIENTS, Needs.SQUARED_GRADIENTS, BOTH])
def test_those_of_autograd(needs: Needs) -> None:
    graph = classifier()
    before = graph.digest()
    found = gradients(graph, graph.sites(), data(graph)(), needs)
    for name, (total, squares) in plain(graph, data(graph)).items():
        assert found[name].samples == 7 and found[name].sums.keys() == set(needs)
        for need, expected in ((Needs.GRADIENTS, total), (Needs.SQUARED_GRADIENTS, squares)):
            if need in needs:
                torch.testing.assert_close(found[name].sums[need].double(), expected, rtol=1e-4, atol=1e-6)
    assert graph.digest() == before and not any(p.requires_grad for p in graph.module.parameters())


def test_by_hand() -> None:
    """Of one linear W x with logits 0 the gradient is (p - y) xᵀ, p = 1/2."""
    graph = chain((3,), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        graph.module.get_parameter("layer0.weight").zero_()
    batch = torch.tensor([[1.0, 2, 0], [3, 5, 0]]), torch.tensor([0, 1])
    found = gradients(graph, graph.sites(), [batch], BOTH)["layer0"].sums
    assert found[Needs.GRADIENTS].tolist() == [[1, 1.5, 0], [-1, -1.5, 0]]
    assert found[Needs.SQUARED_GRADIENTS].tolist() == [[2.5, 7.25, 0], [2.5, 7.25, 0]]


class Taylor(LayerPass):
    """First-order Taylor pruning (Molchanov et al. 2019, equation 8): weights of small Σ (w ∂L/∂w)² become zero."""

    share: float = 0.5

    @property
    def needs(self) -> Needs:
        return Needs.SQUARED_GRADIENTS

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        importance = layer.weight.square() * seen.squared_gradient
        least = importance.flatten().kthvalue(max(1, int(self.share * importance.numel()))).values
        return Outcome(layer.weight * (importance > least))


class Scaled(ScalingPass):
    """Scales every input, and remembers W ∘ ∂L/∂W, which no scale changes.

    stays: what becomes of a factor that no module can take in.
    """

    stays: Literal["unscaled", "explicit"] = "unscaled"

    @property
    def without_scale(self) -> Literal["unscaled", "explicit"]:
        return self.stays

    @property
    def needs(self) -> Needs:
        return BOTH | Needs.NORMS

    @property
    def seen(self) -> dict[str, tuple[Tensor, Tensor]]:
        found: dict[str, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_seen", {})
        return found

    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, Mapping[str, Any]]:
        factor = torch.linspace(0.5, 2, group.layers[0].weight.shape[1])
        return group.tied(factor), {}

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        self.seen[layer.name] = layer.weight * seen.gradient, layer.weight.square() * seen.squared_gradient
        return Outcome(layer.weight)


def carry_out(graph: Graph, folder: Path, config: LayerPass, labelled: Labelled | None, **more: Any) -> Graph:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    step = PassStep.model_validate({"linear": {}}).model_copy(update={"config": config})
    graph_sweep(source, target, step, small_graphs.batches(graph, 7), labelled=labelled, **more)
    return Graph.read(target)


def test_a_pass_that_reads_them(tmp_path: Path) -> None:
    graph = classifier()
    made = carry_out(graph, tmp_path, Taylor(), data(graph))
    for site in graph.sites():
        weight = made.module.get_parameter(site.parameter)
        parts = plain(graph, data(graph))[site.name][1] * site.view(graph.module.get_parameter(site.parameter)).square()
        for part, own in zip(parts.chunk(site.groups), site.view(weight).chunk(site.groups), strict=True):
            order = part.flatten().argsort()
            half = part.numel() // 2
            assert not own.flatten()[order[:half]].any() and bool(own.flatten()[order[half:]].all())


@pytest.mark.parametrize("stays", ["unscaled", "explicit"])
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_scales_do_not_change_what_a_weight_is_worth(inputs: str, stays: Any, tmp_path: Path) -> None:
    """Folded into the layer before, and on the first layer, which has none before it, absent or explicit."""
    graph = small_graphs.chain(
        (3, 5, 5),
        nn.Conv2d(3, 6, 3),
        "relu.default",
        nn.Conv2d(6, 5, 1),
        "relu.default",
        ("mean.dim", [2, 3], False),
        nn.Linear(5, 4),
    )
    config = Scaled(stays=stays)
    carry_out(graph, tmp_path, config, data(graph), inputs=inputs)
    for site in graph.sites():
        weight = site.view(graph.module.get_parameter(site.parameter)).double()
        total, squares = plain(graph, data(graph))[site.name]
        found, found_squares = config.seen[site.name]
        torch.testing.assert_close(found.double(), weight * total, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found_squares.double(), weight.square() * squares, rtol=1e-3, atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    graph = classifier()
    unlabelled: Iterator[tuple[Tensor, Tensor | None]] = ((x, None) for x, _ in data(graph)())
    with pytest.raises(DataError, match="the calibration data has no labels"):
        gradients(graph, graph.sites(), unlabelled, BOTH)
    with pytest.raises(DataError, match="the calibration data has no labels"):
        carry_out(graph, tmp_path, Taylor(), None)
    with pytest.raises(DataError, match="labels of the calibration data go from 4 to 5"):
        gradients(graph, graph.sites(), [(small_graphs.inputs(graph, 2), torch.tensor([4, 5]))], BOTH)
    images = chain((2, 5, 5), nn.Conv2d(2, 3, 1))
    with pytest.raises(UnsupportedError, match="no vector of one number for each class"):
        gradients(images, images.sites(), data(images)(), BOTH)
    with pytest.raises(ValueError, match="does not ask"):
        _ = Statistics(3, Needs.NORMS).gradient
    with pytest.raises(UnsupportedError, match="searched for"):
        _ = Statistics(3, BOTH).gradient


def test_rounded_inputs_let_gradients_pass() -> None:
    """As if nothing were rounded: those of the same weights with inputs as they are differ by what rounding moves."""
    graph = small_graphs.separable()
    for site in graph.sites():
        weight = site.view(graph.module.get_parameter(site.parameter).detach())
        format = Affine(8, "channel", 0, True, "token" if site.kind == "linear" else "none")
        graph.set_weight(site.name, encode(weight, *extremes(weight, format), format, torch.float32))
    assert graph.rounds_inputs
    found = gradients(graph, graph.sites(), data(graph)(), BOTH)
    keep_inputs(graph.module)
    exact = gradients(graph, graph.sites(), data(graph)(), BOTH)
    for name, own in exact.items():
        expected = own.sums[Needs.GRADIENTS]
        assert float((found[name].sums[Needs.GRADIENTS] - expected).norm()) < 0.1 * float(expected.norm())


def test_a_run_hands_labels_on(tmp_path: Path) -> None:
    recipe = from_arguments("sample:cnn", passes=["linear"], output=str(tmp_path / "out"), evaluate=False)
    step = recipe.passes[0].model_copy(update={"config": Taylor()})
    calibration = recipe.calibration.model_copy(update={"samples": 6})
    recipe = recipe.model_copy(update={"passes": (step,), "calibration": calibration})
    network = GraphNetwork(recipe, samples.resolve("sample:cnn"))
    network.calibrate()
    (tmp_path / "work").mkdir()
    network.open(tmp_path / "work")
    target = tmp_path / "target"
    target.mkdir()
    network.sweep(step, network.base, target, network.base, tmp_path / "unfinished", lambda done, total: None)
    graph = Graph.read(target)
    zeros = sum(int((graph.module.get_parameter(site.parameter) == 0).sum()) for site in graph.sites())
    assert 0.45 < zeros / sum(site.rows * site.columns for site in graph.sites()) < 0.55
