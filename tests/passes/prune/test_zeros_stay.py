"""What a pruning pass removes stays 0 in every pass that follows: all pairs, on small networks of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from torch import Tensor

from effcli.formats import SparseWeight
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork
from effcli.graphs.sweep import graph_sweep
from effcli.graphs.training import train_graph
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.layers.contract import TrainPass
from effcli.run.recipe import PassStep

PRUNING = ("magnitude", "wanda", "taylor", "sparsegpt", "alps")
LAYERS: tuple[dict[str, Any], ...] = (
    *({name: {}} for name in ("linear", "awq", "gptq", "smoothquant", "kmeans", "nf4", "binary", "ternary")),
    {"linear": {"bits": 8, "activations": "int8", "activation_range": "minmax"}},
    {"kmeans": {"weighted": True, "refit": 1, "bits": 3}},
    *({name: {"sparsity": 0.3}} for name in PRUNING),
)
# Each is carried out step by step.
CHAINS: tuple[tuple[dict[str, Any], ...], ...] = (
    *((step,) for step in LAYERS),
    ({"fold": {}}, {"equalize": {}}, {"linear": {"bits": 4, "symmetric": True}}, {"bias_correction": {}}),
    ({"fold": {}}, {"adaround": {"iterations": 3}}, {"int8": {}}),
    ({"kmeans": {"bits": 2}}, {"centroids": {"epochs": 1}}),
)


def carried_out(source: Path, target: Path, given: dict[str, Any], dense: Path | None = None) -> Path:
    """The checkpoint of the graph in `source` after a step; dense: the one before weights were compressed."""
    target.mkdir()
    step = PassStep.model_validate(given).for_graph()
    graph = Graph.read(source)
    if isinstance(step.config, TrainPass):
        data = small_graphs.Held(small_graphs.inputs(graph))
        train_graph(source, target, step, data, batch_size=6, original=source, reference=dense)
        return target
    labels = torch.arange(12) % 4
    labelled = [(inputs, labels[: len(inputs)]) for inputs in small_graphs.batches(graph)()]
    batches = small_graphs.batches(graph)
    graph_sweep(source, target, step, batches, reference=dense, labelled=lambda: iter(labelled))
    return target


def kept_of(folder: Path) -> dict[str, Tensor]:
    graph = Graph.read(folder)
    masks = {site.name: graph.mask(site.name) for site in graph.sites()}
    return {name: mask.kept for name, mask in masks.items() if mask is not None}


@pytest.fixture(scope="module", params=PRUNING)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    (folder / "source").mkdir()
    small_graphs.separable().save(folder / "source")
    return carried_out(folder / "source", folder / "pruned", {request.param: {"sparsity": 0.4}})


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_of_a_graph(chain: tuple[dict[str, Any], ...], graph: Path, tmp_path: Path) -> None:
    before = kept_of(graph)
    dense = folder = graph
    assert len(before) == 4
    for number, step in enumerate(chain):
        folder = carried_out(folder, tmp_path / str(number), step, dense)
        dense = folder if step.keys() & {"fold", "equalize"} else dense
    if "int8" in chain[-1]:
        network = IntegerNetwork.read(folder)
        codes = {step.layer: network.array(step, "weight") for step in network.program.steps if hasattr(step, "layer")}
        assert codes.keys() == before.keys()
        for name, kept in before.items():
            assert not codes[name].reshape(kept.shape)[~kept.numpy()].any()
        return
    made, after = Graph.read(folder), kept_of(folder)
    for name, kept in before.items():
        weight: Any = made.layer(name).weight
        assert not weight.detach().view(kept.shape)[~kept].any()
        # Another pruning pass may remove more.
        assert not after[name][~kept].any() if chain[0].keys() & set(PRUNING) else torch.equal(after[name], kept)


@pytest.fixture(scope="module", params=PRUNING)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    source = architectures.make("llama", folder / "model", num_hidden_layers=1)
    return swept(source, folder / "pruned", {request.param: {"pattern": "2:4"}})


def swept(source: Path, target: Path, step: dict[str, Any]) -> Path:
    target.mkdir()
    ids = torch.randint(architectures.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    sweep(source, target, PassStep.model_validate(step), Windows([ids], "original"), target.with_name("work"))
    return target


@pytest.mark.parametrize("step", LAYERS, ids=str)
def test_of_a_language_model(step: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    before, after = open_weights(llama), open_weights(swept(llama, tmp_path / "after", step))
    assert len(before.stored) == 7
    for name in before.stored:
        mask, weight = before.mask(name), after.packed(name)
        assert mask is not None and isinstance(weight, SparseWeight)
        assert not weight.mask[~mask.kept].any() if step.keys() & set(PRUNING) else torch.equal(weight.mask, mask.kept)
        assert not weight.effective(torch.float32)[~mask.kept].any()
