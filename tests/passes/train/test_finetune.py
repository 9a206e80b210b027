"""The `finetune` pass: labels or the original network's outputs, under the masks that are there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import small_graphs
import torch
from small_graphs import Held, chain
from torch import nn
from torch.nn import functional as F

from effcli.errors import DataError, UserError
from effcli.formats import Mask
from effcli.graphs.graph import Graph
from effcli.graphs.training import train
from effcli.layers.contract import Layer, Pass, Step, Transformed
from effcli.passes.quantize import kmeans
from effcli.passes.train.finetune import FineTune


def tuned(graph: Graph, data: Held, original: Graph | None = None, size: int = 8, **options: Any) -> Transformed:
    config = FineTune(**options)
    chosen: dict[str, Pass] = {site.name: config for site in graph.sites()}
    return train(graph, "finetune", config, data, chosen, batch_size=size, original=original)


def test_a_step_by_hand() -> None:
    """Two classes, one input (1, 0, 0) of the second one, weights and biases 0.

    Both logits are 0, so that the gradient of the loss is ±1/2; a step of Adam is the learning rate, whatever its size.
    """
    graph = chain((3,), nn.Linear(3, 2))
    layer: Any = graph.layer("layer0")
    layer.weight.zero_()
    layer.bias.zero_()
    data = Held(torch.tensor([[1.0, 0.0, 0.0]]), np.array([1]))
    tuned(graph, data, steps=1, learning_rate=0.25, keep_best=False)
    torch.testing.assert_close(layer.weight, torch.tensor([[-0.25, 0.0, 0.0], [0.25, 0.0, 0.0]]))
    torch.testing.assert_close(layer.bias, torch.tensor([-0.25, 0.25]))


def test_weights_decay_and_biases_do_not() -> None:
    """No gradient: the network is the original. A step takes learning rate times decay off every weight."""
    graph = chain((2,), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in graph.module.named_parameters()}
    data = Held(torch.zeros(1, 2))
    tuned(graph, data, steps=1, towards="original", learning_rate=0.5, weight_decay=0.5, keep_best=False)
    layer: Any = graph.layer("layer0")
    torch.testing.assert_close(layer.weight, 0.75 * before["layer0.weight"])
    torch.testing.assert_close(layer.bias, before["layer0.bias"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("towards", ["labels", "original"])
def test_a_pruned_network_recovers(towards: str) -> None:
    """What was removed stays 0, and the rest takes over some of its work."""
    original = small_graphs.separable()
    graph = original.copy()
    inputs = small_graphs.inputs(graph, 40)
    masks = {}
    for site in graph.sites():
        weight = site.view(graph.layer(site.name).weight.detach())  # type: ignore[union-attr, operator]
        masks[site.name] = weight.abs() > weight.abs().median()
        graph.set_weight(site.name, Mask(masks[site.name]).over(weight))

    def loss() -> float:
        made, wanted = graph.run(inputs), original.run(inputs)
        return float(F.cross_entropy(made, wanted.argmax(1)) if towards == "labels" else F.mse_loss(made, wanted))

    before = loss()
    data = Held(inputs, original.run(inputs).argmax(1).numpy())
    tuned(graph, data, original, towards=towards, epochs=10, learning_rate=1e-2)
    assert loss() < 0.6 * before
    for site in graph.sites():
        assert torch.equal(site.view(graph.layer(site.name).weight) != 0, masks[site.name])  # type: ignore[arg-type]
        mask = graph.mask(site.name)
        assert mask is not None and torch.equal(mask.kept, masks[site.name])


def test_compressed_layers_stay() -> None:
    graph = small_graphs.separable()
    weight: Any = graph.layer("layer7").weight
    outcome = kmeans.KMeans(bits=2, granularity="tensor").apply(Layer("layer7", "linear", weight, torch.float32))
    graph.set_weight("layer7", outcome.weight)
    before = weight.clone()
    made = tuned(graph, Held(small_graphs.inputs(graph, 8), np.zeros(8, dtype=np.int64)), learning_rate=1e-2)
    assert torch.equal(graph.layer("layer7").weight, before) and "layer7" in graph.stored  # type: ignore[arg-type]
    assert "layer0" in made.notes and any("layer7 stays as it is" in remark for remark in made.remarks)
    for name in ("layer0", "layer2", "layer4"):
        layer: Any = graph.layer(name)
        outcome = kmeans.KMeans(bits=2, granularity="tensor").apply(
            Layer(name, "conv2d", layer.weight.flatten(1), torch.float32)
        )
        graph.set_weight(name, outcome.weight)
    with pytest.raises(UserError, match="finds no layer with a floating weight"):
        tuned(graph, Held(small_graphs.inputs(graph, 8), np.zeros(8, dtype=np.int64)))


def test_labels_are_asked_for() -> None:
    graph = small_graphs.separable()
    with pytest.raises(DataError, match="has no labels"):
        tuned(graph, Held(small_graphs.inputs(graph, 8)))


def test_how_far_outputs_are_from_the_original() -> None:
    """Of classes KL(½, ½ || ¾, ¼); in networks read as a graph a mean square unless it is asked for."""
    step = Step(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), original=torch.zeros(1, 2))
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    plain = FineTune(towards="original")
    assert float(plain.loss(step)) == pytest.approx(divergence, rel=1e-5)
    assert float(plain.for_graph().loss(step)) == pytest.approx(math.log(3) ** 2 / 2, rel=1e-5)
    assert float(FineTune(towards="original", distance="kl").for_graph().loss(step)) == pytest.approx(
        divergence, rel=1e-5
    )
