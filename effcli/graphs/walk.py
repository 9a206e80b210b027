"""Running a graph while looking on: batch by batch, or node by node over all batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from effcli.graphs.graph import Graph

# Told of a node that has just run: its first argument and its value.
Look = Callable[[fx.Node, Any, Any], None]


def stream(graph: Graph, batches: Iterable[Tensor], look: Look) -> None:
    """Run batch after batch, freeing every value after its last use; `look` sees every node that has an argument."""

    class Looking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.args and isinstance(n.args[0], fx.Node):
                look(n, self.env[n.args[0]], value)
            return value

    with torch.no_grad():
        for batch in batches:
            Looking(graph.module).run(batch)


class Walk:
    """All batches through a graph, one node after the other: a layer may be changed when everything before it has run.

    Iterating yields each node before it runs. In memory are the values of all batches that a later node still reads:
    for n inputs that is n times what one input needs.
    """

    def __init__(self, graph: Graph, batches: Iterable[Tensor]) -> None:
        self.graph = graph
        self._interpreter = fx.Interpreter(graph.module)
        self._batches = list(batches)
        self._count = len(self._batches)
        self._values: dict[fx.Node, list[Any]] = {}
        last = {used: node for node in graph.nodes for used in node.all_input_nodes}
        self._freed: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self._freed.setdefault(node, []).append(used)

    def __iter__(self) -> Iterator[fx.Node]:
        for node in self.graph.nodes:
            if node.op == "output":
                return
            yield node
            self._values[node] = self._batches if node.op == "placeholder" else list(self.outputs(node))
            if node.op == "placeholder":
                self._batches = []
            for used in self._freed.get(node, ()):
                del self._values[used]

    def inputs(self, node: fx.Node) -> list[Any]:
        """The first argument of a node, one value per batch."""
        return self._values[node.all_input_nodes[0]]

    def outputs(self, node: fx.Node) -> Iterator[Any]:
        """What a node makes of the values before it, batch by batch, with its layer as it is now."""
        for k in range(self._count):
            with torch.no_grad():
                yield self._run(node, k)

    def _run(self, node: fx.Node, k: int) -> Any:
        args = fx.node.map_arg(node.args, lambda used: self._values[used][k])
        kwargs = fx.node.map_arg(node.kwargs, lambda used: self._values[used][k])
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)
