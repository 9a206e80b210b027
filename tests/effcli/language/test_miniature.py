"""A network with a few of its blocks, of which each stands for others of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import make

from effcli.errors import UnsupportedError
from effcli.language import miniature
from effcli.language.miniature import shares_of, shortened
from effcli.language.weights import open_weights
from effcli.run import pipeline
from effcli.run import recipe as recipes


def pass_through(source: Path, step: str, target: Path) -> None:
    pipeline.run(recipes.from_arguments(str(source), passes=step, output=str(target), no_eval=True))


@pytest.mark.parametrize(
    ("kinds", "shares"),
    [
        ("a", [1]),
        ("aa", [1, 1]),
        ("aaaaaa", [1, 5]),
        # One of each kind; the first of a kind of which there is another counts for itself.
        ("abbbb", [1, 4]),
        ("aab", [1, 1, 1]),
        ("aaabaaabaaab", [1, 4, 4, 3]),
    ],
)
def test_shares(kinds: str, shares: list[float]) -> None:
    assert shares_of(kinds) == shares
    assert sum(shares) == len(kinds)


def test_a_config_is_shortened_wherever_it_speaks_of_blocks() -> None:
    config = {
        "num_hidden_layers": 4,
        "hidden_size": 4,
        "layer_types": ["a", "b", "a", "b"],
        "text_config": {"num_hidden_layers": 4, "sizes": [1, 2, 3]},
        "vision_config": {"num_hidden_layers": 6},
    }
    assert shortened(config, "num_hidden_layers", 4, 2) == {
        "num_hidden_layers": 2,
        "hidden_size": 4,
        "layer_types": ["a", "b"],
        "text_config": {"num_hidden_layers": 2, "sizes": [1, 2, 3]},
        "vision_config": {"num_hidden_layers": 6},
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom", "opt"])
def test_the_first_blocks_are_those_of_the_network(family: str, tmp_path: Path) -> None:
    key = {"gpt2": "n_layer", "bloom": "n_layer"}.get(family, "num_hidden_layers")
    source = make(family, tmp_path / "whole", **{key: 5})
    shares = miniature.write(source, tmp_path / "few")
    before, after = open_weights(source), open_weights(tmp_path / "few")
    path = before.skeleton.block_path
    assert shares == {f"{path}.0": 1, f"{path}.1": 4}
    assert after.skeleton.block_names == [f"{path}.0", f"{path}.1"]
    assert after.unused() == []
    for name in after.skeleton.parameters():
        assert torch.equal(before.parameter(name), after.parameter(name))


def test_a_packed_network(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "whole", num_hidden_layers=4)
    pass_through(source, "linear:group_size=32", tmp_path / "o")
    assert len(miniature.write(tmp_path / "o", tmp_path / "few")) == 2
    assert {name.split(".")[2] for name in open_weights(tmp_path / "few").stored} == {"0", "1"}


def test_what_does_not_say_how_many_blocks_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama", tmp_path / "whole", num_hidden_layers=4)
    monkeypatch.setattr(miniature, "shortened", lambda config, *given: config)
    with pytest.raises(UnsupportedError, match="does not say"):
        miniature.write(source, tmp_path / "few")


def test_the_layout_of_effcli(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "whole")
    pass_through(source, "kmeans:bits=2", tmp_path / "o")
    assert "effcli" in json.loads((tmp_path / "o" / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="own layout"):
        miniature.write(tmp_path / "o", tmp_path / "few")
