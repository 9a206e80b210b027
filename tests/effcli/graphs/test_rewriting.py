"""Rewritings that leave what a graph computes as it was, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Builder, Facts, Graph, operation
from effcli.graphs.rewriting import decompose_attention, select_before_permuting

ATTENTION = "aten.scaled_dot_product_attention.default"


def attention(leading: tuple[int, ...] = (2,), *rest: Any, **options: Any) -> Graph:
    b = Builder()
    x = b.input("x")
    q, k, v = (b.module(name, nn.Linear(6, 6), x) for name in "qkv")
    return b.finish(
        b.call(ATTENTION, q, k, v, *rest, source="net.py:5", **options), Facts(origin="", shape=(*leading, 5, 6))
    )


def inputs_of(graph: Graph) -> Tensor:
    return torch.randn(3, *graph.facts.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"scale": None, "enable_gqa": False}])
def test_attention_becomes_products(leading: tuple[int, ...], options: dict[str, Any]) -> None:
    graph = attention(leading, **options)
    before = graph.run(inputs_of(graph))
    decompose_attention(graph)
    torch.testing.assert_close(graph.run(inputs_of(graph)), before)
    kinds = [operation(node) for node in graph.nodes]
    assert ATTENTION not in kinds and kinds.count("aten.matmul.default") == 2
    (scaled,) = (node for node in graph.nodes if operation(node) == "aten.mul.Tensor")
    assert scaled.args[1] == pytest.approx(options.get("scale") or 1 / math.sqrt(6))
    assert scaled.meta["source"] == "net.py:5"


@pytest.mark.parametrize(
    ("rest", "options", "message"),
    [
        ((None, 0.0, True), {}, "masks its scores"),
        ((None, 0.1), {}, "at random"),
        ((), {"enable_gqa": True}, "shares keys"),
    ],
)
def test_attention_that_stays_no_attention(rest: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        decompose_attention(attention((2,), *rest, **options))
    assert "net.py:5" in caught.value.cause and caught.value.remedy


def test_a_masked_attention() -> None:
    b = Builder()
    x = b.input("x")
    graph = b.finish(b.call(ATTENTION, x, x, x, b.tensor("mask", torch.zeros(5, 5))), Facts(origin="", shape=(5, 6)))
    with pytest.raises(UnsupportedError, match="masks its scores"):
        decompose_attention(graph)


@pytest.mark.parametrize("dims", [[2, 0, 3, 1, 4], [2, 0, 1, 3, 4], [0, 4, 1, 3, 2]])
def test_queries_keys_and_values_of_one_layer(dims: list[int]) -> None:
    """No axis is moved to the batch any more, and an order that changes nothing is none."""
    b = Builder()
    x = b.call("aten.reshape.default", b.input("x"), [-1, 5, 3, 2, 4])
    x = b.call("aten.permute.default", x, dims)
    axis = dims.index(2)
    parts = [b.call("aten.select.int", x, axis, index) for index in range(3)]
    y = b.call("aten.sub.Tensor", b.call("aten.mul.Tensor", parts[0], parts[1]), parts[2])
    graph = b.finish(y, Facts(origin="", shape=(5, 24)))
    before = graph.run(inputs_of(graph))
    select_before_permuting(graph)
    torch.testing.assert_close(graph.run(inputs_of(graph)), before)
    orders = [node.args[1] for node in graph.nodes if operation(node) == "aten.permute.default"]
    assert all(isinstance(order, list) and order[0] == 0 for order in orders)
    assert len(orders) == (0 if dims == [2, 0, 1, 3, 4] else 3)


def test_a_permuted_tensor_that_is_read_whole_stays() -> None:
    b = Builder()
    x: fx.Node = b.call("aten.permute.default", b.input("x"), [0, 2, 1])
    graph = b.finish(
        b.call("aten.add.Tensor", x, b.call("aten.reshape.default", x, [-1, 3, 4])), Facts(origin="", shape=(4, 3))
    )
    before = [node.name for node in graph.nodes]
    select_before_permuting(graph)
    assert [node.name for node in graph.nodes] == before
