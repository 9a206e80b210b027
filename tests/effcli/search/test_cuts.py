"""What it costs to cut groups: held against the network with their channels at zero, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import small_graphs
import torch
from torch import nn

from effcli.errors import UnsupportedError
from effcli.graphs.coupling import coupled
from effcli.graphs.cutting import look_at
from effcli.graphs.graph import Facts, Graph
from effcli.graphs.sensitivity import PricedGraph
from effcli.inputs.images import open_inputs
from effcli.inputs.preprocess import Preprocess
from effcli.inputs.text import Windows
from effcli.language.sensitivity import PricedLanguageModel
from effcli.language.weights import open_weights
from effcli.layers.cutting import decide, offer
from effcli.layers.selection import choose
from effcli.reports.sensitivity import LayerCosts, Way
from effcli.run.recipe import PassStep
from effcli.search.cuts import group_costs


def steps(*ratios: float, **options: object) -> list[PassStep]:
    return [PassStep.model_validate({"channels": {"ratio": ratio, **options}}) for ratio in ratios]


def costs(graph: Graph, folder: Path, way: Way, tried: Sequence[PassStep]) -> dict[str, LayerCosts]:
    np.savez(folder / "inputs.npz", images=small_graphs.inputs(graph, 64).numpy())
    graph.save(folder)
    data = open_inputs(folder / "inputs.npz", graph.facts.shape, Preprocess())
    found = group_costs(PricedGraph(folder, data, 16), tried, "ratio", way, folder)
    return {layer.name: layer for layer in found}


def divergence(graph: Graph, changed: Graph) -> float:
    """KL(original ‖ changed) for the calibration inputs."""
    inputs = small_graphs.inputs(graph, 64)
    before, after = (own.run(inputs).double().log_softmax(1) for own in (graph, changed))
    return float((before.exp() * (before - after)).sum(1).mean())


def test_what_is_left_by_hand(tmp_path: Path) -> None:
    """Of four channels the first two have the largest weights: 3 weights and a bias make each, 5 weights read it."""
    graph = small_graphs.chain((3,), nn.Linear(3, 4), "relu.default", nn.Linear(4, 5))
    with torch.no_grad():
        graph.layer("layer0").weight[:2] *= 100  # type: ignore[operator]
    found = costs(graph, tmp_path, "gram", steps(0.0, 0.5, restore=False, criterion="magnitude"))
    (group,) = found.values()
    assert (group.name, group.kind, group.shape) == ("layer0", "channels", (4, 9))
    whole, half = group.options
    assert (whole.value, whole.format, whole.nbytes, whole.macs) == (0.0, "4 of 4", 4 * 4 * 9, 4 * 8)
    assert (half.value, half.format, half.nbytes, half.macs) == (0.5, "2 of 4", 4 * 2 * 9, 2 * 8)
    assert whole.cost == whole.output_error == 0
    hidden = graph.layer("layer0")(small_graphs.inputs(graph, 64)).relu()
    weight = graph.layer("layer2").weight
    assert isinstance(weight, torch.Tensor)
    expected = (hidden[:, 2:] @ weight[:, 2:].T).square().sum() / (hidden @ weight.T).square().sum()
    assert half.cost == half.output_error == pytest.approx(float(expected), rel=1e-4)


def test_a_group_costs_what_its_readers_cost_together(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    tried = steps(0.25, 0.5, restore=False, criterion="magnitude")
    found = costs(graph, tmp_path, "loss", tried)
    assert list(found) == ["stem", "block.a"]
    for at, step in enumerate(tried):
        config: Any = step.config
        offered = offer(step.name, config, coupled(graph), choose(graph, step))
        for cut in decide(config, offered, look_at(graph, offered, lambda: (), lambda: ())).cuts:
            total, readers = 0.0, offered.readers(cut.coupled)
            for member, _ in readers:
                changed = graph.copy()
                changed.module.state_dict()[member.parameter][:, ~cut.kept[member.position]] = 0
                total += divergence(graph, changed)
            assert found[cut.coupled.name].options[at].cost == pytest.approx(total, rel=1e-4)
            assert len(readers) == (2 if cut.coupled.name == "stem" else 1)


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
def test_what_is_restored_costs_less(way: Way, tmp_path: Path) -> None:
    graph = small_graphs.residual()
    found = {}
    for restore in (True, False):
        folder = tmp_path / str(restore)
        folder.mkdir()
        found[restore] = costs(graph, folder, way, steps(0.0, 0.5, restore=restore, criterion="magnitude"))
    for name, plain in found[False].items():
        assert 0 < found[True][name].options[1].cost < plain.options[1].cost
        assert found[True][name].options[0].cost == 0


def test_a_layer_that_reads_two_groups_divides_its_cost(tmp_path: Path) -> None:
    """By the columns that it loses: of 2 + 6 channels with two columns each go 1 and 3."""
    builder = small_graphs.Builder()
    inputs = builder.input()
    left = builder.module("left", small_graphs.seeded(nn.Conv1d(3, 2, 1), 0), inputs)
    right = builder.module("right", small_graphs.seeded(nn.Conv1d(3, 6, 1), 1), inputs)
    both = builder.call("aten.relu.default", builder.call("aten.cat.default", [left, right], 1))
    flat = builder.call("aten.reshape.default", both, [-1, 16])
    graph = builder.finish(
        builder.module("head", small_graphs.seeded(nn.Linear(16, 4), 2), flat), Facts(origin="test", shape=(3, 2))
    )
    found = costs(graph, tmp_path, "gram", steps(0.5, restore=False, criterion="magnitude"))
    (first,), (second,) = (found[name].options for name in ("left", "right"))
    assert 3 * first.cost == pytest.approx(second.cost) and first.output_error == second.output_error
    assert first.cost + second.cost == pytest.approx(first.output_error)


def test_a_layer_that_reads_nothing_of_what_goes_costs_nothing(tmp_path: Path) -> None:
    """`part` reads the first two of four channels, and `whole` all of them: the last two are small and go."""
    builder = small_graphs.Builder()
    made = builder.module("first", small_graphs.seeded(nn.Linear(3, 4), 0), builder.input())
    part = builder.module(
        "part", small_graphs.seeded(nn.Linear(2, 5), 1), builder.call("aten.slice.Tensor", made, 1, 0, 2)
    )
    whole = builder.module("whole", small_graphs.seeded(nn.Linear(4, 5), 2), made)
    graph = builder.finish(builder.call("aten.add.Tensor", part, whole), Facts(origin="test", shape=(3,)))
    with torch.no_grad():
        graph.layer("first").weight[2:] /= 100  # type: ignore[operator]
        graph.layer("whole").weight[:, 2:] /= 100  # type: ignore[index]
    found = costs(graph, tmp_path, "gram", steps(0.0, 0.5, 0.75, criterion="magnitude", restore=False))
    none, half, most = found["first"].options
    assert (none.cost, half.format, most.format) == (0, "2 of 4", "1 of 4")
    assert 0 < half.cost < 1e-3 < most.cost


def test_a_ratio_of_its_own_stays(tmp_path: Path) -> None:
    found = costs(
        small_graphs.residual(), tmp_path, "gram", steps(0.0, 0.25, 0.5, layers={"block.a": {"ratio": 0.125}})
    )
    assert [option.value for option in found["stem"].options] == [0.0, 0.25, 0.5]
    (only,) = found["block.a"].options
    assert (only.value, only.format) == (0.125, "7 of 8") and only.cost > 0


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = torch.randint(architectures.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    return Windows(list(ids.split(1)))


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
def test_groups_of_a_language_model_with_biases(way: Way, windows: Windows, tmp_path: Path) -> None:
    source = architectures.make("opt", tmp_path / "opt")
    priced = PricedLanguageModel(source, windows, (), False)
    found = group_costs(priced, steps(0.0, 0.25, 0.5), "ratio", way, tmp_path)
    assert [layer.kind for layer in found] == ["feed_forward"] * 2
    names = {site.name for site in open_weights(source).skeleton.sites()}
    for layer in found:
        assert layer.name in names and layer.name.endswith("fc1")
        none, quarter, half = layer.options
        assert 0 == none.cost < quarter.cost < half.cost
        assert half.nbytes == none.nbytes / 2 == 2 * layer.shape[0] * layer.shape[1]
        assert half.format == f"{layer.shape[0] // 2} of {layer.shape[0]}"
    assert not (tmp_path / "cuts").exists()


def test_experts_are_read_by_no_layer(windows: Windows, tmp_path: Path) -> None:
    priced = PricedLanguageModel(architectures.make("mixtral", tmp_path / "mixtral"), windows, (), False)
    with pytest.raises(UnsupportedError, match="no layer reads the experts of") as refused:
        group_costs(priced, steps(0.5, what="experts"), "ratio", "gram", tmp_path)
    assert "what=feed_forward" in str(refused.value.remedy)
