"""From a graph and the ranges of its tensors to an IntegerNetwork (arXiv:1712.05877).

Weights become signed codes with one scale per output channel, activations asymmetric int8 with one scale per tensor.
With x ≈ s (q - z), W ≈ s_W c and y ≈ s_y (q_y - z_y) a layer computes

    q_y = z_y + (s s_W / s_y) (Σ c q + (b / (s s_W) - z Σ c)),

everything in the outer bracket int32, and the factor before it a multiplier with a shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from effcli.errors import NumericsError, UnsupportedError
from effcli.graphs import lowering_attention as attention
from effcli.graphs import lowering_layers as layers
from effcli.graphs import lowering_moves as moves
from effcli.graphs.assembly import REMEDY, Assembly, Range
from effcli.graphs.fusion import fuse, is_constant
from effcli.graphs.graph import Graph, operation, where
from effcli.graphs.integer import IntegerNetwork

# Functions of one number, which become tables.
_FUNCTIONS = (
    *("relu", "hardtanh", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardswish"),
    *("sigmoid", "hardsigmoid", "tanh", "abs", "neg", "exp"),
)
_HANDLERS: dict[str, Callable[[Assembly, fx.Node], None]] = {
    "Conv1d": layers.convolution,
    "Conv2d": layers.convolution,
    "Linear": layers.linear,
    "BatchNorm1d": layers.batch_norm,
    "BatchNorm2d": layers.batch_norm,
    "aten.add.Tensor": layers.arithmetic,
    "aten.sub.Tensor": layers.arithmetic,
    "aten.mul.Tensor": layers.arithmetic,
    "aten.div.Tensor": layers.quotient,
    "aten.matmul.default": attention.product,
    "aten.softmax.int": attention.softmax,
    "LayerNorm": attention.layer_norm,
    "Embedding": attention.embedding,
    "aten.to.dtype": attention.conversion,
    **{f"aten.{name}.default": layers.table for name in _FUNCTIONS},
    "aten.max_pool1d.default": moves.max_pool,
    "aten.max_pool2d.default": moves.max_pool,
    "aten.avg_pool1d.default": moves.average_pool,
    "aten.avg_pool2d.default": moves.average_pool,
    "aten.adaptive_avg_pool1d.default": moves.adaptive_pool,
    "aten.adaptive_avg_pool2d.default": moves.adaptive_pool,
    "aten.mean.dim": moves.mean,
    "aten.constant_pad_nd.default": moves.pad,
    "aten.cat.default": moves.concatenate,
    "aten.slice.Tensor": moves.take,
    "aten.select.int": moves.select,
    "aten.reshape.default": moves.reshape,
    "aten.permute.default": moves.transpose,
}


@dataclass(frozen=True)
class Lowered:
    """An integer network, notes by layer, and remarks on weights that could not stay as they were stored."""

    network: IntegerNetwork
    notes: Mapping[str, dict[str, Any]]
    remarks: tuple[str, ...] = ()


def lower(graph: Graph, ranges: Mapping[str, Range], clip_weights: bool = False) -> Lowered:
    """The integer network of `graph`, whose batch norms should be folded.

    ranges: by tensor, for one tensor of each of `fuse(graph).groups` at least. clip_weights: shrink the range of a
    channel's weights where that lessens their squared error. Weights compressed before with symmetric codes and a scale
    per channel or tensor keep both; any other form is rounded again to int8, with a remark. `UnsupportedError` for what
    has no integer operation, `NumericsError` for scales that no multiplier can express.
    """
    assembly = Assembly(graph, ranges, clip_weights)
    for node, handler in _handled(assembly):
        handler(assembly, node)
    program, arrays = assembly.program()
    remarks = []
    if assembly.rounded_again:
        remarks.append(
            f"{', '.join(assembly.rounded_again)}: rounded again to int8 per channel, since integer operations need "
            "symmetric codes with a scale per channel or tensor"
        )
    return Lowered(IntegerNetwork(program, arrays, graph.facts), assembly.notes, tuple(remarks))


def check(graph: Graph) -> Assembly:
    """What is made of `graph` whatever its ranges will be; `UnsupportedError` if an operation has no counterpart."""
    assembly = Assembly(graph, {name: (-1.0, 1.0) for name in fuse(graph).groups}, False)
    for node, handler in _handled(assembly):
        try:
            handler(assembly, node)
        except NumericsError:
            # A matter of the ranges, which only calibration knows; what follows can still be judged.
            last = assembly.fusion.result(node).name
            if last not in assembly.values:
                assembly.declare(last, assembly.shapes[last])
    return assembly


def _handled(assembly: Assembly) -> Iterator[tuple[fx.Node, Callable[[Assembly, fx.Node], None]]]:
    """The nodes that become steps, with what makes them; `UnsupportedError` at the first without."""
    for node in assembly.graph.nodes:
        if node.op == "output" or is_constant(node) or node in assembly.fusion.absorbed:
            continue
        if operation(node) == "aten.sym_size.int":
            continue  # the batch's size, traced where torch checks it: what takes it is named, with its own line
        if node.op == "placeholder":
            assembly.declare(node.name, assembly.shapes[node.name])
            continue
        handler = _HANDLERS.get(operation(node))
        if handler is None:
            raise UnsupportedError(f"{where(node)} has no integer operation", REMEDY)
        yield node, handler
