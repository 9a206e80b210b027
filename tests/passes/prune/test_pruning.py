"""What all passes share that remove single weights: how many go, in which pattern, on any layer of any network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from effcli import passes
from effcli.errors import RecipeError, SelectionError
from effcli.formats import Bitmask, Mask, NOfM, SparseWeight
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.language.verify import verify
from effcli.language.weights import open_weights
from effcli.layers.contract import Change, Layer, Outcome, carry_out
from effcli.layers.selection import choose
from effcli.layers.statistics import Gradients, Statistics
from effcli.passes.prune._pruning import Pruning, largest, removals
from effcli.run.recipe import PassStep

METHODS = ("magnitude", "wanda", "taylor", "sparsegpt", "alps")


def made(name: str, **options: Any) -> Pruning:
    config: Any = passes.load(name)(**options)
    return config


def seen(config: Pruning, inputs: Tensor, rows: int) -> Statistics:
    found = Statistics(inputs.shape[-1], config.needs)
    found.add(inputs)
    slopes = matrix(rows, inputs.shape[-1], 5).square()
    return found.with_gradients(Gradients.of(dict.fromkeys(config.needs.gradients, slopes), len(inputs)))


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def applied(config: Pruning, weight: Tensor, inputs: Tensor, mask: Mask | None = None, **layer: Any) -> Tensor:
    """The weight that is left, as the engine leaves it."""
    found = Layer("layer", "linear", weight.clone(), layer.get("dtype", torch.float32), mask=mask)
    outcome = carry_out(config, found, (seen(config, inputs, len(weight)),))
    kept = outcome.kept(found)
    assert isinstance(outcome.weight, Tensor)
    return outcome.weight if kept is None else outcome.weight.masked_fill(~kept.kept, 0)


@given(
    name=st.sampled_from(METHODS),
    rows=st.integers(1, 9),
    columns=st.integers(1, 13),
    sparsity=st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.77, 0.99]),
    seed=st.integers(0, 2**32),
)
def test_the_share_is_exact_to_the_weight(name: str, rows: int, columns: int, sparsity: float, seed: int) -> None:
    left = applied(made(name, sparsity=sparsity), matrix(rows, columns, seed), matrix(20, columns, seed + 1))
    assert int((left == 0).sum()) == min(round(sparsity * rows * columns), rows * columns - 1)


@pytest.mark.parametrize("name", METHODS)
def test_a_share_may_be_written_as_a_percentage(name: str) -> None:
    assert made(name, sparsity="62.5%") == made(name, sparsity=0.625)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "1:2", "1:12"])
def test_a_pattern_is_exact(name: str, pattern: str) -> None:
    kept, of = map(int, pattern.split(":"))
    config = made(name, pattern=pattern)
    layer = Layer("layer", "linear", matrix(5, 24), torch.float32)
    outcome = carry_out(config, layer, (seen(config, matrix(30, 24, 1), 5),))
    assert outcome.mask is not None and outcome.mask.pattern == NOfM(kept, of)
    assert (outcome.mask.kept.view(-1, of).sum(1) == kept).all()
    assert outcome.notes["sparsity"] == pytest.approx(1 - kept / of, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0.2}, {"pattern": "2:4"}], ids=str)
def test_zeros_of_an_earlier_mask_stay_and_count(name: str, options: dict[str, Any]) -> None:
    before = Mask(torch.arange(16).view(1, 16).expand(6, 16) % 3 > 0)
    weight = matrix(6, 16).masked_fill(~before.kept, 0)
    left = applied(made(name, **options), weight, matrix(40, 16, 1), before)
    assert not left[~before.kept].any()
    if "sparsity" in options:
        assert int((left == 0).sum()) == max(round(options["sparsity"] * 96), 36)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1, 24), (0, 8)], ids=str)
def test_odd_shapes_of_every_dtype(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = matrix(*shape).to(dtype).float()
    left = applied(made(name), weight, matrix(9, shape[1], 1), dtype=dtype)
    assert left.shape == shape and int((left == 0).sum()) == round(0.5 * weight.numel())
    assert torch.isfinite(left).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_no_input_reached(name: str) -> None:
    """It is pruned by magnitude."""
    config, weight = made(name, sparsity=0.5), torch.tensor([[3.0, 1.0, -2.0, 4.0], [1.0, -7.0, 8.0, 0.5]])
    layer = Layer("layer", "linear", weight, torch.float32)
    outcome = carry_out(config, layer, (Statistics(4, config.needs),))
    assert outcome.mask is not None
    assert outcome.mask.kept.tolist() == [[True, False, False, True], [False, True, True, False]]
    assert bool(config.needs) == ("scored" in outcome.notes)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_that_are_always_zero(name: str) -> None:
    left = applied(made(name), matrix(6, 8), torch.zeros(5, 8))
    assert int((left == 0).sum()) == 24 and torch.isfinite(left).all()


def test_rows_share_what_is_left_over() -> None:
    """Half of three is one or two: four rows lose six weights."""
    assert removals(0.5, torch.zeros(4, 3)).tolist() == [2, 1, 1, 2]
    assert removals(0.29, torch.zeros(1, 100)).tolist() == [29]
    kept = largest(torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 2.0]]), torch.tensor([2, 1]))
    assert kept.tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"pattern": "5:4"}, "5 of 4 neighbours cannot be kept"),
        ({"pattern": "0:4"}, "0 of 4"),
        ({"pattern": "4:4"}, "keeps every weight"),
        ({"sparsity": "150%"}, "less than 1"),
        ({"sparsity": "1.5.0%"}, "valid number"),
        ({"pattern": "2:4:8"}, "no pattern N:M"),
        ({"pattern": "half"}, "no pattern N:M"),
        ({"pattern": "2:512"}, "2 of 512"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exclude each other"),
        ({"density": 0.5}, "Extra inputs"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        made(name, **options)


def test_a_layer_may_have_the_other_of_the_two() -> None:
    options = {"pattern": "2:4", "layers": {"x": {"sparsity": 0.3}}}
    with pytest.raises(RecipeError) as caught:
        PassStep.model_validate({"magnitude": options})
    assert caught.value.cause.endswith("layers.x: sparsity 0.3 and pattern 2:4 exclude each other")
    assert caught.value.remedy == "set one to null"
    step = PassStep.model_validate({"magnitude": options | {"layers": {"x": {"sparsity": 0.3, "pattern": None}}}})
    other: Any = step.for_layer(step.config.layers["x"])
    assert other.share == 0.3 and other.n_of_m is None


@pytest.mark.parametrize("name", METHODS)
def test_what_the_passes_say_of_themselves(name: str) -> None:
    config = made(name)
    assert config.changes == Change.MASK and config.share == 0.5 and config.format is None
    assert str(made(name, pattern="2:4").format) == "sparse 2:4, float32"


@pytest.mark.parametrize("name", METHODS)
def test_a_pattern_that_divides_no_width(name: str) -> None:
    """Named by choosing alone, as a plan does: nine inputs of the first two layers' patches are no fours."""
    step = PassStep.model_validate({name: {"pattern": "2:4"}})
    with pytest.raises(SelectionError, match="pattern 2:4 does not divide the input channels of layer0") as caught:
        choose(small_graphs.separable(), step)
    assert "another pattern" in caught.value.remedy
    ignoring = PassStep.model_validate({name: {"pattern": "2:4", "ignore": ["layer0", "layer2", "layer4"]}})
    assert choose(small_graphs.separable(), ignoring)


def pruned_graph(graph: Graph, folder: Path, name: str, **options: Any) -> Graph:
    for part in ("source", "target"):
        (folder / part).mkdir()
    graph.save(folder / "source")
    step = PassStep.model_validate({name: options}).for_graph()
    labels = torch.arange(12) % 4
    labelled = [(inputs, labels[: len(inputs)]) for inputs in small_graphs.batches(graph)()]
    given = (lambda: iter(labelled)) if step.needs.gradients else None
    graph_sweep(folder / "source", folder / "target", step, small_graphs.batches(graph), labelled=given)
    return Graph.read(folder / "target")


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_grouped_and_depthwise(name: str, tmp_path: Path) -> None:
    """Each layer loses its half whatever its groups; what is kept of it is computed with."""
    graph = pruned_graph(small_graphs.separable(), tmp_path, name)
    assert {site.groups for site in graph.sites()} == {1, 6}
    for site in graph.sites():
        mask = graph.mask(site.name)
        weight: Any = graph.layer(site.name).weight
        assert mask is not None and mask.pattern == Bitmask()
        assert int((~mask.kept).sum()) == round(0.5 * site.rows * site.columns)
        assert not weight.detach().view(site.shape)[~mask.kept].any()
    assert torch.isfinite(graph.run(small_graphs.inputs(graph))).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", architectures.NAMES)
def test_every_architecture(architecture: str, name: str, tmp_path: Path) -> None:
    """Every layer in the blocks keeps two of four, and the output loads."""
    source, target = architectures.make(architecture, tmp_path / "model"), tmp_path / "out"
    target.mkdir()
    generator = torch.Generator().manual_seed(0)
    windows = Windows([torch.randint(architectures.VOCABULARY, (3, 16), generator=generator)], "compressed")
    step = PassStep.model_validate({name: {"pattern": "2:4"}})
    result = sweep(source, target, step, windows, tmp_path / "work")
    weights = open_weights(target)
    changed = [row for row in result.ledger if row.status == "changed"]
    assert {row.name for row in changed} == weights.stored.keys() and len(changed) > 7
    for row in changed:
        weight = weights.packed(row.name)
        assert isinstance(weight, SparseWeight) and weight.format.pattern == NOfM(2, 4)
    assert verify(target).passed


def test_groups_of_a_convolution_compete() -> None:
    """By magnitude over the whole layer: the second group holds the three largest of its and the first one's."""
    weight = torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    config = made("magnitude")
    outcome: Outcome = carry_out(config, Layer("conv", "conv", weight, torch.float32), (Statistics(2),) * 2)
    assert outcome.mask is not None and outcome.mask.kept.tolist() == [[False, False], [True, True]]
