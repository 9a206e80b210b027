"""Which layers a pass takes: patterns that must match, group sizes that must divide, reasons for the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import architectures
import pytest

from effcli.checkpoint import Checkpoint
from effcli.errors import SelectionError
from effcli.recipe import PassStep
from effcli.selection import Choice, choose
from effcli.skeleton import Skeleton


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
