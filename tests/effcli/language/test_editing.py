"""A pass over parameters: it goes on after a crash, and leaves what it does not name byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import architectures
import pytest
import torch
from safetensors.torch import load_file

from effcli.errors import NumericsError
from effcli.language.beside import beside
from effcli.language.editing import edit_model
from effcli.language.journal import Journal
from effcli.language.weights import open_weights
from effcli.layers.contract import ParameterPass
from effcli.layers.edits import Edit, Place, slices
from effcli.run.recipe import PassStep


class Double(ParameterPass):
    """Doubles what ends in one of the names."""

    names: tuple[str, ...]
    factor: float = 2.0

    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        edit = Edit(lambda weight: lambda values, rows: values * self.factor)
        return {name: edit for name in places if name.endswith(self.names)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("llama") / "model", torch.bfloat16, num_hidden_layers=3)


def step(*names: str, factor: float = 2.0, ignore: tuple[str, ...] = ()) -> PassStep:
    return PassStep(name="double", config=Double(names=names, factor=factor, ignore=ignore))


def carried_out(source: Path, target: Path, what: PassStep) -> dict[str, torch.Tensor]:
    target.mkdir(exist_ok=True)
    edit_model(source, target, what, target.with_name(f"{target.name}-work"))
    return load_file(target / "model.safetensors")


def test_changes_what_is_named_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    before = load_file(llama / "model.safetensors")
    named = ("k_proj", "norm.weight", "embed_tokens.weight", "lm_head")
    after = carried_out(llama, tmp_path / "out", step(*named, ignore=("*.1.self_attn.*",)))
    for name, value in before.items():
        doubled = name.removesuffix(".weight").endswith(("k_proj", "norm", "embed_tokens", "lm_head"))
        doubled &= ".1.self_attn" not in name
        assert torch.equal(after[name], 2 * value if doubled else value), name


def test_what_is_ignored_stands_beside_the_rest_as_it_was(llama: Path) -> None:
    before, after = open_weights(llama), beside(llama, step("k_proj", ignore=("*.1.self_attn.*",)))
    for k, factor in enumerate((2, 1, 2)):
        name = f"model.layers.{k}.self_attn.k_proj.weight"
        assert torch.equal(after.parameter(name), factor * before.parameter(name).float())


@pytest.mark.parametrize("done", [1, 3])
def test_after_a_crash_it_goes_on(done: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = carried_out(llama, tmp_path / "whole", step("q_proj"))
    sound, blocks = Journal.advance, []

    def advance(self: Journal, number: int) -> None:
        sound(self, number)
        blocks.append(number)
        if number == done and len(blocks) == done:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        carried_out(llama, tmp_path / "out", step("q_proj"))
    after = carried_out(llama, tmp_path / "out", step("q_proj"))
    assert blocks == [1, 2, 3]
    assert all(torch.equal(after[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, float("inf")), (torch.float16, 1e9)])
def test_numbers_that_are_too_large(dtype: torch.dtype, factor: float, tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", dtype)
    with pytest.raises(NumericsError, match=r"layers\.0\.self_attn\.q_proj would hold NaN or infinity in"):
        carried_out(source, tmp_path / "out", step("q_proj", factor=factor))


def test_places_are_all_that_a_network_has(llama: Path) -> None:
    places = open_weights(llama).places()
    state = open_weights(llama).skeleton.model.state_dict()
    assert {name if name in state else f"{name}.weight" for name in places} == state.keys()
    assert [name for name, place in places.items() if place.head] == ["lm_head"]


def test_slices_are_all_rows() -> None:
    assert [row for part in slices((7, 1 << 19)) for row in range(7)[part]] == list(range(7))
    assert slices((7, 1 << 17))[0] == slice(0, 2)
    assert slices((3, 1 << 24))[0] == slice(0, 1)
    assert slices((0, 4)) == []
