"""Which nodes of a graph become one integer operation, and which tensors must share one scale.

A ReLU or a clamp behind a convolution, linear, addition, multiplication or average becomes the bounds of its result;
zero padding before a convolution becomes the convolution's own, and padding with -inf that of a max pooling. Operations
that only move or select numbers (`SHARING`) keep the scale of their input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Graph, operation, where
from effcli.graphs.operations import HIGHEST, LOWEST

Padding = tuple[int, int, int, int]
Grid = tuple[float, int]

# Scale and zero point of probabilities, unless all are small, and of the numbers of rows that an embedding looks up.
PROBABILITIES: Grid = (1 / 256, LOWEST)
INDICES: Grid = (1.0, LOWEST)
_FINEST = 2.0**-24

# What returns numbers of its inputs, and perhaps a constant.
SHARING = {
    "aten.max_pool1d.default",
    "aten.max_pool2d.default",
    "aten.reshape.default",
    "aten.permute.default",
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.cat.default",
    "aten.to.dtype",
    "aten.constant_pad_nd.default",
}
ACTIVATIONS = {"aten.relu.default", "aten.hardtanh.default"}
_AVERAGES = {
    "aten.avg_pool1d.default",
    "aten.avg_pool2d.default",
    "aten.adaptive_avg_pool1d.default",
    "aten.adaptive_avg_pool2d.default",
    "aten.mean.dim",
}
_ARITHMETIC = {"aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor"}
_MAXIMA = {"aten.max_pool1d.default", "aten.max_pool2d.default"}
# Moves of single numbers, behind which a max pooling may still be all that reads them.
_MOVES = {"aten.reshape.default", "aten.permute.default", "aten.slice.Tensor", "aten.select.int"}
# A padding below this stands for -inf: networks also write the least float32.
_NO_NUMBER = -1e30
# A ReLU commutes with these: the largest of clamped numbers is the largest one, clamped.
_COMMUTING = {"aten.max_pool1d.default", "aten.max_pool2d.default", "aten.reshape.default", "aten.permute.default"}


@dataclass(frozen=True)
class Fusion:
    """How a graph falls into integer operations.

    bounds: by the node that computes, the activation fused into it, whose name the result has; pads: by convolution or
    max pooling, the node of the padding folded into it; fills: by padding that is left, the number other than zero
    that it fills in, -inf where the lowest code will do since only a max pooling reads it; absorbed: the nodes that are
    part of another in one of these ways; groups: by the name of each remaining tensor, the name of the one that stands
    for all that share its scale; roots: the tensors whose numbers make up all others, which is what an observer has to
    see; grids: by group, the scale and the zero point that an operation demands whatever was observed, but for small
    `probabilities`.
    """

    bounds: dict[fx.Node, fx.Node]
    pads: dict[fx.Node, fx.Node]
    absorbed: set[fx.Node]
    groups: dict[str, str]
    roots: tuple[str, ...]
    grids: dict[str, Grid]
    fills: dict[fx.Node, float]

    def covering(self, group: str, low: float, high: float) -> tuple[float, float]:
        """The range of a group widened to the numbers that paddings fill in."""
        fills = [fill for pad, fill in self.fills.items() if self.groups[pad.name] == group and math.isfinite(fill)]
        return min([low, *fills]), max([high, *fills])

    def result(self, node: fx.Node) -> fx.Node:
        """The node whose tensor the operation of `node` returns."""
        return self.bounds.get(node, node)


def hoist_activations(graph: Graph) -> None:
    """Move, in place, activations before the pools and reshapes that commute with them, to where they can be fused."""
    moved = True
    while moved:
        moved = False
        for node in graph.nodes:
            if operation(node) not in ACTIVATIONS:
                continue
            before = node.args[0]
            if not isinstance(before, fx.Node):
                continue
            # What -inf becomes in between does not matter where a max pooling follows, which never returns it.
            passes = fills_nothing(before) and all(operation(user) in _MAXIMA for user in node.users)
            if operation(before) not in _COMMUTING and not passes:
                continue
            if len(before.users) == 1 and len(before.all_input_nodes[0].users) == 1:
                _swap(before, node)
                moved = True
    graph.module.recompile()


def _swap(first: fx.Node, second: fx.Node) -> None:
    """Let `second`, the only reader of `first`, come before it; both read one tensor."""
    (source,) = first.all_input_nodes
    second.replace_all_uses_with(first)
    second.replace_input_with(first, source)
    first.replace_input_with(source, second)
    first.prepend(second)


def fuse(graph: Graph) -> Fusion:
    """Find what belongs together in `graph`."""
    bounds, pads = {}, {}
    for node in graph.nodes:
        user = next(iter(node.users), None)
        if user is None or len(node.users) > 1:
            continue
        if operation(user) in ACTIVATIONS and _clamps(graph, node):
            bounds[node] = user
        elif isinstance(graph.module_of(user), nn.Conv1d | nn.Conv2d) and _foldable(node, graph.module_of(user)):
            pads[user] = node
        if operation(user) in _MAXIMA and fills_nothing(node) and _fits(node, user):
            pads[user] = node
    absorbed = {*bounds.values(), *pads.values()}
    parents: dict[str, str] = {}
    roots = []
    for node in graph.nodes:
        if node.op == "output" or node in absorbed or operation(node) == "aten.sym_size.int":
            continue
        if is_constant(node) and not any(operation(user) in SHARING for user in node.users):
            continue
        result = bounds.get(node, node).name
        parents[result] = result
        if operation(node) in SHARING:
            for source in (each for each in pads.get(node, node).all_input_nodes if each.name in parents):
                parents[_top(parents, source.name)] = result
        else:
            roots.append(result)
    groups = {name: _top(parents, name) for name in parents}
    fills = {}
    for node in graph.nodes:
        if operation(node) == "aten.constant_pad_nd.default" and node not in absorbed and filled(node):
            if fills_nothing(node) and _only_compared(node):
                fills[node] = -math.inf
            elif abs(filled(node)) < -_NO_NUMBER:
                fills[node] = filled(node)
    return Fusion(bounds, pads, absorbed, groups, tuple(roots), _grids(graph, groups, roots), fills)


def is_constant(node: fx.Node) -> bool:
    """Whether a node is a tensor of the network, perhaps repeated for each input of the batch."""
    if operation(node) == "aten.expand.default":
        given, sizes = node.args[:2]
        kept = isinstance(sizes, list | tuple) and all(size == -1 for size in sizes[1:])
        return kept and isinstance(given, fx.Node) and given.op == "get_attr"
    return node.op == "get_attr"


def _grids(graph: Graph, groups: dict[str, str], roots: list[str]) -> dict[str, Grid]:
    """The scales that softmaxes and embeddings demand, by group. `UnsupportedError` where other numbers share them."""
    softmaxes = [node for node in graph.nodes if operation(node) == "aten.softmax.int"]
    lookups = [node for node in graph.nodes if operation(node) == "Embedding"]
    demands = {node.name: PROBABILITIES for node in softmaxes}
    if lookups:
        demands[graph.input.name] = INDICES
    grids: dict[str, Grid] = {}
    for node, name, grid in (
        *((node, node.name, PROBABILITIES) for node in softmaxes),
        *((node, node.all_input_nodes[0].name, INDICES) for node in lookups),
    ):
        others = [root for root in roots if groups[root] == groups[name] and demands.get(root) != grid]
        if others:
            raise UnsupportedError(
                f"{where(node)} shares its scale with {others[0]}",
                "join no other numbers to probabilities, and look up rows by the network's input alone",
            )
        grids[groups[name]] = grid
    return grids


def probabilities(largest: float) -> Grid:
    """The grid of a softmax whose outputs reach `largest`: the finest steps of 2^-b that cover it, b from 8 to 24.

    The largest of n probabilities is at least 1/n, so that 24 bits serve the longest softmax.
    """
    scale, zero = PROBABILITIES
    while largest <= (HIGHEST - LOWEST) * scale / 2 and scale > _FINEST:
        scale /= 2
    return scale, zero


def covered(grid: Grid) -> tuple[float, float]:
    """The numbers of the lowest and the highest code."""
    scale, zero = grid
    return scale * (LOWEST - zero), scale * (HIGHEST - zero)


def _top(parents: dict[str, str], name: str) -> str:
    while parents[name] != name:
        name = parents[name]
    return name


def _foldable(node: fx.Node, convolution: nn.Module | None) -> bool:
    padding = folded_padding(node)
    if padding is None or filled(node) != 0:
        return False
    return not (isinstance(convolution, nn.Conv1d) and any(padding[:2]))


def _fits(pad: fx.Node, pool: fx.Node) -> bool:
    """Whether a max pooling can pad by as much as `pad` besides its own: by less than its window on every side."""
    padding, flat = folded_padding(pad), operation(pool) == "aten.max_pool1d.default"
    if padding is None or (flat and any(padding[:2])):
        return False
    kernel: Any = pool.args[1]
    own: Any = pool.args[3] if len(pool.args) > 3 else pool.kwargs.get("padding", 0)
    extents, around = (
        [number] * 2 if isinstance(number, int) else [*number] * (2 // len(number)) for number in (kernel, own)
    )
    sides = zip(padding, (0, 0, 1, 1), strict=True)
    return all(padded == 0 or padded + around[axis] < extents[axis] for padded, axis in sides)


def filled(pad: fx.Node) -> float:
    """The number that a constant padding fills in."""
    return float(pad.args[2] if len(pad.args) > 2 else pad.kwargs.get("value") or 0)  # type: ignore[arg-type]


def fills_nothing(node: fx.Node) -> bool:
    """Whether `node` pads with -inf, or a number as low as that."""
    return operation(node) == "aten.constant_pad_nd.default" and filled(node) <= _NO_NUMBER


def _only_compared(node: fx.Node) -> bool:
    """Whether max poolings are all that numbers of `node` reach."""
    return all(
        operation(user) in _MAXIMA or (operation(user) in _MOVES and _only_compared(user)) for user in node.users
    )


def folded_padding(node: fx.Node) -> Padding | None:
    """Rows above and below, columns left and right, if `node` pads the last one or two axes."""
    if operation(node) != "aten.constant_pad_nd.default":
        return None
    given: Any = node.args[1]
    amounts = list(given)
    amounts += [0] * (4 - len(amounts))
    if min(amounts) < 0 or any(amounts[4:]):
        return None
    left, right, above, below = amounts[:4]
    return above, below, left, right


def bounds(activation: fx.Node) -> tuple[float, float]:
    """The numbers between which a ReLU or a clamp leaves its input as it is."""
    if operation(activation) == "aten.relu.default":
        return 0.0, math.inf
    limits: list[Any] = [*activation.args[1:], *(-1.0, 1.0)[len(activation.args) - 1 :]]
    return float(limits[0]), float(limits[1])


def _clamps(graph: Graph, node: fx.Node) -> bool:
    """Whether the operation of `node` has bounds of its own."""
    bounded = nn.Conv1d | nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm
    if isinstance(graph.module_of(node), bounded):
        return True
    kind = operation(node)
    return (
        kind in _AVERAGES
        or kind == "aten.matmul.default"
        or (kind in _ARITHMETIC and all(isinstance(term, fx.Node) for term in node.args[:2]))
    )
