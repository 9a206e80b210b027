"""A translation from ONNX under way: its values by name, the graph as it grows, and one ONNX node at a time.

Every shape is known: the graph is traced on meta tensors with a batch of fixed extent. Axis 0 of an activation is the
batch, alone or with other axes folded into it, so that its extent is a multiple of the batch's.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.trial import MOST_NUMBERS

if TYPE_CHECKING:
    from onnx import NodeProto

Array = NDArray[Any]

EXPORT = "export the network without it, or with torch.export to a .pt2 file"

# Where torch's exporter keeps the path of the module that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Constants may come to so many bytes, and so many times a file's weights: integers become floats, and are permuted.
_ROOM = 256 << 20
_GROWTH = 32
# An input of so many numbers may be a shape.
_SHORT = 1024
# These can make more numbers than they are given.
_WINDOWS = {"BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix"}
_GROWING = {"CenterCropPad", "Col2Im", "ConstantOfShape", "Einsum", "Expand", "MaxUnpool", "OneHot", "Pad", "Range"}
_GROWING |= {"Resize", "Tile", "Upsample", *_WINDOWS}
# onnx computes these from this operator set on, and earlier ones mean the same.
_NEWER = {"DequantizeLinear": 19, "QuantizeLinear": 19}
_RESERVED = {*dir(nn.Module()), *keyword.kwlist}
_PARAMETER = re.compile(r"(\w+(?:\.\w+)*)\.\w+")


class Translation:
    """values: each ONNX value by name, an activation as a node, a constant as an array. batch: extent in the trace."""

    def __init__(self, opset: int, batch: int) -> None:
        self.opset = opset
        self.batch = batch
        self.values: dict[str, fx.Node | Array] = {}
        self._builder = Builder()
        self._traced: dict[fx.Node, Tensor] = {}
        self._names: set[str] = set()
        self._layers: dict[tuple[Any, ...], tuple[str, nn.Module]] = {}
        self._room = _ROOM

    def allow(self, weights: int) -> None:
        """Let constants take as much as weights of so many bytes can come to."""
        self._room = _ROOM + _GROWTH * weights

    def folded(self, proto: NodeProto, inputs: dict[str, Array]) -> Iterator[tuple[str, Array]]:
        """The outputs of a node whose inputs are all constants, by name; refused where they would be too large."""
        expected = _folded_bytes(proto, inputs, self.opset)
        if expected is None:
            expected = self._room + 1 if proto.op_type in _GROWING else 0
        if expected > self._room:
            raise UnsupportedError(
                f"{describe(proto)} makes constants larger than effcli computes", "export it with its constants folded"
            )
        for name, value in _folded(proto, inputs, self.opset):
            self._room -= value.nbytes
            yield name, value

    def check(self, proto: NodeProto, inputs: Mapping[str, fx.Node | Array]) -> None:
        """Raise what onnx's own inference of shapes raises for a node with these inputs.

        Nodes that take the shape of their output from a constant are left out: that holds for one size of batch.
        """
        from onnx import defs, helper, numpy_helper, shape_inference

        if proto.op_type in _SHAPED:
            return
        types, data = {}, {}
        for name, value in inputs.items():
            if isinstance(value, fx.Node):
                dtype = torch.empty(0, dtype=self._traced[value].dtype).numpy().dtype
                types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(dtype), self.shape(value))
                continue
            types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            if value.size <= _SHORT:
                data[name] = numpy_helper.from_array(value, name)
        schema = defs.get_schema(proto.op_type, self.opset, "")
        imports = [helper.make_opsetid("", self.opset)]
        shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)

    def input(self, name: str, shape: tuple[int, ...]) -> None:
        """Declare the network's input; shape: without the batch axis."""
        node = self._builder.input(name)
        self._traced[node] = torch.empty(self.batch, *shape, device="meta")
        self.values[name] = node

    def call(self, operation: str, *args: Any, source: str, **kwargs: Any) -> fx.Node:
        node = self._builder.call(operation, *args, source=source, **kwargs)
        assert callable(node.target)
        return self._activation(node, node.target(*fx.node.map_arg(args, self._traced.__getitem__), **kwargs))

    def layer(self, name: str, key: tuple[Any, ...], module: nn.Module, x: fx.Node, source: str) -> fx.Node:
        """Call a layer; layers of one `key` are one layer called several times."""
        if key not in self._layers:
            self._layers[key] = self._unique(name), module
        name, module = self._layers[key]
        node = self._builder.module(name, module.eval(), x, source=source)
        weightless = {own: value.to("meta") for own, value in module.state_dict().items()}
        return self._activation(node, torch.func.functional_call(module, weightless, (self._traced[x],)))

    def tensor(self, name: str, value: Array, source: str) -> fx.Node:
        """A constant operand."""
        tensor = torch.tensor(value.copy(order="C"))
        node = self._builder.tensor(self._unique(name), tensor, source)
        self._traced[node] = tensor.to("meta")
        return node

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._traced[node].shape)

    def finish(self, output: fx.Node, facts: Facts) -> Graph:
        graph = self._builder.finish(output, facts)
        fold_biases(graph)
        # Made anew, so that the constants that went into biases stay behind.
        return Graph(fx.GraphModule(graph.module, graph.module.graph), facts)

    def _activation(self, node: fx.Node, traced: Tensor) -> fx.Node:
        if traced.ndim == 0 or traced.shape[0] == 0 or traced.shape[0] % self.batch:
            raise UnsupportedError(
                f"{node.meta['source']} makes a tensor whose first axis is not the batch",
                "export the network so that it works on batches of any size",
            )
        if traced.numel() // self.batch > MOST_NUMBERS:
            raise UnsupportedError(
                f"{node.meta['source']} makes {traced.numel() // self.batch:,} numbers of one input", EXPORT
            )
        self._traced[node] = traced
        return node

    def _unique(self, name: str) -> str:
        """`name`, or one like it that is neither in use nor above or below one that is."""
        inside = any(name.startswith(f"{used}.") for used in self._names)
        base = name.replace(".", "_") if inside else name
        found = next(
            candidate
            for candidate in chain([base], (f"{base}_{k}" for k in count(1)))
            if not any(f"{used}.".startswith(f"{candidate}.") for used in self._names)
        )
        self._names.add(found)
        return found


class Operator:
    """One ONNX node on its way into the graph."""

    def __init__(self, translation: Translation, proto: NodeProto) -> None:
        from onnx.helper import get_attribute_value

        self._translation = translation
        self._proto = proto
        self._attributes = {item.name: get_attribute_value(item) for item in proto.attribute}
        self.kind: str = proto.op_type
        self.source = describe(proto)
        self.opset = translation.opset

    @property
    def outputs(self) -> int:
        """How many outputs the node has."""
        return len(self._proto.output)

    def refuse(self, problem: str, remedy: str = EXPORT) -> UnsupportedError:
        """The error for a node that `problem` says something about, such as 'has dilations'."""
        return UnsupportedError(f"{self.source} {problem}", remedy)

    def attribute(self, name: str, default: Any) -> Any:
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def operand(self, index: int) -> fx.Node | Array | None:
        """An input of the node: an activation, a constant, or None where it is left out."""
        names = self._proto.input
        return self._translation.values[names[index]] if index < len(names) and names[index] else None

    def activation(self, index: int = 0) -> fx.Node:
        value = self.operand(index)
        if not isinstance(value, fx.Node):
            raise self.refuse(f"takes a constant as input {index}, where effcli needs an activation")
        return value

    def activations(self) -> list[fx.Node]:
        return [self.activation(index) for index in range(len(self._proto.input))]

    def constant(self, index: int) -> Array | None:
        value = self.operand(index)
        if isinstance(value, fx.Node):
            raise self.refuse(f"computes its input {index} at run time, where effcli needs a constant")
        return value

    def needed(self, index: int) -> Array:
        """A constant that may not be left out."""
        value = self.constant(index)
        if value is None:
            raise self.refuse(f"lacks its input {index}", "export the network again")
        return value

    def integers(self, index: int, attribute: str) -> list[int] | None:
        """A list of integers that newer operator sets have as an input and older ones as an attribute."""
        value = self.constant(index)
        if value is not None:
            return [int(item) for item in value.reshape(-1)]
        listed: list[int] | None = self.attribute(attribute, None)
        return listed

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self._translation.shape(node)

    def axis(self, axis: int, rank: int) -> int:
        """An axis counted from the front; the batch axis is refused."""
        axis += rank if axis < 0 else 0
        if axis == 0:
            raise self.refuse("works along the batch axis", "export the network so that batches stay independent")
        if not 0 < axis < rank:
            raise self.refuse(f"names axis {axis} of a tensor with {rank} axes", "export the network again")
        return axis

    def call(self, operation: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._translation.call(operation, *args, source=self.source, **kwargs)

    def layer(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """Call `module`, made from the constants of this node; nodes that share all constants share the layer."""
        attributes = tuple(item.SerializeToString() for item in self._proto.attribute)
        names = enumerate(self._proto.input)
        constants = tuple(name for index, name in names if not isinstance(self.operand(index), fx.Node))
        key = self.kind, constants, attributes, repr(module)
        return self._translation.layer(layer_name(self._proto), key, module, x, self.source)

    def term(self, value: fx.Node | Array, x: fx.Node) -> fx.Node | float:
        """An operand beside `x`: one number where it is one, and a tensor of the graph otherwise."""
        if isinstance(value, fx.Node):
            return value
        if value.size == 1 and value.ndim <= len(self.shape(x)):
            return float(value.reshape(()))
        return self.tensor(value, self._name_of(value))

    def tensor(self, value: Array, name: str = "") -> fx.Node:
        """A constant operand of this node."""
        name = valid_name(name or f"{self._proto.name or self.kind}.constant")
        return self._translation.tensor(name, value, self.source)

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """`x` in another shape, given with the extent of axis 0 in the trace."""
        if tuple(shape) == self.shape(x):
            return x
        if not shape or shape[0] == 0 or shape[0] % self._translation.batch:
            raise self.refuse(
                f"reshapes {self._shown(self.shape(x))} to {self._shown(shape)}, which does not keep the batch axis",
                "export the network so that it works on batches of any size",
            )
        if x.target is torch.ops.aten.reshape.default:
            (x, *_) = x.args  # type: ignore[assignment]
        if tuple(shape) == self.shape(x):
            return x
        return self.call("aten.reshape.default", x, [-1, *shape[1:]])

    def permute(self, x: fx.Node, axes: Sequence[int]) -> fx.Node:
        if x.target is torch.ops.aten.permute.default:
            before: Any
            (x, before) = x.args  # type: ignore[assignment]
            axes = [before[axis] for axis in axes]
        return x if list(axes) == sorted(axes) else self.call("aten.permute.default", x, list(axes))

    def _name_of(self, value: Array) -> str:
        names: Iterable[str] = self._proto.input
        return next(name for name in names if self._translation.values.get(name) is value)

    def _shown(self, shape: Sequence[int]) -> str:
        extents = [str(extent) for extent in shape]
        if extents and shape[0] == self._translation.batch:
            extents[0] = "batch"
        return f"({', '.join(extents)})"


def describe(proto: NodeProto) -> str:
    """A node for messages: 'ONNX Conv /layer1/conv/Conv'."""
    domain = f"{proto.domain}." if proto.domain not in ("", "ai.onnx") else ""
    return f"ONNX {domain}{proto.op_type} {proto.name or next(filter(None, proto.output), '')}".rstrip()


def layer_name(proto: NodeProto) -> str:
    """The module path of a node's weight: from the weight's own name, from torch's notes, or from the node's name."""
    for name in proto.input:
        parameter = _PARAMETER.fullmatch(name)
        if parameter:
            return valid_name(parameter[1])
    for item in proto.metadata_props:
        if item.key == _SCOPES:
            scopes: list[str] = ast.literal_eval(item.value)
            if len(scopes) > 1 and scopes[-2]:
                return valid_name(scopes[-2])
    # '/layer1/layer1.0/conv/Conv': modules from the outermost on, a child of a list with its list's name before it.
    scopes = [part for part in proto.name.split("/") if part]
    if len(scopes) > 1 and scopes[-1].lower().startswith(proto.op_type.lower()):
        scopes.pop()
    path: list[str] = []
    for part in scopes:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return valid_name(".".join(path) or proto.op_type)


def valid_name(name: str) -> str:
    """`name` as a path of modules: words between dots, none of which Python or a module uses for itself."""
    words = [re.sub(r"\W", "_", word) for word in re.split(r"[./]", name) if word]
    return ".".join(f"{word}_" if word in _RESERVED else word for word in words)


def fold_biases(graph: Graph) -> None:
    """Make a constant that is added to the output of a layer without bias the layer's bias."""
    for node in graph.nodes:
        found = _bias(graph, node)
        if found is not None:
            layer, bias = found
            graph.set_bias(str(layer.target), bias)
            node.replace_all_uses_with(layer)
            graph.module.graph.erase_node(node)
    graph.module.graph.eliminate_dead_code()


def _bias(graph: Graph, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """The layer whose output `node` adds a constant to, and the constant (out,); None where a bias cannot do it."""
    if node.target is not torch.ops.aten.add.Tensor or not isinstance(node.args[0], fx.Node):
        return None
    layer, term = node.args[0], node.args[1]
    module = graph.module_of(layer)
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or module.bias is not None or len(layer.users) > 1:
        return None
    if sum(other.target == layer.target for other in graph.nodes) > 1:
        return None
    width = module.weight.shape[0]
    if isinstance(term, float):
        return layer, torch.full((width,), term)
    if not isinstance(term, fx.Node) or term.op != "get_attr":
        return None
    owner, _, own = str(term.target).rpartition(".")
    value: Tensor = getattr(graph.module.get_submodule(owner), own)
    trailing = module.weight.ndim - 2
    if value.numel() == width and value.ndim > trailing and value.shape[value.ndim - 1 - trailing] == width:
        return layer, value.reshape(-1)
    return None


def _folded(proto: NodeProto, inputs: dict[str, Array], opset: int) -> Iterator[tuple[str, Array]]:
    """The outputs of a node whose inputs are all constants, by name."""
    from onnx.helper import make_function, make_opsetid
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import RuntimeImplementationError

    names = [name for name in proto.output if name]
    if proto.op_type in _NEWER:
        opset = max(opset, _NEWER[proto.op_type])
    try:
        function = make_function("effcli", "folded", list(inputs), names, [proto], [make_opsetid("", opset)])
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(function).run(None, inputs, attributes={})
    except RuntimeImplementationError as error:
        raise UnsupportedError(
            f"{describe(proto)} works on constants, and effcli cannot compute it in operator set {opset}",
            "convert it: onnx.version_converter.convert_version(onnx.load(FILE), 21)",
        ) from error
    return zip(names, map(np.asarray, results), strict=True)


# Operators with the shape of their output among their inputs.
_SHAPED = {"Reshape", "Expand"}


def _folded_bytes(proto: NodeProto, inputs: dict[str, Array], opset: int) -> int | None:
    """How many bytes the outputs of a node on constants will take, before any is computed; None where onnx cannot say.

    Its inference is given the values of short inputs, which is where shapes are.
    """
    from onnx import defs, helper, numpy_helper, shape_inference

    known = {name: value for name, value in inputs.items() if value.dtype != object}
    types = {
        name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in known.items()
    }
    data = {name: numpy_helper.from_array(value, name) for name, value in known.items() if value.size <= _SHORT}
    try:
        schema = defs.get_schema(proto.op_type, opset, "")
        found = shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[helper.make_opsetid("", opset)]
        )
    except Exception:  # inference errors of onnx share no base; what is wrong is said where the node is computed
        return None
    total = 0
    for value in found.values():
        tensor = value.tensor_type
        if not tensor.HasField("shape") or not all(item.HasField("dim_value") for item in tensor.shape.dim):
            return None
        # Eight bytes at most, whatever its type.
        total += 8 * math.prod(item.dim_value for item in tensor.shape.dim)
    return total
