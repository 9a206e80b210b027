"""Graphs tried on shapes alone: arithmetic on sizes within limits, and the memory of a batch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from effcli.graphs import graph as graphs
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.trial import Sizes, largest


def computed(target: Callable[..., Any], *args: Any) -> Any:
    graph = fx.Graph()
    graph.output(graph.create_node("call_function", target, args))
    return Sizes(nn.Module(), graph=graph).run()


@pytest.mark.parametrize(
    ("target", "args", "value"),
    [
        (operator.pow, (2, 62), 2**62),
        (operator.pow, (-1, 10**12), 1),
        (operator.pow, (3, -1), 1 / 3),
        (operator.mul, (2**31, 2**31), 2**62),
        (operator.getitem, ([4, 5], 1), 5),
        (torch.sym_sum, ([1, 2, 3],), 6),
    ],
)
def test_arithmetic_on_sizes(target: Callable[..., Any], args: tuple[Any, ...], value: Any) -> None:
    assert computed(target, *args) == value


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (operator.pow, (10**9, 10**9)),
        (operator.pow, (2, 63)),
        (operator.mul, (2**32, 2**32)),
        (operator.mul, ("x", 10**9)),
        (operator.mul, ([1], 10**9)),
        (operator.add, ("a", "b")),
    ],
)
def test_sizes_that_are_none(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"it computes with|it makes a size of more than 64 bits"):
        computed(target, *args)


def wide() -> Graph:
    """64 numbers for one input of 4, its largest value."""
    builder = Builder()
    made = builder.call("aten.repeat.default", builder.input(), [1, 16])
    return builder.finish(builder.call("aten.mul.Tensor", made, 2.0), Facts(origin="test", shape=(4,)))


def test_the_largest_value() -> None:
    assert largest(wide().module, (4,)) == 64


def test_a_large_batch_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, seen = wide(), []
    graph.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    inputs = torch.arange(40.0).reshape(10, 4)
    whole = graph.run(inputs)
    monkeypatch.setattr(graphs, "_ROOM", 4 * 64)
    assert torch.equal(graph.run(inputs), whole)
    monkeypatch.setattr(graphs, "_ROOM", 1)
    assert torch.equal(graph.run(inputs[:2]), whole[:2])
    assert [count for count in seen if count][-6:] == [10, 4, 4, 2, 1, 1]
