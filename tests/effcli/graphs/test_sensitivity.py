"""What each layer of a graph costs alone: held against the graph run with that layer changed, and against autograd."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import small_graphs
import torch
from torch import Tensor, nn

from effcli.formats import AffineWeight
from effcli.graphs.graph import Graph, class_count
from effcli.graphs.sensitivity import _divergence, layer_costs
from effcli.layers.contract import Layer, Statistics, carry_out
from effcli.layers.restoring import Removal, Restoring
from effcli.layers.selection import choose
from effcli.reports.sensitivity import Way
from effcli.run.recipe import PassStep
from effcli.search.costs import Cost


def step(name: str, bits: int, **more: object) -> PassStep:
    return PassStep.model_validate({name: {"bits": bits, **more}}).for_graph()


def costs(graph: Graph, folder: Path, way: Way, *steps: PassStep) -> list[dict[str, Cost]]:
    folder.mkdir(exist_ok=True)
    graph.save(folder)
    variants = [choose(graph, each) for each in steps]
    return layer_costs(folder, variants, small_graphs.batches(graph), way)


def changed(graph: Graph, folder: Path, name: str, given: PassStep) -> tuple[Tensor, Tensor]:
    """The outputs for all inputs, and those with layer `name` alone rounded."""
    inputs = small_graphs.inputs(graph)
    before = graph.run(inputs).double()
    copy = Graph.read(folder)
    weight: Tensor = copy.layer(name).weight  # type: ignore[assignment]
    flat = weight.detach().flatten(1).clone()
    outcome = carry_out(given.config, Layer(name, "conv", flat, torch.float32)).weight
    assert isinstance(outcome, AffineWeight)
    copy.set_weight(name, outcome)
    return before, copy.run(inputs).double()


@pytest.mark.parametrize("make", [small_graphs.residual, small_graphs.separable])
def test_loss_is_that_of_the_network_with_one_layer_changed(make: type, tmp_path: Path) -> None:
    graph = make()
    given = step("linear", 3)
    (found,) = costs(graph, tmp_path / "work", "loss", given)

    assert class_count(graph) is not None
    for name in found:
        before, after = (values.log_softmax(1) for values in changed(graph, tmp_path / "work", name, given))
        expected = float((before.exp() * (before - after)).sum(1).mean())
        assert found[name].cost == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_of_a_network_that_is_no_classifier(tmp_path: Path) -> None:
    """Of one linear layer even the prediction is exact, up to the noise that it draws."""
    graph = small_graphs.chain((6,), nn.Linear(6, 6))
    given = step("linear", 2)
    (found,) = costs(graph, tmp_path / "work", "loss", given)
    assert class_count(graph) is None
    before, after = changed(graph, tmp_path / "work", "layer0", given)
    assert found["layer0"].cost == pytest.approx(
        float((before - after).square().sum() / before.square().sum()), rel=1e-4
    )

    variants = [choose(graph, given)]
    inputs = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    predicted, measured = (
        layer_costs(tmp_path / "work", variants, lambda: iter(inputs.split(500)), way)[0]["layer0"].cost
        for way in ("fisher", "loss")
    )
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("size", [1, 4, 24])
def test_what_is_fitted_to_inputs_is_measured_on_others(tmp_path: Path, size: int) -> None:
    """Every second input decides the weights, and the others what they cost, whatever the batches."""
    graph = small_graphs.chain((6,), nn.Linear(6, 5))
    graph.save(tmp_path)
    given = step("gptq", 2, scales=False)
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    fitted, others = inputs[::2], inputs[1::2]
    gram = Statistics(6)
    gram.add(fitted)
    weight = cast(Tensor, graph.layer("layer0").weight).detach()
    outcome = carry_out(given.config, Layer("layer0", "linear", weight.clone(), torch.float32), (gram,)).weight
    assert isinstance(outcome, AffineWeight)
    before, after = graph.run(others), others @ outcome.dequantize(torch.float32).t() + graph.layer("layer0").bias
    before, after = before.log_softmax(1), after.log_softmax(1)

    variants = [choose(graph, given)]
    (found,) = layer_costs(tmp_path, variants, lambda: iter(inputs.split(size)), "loss")
    assert class_count(graph) is not None
    assert found["layer0"].cost == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-3)


def test_classes_that_the_network_rules_out_cost_nothing(tmp_path: Path) -> None:
    """A logit of -inf has a probability of 0 before and after."""
    graph = small_graphs.chain((6,), nn.Linear(6, 5))
    with torch.no_grad():
        graph.layer("layer0").bias[0] = -torch.inf  # type: ignore[index]
    values = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    ruled = values.clone()
    ruled[:, 0] = -torch.inf
    other = ruled + torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    expected = _divergence(ruled[:, 1:], other[:, 1:], True)
    assert expected > 0 and _divergence(ruled, other, True) == pytest.approx(expected)


def test_a_single_input_serves_for_both(tmp_path: Path) -> None:
    graph = small_graphs.chain((6,), nn.Linear(6, 6))
    graph.save(tmp_path)
    given = step("gptq", 2)
    inputs = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    (found,) = layer_costs(tmp_path, [choose(graph, given)], lambda: iter([inputs]), "fisher")
    assert found["layer0"].cost > 0


@pytest.mark.parametrize("name", ["linear", "awq", "adaround"])
@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
def test_every_pass_with_bits(name: str, way: Way, tmp_path: Path) -> None:
    more = {"iterations": 5} if name == "adaround" else {}
    graph = small_graphs.separable()
    few, many = costs(graph, tmp_path / "work", way, step(name, 2, **more), step(name, 8, **more))

    assert few.keys() == many.keys() == {site.name for site in graph.sites()}
    for layer, cost in many.items():
        assert 0 <= cost.cost <= few[layer].cost
        assert 0 <= cost.output_error < 0.1 * few[layer].output_error


@pytest.mark.parametrize("way", ["fisher", "loss"])
def test_what_a_bias_takes_counts(way: Way, tmp_path: Path) -> None:
    """A convolution without a bias is given one, and the weight that it loses is made up for but for a rest."""
    inputs = torch.cat([torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(1)), torch.ones(64, 1, 4)], 1)
    graph = small_graphs.chain((2, 4), nn.Conv1d(2, 3, 1, bias=False), "relu.default", ("mean.dim", [2]))
    graph.save(tmp_path)
    found = {}
    for damping in (None, 0.0):
        config = Restoring(removed={"layer0": Removal(columns=(1,), damping=damping)})
        variants = [choose(graph, PassStep(name="cut", config=config))]
        (costs,) = layer_costs(tmp_path, variants, lambda: iter(inputs.split(16)), way)
        found[damping] = costs["layer0"]
    assert found[None].cost > 1e-3 and found[None].output_error > 0.01
    assert found[0.0].cost < 1e-9 and found[0.0].output_error < 1e-9
    assert graph.layer("layer0").bias is None


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    inputs = small_graphs.inputs(graph)
    before = graph.run(inputs)
    costs(graph, tmp_path / "work", "loss", step("awq", 2))
    assert torch.equal(graph.run(inputs), before)
    assert torch.equal(Graph.read(tmp_path / "work").run(inputs), before)


def test_the_same_again(tmp_path: Path) -> None:
    first, second = (
        costs(small_graphs.residual(), tmp_path / name, "fisher", step("linear", 3)) for name in ("a", "b")
    )
    assert first == second


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
def test_progress_is_told_layer_by_layer(tmp_path: Path, way: Way) -> None:
    graph = small_graphs.residual()
    graph.save(tmp_path)
    told: list[tuple[int, int]] = []
    variants = [choose(graph, step("linear", bits)) for bits in (2, 4)]
    layer_costs(tmp_path, variants, small_graphs.batches(graph), way, lambda *at: told.append(at))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    total = 2 * len(graph.sites()) + {"gram": 0, "fisher": 1, "loss": 2}[way]
    assert told[0] == (0, total) and told[-1] == (total, total)
