"""The `binary` pass: by hand, the best scale for signs, one bit per weight."""

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

from effcli.formats import Codebook, CodebookWeight, Strategy, unpack
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.layers.contract import Layer, LayerPass, Needs
from effcli.passes.quantize import binary
from effcli.run.recipe import PassStep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(weight: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> CodebookWeight:
    outcome = binary.Binary(**options).apply(Layer("layer", "linear", weight, dtype))
    assert isinstance(outcome.weight, CodebookWeight)
    return outcome.weight


def group_of(shape: tuple[int, int], granularity: Strategy) -> int | None:
    """A group size that divides the rows, where one is to be given."""
    return (1 if shape[1] % 4 else 4) if granularity == "group" else None


def test_by_hand() -> None:
    """Rows of mean magnitude 2 and 1.5; zero is positive, whatever its sign."""
    weight = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.0, -0.0, 3.0, -3.0]])
    assert quantized(weight).dequantize().tolist() == [[2, -2, 2, -2], [1.5, 1.5, 1.5, -1.5]]
    assert quantized(weight, granularity="tensor").dequantize()[0].tolist() == [1.75, -1.75, 1.75, -1.75]
    grouped = quantized(weight, granularity="group", group_size=2)
    assert grouped.dequantize().tolist() == [[2, -2, 2, -2], [0, 0, 3, -3]]


@given(
    seed=st.integers(0, 2**32), factor=st.floats(0.5, 2), granularity=st.sampled_from(["tensor", "channel", "group"])
)
def test_no_other_scale_is_better(seed: int, factor: float, granularity: Strategy) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    made = quantized(weight, granularity=granularity, group_size=4 if granularity == "group" else None)
    dense = made.dequantize().double()
    assert float((dense - weight).square().sum()) <= float((dense * factor - weight).square().sum()) + 1e-9
    assert torch.equal(dense.sign(), weight.sign().double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (41, 72)])
def test_a_bit_per_weight_in_the_file(shape: tuple[int, int], granularity: Strategy, dtype: torch.dtype) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    made = quantized(weight, dtype, granularity=granularity, group_size=group_of(shape, granularity))
    packed = made.pack()
    assert packed["weight_packed"].nbytes == -(-weight.numel() // 32) * 4
    assert sum(tensor.nbytes for tensor in packed.values()) == made.format.nbytes(shape, dtype.itemsize)
    again = unpack(made.format, packed).dequantize()
    assert again.dtype == dtype
    torch.testing.assert_close(again, made.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.25, 3.0])
def test_equal_weights_are_exact(value: float) -> None:
    assert bool((quantized(torch.full((3, 5), value)).dequantize() == value).all())


def test_convolutions(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    graph.save(tmp_path / "before")
    graph_sweep(tmp_path / "before", tmp_path / "after", PassStep.model_validate("binary").for_graph())
    made = Graph.read(tmp_path / "after")
    for site in graph.sites():
        before: Any = graph.layer(site.name).weight
        after: Any = made.layer(site.name).weight
        torch.testing.assert_close(after.flatten(1).abs().amax(1), before.flatten(1).abs().mean(1))
        assert torch.equal(after > 0, before >= 0)


def test_what_the_pass_asks_for() -> None:
    assert binary.Binary().format == binary.Binary().for_graph().format == Codebook("binary", 1, "channel")
    assert isinstance(binary.Binary(), LayerPass) and binary.Binary().needs == Needs.NOTHING


@pytest.mark.parametrize("options", [{"bits": 2}, {"granularity": "group"}, {"group_size": 8}, {"granularity": "row"}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        binary.Binary(**options)
