"""The `centroids` pass: gradients summed over shared weights, and outputs closer to what they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small_graphs
import torch
from small_graphs import Held, chain
from torch import Tensor, nn

from effcli.errors import DataError, NumericsError, UserError
from effcli.formats import Codebook, CodebookWeight
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.graphs.training import train, train_graph
from effcli.layers.contract import Layer, Needs, Pass, TrainPass, Transformed
from effcli.passes.quantize import kmeans
from effcli.passes.train import centroids
from effcli.run.recipe import PassStep


def shared(graph: Graph, *ignored: str, bits: int = 2) -> Graph:
    """A copy whose weights share tables."""
    other = Graph(copy.deepcopy(graph.module), graph.facts)
    config = kmeans.KMeans(granularity="tensor", bits=bits)
    for site in other.sites():
        if site.name not in ignored:
            weight: Any = other.layer(site.name).weight
            outcome = config.apply(Layer(site.name, site.kind, weight.flatten(1).clone(), torch.float32))
            other.set_weight(site.name, outcome.weight)
    return other


def tuned(
    graph: Graph, reference: Graph | None, *ignored: str, count: int = 60, size: int = 20, **options: Any
) -> Transformed:
    chosen: dict[str, Pass] = {site.name: centroids.Centroids() for site in graph.sites() if site.name not in ignored}
    data = Held(small_graphs.inputs(graph, count))
    config = centroids.Centroids(**options)
    return train(graph, "centroids", config, data, chosen, batch_size=size, dense=reference)


def error(graph: Graph, reference: Graph) -> float:
    inputs = small_graphs.inputs(graph, 60)
    return float((graph.run(inputs) - reference.run(inputs)).square().sum())


def table(graph: Graph, name: str = "layer0") -> Tensor:
    weight = graph.stored[name]
    assert isinstance(weight, CodebookWeight)
    return weight.table


def test_by_hand() -> None:
    """One entry for the weights 1 and 3 of a single linear: inputs along the second pull it from 2 to 3."""
    reference = chain((3,), nn.Linear(3, 1, bias=False))
    reference.set_weight("layer0", torch.tensor([[1.0, 3.0, 9.0]]))
    graph = Graph(copy.deepcopy(reference.module), reference.facts)
    codes = torch.tensor([[0, 0, 1]], dtype=torch.uint8)
    weight = CodebookWeight(Codebook("kmeans", 1, "tensor"), codes, torch.tensor([[2.0, 9.0]]))
    graph.set_weight("layer0", weight)
    config, data = centroids.Centroids(epochs=600, learning_rate=0.01), Held(torch.tensor([[0.0, 1.0, 0.0]]))
    made = train(graph, "centroids", config, data, {"layer0": config}, batch_size=1, dense=reference)
    torch.testing.assert_close(table(graph), torch.tensor([[3.0, 9.0]]), rtol=1e-4, atol=0)
    parameter: Any = graph.layer("layer0").weight
    torch.testing.assert_close(parameter, torch.tensor([[3.0, 3.0, 9.0]]), rtol=1e-4, atol=0)
    # |3 - 2| over |(2, 9)|.
    assert made.notes["layer0"]["moved"] == pytest.approx(1 / 85**0.5, abs=1e-4)
    assert weight.table.tolist() == [[2.0, 9.0]], "the table that was is left alone"


def test_one_step_goes_down_the_summed_gradient() -> None:
    """Against the gradients of the dense weights, summed by code in float64: the sign of Adam's first step."""
    reference = chain((6,), nn.Linear(6, 5), "relu.default", nn.Linear(5, 3))
    graph = shared(reference)
    inputs = small_graphs.inputs(graph, 40)
    before, codes = table(graph).clone(), graph.stored["layer0"].codes.clone()
    dense: Any = graph.layer("layer0")
    other: Any = graph.layer("layer2")
    weight = dense.weight.detach().double().requires_grad_()
    hidden = torch.relu(inputs.double() @ weight.T + dense.bias.double())
    outputs = hidden @ other.weight.detach().double().T + other.bias.double()
    (outputs - reference.run(inputs).double()).square().sum().backward()
    assert weight.grad is not None
    summed = torch.stack([weight.grad[codes == code].sum() for code in range(4)])
    tuned(graph, reference, count=40, size=40, epochs=1, learning_rate=1e-4)
    moved = (table(graph) - before)[0]
    assert bool((moved.sign() == -summed.sign().float()).all())
    # Adam's first step has the length of the learning rate, in units of the mean magnitude of the entries.
    torch.testing.assert_close(moved.abs(), torch.full((4,), 1e-4 * float(before.abs().mean())), rtol=1e-2, atol=0)


@pytest.mark.parametrize("make", [small_graphs.separable, small_graphs.residual])
def test_outputs_come_closer_to_what_they_were(make: Any) -> None:
    reference = make()
    graph = shared(reference, bits=3)
    before = error(graph, reference)
    codes = {name: weight.codes.clone() for name, weight in graph.stored.items()}
    made = tuned(graph, reference, epochs=20, learning_rate=0.01)
    assert error(graph, reference) < 0.7 * before
    assert set(made.notes) == set(graph.stored)
    assert "error of the outputs" in made.remarks[-1]
    for name, weight in graph.stored.items():
        parameter: Any = graph.layer(name).weight
        torch.testing.assert_close(weight.dequantize(), parameter.flatten(1), rtol=0, atol=0)
        assert bool((table(graph, name).diff(dim=1) >= 0).all())
        # The same weights share an entry as before.
        assert len(torch.unique(torch.stack([codes[name], weight.codes]).flatten(1), dim=1).T) == len(
            codes[name].unique()
        )


def test_pruned_weights_stay_pruned() -> None:
    reference = small_graphs.separable()
    for site in reference.sites():
        weight: Any = reference.layer(site.name).weight
        weight *= weight.abs() > weight.abs().median()
    graph = shared(reference, bits=3)
    zero = {name: weight.dequantize() == 0 for name, weight in graph.stored.items()}
    before = error(graph, reference)
    tuned(graph, reference, epochs=5, learning_rate=0.01)
    assert error(graph, reference) < before
    for name, weight in graph.stored.items():
        assert torch.equal(weight.dequantize() == 0, zero[name])
        assert float(zero[name].float().mean()) >= 0.45


def test_a_table_for_each_channel_and_an_explicit_scale() -> None:
    reference = chain((6,), nn.Linear(6, 5), "relu.default", nn.Linear(5, 3))
    graph = Graph(copy.deepcopy(reference.module), reference.facts)
    config = kmeans.KMeans(bits=1)
    scale = torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.5
    first: Any = graph.layer("layer0").weight
    outcome = config.apply(Layer("layer0", "linear", first * scale, torch.float32)).weight
    assert isinstance(outcome, CodebookWeight)
    graph.set_weight("layer0", outcome.with_input_scale(scale))
    before = error(graph, reference)
    tuned(graph, reference, epochs=30, learning_rate=0.01)
    assert table(graph).shape == (5, 2)
    assert error(graph, reference) < 0.9 * before
    parameter: Any = graph.layer("layer0").weight
    torch.testing.assert_close(parameter, graph.stored["layer0"].dequantize() / scale)


def test_what_does_not_help_is_not_kept() -> None:
    reference = small_graphs.separable()
    graph = shared(reference)
    before = table(graph).clone()
    made = tuned(graph, reference, epochs=2, learning_rate=1e3)
    assert torch.equal(table(graph), before)
    assert not made.notes and "stay as they are" in made.remarks[-1]


def test_the_same_inputs_give_the_same_tables() -> None:
    reference = small_graphs.separable()
    graphs = [shared(reference) for _ in range(2)]
    for graph in graphs:
        tuned(graph, reference, epochs=2)
    for name in graphs[0].stored:
        assert torch.equal(table(graphs[0], name), table(graphs[1], name))


def test_layers_without_a_table_stay_as_they_are() -> None:
    reference = small_graphs.separable()
    graph = shared(reference, "layer7")
    before = {name: table(graph, name).clone() for name in graph.stored}
    made = tuned(graph, reference, "layer0")
    assert made.remarks[0] == "layer7 stays as it is: it has no table of shared weights"
    assert set(made.notes) == {"layer2", "layer4"}
    assert torch.equal(table(graph, "layer0"), before["layer0"])
    assert not torch.equal(table(graph, "layer2"), before["layer2"])


def test_what_it_cannot_work_on() -> None:
    reference = small_graphs.separable()
    with pytest.raises(UserError, match="and none were"):
        tuned(shared(reference), None)
    with pytest.raises(UserError, match="no layer with a table"):
        tuned(reference, reference)
    with pytest.raises(DataError, match="no calibration input"):
        tuned(shared(reference), reference, count=0)
    graph = shared(reference)
    graph.set_bias("layer0", torch.full((6,), torch.nan))
    with pytest.raises(NumericsError, match="outputs are NaN"):
        tuned(graph, reference)


def test_after_kmeans_in_a_run(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    for name in ("input", "kmeans", "centroids"):
        (tmp_path / name).mkdir()
    graph.save(tmp_path / "input")
    steps = [PassStep.model_validate(step).for_graph() for step in ({"kmeans": {"bits": 3}}, "centroids")]
    batches = small_graphs.batches(graph)
    graph_sweep(tmp_path / "input", tmp_path / "kmeans", steps[0], batches)
    result = train_graph(
        tmp_path / "kmeans",
        tmp_path / "centroids",
        steps[1],
        Held(small_graphs.inputs(graph)),
        batch_size=5,
        reference=tmp_path / "input",
    )
    assert all(row.status == "changed" and row.format.startswith("kmeans3") for row in result.ledger)
    made = Graph.read(tmp_path / "centroids")
    assert error(made, graph) < error(Graph.read(tmp_path / "kmeans"), graph)


def test_what_the_pass_asks_for() -> None:
    assert isinstance(centroids.Centroids(), TrainPass) and centroids.Centroids().needs == Needs.INPUTS | Needs.DENSE
