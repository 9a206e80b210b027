"""Running a graph while looking on."""

from __future__ import annotations

from typing import Any

import small_graphs
import torch
from torch import Tensor, fx

from effcli.graphs.walk import Walk, stream


def test_streaming_sees_every_input_and_output() -> None:
    graph = small_graphs.residual()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def look(node: fx.Node, inputs: Any, value: Any) -> None:
        seen.setdefault(node.name, []).append((inputs, value))

    stream(graph, small_graphs.batches(graph)(), look)
    whole = small_graphs.inputs(graph)
    torch.testing.assert_close(torch.cat([value for _, value in seen["head"]]), graph.run(whole))
    torch.testing.assert_close(torch.cat([inputs for inputs, _ in seen["stem"]]), whole)


def test_walking_gives_the_same_values_and_forgets_them() -> None:
    graph = small_graphs.residual()
    last = None
    walk = Walk(graph, small_graphs.batches(graph)())
    alive = []
    for node in walk:
        alive.append(len(walk._values))
        if node.name == "head":
            last = torch.cat(list(walk.outputs(node)))
            assert [len(value) for value in walk.inputs(node)] == [5, 5, 2]
    torch.testing.assert_close(last, graph.run(small_graphs.inputs(graph)))
    # The residual connection keeps one value beside the one that is being made.
    assert max(alive) == 2


def test_a_layer_changed_on_the_way_counts_for_what_follows() -> None:
    graph = small_graphs.residual()
    before = graph.run(small_graphs.inputs(graph))
    outputs = None
    walk = Walk(graph, small_graphs.batches(graph)())
    for node in walk:
        if node.name == "stem":
            graph.set_weight("stem", torch.zeros(8, 27))
        if node.name == "head":
            outputs = torch.cat(list(walk.outputs(node)))
    torch.testing.assert_close(outputs, graph.run(small_graphs.inputs(graph)))
    assert not torch.allclose(graph.run(small_graphs.inputs(graph)), before)


def test_no_batch_at_all() -> None:
    graph = small_graphs.residual()
    walk = Walk(graph, iter(()))
    assert [len(list(walk.outputs(node))) for node in walk if node.op == "call_module"] == [0] * 7
