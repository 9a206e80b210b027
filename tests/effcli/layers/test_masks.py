"""A weight that a pass removes stays 0 in every pass that follows, in both kinds of network, and on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import architectures
import pytest
import small_graphs
import torch
from plain_passes import Tune
from torch import Tensor
from torch.testing import assert_close

from effcli.formats import Affine, Bitmask, Mask, NOfM, SparseWeight, unpack
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork
from effcli.graphs.network import outputs_of
from effcli.graphs.sweep import graph_sweep
from effcli.graphs.training import train_graph
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.layers.contract import Change, Layer, LayerPass, Outcome, Statistics, TrainPass
from effcli.layers.result import PassResult
from effcli.passes.quantize._affine import encode, extremes
from effcli.run.recipe import PassStep


class Prune(LayerPass):
    """Keeps the larger half of each row, or two of four neighbours, and says so; returns all weights as they are."""

    changes: ClassVar[Change] = Change.VALUES | Change.MASK
    pattern: bool = False

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        weight = layer.weight
        if not self.pattern:
            return Outcome(weight, mask=Mask(weight.abs() >= weight.abs().median(1, keepdim=True).values))
        blocks = weight.abs().view(len(weight), -1, 4)
        places = blocks.topk(2, dim=2).indices
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, places, True)
        return Outcome(weight, mask=Mask(kept.view_as(weight), NOfM(2, 4)))


class Fill(LayerPass):
    """Returns ones everywhere."""

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(torch.ones_like(layer.weight))


def carried_out(folder: Path, step: Any, name: str, reference: Path | None = None) -> tuple[Path, PassResult]:
    """The checkpoint that `step` makes of the graph in `folder`; reference: the one before weights were compressed."""
    checked = step if isinstance(step, PassStep) else PassStep.model_validate(step)
    checked = checked.model_copy(update={"config": checked.config.for_graph()})
    target = folder.with_name(name)
    target.mkdir()
    graph = Graph.read(folder)
    if isinstance(checked.config, TrainPass):
        data = small_graphs.inputs(graph)
        made = train_graph(
            folder, target, checked, small_graphs.Held(data), batch_size=6, original=folder, reference=reference
        )
    else:
        made = graph_sweep(folder, target, checked, small_graphs.batches(graph))
    return target, made


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A pruned graph with batch norms, and what was kept of its layers."""
    source = tmp_path / "source"
    source.mkdir()
    graph = small_graphs.separable()
    graph.save(source)
    target, result = carried_out(source, PassStep(name="prune", config=Prune()), "pruned")
    made = Graph.read(target)
    assert {row.status for row in result.ledger} == {"changed"} and not made.stored
    kept = {}
    for site in made.sites():
        before = site.view(graph.layer(site.name).weight.detach())  # type: ignore[operator]
        mask = made.mask(site.name)
        assert mask is not None
        assert_close(site.view(made.layer(site.name).weight.detach()), before.masked_fill(~mask.kept, 0))  # type: ignore[operator]
        kept[site.name] = mask.kept
        row = next(row for row in result.ledger if row.name == site.name)
        assert row.format == "sparse bitmask, float32"
    return target, kept


STEPS: list[Any] = [
    *({name: {}} for name in ("linear", "awq", "kmeans", "nf4", "binary", "ternary", "gptq", "fold", "adaround")),
    {"linear": {"bits": 8, "activations": "int8", "activation_range": "minmax"}},
    {"smoothquant": {}},
    PassStep(name="fill", config=Fill()),
    PassStep(name="tune", config=Tune(epochs=1)),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name if isinstance(step, PassStep) else str(step))
def test_a_graph_keeps_its_zeros(step: Any, pruned: tuple[Path, dict[str, Tensor]]) -> None:
    folder, kept = pruned
    target, _ = carried_out(folder, step, "after")
    made = Graph.read(target)
    for site in made.sites():
        mask = made.mask(site.name)
        assert mask is not None and torch.equal(mask.kept, kept[site.name])
        weight: Any = made.layer(site.name).weight
        assert not weight.detach().view(site.shape)[~mask.kept].any()
        assert all(isinstance(stored, SparseWeight) for stored in made.stored.values())


def test_zeros_of_folded_and_equalized_layers_are_zeros_of_the_integer_network(
    pruned: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, kept = pruned
    for number, name in enumerate(("fold", "equalize", "int8")):
        folder, _ = carried_out(folder, {name: {}}, f"step{number}")
    network = IntegerNetwork.read(folder)
    rows = {step.layer: network.array(step, "weight") for step in network.program.steps if hasattr(step, "layer")}
    assert rows.keys() == kept.keys()
    for name, codes in rows.items():
        # Symmetric integers: code 0 is 0.
        assert not codes.reshape(kept[name].shape)[~kept[name].numpy()].any()


def test_trained_tables_leave_the_mask_alone(pruned: tuple[Path, dict[str, Tensor]]) -> None:
    folder, kept = pruned
    shared, _ = carried_out(folder, {"kmeans": {"bits": 2}}, "shared")
    trained, result = carried_out(shared, {"centroids": {"epochs": 1, "learning_rate": 0.01}}, "trained", folder)
    made, before = Graph.read(trained), Graph.read(shared)
    assert any("moved" in row.notes for row in result.ledger)
    for name, weight in made.stored.items():
        assert isinstance(weight, SparseWeight) and torch.equal(weight.mask, kept[name])
        assert not torch.equal(weight.values.dequantize(), before.stored[name].values.dequantize())  # type: ignore[attr-defined]
    assert torch.isfinite(outputs_of(trained)(small_graphs.inputs(made))).all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("llama") / "model", torch.bfloat16)


def windows() -> Windows:
    generator = torch.Generator().manual_seed(0)
    return Windows([torch.randint(architectures.VOCABULARY, (3, 16), generator=generator)], "original")


def swept(source: Path, target: Path, step: Any) -> PassResult:
    target.mkdir()
    checked = step if isinstance(step, PassStep) else PassStep.model_validate(step)
    return sweep(source, target, checked, windows(), target.with_name(f"{target.name}-work"))


@pytest.mark.parametrize("pattern", [False, True], ids=["bitmask", "2:4"])
def test_a_language_model_keeps_its_zeros_and_its_pattern(pattern: bool, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    result = swept(llama, folder, PassStep(name="prune", config=Prune(pattern=pattern)))
    assert {row.status for row in result.ledger if row.kind == "linear"} == {"changed", "kept"}
    before = open_weights(llama)
    expected: Any = NOfM(2, 4) if pattern else Bitmask()
    steps: list[Any] = [{"smoothquant": {}}, {"awq": {"bits": 4}}, PassStep(name="fill", config=Fill())]
    names = sorted(open_weights(folder).stored)
    assert len(names) == 14
    kept = {name: mask.kept for name in names if (mask := open_weights(folder).mask(name)) is not None}
    for name in names:
        weight = open_weights(folder).packed(name)
        assert weight is not None
        dense = before.parameter(f"{name}.weight")
        assert torch.equal(weight.dequantize(), dense.masked_fill(~kept[name], 0))
    for number, step in enumerate(steps):
        after = tmp_path / f"after{number}"
        result = swept(folder, after, step)
        folder = after
        found = open_weights(folder)
        for name in names:
            weight = found.packed(name)
            assert isinstance(weight, SparseWeight) and weight.format.pattern == expected
            assert torch.equal(weight.mask, kept[name])
            assert not weight.effective(torch.float32)[~kept[name]].any()
    # Ones where weights are kept, and no longer compressed.
    assert found.packed(names[0]).dequantize(torch.float32).sum() == kept[names[0]].sum()  # type: ignore[union-attr]
    assert {row.status for row in result.ledger if row.name in names} == {"changed"}


def test_masks_by_hand() -> None:
    first = torch.tensor([[True, True, False, False], [False, True, False, True]])
    mask = Mask(first, NOfM(2, 4))
    assert mask & None is mask
    both = mask & Mask(torch.tensor([[True, False, True, True]]).expand(2, 4))
    assert both.pattern == Bitmask() and both.kept.tolist() == [
        [True, False, False, False],
        [False, False, False, True],
    ]
    assert (mask & Mask(torch.ones(2, 4, dtype=torch.bool))).pattern == NOfM(2, 4)
    weight = torch.arange(1.0, 9.0).view(2, 4)
    assert mask.over(weight).dequantize().tolist() == [[1, 2, 0, 0], [0, 6, 0, 8]]
    low, high = extremes(weight, Affine(4, "channel"))
    scaled = encode(weight, low, high, Affine(4, "channel"), torch.float32).with_input_scale(torch.full((4,), 2.0))
    sparse = mask.over(scaled)
    assert sparse.values.input_scale is None and torch.equal(sparse.input_scale, torch.full((4,), 2.0))  # type: ignore[arg-type]
    assert_close(sparse.effective(), scaled.effective().masked_fill(~first, 0))
    with pytest.raises(ValueError, match="a mask"):
        mask.over(torch.ones(3, 4))
    with pytest.raises(ValueError, match="do not keep 2"):
        Mask(torch.ones(2, 4, dtype=torch.bool), NOfM(2, 4)).over(weight)


def test_a_mask_that_is_a_view() -> None:
    """As a transposed matrix, or a part of one, is no run of memory."""
    kept = torch.tensor([[True, False], [True, False], [False, True], [False, True]]).t()
    assert not kept.is_contiguous()
    weight = torch.arange(1.0, 9.0).view(2, 4)
    sparse = Mask(kept, NOfM(2, 4)).over(weight)
    assert sparse.dequantize().tolist() == [[1, 2, 0, 0], [0, 0, 7, 8]]
    assert torch.equal(unpack(sparse.format, sparse.pack(), (2, 4)).dequantize(), sparse.dequantize())


def test_groups_of_a_convolution_join_their_masks() -> None:
    weight = torch.ones(2, 4)
    half = torch.tensor([[True, False, True, False]] * 2)
    assert Outcome.joined([Outcome(weight), Outcome(weight)]).mask is None
    joined = Outcome.joined([Outcome(weight, mask=Mask(half, NOfM(2, 4)))] * 2).mask
    assert joined is not None and joined.pattern == NOfM(2, 4) and torch.equal(joined.kept, half.repeat(2, 1))
    joined = Outcome.joined([Outcome(weight, mask=Mask(half, NOfM(2, 4))), Outcome(weight)]).mask
    assert joined is not None and joined.pattern == Bitmask() and joined.kept[2:].all()
