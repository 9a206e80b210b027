"""Image classifiers of many architectures, read as graphs: the same logits, layers named as in the checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import vision_architectures
from coupled_cuts import random_cuts, zero
from torch import nn
from transformers import AutoModelForImageClassification

from effcli.files.checkpoint import read_header
from effcli.graphs.coupling import coupled, cut
from effcli.graphs.graph import Graph, operation
from effcli.importers import read, recognises

# Those with attention put a token before every input's, so the size of the batch stays in their graph.
KEEP_THE_BATCH = {"vit"}


def check_cut(graph: Graph) -> None:
    """Half of what can be cut leaves what the network computes with those channels set to zero, in float64."""
    cuts = random_cuts(coupled(graph), share=0.5)
    assert cuts
    silent, smaller = copy.deepcopy(graph), copy.deepcopy(graph)
    zero(silent.module.state_dict(), cuts)
    cut(smaller, cuts)
    assert smaller.weights() < 0.9 * graph.weights()
    inputs = torch.randn(3, *graph.facts.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = silent.module.double()(inputs)
    torch.testing.assert_close(smaller.module.double()(inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", vision_architectures.NAMES)
def test_a_classifier_becomes_a_graph(name: str, tmp_path: Path) -> None:
    source = vision_architectures.make(name, tmp_path / "source")
    network = AutoModelForImageClassification.from_pretrained(source)
    assert recognises(source)
    graph = read(source)
    (tmp_path / "graph").mkdir()
    graph.save(tmp_path / "graph")
    again = Graph.read(tmp_path / "graph")

    for batch in (1, 3):
        inputs = torch.randn(batch, *graph.facts.shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = network(pixel_values=inputs).logits
        # Logits that do not depend on the inputs would prove nothing.
        assert batch == 1 or float(expected.std(0).min()) > 0.05
        for found in (graph, again):
            torch.testing.assert_close(found.run(inputs), expected, rtol=0, atol=1e-5)

    stored = read_header(source / "model.safetensors")
    parameters = dict(graph.module.named_parameters())
    assert parameters.keys() <= stored.keys()
    assert all(tuple(parameter.shape) == stored[key].shape for key, parameter in parameters.items())
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(graph.sites()) == len(layers)
    sizes = [node for node in graph.nodes if operation(node) == "aten.sym_size.int"]
    assert bool(sizes) == (name in KEEP_THE_BATCH)
    assert graph.facts.classes == vision_architectures.CLASSES
    assert graph.facts.config is not None and graph.facts.origin == f"transformers {network.config.model_type}"
    check_cut(graph)
    assert all(" in forward" in node.meta["source"] for node in graph.nodes if node.op == "call_module")
