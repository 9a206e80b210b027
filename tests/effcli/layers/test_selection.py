"""Which layers a pass takes: patterns that must match, group sizes that must divide, reasons for the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs

from effcli.errors import SelectionError, UnsupportedError
from effcli.files.checkpoint import Checkpoint
from effcli.graphs.graph import Graph
from effcli.language.skeleton import Skeleton
from effcli.layers.contract import Needs, NetworkPass, Transformed
from effcli.layers.selection import Choice, choose
from effcli.run.recipe import PassStep


def make_skeleton(folder: Path, name: str = "llama", **changes: Any) -> Skeleton:
    architectures.make(name, folder, **changes)
    return Skeleton(folder, Checkpoint.open(folder).config)


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return make_skeleton(tmp_path_factory.mktemp("llama"))


def chosen(skeleton: Skeleton, **options: Any) -> dict[str, Choice]:
    return choose(skeleton, PassStep.model_validate({"linear": options}))


def test_every_layer_is_there_with_options_or_a_reason(skeleton: Skeleton) -> None:
    choices = chosen(skeleton)
    assert len(choices) == 2 * 7 + 1
    assert [name for name, choice in choices.items() if choice.config is None] == ["lm_head"]
    assert choices["lm_head"].reason == "the output head is kept unless lm_head is set"
    assert all(bool(choice.reason) == (choice.config is None) for choice in choices.values())


def test_a_tied_head_says_so(tmp_path: Path) -> None:
    reason = chosen(make_skeleton(tmp_path, tie_word_embeddings=True))["lm_head"].reason
    assert "shares its weight with the input embedding" in reason


def test_the_head_on_request(skeleton: Skeleton) -> None:
    assert chosen(skeleton, lm_head=True)["lm_head"].config is not None
    assert chosen(skeleton, lm_head=True, ignore=["lm_head"])["lm_head"].reason == "ignored by 'lm_head'"


def test_projections_around_the_stack_are_left_alone(tmp_path: Path) -> None:
    choices = chosen(make_skeleton(tmp_path, "opt", word_embed_proj_dim=32), group_size=32)
    assert choices["model.decoder.project_in"].reason == "outside the repeated blocks"


def test_options_of_single_layers_the_last_match_wins(skeleton: Skeleton) -> None:
    layers = {"*.down_proj": {"bits": 8}, "model.layers.1.*": {"bits": 3, "symmetric": True}}
    choices = chosen(skeleton, bits=4, layers=layers)

    def bits(name: str) -> tuple[int, bool]:
        config: Any = choices[f"model.layers.{name}"].config
        return config.bits, config.symmetric

    assert bits("0.mlp.up_proj") == (4, False)
    assert bits("0.mlp.down_proj") == (8, False)
    assert bits("1.mlp.down_proj") == (3, True)


def test_ignored_layers_name_their_pattern(skeleton: Skeleton) -> None:
    choices = chosen(skeleton, ignore=["*.q_proj", "*layers.1*"])
    assert choices["model.layers.0.self_attn.q_proj"].reason == "ignored by '*.q_proj'"
    assert choices["model.layers.1.mlp.up_proj"].reason == "ignored by '*layers.1*'"
    assert choices["model.layers.0.mlp.up_proj"].config is not None


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("down_proj", "write '*.down_proj'"),
        ("*.down_prj", "'down_proj'"),
        ("*.mlp.dwn_proj", "'down_proj'"),
        ("model.layers.7.mlp.down_proj", "'*.down_proj'"),
        ("*.fc1", "known: down_proj, gate_proj"),
        ("", "known:"),
        ("[", "known:"),
    ],
)
@pytest.mark.parametrize("key", ["ignore", "layers"])
def test_a_pattern_that_matches_nothing_lists_near_names(
    pattern: str, remedy: str, key: str, skeleton: Skeleton
) -> None:
    with pytest.raises(SelectionError) as caught:
        chosen(skeleton, **{key: [pattern] if key == "ignore" else {pattern: {"bits": 3}}})
    assert caught.value.cause == f"linear.{key}: the pattern {pattern!r} matches no layer"
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers": {"lm_head": {"bits": 8}}}, "the output head is kept unless lm_head is set"),
        ({"layers": {"*.up_proj": {"bits": 8}}, "ignore": ["*.up_proj"]}, "ignored by '*.up_proj'"),
    ],
)
def test_options_for_layers_that_are_left_alone(options: dict[str, Any], reason: str, skeleton: Skeleton) -> None:
    """The entry would change nothing: that is not done in silence."""
    with pytest.raises(SelectionError, match="matches only layers that are left alone") as caught:
        chosen(skeleton, **options)
    assert reason in caught.value.remedy


def test_nothing_left_to_do(skeleton: Skeleton) -> None:
    with pytest.raises(SelectionError, match="would take no layer at all"):
        chosen(skeleton, ignore=["*"])


@pytest.mark.parametrize(("size", "sizes"), [(48, "16, 32, 64"), (65, "16, 32, 64"), (7, "8, 16, 32"), (128, "32, 64")])
def test_a_group_size_that_divides_nothing_lists_those_that_do(size: int, sizes: str, skeleton: Skeleton) -> None:
    with pytest.raises(SelectionError) as caught:
        chosen(skeleton, group_size=size)
    assert f"group size {size} does not divide the input channels of model.layers.0.self_attn.q_proj (64)" in (
        caught.value.cause
    )
    assert caught.value.remedy.startswith("group sizes that divide every layer: ")
    listed = [int(word) for word in caught.value.remedy.rpartition(": ")[2].split(", ")]
    assert all(64 % n == 0 and 128 % n == 0 for n in listed)
    assert sizes in caught.value.remedy


def test_widths_that_are_no_multiple_of_eight(tmp_path: Path) -> None:
    """60 and 90 input channels: 30 divides both."""
    skeleton = make_skeleton(tmp_path, hidden_size=60, intermediate_size=90, num_attention_heads=2, head_dim=30)
    with pytest.raises(SelectionError) as caught:
        chosen(skeleton, group_size=64)
    assert "30" in caught.value.remedy
    assert math.gcd(60, 90) == 30
    assert chosen(skeleton, group_size=30)


def test_no_common_group_size(tmp_path: Path) -> None:
    skeleton = make_skeleton(tmp_path, intermediate_size=67)
    with pytest.raises(SelectionError) as caught:
        chosen(skeleton, group_size=64)
    assert caught.value.cause.endswith("model.layers.0.mlp.down_proj (67), model.layers.1.mlp.down_proj (67)")
    assert caught.value.remedy == "give those layers another group_size under `layers`, or `ignore` them"
    assert chosen(skeleton, group_size=64, ignore=["*.down_proj"])
    assert chosen(skeleton, group_size=64, layers={"*.down_proj": {"granularity": "channel"}})


def chosen_of_graph(graph: Graph, **options: Any) -> dict[str, Choice]:
    return choose(graph, PassStep.model_validate({"linear": options}).for_graph())


def test_every_layer_of_a_graph_is_taken_unless_ignored() -> None:
    choices = chosen_of_graph(small_graphs.separable(), ignore=["layer2"])
    assert list(choices) == ["layer0", "layer2", "layer4", "layer7"]
    assert choices["layer2"].reason == "ignored by 'layer2'"
    assert [name for name, choice in choices.items() if choice.config is None] == ["layer2"]


def test_defaults_of_graphs_and_groups_on_request() -> None:
    graph = small_graphs.separable()

    def formats(**options: Any) -> list[str]:
        choices = chosen_of_graph(graph, **options).values()
        return [str(getattr(choice.config, "format", None)) for choice in choices]

    assert formats() == ["int8 channel asym"] * 4
    assert formats(granularity="tensor") == ["int8 tensor asym"] * 4
    assert formats(granularity="group", ignore=["layer0", "layer2", "layer4"], group_size=32)[3] == "int8 g32 asym"
    grouped = formats(layers={"layer7": {"group_size": 16}})
    assert grouped == ["int8 channel asym"] * 3 + ["int8 g16 asym"]


def test_a_group_size_for_all_layers_of_a_graph_must_divide_them() -> None:
    with pytest.raises(SelectionError, match=r"group size 9 does not divide the input channels of layer4 \(6\)"):
        chosen_of_graph(small_graphs.separable(), group_size=9)
    choices = chosen_of_graph(small_graphs.separable(), group_size=9, ignore=["layer4", "layer7"])
    config: Any = choices["layer0"].config
    assert str(config.format) == "int8 g9 asym"


@pytest.mark.parametrize("key", ["ignore", "layers"])
def test_a_pattern_that_matches_no_layer_of_a_graph(key: str) -> None:
    with pytest.raises(SelectionError) as caught:
        chosen_of_graph(small_graphs.residual(), **{key: ["*.aa"] if key == "ignore" else {"*.aa": {"bits": 3}}})
    assert caught.value.cause == f"linear.{key}: the pattern '*.aa' matches no layer"
    assert caught.value.remedy == "did you mean 'a'?"


def test_a_graph_has_no_output_head() -> None:
    with pytest.raises(SelectionError, match="has no language model's output head") as caught:
        chosen_of_graph(small_graphs.separable(), lm_head=True)
    assert "leave lm_head out" in caught.value.remedy


def test_a_graph_without_layers() -> None:
    with pytest.raises(SelectionError, match="would take no layer at all") as caught:
        chosen_of_graph(small_graphs.chain((3,), "relu.default"))
    assert caught.value.remedy == "the network has no convolution and no linear layer"


class Whole(NetworkPass):
    """Leaves the graph as it is. asks: for what."""

    asks: int

    @property
    def needs(self) -> Needs:
        return Needs(self.asks)

    def transform(self, graph: Graph, seen: Any) -> Transformed:
        return Transformed(graph)


@pytest.mark.parametrize("needs", [Needs.GRADIENTS | Needs.NORMS, Needs.INPUTS | Needs.GRAM, Needs.SQUARED_GRADIENTS])
def test_a_pass_over_a_whole_graph_is_given_no_statistics_of_layers(needs: Needs) -> None:
    with pytest.raises(UnsupportedError, match="asks for statistics of single layers"):
        choose(small_graphs.separable(), PassStep(name="whole", config=Whole(asks=needs.value)))
    given = Needs.INPUTS | Needs.DENSE
    assert choose(small_graphs.separable(), PassStep(name="whole", config=Whole(asks=given.value)))
