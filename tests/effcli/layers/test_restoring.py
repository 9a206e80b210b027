"""Restoring the layers behind removed channels: least squares of what is left, checked against float64 and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import architectures
import pytest
import small_graphs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import effcli
from effcli.errors import NumericsError, UnsupportedError
from effcli.formats import Mask
from effcli.graphs.graph import Facts, Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.text import Windows
from effcli.language.cutting import cut_model
from effcli.language.verify import verify
from effcli.layers.contract import CutPass, Layer, Members, Needs, Outcome, Statistics
from effcli.layers.coupling import Coupled, Cut
from effcli.layers.restoring import Removal, Restoring, restored
from effcli.layers.result import PassResult
from effcli.reports.report import Stage
from effcli.run.recipe import PassStep


def problem(seed: int, rows: int = 5, columns: int = 12, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (out, in), inputs (in, tokens) that hang together and have a mean, and which columns stay; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = mixed @ torch.randn(columns, tokens, generator=generator, dtype=torch.float64) + 1
    kept = torch.rand(columns, generator=generator) < 0.6
    kept[0], kept[-1] = True, False
    return weight, inputs, kept


def test_least_squares_as_lapack_solves_them() -> None:
    weight, inputs, kept = problem(0)
    gram = inputs @ inputs.T / inputs.shape[1]
    found, damping = restored(weight, gram, kept, 0.0, "layer")
    expected = torch.linalg.lstsq(inputs[kept].T, (weight @ inputs).T).solution.T
    assert_close(found[:, kept], expected)
    assert not bool(found[:, ~kept].any()) and damping == 0
    # The same as the formula of the whole Gram matrix.
    assert_close(found[:, kept], weight @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept]))


def test_by_hand() -> None:
    """The second channel is twice the first, so that the first with 1 + 2 · 3 does what both did."""
    weight, gram = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double()
    kept = torch.tensor([True, False])
    assert_close(restored(weight, gram, kept, 0.0, "layer")[0], torch.tensor([[7.0, 0.0]]).double())
    # With λ = 1 of a mean diagonal of 1 half of that is made up for.
    assert_close(restored(weight, gram, kept, 1.0, "layer")[0], torch.tensor([[4.0, 0.0]]).double())
    assert restored(weight, torch.zeros_like(gram), kept, 0.1, "layer")[0].tolist() == [[1.0, 0.0]]


def test_damping_is_raised_where_it_must_be_and_told() -> None:
    weight = torch.ones(1, 3).double()
    gram, kept = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 1]]).double(), torch.tensor([True, True, False])
    found, damping = restored(weight, gram, kept, 0.0, "layer")
    assert 0 < damping <= 1e-6
    assert_close(found, torch.tensor([[1.5, 1.5, 0.0]]).double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(NumericsError, match="layer has no Cholesky factor"):
        restored(weight, gram * torch.nan, kept, 0.1, "layer")


def applied(layer: Layer, inputs: Tensor, kept: Tensor, damping: float) -> Outcome:
    seen = Statistics(len(inputs), Needs.GRAM | Needs.MEANS)
    seen.add(inputs.T.float())
    columns = tuple((~kept).nonzero().flatten().tolist())
    return Restoring(removed={"layer": Removal(columns=columns, damping=damping)}).apply(layer, seen)


def test_a_bias_takes_the_mean_as_a_constant_input_would() -> None:
    weight, inputs, kept = problem(1)
    outcome = applied(Layer("layer", "linear", weight.float(), torch.float32, biased=True), inputs, kept, 0.0)
    constant = torch.cat([inputs[kept], torch.ones(1, inputs.shape[1])])
    expected = torch.linalg.lstsq(constant.T.double(), (weight @ inputs).T).solution.T
    assert isinstance(outcome.weight, Tensor) and outcome.shift is not None
    assert_close(outcome.weight[:, kept].double(), expected[:, :-1], rtol=1e-3, atol=1e-3)
    assert_close(outcome.shift.double(), expected[:, -1], rtol=1e-3, atol=1e-3)
    lost = (weight[:, ~kept] @ inputs[~kept]).square().sum() / (weight @ inputs).square().sum()
    assert outcome.notes["unrestored_error"] == pytest.approx(float(lost), rel=1e-4)


def test_without_a_bias_nothing_is_shifted() -> None:
    weight, inputs, kept = problem(1)
    outcome = applied(Layer("layer", "linear", weight.float(), torch.float32), inputs, kept, 0.0)
    assert outcome.shift is None
    expected = torch.linalg.lstsq(inputs[kept].T, (weight @ inputs).T).solution.T
    assert isinstance(outcome.weight, Tensor)
    assert_close(outcome.weight[:, kept].double(), expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    damping=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    biased=st.booleans(),
    masked=st.booleans(),
)
def test_the_error_is_never_above_that_without(seed: int, damping: float, biased: bool, masked: bool) -> None:
    weight, inputs, kept = problem(seed, tokens=9 if seed % 2 else 60)
    mask = Mask(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.4) if masked else None
    weight = weight if mask is None else weight * mask.kept
    outcome = applied(
        Layer("layer", "linear", weight.float(), torch.float32, mask=mask, biased=biased), inputs, kept, damping
    )
    assert isinstance(outcome.weight, Tensor)
    shift = torch.zeros(len(weight), 1) if outcome.shift is None else outcome.shift.unsqueeze(1)
    error = (weight @ inputs - outcome.weight.double() @ inputs - shift).square().sum(1)
    bound = (weight[:, ~kept] @ inputs[~kept]).square().sum(1)
    assert bool((error <= bound * (1 + 1e-4) + 1e-4).all())
    assert mask is None or not bool(outcome.weight[~mask.kept].any())


def test_a_layer_that_nothing_reached_only_loses_columns() -> None:
    weight = torch.ones(2, 3)
    outcome = applied(
        Layer("layer", "linear", weight, torch.float32), torch.zeros(3, 0), torch.tensor([True, False, True]), 0.1
    )
    assert isinstance(outcome.weight, Tensor) and outcome.weight.tolist() == [[1, 0, 1], [1, 0, 1]]


class Drop(CutPass):
    """Removes the first quarter of every group, one at least, and restores what reads it."""

    damping: float | None = 0.0
    asks: int = Needs.INPUTS.value

    @property
    def needs(self) -> Needs:
        return Needs(self.asks)

    @property
    def restoring(self) -> float | None:
        return self.damping

    def cut(self, groups: Sequence[Coupled], seen: Members) -> Sequence[Cut]:
        return [Cut(group, torch.arange(group.count) >= max(1, group.count // 4)) for group in groups]


Inputs = Literal["original", "compressed"]


def cut_graph(graph: Graph, folder: Path, config: CutPass, inputs: Inputs = "original") -> tuple[Graph, PassResult]:
    source, target = folder / "source", folder / "target"
    source.mkdir(parents=True)
    target.mkdir()
    graph.save(source)
    result = graph_sweep(source, target, PassStep(name="drop", config=config), small_graphs.batches(graph), inputs)
    return Graph.read(target), result


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_a_channel_that_others_make_up_for_leaves_no_trace(inputs: Inputs, tmp_path: Path) -> None:
    """Channel 0 is channel 1, shifted: the layer behind restores it with its weight and its bias."""
    graph = small_graphs.chain((3, 6, 6), nn.Conv2d(3, 4, 3), ("add.Scalar", 9.0), nn.Conv2d(4, 5, 3), "relu.default")
    tensors = graph.module.state_dict()
    with torch.no_grad():
        tensors["layer0.weight"][0] = tensors["layer0.weight"][1]
        tensors["layer0.bias"][0] = tensors["layer0.bias"][1] + 2
    made, result = cut_graph(graph, tmp_path, Drop(), inputs)
    given = small_graphs.inputs(graph, seed=1)
    assert made.layer("layer2").weight.shape == (5, 3, 3, 3)
    assert_close(made.run(given), graph.run(given), rtol=1e-3, atol=1e-2)
    (row,) = (row for row in result.ledger if row.name == "layer2")
    assert row.output_error == pytest.approx(0, abs=1e-5) and row.notes["unrestored_error"] > 0.01
    assert row.notes["inputs_removed"] == "0" and row.notes["shape_before"] == [5, 36]


@pytest.mark.parametrize(
    "make",
    [
        small_graphs.residual,
        small_graphs.separable,
        lambda: small_graphs.chain(
            (4, 5, 5),
            nn.Conv2d(4, 8, 3),
            "relu.default",
            nn.Conv2d(8, 8, 1, groups=2),
            "relu.default",
            ("mean.dim", [2, 3], False),
            nn.Linear(8, 3),
        ),
    ],
)
def test_every_reader_is_restored_and_none_is_worse(make: Any, tmp_path: Path) -> None:
    graph = make()
    made, result = cut_graph(graph, tmp_path / "with", Drop(damping=0.01))
    plain, without = cut_graph(graph, tmp_path / "without", Drop(damping=None))
    rows = [row for row in result.ledger if "inputs_removed" in row.notes]
    assert rows and all(row.output_error is not None for row in rows)
    for row in rows:
        assert row.output_error is not None and row.output_error <= row.notes["unrestored_error"] + 1e-6
    assert not any(row.output_error for row in without.ledger)
    given = small_graphs.inputs(graph)
    error, bound = ((each.run(given) - graph.run(given)).square().sum() for each in (made, plain))
    assert float(error) < float(bound)


def two_into_one() -> Graph:
    """Two layers whose channels, side by side, one layer reads."""
    builder = small_graphs.Builder()
    inputs = builder.input()
    left = builder.module("left", small_graphs.seeded(nn.Conv2d(3, 8, 3), 0), inputs)
    right = builder.module("right", small_graphs.seeded(nn.Conv2d(3, 8, 3), 1), inputs)
    both = builder.call("aten.cat.default", [left, right], 1)
    head = builder.module("head", small_graphs.seeded(nn.Conv2d(16, 4, 1), 2), both)
    return builder.finish(head, Facts(origin="test", shape=(3, 6, 6)))


@pytest.mark.parametrize("left, right, largest", [(0.01, None, 0.01), (None, 0.01, 0.01), (0.1, 0.01, 0.1)])
def test_a_layer_that_reads_two_groups_is_fitted_to_what_both_leave(
    left: float | None, right: float | None, largest: float, tmp_path: Path
) -> None:
    graph = two_into_one()
    own = Drop(layers={"left": {"damping": left}, "right": {"damping": right}})
    made, result = cut_graph(graph, tmp_path / "own", own)
    alike, expected = cut_graph(graph, tmp_path / "alike", Drop(damping=largest))
    rows = [next(row for row in found.ledger if row.name == "head") for found in (result, expected)]
    assert rows[0] == rows[1] and rows[0].notes["damping"] == largest
    assert_close(made.layer("head").weight, alike.layer("head").weight)


def test_restoring_asks_for_inputs(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not ask for the calibration inputs"):
        cut_graph(small_graphs.residual(), tmp_path, Drop(asks=0))


def cut_language(source: Path, folder: Path, config: CutPass, inputs: Inputs = "original") -> tuple[Path, PassResult]:
    target, work = folder / "target", folder / "work"
    target.mkdir(parents=True)
    result = cut_model(source, target, PassStep(name="drop", config=config), Windows([tokens()], inputs), work)
    assert not work.exists()
    return target, result


def tokens() -> Tensor:
    return torch.randint(architectures.VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(0))


# OPT has biases, GPT-2 stores its weights transposed, Mixtral has experts that few tokens reach.
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_language_models_are_restored(name: str, inputs: Inputs, tmp_path: Path) -> None:
    source = architectures.make(name, tmp_path / "source")
    target, result = cut_language(source, tmp_path / "with", Drop(damping=1e-3), inputs)
    plain, _ = cut_language(source, tmp_path / "without", Drop(damping=None), inputs)
    rows = [row for row in result.ledger if "inputs_removed" in row.notes]
    assert rows
    for row in rows:
        if "unrestored_error" in row.notes:
            assert row.output_error is not None and row.output_error <= row.notes["unrestored_error"] + 1e-6
    networks = [effcli.load(each, packed=False) for each in (source, target, plain)]
    with torch.no_grad():
        original, found, without = (network(tokens()).logits for network in networks)
    assert float((found - original).norm()) < float((without - original).norm())
    if name != "mixtral":
        AutoModelForCausalLM.from_pretrained(target)
    stage = Stage.model_construct(ledger=tuple(result.ledger), histograms=())
    checked = verify(target, against=source, stages=[stage])
    assert checked.passed, checked.line


def test_what_was_decided_and_swept_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the network is cut, the same command goes on from there."""
    import effcli.language.cutting as cutting

    source = architectures.make("llama", tmp_path / "source")
    whole, _ = cut_language(source, tmp_path / "whole", Drop())
    target, work = tmp_path / "target", tmp_path / "work"
    target.mkdir()
    step, windows = PassStep(name="drop", config=Drop()), Windows([tokens()], "original")

    class Killed(Exception):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(cutting, "cut", kill)
        with pytest.raises(Killed):
            cut_model(source, target, step, windows, work)
    with monkeypatch.context() as patched:
        patched.setattr(cutting, "decide", kill)
        cut_model(source, target, step, windows, work)
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
