"""The `magnitude` pass: by hand, and against a plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import Mask
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.layers.contract import Layer, Needs
from effcli.passes.prune.magnitude import Magnitude
from effcli.run.recipe import PassStep


def kept(weight: Tensor, compare: Literal["layer", "row"], sparsity: float = 0.5) -> Tensor:
    outcome = Magnitude(sparsity=sparsity, compare=compare).apply(Layer("layer", "linear", weight, torch.float32))
    assert outcome.mask is not None and outcome.weight is weight
    return outcome.mask.kept


def test_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0], [0.5, 0.25, -2.5, 1.0]])
    assert kept(weight, "row").tolist() == [[True, False, False, True], [False, False, True, True]]
    assert kept(weight, "layer").tolist() == [[True, False, True, True], [False, False, True, False]]


@given(rows=st.integers(1, 6), columns=st.integers(1, 20), sparsity=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_nothing_kept_is_smaller_than_what_is_removed(rows: int, columns: int, sparsity: float, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double().float()
    stays = kept(weight, "layer", sparsity)
    gone = min(round(sparsity * weight.numel()), weight.numel() - 1)
    ranked = sorted(weight.double().abs().flatten().tolist())[gone:]
    assert sorted(weight.double().abs()[stays].tolist()) == ranked


def of_grain(weight: Tensor, grain: str, sparsity: float, mask: Mask | None = None) -> Tensor:
    """What is kept of a convolution's weight (out, in, height, width)."""
    config = Magnitude.model_validate({"sparsity": sparsity, "grain": grain})
    kernel = weight.shape[2], weight.shape[3]
    layer = Layer("layer", "conv", weight.flatten(1), torch.float32, mask=mask, kernel=kernel)
    outcome = config.apply(layer)
    assert outcome.mask is not None
    return outcome.mask.kept.view(weight.shape)


def test_grains_by_hand() -> None:
    """Two filters of two kernels 2 x 3; each kernel has one row of ones beside a louder or a quieter one."""
    weight = torch.ones(2, 2, 2, 3)
    weight[0, 0, 1], weight[0, 1, 0] = 0.1, 0.2
    weight[1, 0, 0], weight[1, 1, 1] = 3.0, 0.3
    vectors = of_grain(weight, "vector", 3 / 8)
    assert vectors[..., 0].tolist() == [[[True, False], [False, True]], [[True, True], [True, False]]]
    assert bool((vectors == vectors[..., :1]).all())
    kernels = of_grain(weight, "kernel", 0.25)
    assert kernels[:, :, 0, 0].tolist() == [[False, True], [True, True]]
    assert bool((kernels == kernels[:, :, :1, :1]).all())
    filters = of_grain(weight, "filter", 0.5)
    assert filters[:, 0, 0, 0].tolist() == [False, True] and bool((filters == filters[:, :1, :1, :1]).all())


@pytest.mark.parametrize("grain", ["vector", "kernel", "filter"])
def test_removed_parts_stay_removed(grain: str) -> None:
    weight = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    first = of_grain(weight, grain, 0.25)
    again = of_grain(weight * first, grain, 0.5, Mask(first.flatten(1)))
    assert not bool((again & ~first).any())
    assert float(again.float().mean()) == pytest.approx(0.5, abs=0.06)


def test_a_linear_layer_has_no_kernels() -> None:
    weight = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    for grain in ("vector", "kernel"):
        assert torch.equal(of_grain(weight[..., None, None], grain, 0.5)[..., 0, 0], kept(weight, "layer"))


def test_grains_reach_the_convolutions_of_a_graph(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    graph = small_graphs.separable()
    graph.save(source)
    graph_sweep(source, target, PassStep.model_validate({"magnitude": {"grain": "kernel", "sparsity": 0.5}}))
    made = Graph.read(target)
    mask = made.mask("layer0")
    assert mask is not None
    kernels = mask.kept.view(6, 3, 3, 3)
    assert bool((kernels == kernels[:, :, :1, :1]).all()) and int(kernels[:, :, 0, 0].sum()) == 9
    # A depthwise convolution has one kernel in each of its groups, which compete.
    mask = made.mask("layer2")
    assert mask is not None and sorted(mask.kept.sum(1).tolist()) == [0] * 3 + [9] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grain": "kernel", "pattern": "2:4"}, "a pattern takes single weights"),
        ({"grain": "filter", "compare": "row"}, "compare=row has the weights of one output compete"),
    ],
)
def test_grains_that_cannot_be_kept(options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Magnitude.model_validate(options)


def test_what_it_asks_for() -> None:
    assert Magnitude().needs == Needs.NOTHING
    with pytest.raises(ValueError, match="compare"):
        Magnitude(compare="column")  # type: ignore[arg-type]


@pytest.mark.parametrize(("grain", "sparsity"), [("filter", 0.9), ("kernel", 0.97), ("weight", 0.999)])
def test_something_of_a_layer_stays(grain: str, sparsity: float) -> None:
    kept = of_grain(torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), grain, sparsity)
    assert bool(kept.any())
