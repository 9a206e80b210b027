"""How a share is divided among layers: by hand, exactly as many as asked for, and against plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.layers.contract import Needs
from effcli.passes.prune._allocation import Summary, allotted
from effcli.passes.prune.alps import ALPS
from effcli.passes.prune.magnitude import Magnitude
from effcli.passes.prune.wanda import Wanda
from effcli.run.recipe import PassStep


def scores(count: int, seed: int, loudness: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs() * loudness


def test_a_summary_by_hand() -> None:
    """The last is an outlier: ten others of one value, and their mean is 2.7."""
    found = Summary.of(torch.tensor([1.0] * 10 + [20.0]))
    assert (found.size, found.values.tolist(), found.counts.tolist()) == (11, [1, 20], [10, 1])
    assert found.outliers == pytest.approx(1 / 11)
    # Zeros, and values that differ in the eighth bit behind the point.
    found = Summary.of(torch.tensor([0.0, 0.0, 1.0, 1 + 2**-9, 1 + 2**-7]))
    assert (found.values.tolist(), found.counts.tolist()) == ([0, 1, 1 + 2**-7], [2, 2, 1])
    assert Summary.of(torch.zeros(0)).size == 0


def test_by_hand() -> None:
    first, second = Summary.of(torch.tensor([1.0, 2, 3, 4])), Summary.of(torch.tensor([3.5, 5.0, 6, 7]))
    assert allotted("uniform", (first, second), (0.5, 0.25), 0) == [2, 1]
    # 1, 2, 3 and 3.5 are the lowest.
    assert allotted("global", (first, second), (0.5, 0.5), 0) == [3, 1]
    # One weight of each always stays.
    assert allotted("global", (first, second), (0.75, 0.75), 0) == [3, 3]
    # As fractions of 30 and 122: 1, 4, 9, 16 and 12, 25, 36, 49. The lowest are 1/30, 12/122, 4/30 and 25/122.
    assert allotted("error", (first, second), (0.5, 0.5), 0.5) == [2, 2]
    assert allotted("error", (first, second), (0.25, 0.5), 0.5) == [2, 1]


@given(
    way=st.sampled_from(["uniform", "global", "error", "outliers"]),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.95]),
    spread=st.sampled_from([0.0, 0.08, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_as_many_go_as_asked_for(way: Any, sizes: list[int], share: float, spread: float, seed: int) -> None:
    layers = [Summary.of(scores(size, seed + k, 3.0**k)) for k, size in enumerate(sizes)]
    found = allotted(way, layers, [share] * len(sizes), spread)
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    if way == "uniform":
        return
    assert all(count < size for count, size in zip(found, sizes, strict=True))
    # Whole numbers within narrow bounds need not add up.
    assert abs(sum(found) - round(share * sum(sizes))) <= len(sizes)
    if way == "global":
        assert sum(found) == min(round(share * sum(sizes)), sum(sizes) - len(sizes))


@given(share=st.sampled_from([0.2, 0.5, 0.9]), seed=st.integers(0, 2**32))
def test_global_is_a_sort_of_all_scores(share: float, seed: int) -> None:
    """Of scores that a summary tells apart, in float64."""
    rows = [scores(50, seed + k, 2.0**k).bfloat16().float() for k in range(3)]
    removed = round(share * 150)
    bound = sorted(torch.cat(rows).double().tolist())[removed - 1]
    found = allotted("global", [Summary.of(row) for row in rows], [share] * 3, 0)
    for row, count in zip(rows, found, strict=True):
        if max(found) < 49:
            assert int((row.double() < bound).sum()) <= count <= int((row.double() <= bound).sum())


def test_more_stays_where_there_are_more_outliers() -> None:
    """The second of three equally large layers has twice as many as the third, the first none."""
    layers = []
    for many in (0, 20, 10):
        values = torch.ones(1000)
        values[:many] = 100
        layers.append(Summary.of(values))
    # 0, 0.02 and 0.01 become 0, 0.2 and 0.1 around their mean of 0.1.
    assert allotted("outliers", layers, [0.5] * 3, 0.1) == [600, 400, 500]
    assert allotted("outliers", layers[:1] * 2, [0.5] * 2, 0.1) == [500, 500]


def test_by_error_sums_to_less_than_uniform() -> None:
    """A layer with a few large scores can lose more of the others."""
    rows = [scores(500, 1), scores(500, 2).pow(4), scores(1000, 3).sqrt()]
    found = allotted("error", [Summary.of(row) for row in rows], [0.5] * 3, 0.3)
    assert sum(found) == 1000

    def cost(counts: list[int]) -> float:
        parts = zip(rows, counts, strict=True)
        return sum(float(row.sort().values[:count].square().sum() / row.square().sum()) for row, count in parts)

    assert cost(found) < 0.8 * cost([250, 250, 500])
    assert all(0.2 * len(row) <= count <= 0.8 * len(row) for row, count in zip(rows, found, strict=True))


@pytest.mark.parametrize("way", ["global", "error", "outliers"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "taylor", "sparsegpt", "alps"])
def test_a_network_loses_the_share(name: str, way: str, tmp_path: Path) -> None:
    graph = small_graphs.separable()
    for part in ("source", "target"):
        (tmp_path / part).mkdir()
    graph.save(tmp_path / "source")
    step = PassStep.model_validate({name: {"sparsity": 0.6, "allocation": way, "spread": 0.2}}).for_graph()
    labels = torch.arange(12) % 4
    labelled = [(inputs, labels[: len(inputs)]) for inputs in small_graphs.batches(graph)()]
    batches = small_graphs.batches(graph) if step.needs else None
    result = graph_sweep(tmp_path / "source", tmp_path / "target", step, batches, labelled=lambda: iter(labelled))
    made = Graph.read(tmp_path / "target")
    masks = {site.name: made.mask(site.name) for site in made.sites()}
    shares = {layer: float((~mask.kept).float().mean()) for layer, mask in masks.items() if mask is not None}
    total = sum(int((~mask.kept).sum()) for mask in masks.values() if mask is not None)
    assert abs(total - round(0.6 * graph_weights(made))) <= 4
    assert len(set(shares.values())) > 1
    noted = {row.name: row.notes["sparsity"] for row in result.ledger if row.name in shares}
    assert noted == pytest.approx(shares, abs=1e-6)


def graph_weights(graph: Graph) -> int:
    return sum(site.rows * site.columns for site in graph.sites())


def test_what_a_survey_asks_for() -> None:
    assert Magnitude().surveys is None and Magnitude(allocation="global").surveys == Needs.NOTHING
    assert Magnitude(allocation="error").gathers == Needs.NORMS and Magnitude(allocation="error").needs == Needs.NOTHING
    assert Wanda(allocation="global").surveys == Needs.NORMS
    assert ALPS(allocation="outliers").surveys == Needs.NORMS and ALPS(allocation="outliers").gathers == (
        Needs.NORMS | Needs.GRAM
    )


def test_a_pattern_leaves_nothing_to_divide() -> None:
    with pytest.raises(ValidationError, match="leave allocation global out"):
        Magnitude(pattern="2:4", allocation="global")
