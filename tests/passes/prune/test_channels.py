"""The `channels` pass: which channels go, by hand and by their criteria, in both kinds of networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from coupled_cuts import zero
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from effcli.errors import SelectionError, UserError
from effcli.graphs.coupling import coupled
from effcli.graphs.graph import Facts, Graph
from effcli.graphs.plan import PlannedGraph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.options import Calibration
from effcli.inputs.text import Windows
from effcli.language.cutting import cut_model
from effcli.language.plan import PlannedModel
from effcli.language.weights import open_weights
from effcli.layers.coupling import Cut
from effcli.layers.result import PassResult
from effcli.layers.selection import choose
from effcli.passes.prune.channels import Channels, ranked
from effcli.run.recipe import PassStep


def step(**options: Any) -> PassStep:
    return PassStep.model_validate({"channels": {"restore": False, **options}})


def cut_graph(graph: Graph, folder: Path, **options: Any) -> tuple[Graph, PassResult]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    labels = torch.arange(12) % 5
    result = graph_sweep(
        source,
        target,
        step(**options),
        small_graphs.batches(graph),
        labelled=lambda: iter([(small_graphs.inputs(graph), labels)]),
    )
    return Graph.read(target), result


def cut_language(source: Path, folder: Path, **options: Any) -> tuple[Path, PassResult]:
    target = folder / "target"
    target.mkdir()
    ids = torch.randint(architectures.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    return target, cut_model(source, target, step(**options), Windows([ids], "original"), folder / "work")


def plan_graph(graph: Graph, **options: Any) -> None:
    planned = PlannedGraph(graph, Calibration())
    made = step(**options)
    planned.take(made, choose(planned.layered(made), made))


def two_layers() -> Graph:
    """Three hidden channels whose squares with all that goes with them sum up to 3, 14 and 30."""
    graph = small_graphs.chain((1,), nn.Linear(1, 3), "relu.default", nn.Linear(3, 2))
    tensors = graph.module.state_dict()
    with torch.no_grad():
        tensors["layer0.weight"].copy_(torch.tensor([[1.0], [1.0], [5.0]]))
        tensors["layer0.bias"].copy_(torch.tensor([1.0, 2.0, 0.0]))
        tensors["layer2.weight"].copy_(torch.tensor([[1.0, 3.0, 1.0], [0.0, 0.0, 2.0]]))
    return graph


def test_magnitude_by_hand(tmp_path: Path) -> None:
    graph = two_layers()
    made, result = cut_graph(graph, tmp_path, ratio=0.3)
    assert made.module.state_dict()["layer0.weight"].tolist() == [[1.0], [5.0]]
    assert made.module.state_dict()["layer2.weight"].tolist() == [[3.0, 1.0], [0.0, 2.0]]
    rows = {row.name: row for row in result.ledger}
    assert rows["layer0"].notes == {"shape_before": [3, 1], "outputs_removed": "0"}
    assert rows["layer2"].notes == {"shape_before": [2, 3], "inputs_removed": "0"}


def test_batch_norms_tell_what_goes(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    tensors = graph.module.state_dict()
    made, _ = cut_graph(graph, tmp_path, ratio=0.5, criterion="batchnorm")
    scores = tensors["block.a_norm.weight"].abs()
    wanted = sorted(scores.topk(4).indices.tolist())
    together = tensors["stem_norm.weight"].abs() + tensors["block.b_norm.weight"].abs()
    stem = sorted(together.topk(4).indices.tolist())
    assert_close(made.module.state_dict()["block.a_norm.weight"], tensors["block.a_norm.weight"][wanted])
    assert_close(made.module.state_dict()["stem_norm.weight"], tensors["stem_norm.weight"][stem])


@pytest.mark.parametrize("criterion", ["magnitude", "batchnorm"])
def test_what_is_left_computes_what_was_with_zeros(criterion: str, tmp_path: Path) -> None:
    graph = small_graphs.residual()
    made, _ = cut_graph(graph, tmp_path, ratio=0.4, criterion=criterion)
    silent = graph.copy()
    cuts = []
    for group in coupled(graph):
        if not group.reason:
            left = made.module.state_dict()[f"{group.name}.weight"]
            before = graph.module.state_dict()[f"{group.name}_norm.weight"]
            after = made.module.state_dict()[f"{group.name}_norm.weight"]
            kept = torch.isin(before, after)
            assert int(kept.sum()) == len(left) == 5
            cuts.append(Cut(group, kept))
    zero(silent.module.state_dict(), cuts)
    inputs = small_graphs.inputs(graph)
    assert_close(made.run(inputs), silent.run(inputs), rtol=1e-4, atol=1e-5)


CRITERIA = ("magnitude", "batchnorm", "apoz", "taylor", "taylor_squared", "lasso", "reconstruction")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_on_a_graph(criterion: str, tmp_path: Path) -> None:
    graph = small_graphs.residual()
    with torch.no_grad():
        # Channel 3 of block.a is dead: its norm gives 0, which a ReLU passes on.
        graph.module.state_dict()["block.a_norm.weight"][3] = 0
        graph.module.state_dict()["block.a_norm.bias"][3] = 0
        if criterion == "magnitude":
            for name, axis in (("block.a.weight", 0), ("block.b.weight", 1)):
                graph.module.state_dict()[name].select(axis, 3).zero_()
    made, result = cut_graph(graph, tmp_path, ratio=0.25, criterion=criterion, restore=True)
    (row,) = (row for row in result.ledger if row.name == "block.a")
    assert row.shape == (6, 54) and "3" in str(row.notes["outputs_removed"]).replace("-", ", ").split(", ")
    assert made.weights() < graph.weights()


@pytest.mark.parametrize("criterion", ["taylor", "taylor_squared", "lasso", "reconstruction"])
def test_every_criterion_on_a_language_model(criterion: str, llama: Path, tmp_path: Path) -> None:
    target, result = cut_language(llama, tmp_path, ratio=0.5, criterion=criterion, restore=True)
    config = AutoModelForCausalLM.from_pretrained(target).config
    assert (config.num_key_value_heads, config.intermediate_size) == (1, 64)
    errors = [
        (row.output_error, row.notes["unrestored_error"]) for row in result.ledger if "unrestored_error" in row.notes
    ]
    assert len(errors) == 4 and all(found is not None and found < bound for found, bound in errors)


def test_reconstruction_loses_less_than_magnitude(llama: Path, tmp_path: Path) -> None:
    errors = {}
    for criterion in ("magnitude", "lasso", "reconstruction"):
        folder = tmp_path / criterion
        folder.mkdir()
        _, result = cut_language(llama, folder, ratio=0.5, criterion=criterion, restore=True, what="feed_forward")
        errors[criterion] = sum(row.output_error or 0 for row in result.ledger)
    assert errors["reconstruction"] < errors["magnitude"] and errors["reconstruction"] <= errors["lasso"]


def test_zeros_tell_where_a_relu_stands(tmp_path: Path) -> None:
    source = architectures.make("opt", tmp_path / "source")
    target, _ = cut_language(source, tmp_path, ratio=0.5, criterion="apoz")
    assert AutoModelForCausalLM.from_pretrained(target).config.ffn_dim == 64


def test_layers_have_ratios_of_their_own(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    made, _ = cut_graph(graph, tmp_path, ratio=0.25, layers={"block.a": {"ratio": 0.75}})
    assert made.module.state_dict()["block.a.weight"].shape[0] == 2
    assert made.module.state_dict()["stem.weight"].shape[0] == 6


def test_a_group_of_a_language_model_has_the_options_of_its_maker(llama: Path, tmp_path: Path) -> None:
    own = {"*.0.mlp.gate_proj": {"ratio": 0.75}}
    _, result = cut_language(llama, tmp_path, ratio=0.25, what="feed_forward", layers=own)
    width = open_weights(llama).skeleton.config.intermediate_size
    left = {row.name: row.shape[1] for row in result.ledger if row.name.endswith("down_proj")}
    assert list(left.values())[:2] == [width // 4, width * 3 // 4]


@pytest.mark.parametrize(
    ("multiple", "ratio", "width"), [(4, 0.3, 4), (4, 0.25, 8), (3, 0.25, 6), (8, 0.9, 8), (4, 0.0, 8), (3, 0, 8)]
)
def test_widths_are_multiples(multiple: int, ratio: float, width: int, tmp_path: Path) -> None:
    made, _ = cut_graph(small_graphs.residual(), tmp_path, ratio=ratio, multiple_of=multiple)
    assert made.module.state_dict()["stem.weight"].shape[0] == width


def test_one_ranking_by_hand() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.3, 0.4]), torch.tensor([0.05])]
    assert ranked(scores, [1, 1, 1], 0.5) == [1, 1, 1]
    assert ranked(scores, [1, 1, 1], 0.34) == [1, 2, 1]
    assert ranked(scores, [3, 1, 1], 0.5) == [3, 1, 1]
    assert ranked(scores, [1, 1, 1], 0) == [3, 2, 1]
    assert ranked(scores, [1, 1, 1], 0.99) == [1, 1, 1]


def test_one_ranking_takes_from_where_it_costs_least(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    with torch.no_grad():
        graph.module.state_dict()["block.a_norm.weight"].mul_(1e-3)
    made, _ = cut_graph(graph, tmp_path, ratio=0.4, criterion="batchnorm", ranking="network")
    assert made.module.state_dict()["block.a.weight"].shape[0] == 2
    assert made.module.state_dict()["stem.weight"].shape[0] == 8


def test_groups_that_stay_whole_are_told(tmp_path: Path) -> None:
    own = {"block.a": {"multiple_of": 8}}
    _, result = cut_graph(small_graphs.residual(), tmp_path, ratio=0.4, ranking="network", layers=own)
    assert "nothing is cut of block.a" in result.remarks


def plain() -> Graph:
    return small_graphs.chain((4,), nn.Linear(4, 6), "relu.default", nn.Linear(6, 3))


def image_to_image() -> Graph:
    return small_graphs.chain((3, 6, 6), nn.Conv2d(3, 4, 3, padding=1), "relu.default", nn.Conv2d(4, 3, 1))


@pytest.mark.parametrize(
    ("graph", "options", "said"),
    [
        (two_layers, {"ratio": 0.9}, "would leave nothing of the 3 channels of layer0"),
        (small_graphs.residual, {"multiple_of": 16}, "stem has 8 channels, fewer than multiple_of=16"),
        (plain, {"criterion": "batchnorm"}, "layer0 pass no batch norm"),
        (plain, {"layers": {"layer2": {"ratio": 0.5}}}, "'layer2' matches no layer that is the first to make"),
        (plain, {"what": "heads"}, "channels finds no channels that can be cut"),
        (
            small_graphs.residual,
            {"ranking": "network", "layers": {"block.a": {"ratio": 0.5}}},
            "block.a has a ratio of its own",
        ),
        (plain, {"ranking": "network", "criterion": "lasso"}, "lasso compares the channels of one group"),
        (image_to_image, {"criterion": "taylor"}, "gradients need a loss"),
    ],
)
def test_bad_input_is_refused_in_the_plan(graph: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        plan_graph(graph(), **options)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"restore": True}, {"restore": True, "criterion": "reconstruction"}),
        ({"restore": True, "ranking": "network"}, {"restore": True, "ranking": "network", "criterion": "magnitude"}),
        ({}, {"criterion": "magnitude"}),
    ],
)
def test_the_criterion_where_none_is_asked_for(options: dict[str, Any], same: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for name, own in (("a", options), ("b", same)):
        (tmp_path / name).mkdir()
        found.append(cut_graph(small_graphs.residual(), tmp_path / name, ratio=0.4, **own)[0].module.state_dict())
    for mine, theirs in zip(*(each.values() for each in found), strict=True):
        assert torch.equal(mine, theirs)
    assert step(**options).needs == step(**same).needs


def test_another_criterion_than_usual_is_told(tmp_path: Path) -> None:
    """The layer behind reads the first two of four channels twice, which `reconstruction` does not allow."""
    builder = small_graphs.Builder()
    made = builder.module("first", small_graphs.seeded(nn.Linear(3, 4), 0), builder.input())
    twice = builder.call("aten.cat.default", [made, builder.call("aten.slice.Tensor", made, 1, 0, 2)], 1)
    last = builder.module("last", small_graphs.seeded(nn.Linear(6, 2), 1), twice)
    graph = builder.finish(last, Facts(origin="test", shape=(3,)))
    _, result = cut_graph(graph, tmp_path, restore=True)
    (told,) = (remark for remark in result.remarks if "by magnitude, not reconstruction: last reads" in remark)
    assert told.startswith("first is cut")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_are_shares(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        Channels(ratio=ratio)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize(
    ("what", "changed"),
    [("heads", {"num_attention_heads": 2, "num_key_value_heads": 1}), ("feed_forward", {"intermediate_size": 64})],
)
def test_language_models_lose_one_kind_and_stay_stock(
    what: str, changed: dict[str, int], llama: Path, tmp_path: Path
) -> None:
    target, _ = cut_language(llama, tmp_path, ratio=0.5, what=what)
    network = AutoModelForCausalLM.from_pretrained(target)
    before = AutoModelForCausalLM.from_pretrained(llama).config
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers"):
        assert getattr(network.config, key) == changed.get(key, getattr(before, key))


def test_a_language_model_is_refused_in_the_plan(llama: Path) -> None:
    planned = PlannedModel(open_weights(llama), Calibration())
    made = step(ratio=0.8)
    with pytest.raises(SelectionError, match=r"nothing of the 2 heads of model.layers.0 attention heads"):
        planned.take(made, choose(planned.layered(made), made))
    made = step(criterion="batchnorm", what="feed_forward")
    with pytest.raises(SelectionError, match="pass no batch norm"):
        planned.take(made, choose(planned.layered(made), made))


def test_experts_are_read_by_nothing(tmp_path: Path) -> None:
    planned = PlannedModel(open_weights(architectures.make("mixtral", tmp_path / "source")), Calibration())
    made = step(criterion="reconstruction")
    with pytest.raises(SelectionError, match="no layer reads the experts of"):
        planned.take(made, choose(planned.layered(made), made))


def test_heads_are_not_rounded(llama: Path, tmp_path: Path) -> None:
    target, _ = cut_language(llama, tmp_path, ratio=0.5, multiple_of=48)
    config = AutoModelForCausalLM.from_pretrained(target).config
    assert config.num_key_value_heads == 1 and config.intermediate_size == 48
