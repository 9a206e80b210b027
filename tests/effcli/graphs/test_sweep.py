"""One pass over a graph: what it writes, what it says, and that scales change nothing before weights are rounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_graphs
import torch
from small_graphs import chain
from torch import Tensor, nn
from torch.nn import functional

from effcli import importers
from effcli.errors import DataError, NumericsError, SelectionError, UserError
from effcli.formats import Affine, AffineWeight, unpack
from effcli.graphs import sweep as sweeping
from effcli.graphs.graph import WEIGHTS_NAME, Builder, Facts, Graph
from effcli.graphs.sweep import graph_sweep
from effcli.graphs.walk import Walk
from effcli.layers.contract import Group, Layer, LayerPass, Needs, Outcome
from effcli.layers.result import PassResult
from effcli.layers.statistics import Statistics
from effcli.passes.quantize import awq
from effcli.passes.quantize._affine import encode, extremes, nearest
from effcli.passes.quantize.adaround import AdaRound
from effcli.run.recipe import PassStep

LINEAR = {"linear": {"bits": 4}}
ADAROUND: dict[str, Any] = {"adaround": {"iterations": 100}}


def sweep(graph: Graph, folder: Path, step: Any, count: int = 12, **more: Any) -> tuple[Graph, PassResult]:
    """What `step` makes of `graph`, read back from the disk."""
    number = next(_NUMBERS)
    source, target = folder / f"source-{number}", folder / f"target-{number}"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    made = graph_sweep(source, target, prepared(step), small_graphs.batches(graph, count), **more)
    return Graph.read(target), made


_NUMBERS = itertools.count()


def prepared(step: Any) -> PassStep:
    checked = PassStep.model_validate(step)
    return checked.model_copy(update={"config": checked.config.for_graph()})


def weight_of(graph: Graph, name: str) -> Tensor:
    weight: Any = graph.layer(name).weight
    return weight.detach()


def grams_by_name(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Statistics]]:
    """Let `adaround` keep every weight, and note what it is shown, group by group."""
    found: dict[str, list[Statistics]] = {}

    def apply(config: Any, layer: Layer, seen: Statistics) -> Outcome:
        found.setdefault(layer.name, []).append(seen)
        return Outcome(layer.weight)

    monkeypatch.setattr(AdaRound, "apply", apply)
    monkeypatch.setattr(AdaRound, "apply_groups", LayerPass.apply_groups)
    return found


def test_every_layer_is_rounded_and_told_of(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    made, result = sweep(graph, tmp_path, LINEAR)
    assert [row.name for row in result.ledger] == ["layer0", "layer2", "layer4", "layer7"]
    for row in result.ledger:
        weight = weight_of(graph, row.name).flatten(1)
        expected = nearest(weight, Affine(4, "channel"), torch.float32)
        torch.testing.assert_close(weight_of(made, row.name).flatten(1), expected)
        assert (row.status, row.format, row.kind) == ("compressed", "int4 channel asym", row.kind)
        assert row.weight_error == pytest.approx(float((expected - weight).norm() / weight.norm()) ** 2, rel=1e-4)
        assert row.output_error is None
        assert row.nbytes == sum(tensor.nbytes for tensor in made.stored[row.name].pack().values())
        assert row.bits_per_weight == pytest.approx(8 * row.nbytes / weight.numel())
    assert [row.macs for row in result.ledger] == [6 * 27 * 64, 6 * 9 * 64, 60 * 16, 640]
    assert [row.parameters for row in result.ledger] == [6 * 27 + 6, 6 * 9 + 6, 60 + 10, 640 + 4]
    assert [row.kind for row in result.ledger] == ["conv", "conv", "conv", "linear"]
    assert {item.layer for item in result.histograms} == {row.name for row in result.ledger}


def test_options_of_single_layers_and_layers_that_are_ignored(tmp_path: Path) -> None:
    step = {"linear": {"bits": 8, "ignore": ["layer0"], "layers": {"layer7": {"bits": 3, "group_size": 16}}}}
    graph = small_graphs.separable()
    made, result = sweep(graph, tmp_path, step)
    rows = {row.name: row for row in result.ledger}
    assert (rows["layer0"].status, rows["layer0"].reason) == ("kept", "ignored by 'layer0'")
    assert rows["layer0"].format == "float32"
    assert rows["layer2"].format == "int8 channel asym"
    assert rows["layer7"].format == "int3 g16 asym"
    torch.testing.assert_close(weight_of(made, "layer0"), weight_of(graph, "layer0"), rtol=0, atol=0)


def test_the_inputs_of_every_layer_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own unfolding of all inputs at once in float64; a grouped convolution group by group."""
    graph = small_graphs.separable()
    found = grams_by_name(monkeypatch)
    sweep(graph, tmp_path, ADAROUND)
    values: dict[str, Tensor] = {}
    walk = Walk(graph, [small_graphs.inputs(graph)])
    for node in walk:
        if node.op == "call_module":
            values[node.name] = walk.inputs(node)[0].double()
    patches = functional.unfold(values["layer0"], 3, padding=1).permute(1, 0, 2).flatten(1)
    (gram,) = found["layer0"]
    torch.testing.assert_close(gram.matrix.double(), patches @ patches.t(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gram.magnitude.double(), patches.abs().mean(1), rtol=1e-4, atol=1e-5)
    assert gram.tokens == 12 * 64
    assert len(found["layer2"]) == 6
    for k, gram in enumerate(found["layer2"]):
        patches = functional.unfold(values["layer2"][:, k : k + 1], 3, padding=1).permute(1, 0, 2).flatten(1)
        torch.testing.assert_close(gram.matrix.double(), patches @ patches.t(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        found["layer7"][0].matrix.double(), values["layer7"].t() @ values["layer7"], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_the_output_error_is_that_of_the_outputs(inputs: Any, tmp_path: Path) -> None:
    """Of each layer alone, on what it sees: the original network's values, or those of the layers made before it."""
    graph = small_graphs.separable()
    made, result = sweep(graph, tmp_path, ADAROUND, inputs=inputs)
    source = graph if inputs == "original" else made
    walk = Walk(source, [small_graphs.inputs(graph)])
    for node in walk:
        if node.op != "call_module":
            continue
        row = next(row for row in result.ledger if row.name == node.name)
        with torch.no_grad():
            outputs = []
            for network in (graph, made):
                module: Any = network.layer(node.name)
                kept, module.bias = module.bias, None
                outputs.append(module(walk.inputs(node)[0]).double())
                module.bias = kept
        error = float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())
        assert row.output_error == pytest.approx(error, rel=2e-2)


def test_compressed_inputs_are_those_of_the_layers_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that doubles every weight: the second layer sees inputs twice as large, its Gram matrix four times."""
    graph = chain((3,), nn.Linear(3, 4, bias=False), "relu.default", nn.Linear(4, 2, bias=False))
    found: dict[str, Statistics] = {}

    def apply(config: Any, layer: Layer, seen: Statistics) -> Outcome:
        found[layer.name] = seen
        return Outcome(2 * layer.weight)

    monkeypatch.setattr(AdaRound, "apply", apply)
    sweep(graph, tmp_path, ADAROUND, inputs="original")
    first = dict(found)
    made, result = sweep(graph, tmp_path, ADAROUND, inputs="compressed")
    torch.testing.assert_close(found["layer0"].matrix, first["layer0"].matrix)
    torch.testing.assert_close(found["layer2"].matrix, 4 * first["layer2"].matrix)
    assert [row.status for row in result.ledger] == ["changed", "changed"]
    assert [row.weight_error for row in result.ledger] == pytest.approx([1, 1])
    assert made.stored == {}


def test_layers_that_see_the_same_share_one_gram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder()
    node = builder.input()
    branches = [
        builder.module(f"b{k}", small_graphs.seeded(module, k), node)
        for k, module in enumerate(
            (nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding="same"), nn.Conv2d(2, 3, 1))
        )
    ]
    total = builder.call("aten.add.Tensor", builder.call("aten.add.Tensor", *branches[:2]), branches[2])
    graph = builder.finish(total, Facts(origin="test", shape=(2, 5, 5)))
    found = grams_by_name(monkeypatch)
    for inputs in ("original", "compressed"):
        found.clear()
        sweep(graph, tmp_path, ADAROUND, inputs=inputs)
        assert found["b0"][0] is found["b1"][0]
        assert found["b0"][0] is not found["b2"][0]


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_a_layer_that_runs_twice(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its inputs count where the network runs as it was; walking through it, those of the first call."""
    builder = Builder()
    shared = small_graphs.seeded(nn.Linear(3, 3), 0)
    graph = builder.finish(
        builder.module("a", shared, builder.module("a", shared, builder.input())), Facts(origin="test", shape=(3,))
    )
    found = grams_by_name(monkeypatch)
    _, result = sweep(graph, tmp_path, ADAROUND, inputs=inputs)
    (row,) = result.ledger
    assert found["a"][0].tokens == (24 if inputs == "original" else 12)
    assert row.macs == 18
    assert ("those of the first" in row.reason) == (inputs == "compressed")


class Untouched:
    """AWQ's scales with weights that are not rounded."""

    @staticmethod
    def use(monkeypatch: pytest.MonkeyPatch) -> None:
        def scale(config: Any, group: Group, seen: Statistics) -> tuple[Tensor, dict[str, Any]]:
            generator = torch.Generator().manual_seed(len(group.layers[0].name))
            values = torch.rand(seen.magnitude.shape, generator=generator) * 3 + 0.3
            return group.tied(values), {"alpha": 0.5}

        monkeypatch.setattr(awq.AWQ, "scale", scale)
        monkeypatch.setattr(awq.AWQ, "apply", lambda config, layer, seen: Outcome(layer.weight))


SCALED: dict[str, tuple[Callable[[], Graph], set[str]]] = {
    "separable": (small_graphs.separable, {"layer2", "layer4"}),
    "residual": (small_graphs.residual, {"block.a_norm"}),
    "layer norm": (lambda: chain((5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), {"layer0"}),
    "pooled": (
        lambda: chain((2, 6, 6), nn.Conv2d(2, 4, 3), ("max_pool2d.default", [2, 2], [2, 2]), nn.Conv2d(4, 3, 2)),
        {"layer0"},
    ),
}


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@pytest.mark.parametrize("name", SCALED)
def test_scales_change_nothing(name: str, inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded into layers, batch norms and layer norms: before any rounding the outputs are what they were."""
    make, producers = SCALED[name]
    graph = make()
    before = graph.run(small_graphs.inputs(graph))
    Untouched.use(monkeypatch)
    made, result = sweep(graph, tmp_path, {"awq": {}}, inputs=inputs)
    after = made.run(small_graphs.inputs(graph))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    folded = {row.notes["folded_into"] for row in result.ledger if "folded_into" in row.notes}
    assert folded == producers
    assert set(made.facts.rescaled) == producers
    for row in result.ledger:
        assert row.weight_error == pytest.approx(0, abs=1e-10)
        assert row.output_error == pytest.approx(0, abs=1e-10)
        assert ("folded_into" in row.notes) != row.reason.startswith("unscaled: ")
    changed = [n for n in folded if not torch.allclose(weight_of(made, n), weight_of(graph, n))]
    assert set(changed) == folded


def test_the_error_of_scaled_layers_is_that_of_the_weights_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W against what the rounded layer amounts to with its scales: Q(W₁ / s) · s and Q(W₂ · s) / s."""
    graph = chain((6,), nn.Linear(6, 8), "relu.default", nn.Linear(8, 5))
    factor = torch.tensor([1.0, 2, 4, 8, 0.5, 0.25, 3, 1])

    def scale(config: Any, group: Group, seen: Statistics) -> tuple[Tensor, dict[str, Any]]:
        return (factor if len(seen.magnitude) == 8 else torch.ones(6)), {}

    monkeypatch.setattr(awq.AWQ, "scale", scale)
    made, result = sweep(graph, tmp_path, {"awq": {"bits": 3}}, count=50)
    inputs = small_graphs.inputs(graph, 50)
    first: Any = graph.layer("layer0")
    seen = {"layer0": inputs, "layer2": first(inputs).relu()}
    amounts = {
        "layer0": weight_of(made, "layer0") * factor.unsqueeze(1),
        "layer2": weight_of(made, "layer2") / factor,
    }
    for row in result.ledger:
        weight, difference = weight_of(graph, row.name), amounts[row.name] - weight_of(graph, row.name)
        assert row.weight_error == pytest.approx(float((difference.norm() / weight.norm()).square()), rel=1e-4)
        errors = (seen[row.name] @ difference.t()).norm() / (seen[row.name] @ weight.t()).norm()
        assert row.output_error == pytest.approx(float(errors.square()), rel=2e-2)


def test_awq_scales_convolutions_and_pays(tmp_path: Path) -> None:
    """Loud channels: scaled and clipped against merely rounded, by the outputs."""
    graph = small_graphs.separable()
    first: Any = graph.layer("layer2")
    with torch.no_grad():
        first.weight.mul_(torch.tensor([0.1, 1, 10, 0.1, 1, 10]).view(-1, 1, 1, 1))
    made, result = sweep(graph, tmp_path, {"awq": {"bits": 3}}, count=30)
    plain, _ = sweep(graph, tmp_path, {"linear": {"bits": 3}})
    notes = {row.name: row.notes for row in result.ledger}
    assert notes["layer4"]["folded_into"] == "layer2"
    inputs = small_graphs.inputs(graph, 30)
    wanted = graph.run(inputs)
    assert float((made.run(inputs) - wanted).norm()) < float((plain.run(inputs) - wanted).norm())


def reasons(result: PassResult) -> dict[str, str]:
    return {row.name: row.reason for row in result.ledger}


def test_why_layers_stay_unscaled(tmp_path: Path) -> None:
    _, result = sweep(small_graphs.separable(), tmp_path, {"awq": {}})
    found = reasons(result)
    assert found["layer0"] == (
        "unscaled: no layer's output channels are its inputs, which come from input_1 (placeholder)"
    )
    assert found["layer2"] == "unscaled: it is a grouped convolution"
    assert not found["layer4"].startswith("unscaled")
    _, result = sweep(small_graphs.separable(), tmp_path, {"awq": {"ignore": ["layer2"]}})
    assert reasons(result)["layer4"] == "unscaled: layer2, which produces its input, is left alone"
    assert reasons(result)["layer2"] == "ignored by 'layer2'"
    _, result = sweep(small_graphs.separable(clip=True), tmp_path, {"awq": {}})
    assert reasons(result)["layer4"] == (
        "unscaled: hardtanh_1 (aten.hardtanh.default, net.py:3) stands between and clips"
    )
    _, result = sweep(small_graphs.residual(), tmp_path, {"awq": {}})
    assert "also reads the channels" in reasons(result)["block.a"]


def test_readers_with_other_patches_or_left_alone(tmp_path: Path) -> None:
    builder = Builder()
    trunk = builder.module("a", small_graphs.seeded(nn.Conv2d(2, 4, 1), 0), builder.input())
    left = builder.module("b", small_graphs.seeded(nn.Conv2d(4, 3, 3, padding=1), 1), trunk)
    right = builder.module("c", small_graphs.seeded(nn.Conv2d(4, 3, 1), 2), trunk)
    again = builder.module("d", small_graphs.seeded(nn.Conv2d(4, 3, 1), 3), trunk)
    total = builder.call("aten.add.Tensor", builder.call("aten.add.Tensor", left, right), again)
    graph = builder.finish(total, Facts(origin="test", shape=(2, 5, 5)))
    _, result = sweep(graph, tmp_path, {"awq": {}})
    assert reasons(result)["b"] == "unscaled: c reads the same channels in another way"
    _, result = sweep(graph, tmp_path, {"awq": {"ignore": ["d"]}})
    assert reasons(result)["c"] == "unscaled: d reads the same input and is left alone"


def test_a_scale_that_no_layer_can_take_in_stays_explicit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One factor per input channel, whatever the kernel, stored beside the packed weight and divided out on reading."""
    graph = chain((3, 6, 6), nn.Conv2d(3, 4, 3), "sigmoid.default", nn.Conv2d(4, 5, 2))
    scales = {3: torch.tensor([1.0, 4, 0.5]), 4: torch.tensor([2.0, 1, 3, 0.25])}

    def scale(config: Any, group: Group, seen: Statistics) -> tuple[Tensor, dict[str, Any]]:
        assert group.channel is not None
        return scales[int(group.channel.max()) + 1][group.channel], {}

    monkeypatch.setattr(awq.AWQ, "scale", scale)
    made, result = sweep(graph, tmp_path, {"awq": {"bits": 8, "without_pair": "explicit"}})
    stored = made.stored["layer2"]
    assert stored.input_scale is not None
    torch.testing.assert_close(stored.input_scale, scales[4].repeat_interleave(4))
    assert reasons(result)["layer2"].startswith("its scale stays explicit on its input: ")
    torch.testing.assert_close(weight_of(made, "layer2"), weight_of(graph, "layer2"), rtol=0.1, atol=0.1)
    inputs = small_graphs.inputs(graph)
    torch.testing.assert_close(made.run(inputs), graph.run(inputs), rtol=0.05, atol=0.05)


def test_what_a_layer_with_an_explicit_scale_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs divided by the scale, whether they come from the original or from the compressed layers before it."""
    graph = chain((3, 6, 6), nn.Conv2d(3, 4, 3), "sigmoid.default", nn.Conv2d(4, 5, 2))
    factor = torch.tensor([2.0, 1, 3, 0.25]).repeat_interleave(4)
    shown: list[Tensor] = []

    def scale(config: Any, group: Group, seen: Statistics) -> tuple[Tensor, dict[str, Any]]:
        return factor if len(seen.matrix) == len(factor) else torch.ones(len(seen.matrix)), {}

    def apply(config: Any, layer: Layer, seen: Statistics) -> Outcome:
        if len(seen.matrix) == len(factor):
            shown.append(seen.matrix)
        return Outcome(layer.weight)

    monkeypatch.setattr(awq.AWQ, "scale", scale)
    monkeypatch.setattr(awq.AWQ, "apply", apply)
    for inputs in ("original", "compressed"):
        for choice in ("unscaled", "explicit"):
            sweep(graph, tmp_path, {"awq": {"without_pair": choice}}, inputs=inputs)
        plain, divided = shown[-2:]
        torch.testing.assert_close(divided, plain / factor / factor[:, None])


def test_a_compressed_network_is_taken_again(tmp_path: Path) -> None:
    """What is left alone keeps its bytes; what is taken is rounded from what it stands for now."""
    graph = small_graphs.separable()
    first, _ = sweep(graph, tmp_path, {"linear": {"bits": 8}})
    second, result = sweep(first, tmp_path, {"linear": {"bits": 3, "ignore": ["layer0"]}})
    rows = {row.name: row for row in result.ledger}
    assert (rows["layer0"].format, rows["layer0"].status) == ("int8 channel asym", "kept")
    torch.testing.assert_close(second.stored["layer0"].codes, first.stored["layer0"].codes, rtol=0, atol=0)
    expected = nearest(weight_of(first, "layer4").flatten(1), Affine(3, "channel"), torch.float32)
    torch.testing.assert_close(weight_of(second, "layer4").flatten(1), expected)


def test_passes_over_the_whole_graph(tmp_path: Path) -> None:
    """Fold, equalize, round, correct the biases: each reads what the one before it wrote."""
    graph = small_graphs.residual()
    folded, result = sweep(graph, tmp_path, "fold")
    rows = {row.name: row for row in result.ledger}
    assert rows["stem"].status == "changed" and rows["stem"].notes == {"folded": ["stem_norm"]}
    assert rows["stem"].parameters == 8 * 27 + 8
    assert (rows["head"].status, rows["head"].notes) == ("kept", {})
    even, result = sweep(folded, tmp_path, "equalize")
    assert {row.name for row in result.ledger if row.status == "changed"} == {"block.a", "block.b"}
    assert {item.layer for item in result.histograms} == {"block.a", "block.b"}
    rounded, _ = sweep(even, tmp_path, {"linear": {"bits": 3}})
    reference = tmp_path / "reference"
    reference.mkdir()
    even.save(reference)
    made, result = sweep(rounded, tmp_path, "bias_correction", reference=reference)
    assert all(row.status == "changed" and row.format == "int3 channel asym" for row in result.ledger)
    inputs = small_graphs.inputs(graph)
    wanted = graph.run(inputs)
    torch.testing.assert_close(even.run(inputs), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.run(inputs).mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)
    for name, packed in rounded.stored.items():
        torch.testing.assert_close(made.stored[name].codes, packed.codes, rtol=0, atol=0)


def test_a_network_is_not_compared_with_itself(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    source = tmp_path / "source"
    source.mkdir()
    graph.save(source)
    step = PassStep.model_validate("bias_correction")
    with pytest.raises(UserError, match="none were"):
        graph_sweep(source, tmp_path, step, lambda: iter([small_graphs.inputs(graph)]), reference=source)


def test_ignored_layers_are_not_for_passes_over_the_whole_graph(tmp_path: Path) -> None:
    _, result = sweep(small_graphs.residual(), tmp_path, {"fold": {"ignore": ["stem"]}})
    rows = {row.name: row for row in result.ledger}
    assert (rows["stem"].status, rows["stem"].reason) == ("kept", "ignored by 'stem'")
    assert result.remarks == ["stem_norm stays: stem is ignored"]


def test_an_integer_network(tmp_path: Path) -> None:
    graph, _ = sweep(small_graphs.residual(), tmp_path, "fold")
    source, target = tmp_path / "folded", tmp_path / "integer"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    result = graph_sweep(source, target, prepared("int8"), small_graphs.batches(graph))
    assert (target / "integer.json").is_file() and not (target / "graph.json").exists()
    assert [row.name for row in result.ledger] == ["stem", "block.a", "block.b", "head"]
    for row in result.ledger:
        assert (row.format, row.status) == ("int8 channel sym", "compressed")
        assert row.weight_error is not None and row.weight_error < 1e-3
        assert row.nbytes == math.prod(row.shape) + 5 * row.shape[0]
    assert result.activations


def test_an_integer_network_of_unfolded_layers_tells_no_error(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    source, target = tmp_path / "source", tmp_path / "integer"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    result = graph_sweep(source, target, prepared("int8"), small_graphs.batches(graph))
    errors = {row.name: row.weight_error for row in result.ledger}
    assert errors["stem"] is None
    assert errors["head"] is not None


def test_embeddings_and_other_matrices_stand_in_the_ledger(tmp_path: Path) -> None:
    builder = Builder()
    positions = builder.tensor("positions", torch.ones(5, 4))
    node = builder.call("aten.add.Tensor", builder.input(), positions)
    graph = builder.finish(
        builder.module("out", small_graphs.seeded(nn.Linear(4, 2), 0), node), Facts(origin="test", shape=(5, 4))
    )
    made, result = sweep(graph, tmp_path, LINEAR)
    assert [(row.name, row.kind, row.nbytes) for row in result.ledger][1:] == [("positions", "embedding", 80)]
    assert result.ledger[0].macs == 8 * 5
    assert made.weights() == graph.weights()


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_progress_rises_to_the_end(inputs: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    sweep(small_graphs.separable(), tmp_path, ADAROUND, inputs=inputs, progress=lambda *at: told.append(at))
    assert told[-1] == (4, 4)
    assert told == sorted(told)


def test_weights_that_are_no_numbers_name_the_layer(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    graph.set_bias("layer4", torch.full((10,), torch.inf))
    with pytest.raises(NumericsError, match=r"layer4\.bias holds NaN or infinity"):
        sweep(graph, tmp_path, LINEAR)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_activations_that_are_no_numbers_name_the_layer(inputs: Any, tmp_path: Path) -> None:
    graph = chain((3,), nn.Linear(3, 4), ("mul.Tensor", 1e30), ("mul.Tensor", 1e30), nn.Linear(4, 2))
    with pytest.raises(NumericsError, match="the inputs of layer3 are NaN or infinite"):
        sweep(graph, tmp_path, ADAROUND, inputs=inputs)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_calibration_that_is_empty(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no calibration input reached layer0"):
        sweep(small_graphs.separable(), tmp_path, ADAROUND, count=0, inputs=inputs)


def test_calibration_that_is_missing(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    graph.save(tmp_path)
    with pytest.raises(DataError, match="adaround looks at the inputs of the layers"):
        graph_sweep(tmp_path, tmp_path, prepared(ADAROUND))
    with pytest.raises(UserError, match="none were"):
        graph_sweep(tmp_path, tmp_path, prepared("bias_correction"), small_graphs.batches(graph))
    with pytest.raises(SelectionError, match="matches no layer"):
        graph_sweep(tmp_path, tmp_path, prepared({"linear": {"ignore": ["layer9"]}}))


def test_nothing_is_read_of_calibration_that_no_pass_needs(tmp_path: Path) -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    small_graphs.separable().save(source)
    assert prepared(LINEAR).config.needs is Needs.NOTHING
    graph_sweep(source, target, prepared(LINEAR), batches)
    graph_sweep(source, target, prepared("fold"), batches)


@pytest.mark.parametrize("format", [Affine(4, "channel"), Affine(3, "group", 4, True), Affine(8, "tensor")], ids=str)
def test_outcomes_of_groups_are_joined(format: Affine) -> None:
    parts = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    packed = [encode(part, *extremes(part, format), format, torch.float32) for part in parts]
    outcomes = [Outcome(weight, {"gain": k, "name": "x", "own": str(k)}) for k, weight in enumerate(packed)]
    joined = Outcome.joined(outcomes)
    assert isinstance(joined.weight, AffineWeight)
    torch.testing.assert_close(joined.weight.dequantize(), torch.cat([weight.dequantize() for weight in packed]))
    assert joined.weight.format.strategy == ("channel" if format.strategy == "tensor" else format.strategy)
    assert joined.notes == {"gain": 1, "name": "x"}
    again = unpack(joined.weight.format, joined.weight.pack())
    torch.testing.assert_close(again.dequantize(), joined.weight.dequantize())
    dense = Outcome.joined([Outcome(parts[0]), Outcome(packed[1])])
    assert isinstance(dense.weight, Tensor) and dense.weight.shape == (4, 8)


@pytest.mark.slow
def test_four_bits_on_a_real_network(asset: Callable[[str], Path], tmp_path: Path) -> None:
    """ResNet-20, every layer at 4 bits: learned rounding loses less than one point on 2,000 test images."""
    data = np.load(asset("cifar10_jpeg") / "test.npz")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (torch.from_numpy(data["images"][:2512]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    labels = torch.from_numpy(data["labels"][512:2512]).long()

    def accuracy(graph: Graph) -> float:
        found = torch.cat([graph.run(batch).argmax(1) for batch in images[512:].split(500)])
        return float((found == labels).float().mean())

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    graph, _ = sweep(importers.read(asset("cifar10_resnet20_jpegft")), tmp_path, "fold")
    graph.save(source)
    graph_sweep(source, target, prepared("adaround"), lambda: iter(images[:512].split(64)))
    assert accuracy(Graph.read(target)) > accuracy(graph) - 0.01


def without_known(compress: Callable[..., Any], *given: Any, known: Any, **named: Any) -> Any:
    return compress(*given, **named)


def test_what_ranks_channels_restores_their_readers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are observed once, and what is written is what two observations give."""
    graph = small_graphs.residual()
    written = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(sweeping, "_compress", partial(without_known, sweeping._compress))
        source, target = tmp_path / f"source{known}", tmp_path / f"target{known}"
        for folder in (source, target):
            folder.mkdir()
        graph.save(source)
        inputs = torch.randn(6, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
        calls = 0

        def batches(inputs: Tensor = inputs) -> Iterator[Tensor]:
            nonlocal calls
            calls += 1
            yield from inputs.split(3)

        step = PassStep.model_validate({"channels": {"ratio": 0.5}})
        graph_sweep(source, target, step, batches)
        assert calls == (1 if known else 2)
        written.append((target / WEIGHTS_NAME).read_bytes())
    assert written[0] == written[1]
