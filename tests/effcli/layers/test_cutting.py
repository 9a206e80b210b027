"""Passes that cut: which groups they are offered, what they see of them, what the ledger says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from coupled_cuts import zero
from torch import Tensor
from torch.testing import assert_close

import effcli
from effcli.errors import PluginError, UnsupportedError, UserError
from effcli.formats import Bitmask, Mask
from effcli.graphs.backward import gradients as graph_gradients
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.text import Windows
from effcli.language.cutting import cut_model
from effcli.language.verify import verify
from effcli.layers.contract import CutPass, Members, Needs
from effcli.layers.coupling import Coupled, Cut, Member
from effcli.layers.result import PassResult
from effcli.reports.report import Stage
from effcli.run.recipe import PassStep


class Halve(CutPass):
    """Keeps the half of every group with the larger sums; notes what it was given."""

    asks: int = 0
    strange: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(self.asks)

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        _GIVEN[:] = [(group, seen) for group in groups]
        if self.strange:
            first = groups[0]
            return [Cut(Coupled(first.name, first.count, first.members), torch.arange(first.count) > 0)]
        return [Cut(group, kept(seen.sums(group))) for group in groups]


_GIVEN: list[tuple[Coupled, Members]] = []


def kept(scores: Tensor) -> Tensor:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.topk(max(1, len(scores) // 2)).indices] = True
    return mask


def cut_graph(graph: Graph, folder: Path, config: CutPass, **more: Any) -> tuple[Graph, PassResult]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    result = graph_sweep(source, target, PassStep(name="halve", config=config), small_graphs.batches(graph), **more)
    return Graph.read(target), result


def test_a_graph_computes_what_it_did_with_zeros(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    made, result = cut_graph(graph, tmp_path, Halve())
    silent = graph.copy()
    cuts = [Cut(group, kept(seen.sums(group))) for group, seen in _GIVEN]
    zero(silent.module.state_dict(), cuts)
    inputs = small_graphs.inputs(graph)
    assert_close(made.run(inputs), silent.run(inputs), rtol=1e-4, atol=1e-5)
    rows = {row.name: row for row in result.ledger}
    assert rows["stem"].shape == (4, 27) and rows["stem"].notes == {"shape_before": [8, 27]}
    assert rows["stem"].status == "changed" and rows["stem"].nbytes == 4 * 27 * 4
    assert rows["head"].shape == (5, 4)
    assert rows["stem"].macs == 9 * 7 * 4 * 27
    assert result.remarks == ["head cannot be cut: head is the network's output"]


def test_ignored_layers_keep_their_groups_whole(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    made, result = cut_graph(graph, tmp_path, Halve(ignore=("stem",)))
    rows = {row.name: row for row in result.ledger}
    assert [group.name for group, _ in _GIVEN] == ["block.a"]
    assert rows["stem"].status == "kept" and rows["block.a"].shape == (4, 72)
    assert any("stem is left alone (ignored by 'stem')" in remark for remark in result.remarks)
    assert made.weights() < graph.weights()


def test_nothing_to_cut_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="halve finds no channels that can be cut") as error:
        cut_graph(small_graphs.residual(), tmp_path, Halve(ignore=("stem", "block.*")))
    assert "is left alone" in str(error.value.remedy)


def test_a_group_that_was_not_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"the pass Halve returned a cut of stem, which it was not given, from `cut`"):
        cut_graph(small_graphs.residual(), tmp_path, Halve(strange=True))


def test_statistics_of_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="asks for more than gradients"):
        cut_graph(small_graphs.residual(), tmp_path, Halve(asks=Needs.GRAM.value))


def test_sums_by_hand() -> None:
    tensors = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    members = Member("w", 0, torch.tensor([1, 0])), Member("b", 0, torch.tensor([-1, 1]))
    group = Coupled("w", 2, members)
    slopes: dict[str, dict[Needs, Tensor]] = {"w": {Needs.GRADIENTS: torch.full((2, 2), 2.0)}, "b": {}}
    seen = Members(tensors.__getitem__, gradients=slopes.__getitem__)
    assert seen.sums(group).tolist() == [25.0, 5.0 + 36.0]
    assert seen.sums(group, torch.abs).tolist() == [7.0, 3.0 + 6.0]
    assert seen.products(group, Needs.GRADIENTS).tolist() == [14.0, 6.0]


def test_gradients_come_in_the_shape_of_the_parameter(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    inputs = small_graphs.inputs(graph)
    labels = torch.arange(len(inputs)) % 5
    needs = Needs.GRADIENTS | Needs.SQUARED_GRADIENTS
    expected = graph_gradients(graph, graph.sites(), [(inputs, labels)], needs)
    cut_graph(graph, tmp_path, Halve(asks=needs.value), labelled=lambda: iter([(inputs, labels)]))
    assert _GIVEN
    for group, seen in _GIVEN:
        total = torch.zeros(group.count)
        assert seen.samples == len(inputs)
        for member in group.members:
            owner, _, own = member.parameter.rpartition(".")
            if owner in expected and own == "weight":
                found = seen.gradients(member.parameter)
                weight = seen.read(member.parameter)
                for need, sums in expected[owner].sums.items():
                    assert_close(found[need], sums.view(weight.shape))
                total += member.per_position(weight * found[Needs.GRADIENTS], group.count)
            else:
                assert seen.gradients(member.parameter) == {}
        assert_close(seen.products(group, Needs.GRADIENTS), total)


def test_masks_are_cut_with_their_weights(tmp_path: Path) -> None:
    graph = small_graphs.residual()
    generator = torch.Generator().manual_seed(0)
    for site in graph.sites():
        weight: Any = graph.layer(site.name).weight
        mask = Mask(torch.rand(site.shape, generator=generator) > 0.5)
        graph.set_weight(site.name, mask.over(weight.detach().view(site.shape)))
    made, _ = cut_graph(graph, tmp_path, Halve())
    for site in made.sites():
        mask_after = made.mask(site.name)
        assert mask_after is not None and mask_after.kept.shape == site.shape and mask_after.pattern == Bitmask()
        weight = made.layer(site.name).weight
        assert torch.equal(weight.detach().view(site.shape) != 0, mask_after.kept)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("llama") / "model")


def cut_language(source: Path, folder: Path, config: CutPass) -> tuple[Path, PassResult]:
    target, work = folder / "target", folder / "work"
    target.mkdir()
    ids = torch.randint(architectures.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    step = PassStep(name="halve", config=config)
    result = cut_model(source, target, step, Windows([ids], "original"), work)
    assert not work.exists()
    return target, result


def test_a_language_model_computes_what_it_did_with_zeros(llama: Path, tmp_path: Path) -> None:
    target, result = cut_language(llama, tmp_path, Halve())
    network, made = effcli.load(llama, packed=False), effcli.load(target)
    assert type(made) is type(network)
    zero(network.state_dict(), [Cut(group, kept(seen.sums(group))) for group, seen in _GIVEN])
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert_close(made(ids).logits, network(ids).logits, rtol=1e-3, atol=1e-4)
    rows = {row.name: row for row in result.ledger}
    up = rows["model.layers.0.mlp.up_proj"]
    assert up.status == "changed" and up.notes["shape_before"] == [2 * up.shape[0], up.shape[1]]
    assert rows["lm_head"].status == "kept" and rows["model.embed_tokens.weight"].kind == "embedding"
    assert sum(row.nbytes for row in result.ledger) <= sum(file.stat().st_size for file in target.glob("*.safetensors"))
    stage = Stage.model_construct(ledger=tuple(result.ledger), histograms=())
    checked = verify(target, against=llama, stages=[stage])
    assert checked.passed, checked.line


def test_a_tampered_cut_is_found(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target, result = cut_language(llama, tmp_path, Halve())
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    stage = Stage.model_construct(ledger=tuple(result.ledger), histograms=())
    checked = verify(target, against=llama, stages=[stage])
    assert not checked.passed and "model.layers.0.mlp.up_proj" in checked.line


def test_a_language_model_with_gradients(llama: Path, tmp_path: Path) -> None:
    cut_language(llama, tmp_path, Halve(asks=Needs.SQUARED_GRADIENTS.value))
    group, seen = _GIVEN[0]
    assert seen.samples == 3
    weights = [member.parameter for member in group.members if seen.gradients(member.parameter)]
    assert weights
    for name in weights:
        assert seen.gradients(name)[Needs.SQUARED_GRADIENTS].shape == seen.read(name).shape
        assert bool(seen.gradients(name)[Needs.SQUARED_GRADIENTS].any())
    assert bool(seen.products(group, Needs.SQUARED_GRADIENTS).all())
