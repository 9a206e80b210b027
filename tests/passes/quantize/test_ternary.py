"""The `ternary` pass: by hand, against a plain reference, two bits per weight or fewer."""

from __future__ import annotations

import math
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
from effcli.passes.quantize import ternary
from effcli.run.recipe import PassStep

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(weight: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> CodebookWeight:
    outcome = ternary.Ternary(**options).apply(Layer("layer", "linear", weight, dtype))
    assert isinstance(outcome.weight, CodebookWeight)
    return outcome.weight


def group_of(shape: tuple[int, int], granularity: Strategy) -> int | None:
    """A group size that divides the rows, where one is to be given."""
    return (1 if shape[1] % 4 else 4) if granularity == "group" else None


def test_by_hand() -> None:
    """The mean magnitudes are 2 and 1: above 1.4 and 0.7 stand {-3, 4} and {1.5, 2}."""
    weight = torch.tensor([[1.0, -3.0, 4.0, 0.0], [0.5, 1.5, 2.0, 0.0]])
    assert quantized(weight).dequantize().tolist() == [[0, -3.5, 3.5, 0], [0, 1.75, 1.75, 0]]
    # Over the whole tensor the threshold is 1.05.
    assert quantized(weight, granularity="tensor").scales.tolist() == [2.625]  # type: ignore[union-attr]
    grouped = quantized(weight, granularity="group", group_size=2)
    assert grouped.dequantize().tolist() == [[0, -3, 4, 0], [0, 1.5, 2, 0]]


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), columns=st.integers(1, 30))
def test_is_the_plain_reference(seed: int, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    wanted = []
    for row in weight.double().tolist():
        threshold = 0.7 * math.fsum(map(abs, row)) / len(row)
        above = [abs(value) for value in row if abs(value) > threshold]
        scale = math.fsum(above) / len(above)
        wanted.append([math.copysign(scale, value) if abs(value) > threshold else 0.0 for value in row])
    torch.testing.assert_close(quantized(weight).dequantize(), torch.tensor(wanted))


@given(seed=st.integers(0, 2**32), granularity=st.sampled_from(["tensor", "channel", "group"]))
def test_zeros_stay_zero_and_no_other_scale_is_better(seed: int, granularity: Strategy) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    weight = weight * (weight.abs() > 0.5)
    made = quantized(weight, granularity=granularity, group_size=4 if granularity == "group" else None)
    dense = made.dequantize().double()
    assert bool((dense[weight == 0] == 0).all())
    errors = [float((dense * factor - weight).square().sum()) for factor in (1.0, 0.95, 1.05)]
    assert errors[0] <= min(errors[1:]) + 1e-9


@pytest.mark.parametrize("huffman", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (41, 72)])
def test_two_bits_per_weight_in_the_file(
    shape: tuple[int, int], granularity: Strategy, dtype: torch.dtype, huffman: bool
) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    size = group_of(shape, granularity)
    made = quantized(weight, dtype, granularity=granularity, group_size=size, huffman=huffman)
    packed = made.pack()
    held = sum(tensor.nbytes for tensor in packed.values())
    if huffman:
        assert held <= made.format.nbytes(shape, dtype.itemsize)
        # At most 1.58 bits of entropy, and a code that gives 1 bit to the most frequent of three.
        assert packed["weight_packed"].nbytes <= math.ceil(weight.numel() * 5 / 3 / 8)
    else:
        assert held == made.format.nbytes(shape, dtype.itemsize)
        assert packed["weight_packed"].nbytes == -(-weight.numel() * 2 // 32) * 4
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
    graph_sweep(tmp_path / "before", tmp_path / "after", PassStep.model_validate("ternary").for_graph())
    made = Graph.read(tmp_path / "after")
    for site in graph.sites():
        after: Any = made.layer(site.name).weight
        levels = after.flatten(1).abs()
        assert bool(((levels == 0) | (levels == levels.amax(1, keepdim=True))).all())


def test_what_the_pass_asks_for() -> None:
    assert ternary.Ternary().format == ternary.Ternary().for_graph().format == Codebook("ternary", 2, "channel")
    assert ternary.Ternary(huffman=True).format == Codebook("ternary", 2, "channel", huffman=True)
    assert isinstance(ternary.Ternary(), LayerPass) and ternary.Ternary().needs == Needs.NOTHING


@pytest.mark.parametrize("options", [{"bits": 2}, {"granularity": "group"}, {"group_size": 8}, {"threshold": 0.5}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ternary.Ternary(**options)
