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
from torch import Tensor, nn
from torch.testing import assert_close

import effcli
from effcli.errors import PluginError, UnsupportedError, UserError
from effcli.formats import Bitmask, Mask
from effcli.graphs.backward import gradients as graph_gradients
from effcli.graphs.coupling import coupled
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.text import Windows
from effcli.language.cutting import cut_model
from effcli.language.verify import verify
from effcli.layers.contract import CutPass, Members, Needs, Reader, Statistics
from effcli.layers.coupling import Coupled, Cut, Member
from effcli.layers.cutting import offer, spans
from effcli.layers.result import PassResult
from effcli.layers.selection import choose
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
        _READERS[:] = [(group, seen.readers(group)) for group in groups]
        if self.strange:
            first = groups[0]
            return [Cut(Coupled(first.name, first.count, first.members), torch.arange(first.count) > 0)]
        return [Cut(group, kept(seen.sums(group))) for group in groups]


_GIVEN: list[tuple[Coupled, Members]] = []
# What stands on the disk only as long as the pass works.
_READERS: list[tuple[Coupled, Sequence[Reader]]] = []


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
    assert rows["stem"].shape == (4, 27) and rows["stem"].notes["shape_before"] == [8, 27]
    gone = [number for one in cuts for number in (~one.kept).nonzero().flatten().tolist()]
    assert rows["stem"].notes["outputs_removed"] == spans(gone[:4]) and "inputs_removed" not in rows["stem"].notes
    assert rows["block.b"].notes["inputs_removed"] == spans(gone[4:])
    assert rows["stem"].status == "changed" and rows["stem"].nbytes == 4 * 27 * 4
    assert rows["head"].shape == (5, 4)
    assert rows["stem"].macs == 9 * 7 * 4 * 27
    assert result.remarks == ["head cannot be cut: head is the network's output"]


def test_spans() -> None:
    assert spans([0, 4, 5, 6, 9]) == "0, 4-6, 9" and spans([1, 2]) == "1-2" and spans([]) == ""


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


def test_two_groups_of_one_name_are_refused() -> None:
    graph = small_graphs.residual()
    step = PassStep(name="halve", config=Halve())
    with pytest.raises(ValueError, match="two groups are called stem"):
        offer("halve", Halve(), [*coupled(graph), *coupled(graph)], choose(graph, step))


def test_labels_and_histograms_are_refused(tmp_path: Path) -> None:
    for number, need in enumerate((Needs.LABELS, Needs.VALUES, Needs.DENSE)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UnsupportedError, match="asks for labels, histograms or another network"):
            cut_graph(small_graphs.residual(), folder, Halve(asks=need.value))


ALL = Needs.NORMS | Needs.MEANS | Needs.NONZERO | Needs.GRAM | Needs.EXTREMES | Needs.SAMPLE


@pytest.mark.parametrize("needs", [ALL, Needs.NONZERO, Needs.NORMS | Needs.EXTREMES])
def test_readers_of_a_graph_bring_their_inputs(needs: Needs, tmp_path: Path) -> None:
    graph = small_graphs.separable()
    cut_graph(graph, tmp_path, Halve(asks=needs.value))
    group, seen = _GIVEN[0]
    (reader,) = seen.readers(group)
    assert [group.name for group, _ in _GIVEN] == ["layer0", "layer4"]
    assert reader.name == "layer4" and reader.weight.shape == (10, 6) and reader.position.tolist() == list(range(6))
    # What layer4 reads of each input: every second place of 8 x 8.
    values = fx_value(graph, "layer4")[:, :, ::2, ::2].transpose(0, 1).flatten(1)
    assert reader.seen.tokens == values.shape[1] and reader.seen.needs == needs
    check_seen(reader.seen, values, needs)
    group, seen = _GIVEN[1]
    (reader,) = seen.readers(group)
    assert reader.position.tolist() == torch.arange(10).repeat_interleave(16).tolist()
    scores = reader.per_position(torch.ones(160), 10)
    assert scores.tolist() == [16.0] * 10


def fx_value(graph: Graph, name: str) -> Tensor:
    """What the layer `name` reads of the small inputs."""
    found: list[Tensor] = []
    graph.layer(name).register_forward_pre_hook(lambda module, given: found.append(given[0]))
    graph.run(small_graphs.inputs(graph))
    return found[-1]


def check_seen(seen: Statistics, values: Tensor, needs: Needs) -> None:
    """seen: of inputs `values` (in, tokens)."""
    if Needs.NONZERO in needs:
        assert_close(seen.nonzero, (values != 0).float().mean(1))
    if Needs.GRAM in needs:
        assert_close(seen.matrix, values @ values.T, rtol=1e-4, atol=1e-3)
        assert_close(seen.magnitude, values.abs().mean(1), rtol=1e-4, atol=1e-4)
    if needs & (Needs.GRAM | Needs.NORMS):
        assert_close(seen.squares, values.square().sum(1), rtol=1e-4, atol=1e-3)
    if Needs.MEANS in needs:
        assert_close(seen.mean, values.mean(1), rtol=1e-4, atol=1e-5)
    if Needs.EXTREMES in needs:
        assert_close(seen.high, values.amax(1).clamp(min=0))
        assert_close(seen.low, values.amin(1).clamp(max=0))
    if Needs.SAMPLE in needs:
        assert seen.sample.shape[1] == len(values) and 0 < len(seen.sample) <= 128


def test_readers_are_parts_of_grouped_convolutions(tmp_path: Path) -> None:
    graph = small_graphs.chain(
        (4, 5, 5),
        nn.Conv2d(4, 6, 3),
        "relu.default",
        nn.Conv2d(6, 8, 1, groups=2),
        "relu.default",
        ("mean.dim", [2, 3], False),
        nn.Linear(8, 3),
    )
    cut_graph(graph, tmp_path, Halve(asks=Needs.GRAM.value))
    for group, seen in _GIVEN:
        for reader in seen.readers(group):
            assert reader.seen.matrix.shape == (reader.weight.shape[1],) * 2 == (len(reader.position),) * 2
    names = [reader.name for group, seen in _GIVEN for reader in seen.readers(group)]
    assert names.count("layer2") in (0, 2) and "layer5" in names


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


@pytest.mark.parametrize("needs", [ALL, Needs.NONZERO])
def test_a_language_model_with_statistics(needs: Needs, llama: Path, tmp_path: Path) -> None:
    cut_language(llama, tmp_path, Halve(asks=needs.value))
    network = effcli.load(llama, packed=False)
    found: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        return lambda module, given: found.update({name: given[0].flatten(0, 1).T})

    for name, module in network.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        network(torch.randint(architectures.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0)))
    names = []
    for group, (reader,) in _READERS:
        names.append(reader.name)
        assert reader.seen.tokens == 48
        check_seen(reader.seen, found[reader.name], needs)
        each = len(reader.position) // group.count
        assert reader.position.bincount().tolist() == [each] * group.count
    assert sorted(names) == sorted(found)


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
