"""ONNX files as graphs: constants folded, weights as layers under the names of the original network.

What follows from shapes alone is computed here, so that of the arithmetic by which exporters find a shape nothing is
left. Batches of any size go through the result, and that is measured: inputs together must give what they give alone,
also where the file declares a batch of fixed size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from effcli.errors import CheckpointError, EffcliError, UnsupportedError
from effcli.graphs.graph import Facts, Graph
from effcli.importers._onnx_operators import OPERATORS
from effcli.importers._onnx_translation import EXPORT, Operator, Translation, describe
from effcli.importers._trace import first_line
from effcli.platform.onnx_session import require

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

OLDEST_OPSET = 11

_AGAIN = "export or copy it again"
# Far above what exporters write: nodes of a network, functions inside each other.
_MOST_NODES = 200_000
_DEEPEST = 64
_DEFAULT_DOMAINS = ("", "ai.onnx")
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
# Extents of a dynamic batch in the trace: primes that no other axis is likely to have.
_TRACED_BATCHES = (997, 1009)
# Rounding differs with the size of a batch, by far less than this fraction of the largest output.
_ROUNDING = 1e-3


def read_onnx(path: Path) -> Graph:
    """The network in the ONNX file `path`, with its weights from the file or beside it.

    Raises `CheckpointError` for a file that is missing, damaged or without its data, `UnsupportedError` for what a
    graph cannot hold, each with the node's name; `UserError` when onnx is not installed.
    """
    require("onnx")
    model = _load(path)
    opset = _opset(model, path)
    _check(model, path)
    name, extent, shape = _input(model.graph, path)
    _check_operators(model.graph, name)
    graph, *others = (
        _translated(model.graph, Translation(opset, batch), name, shape, path)
        for batch in ([extent] if extent else _TRACED_BATCHES)
    )
    _check_batches(graph, others, path)
    return graph


def _load(path: Path) -> ModelProto:
    import onnx
    from onnx import inliner

    if not path.is_file():
        raise CheckpointError(f"there is no {path}", "give an ONNX file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own, or the file system's
        raise _damaged(path, error) from error
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # checker and file errors, which share no base
        raise CheckpointError(
            f"{path} lacks its weights: {first_line(error)}", "put the data file beside it, under its own name"
        ) from error
    if not model.functions:
        return model
    _check_functions(model, path)
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # checker and conversion errors, which share no base
        raise _damaged(path, error) from error


def _check_functions(model: ModelProto, path: Path) -> None:
    """Refuse functions that call themselves, or that grow beyond what a network has, before they are put in place."""
    bodies = {(item.domain, item.name): item.node for item in model.functions}
    counted: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[NodeProto], inside: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            name = node.domain, node.op_type
            if name in inside or len(inside) > _DEEPEST:
                raise CheckpointError(f"{path} is damaged: its function {node.op_type} calls itself", _AGAIN)
            if name in bodies and name not in counted:
                counted[name] = count(bodies[name], (*inside, name))
            total += counted.get(name, 1)
            below = (item for held in node.attribute for item in (held.g, *held.graphs))
            total += sum(count(graph.node, inside) for graph in below if graph.node)
        return total

    nodes = count(model.graph.node, ())
    if nodes > _MOST_NODES:
        raise UnsupportedError(f"the functions of {path} come to {nodes:,} nodes", "export it without functions")


def _declared(model: ModelProto) -> bool:
    """Whether each input and output declares a shape, which onnx's checker asks for and its runtimes do not."""
    return all(
        value.type.tensor_type.HasField("shape")
        for value in (*model.graph.input, *model.graph.output)
        if value.type.HasField("tensor_type")
    )


def _with_shapes(path: Path) -> ModelProto:
    """The model for the checker: with a shape wherever one is left open, and without the weights beside the file."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path, format="protobuf", load_external_data=False)
    graph, names = model.graph, {item.name for item in model.graph.input}
    outside = [item for item in graph.initializer if item.data_location == TensorProto.EXTERNAL]
    for item in outside:
        graph.initializer.remove(item)
        if item.name not in names:
            graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    return model


def _opset(model: ModelProto, path: Path) -> int:
    """The version of the standard operators that the file uses."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    versions = [item.version for item in model.opset_import if item.domain in _DEFAULT_DOMAINS]
    opset = versions[0] if versions else newest
    if opset > newest or model.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(
            f"{path} has operator set {opset} and format {model.ir_version}, onnx {onnx.__version__} knows "
            f"{newest} and {onnx.IR_VERSION}",
            "pip install -U onnx, or export for an older operator set",
        )
    if opset < OLDEST_OPSET:
        raise UnsupportedError(
            f"{path} has operator set {opset}, effcli reads {OLDEST_OPSET} and above",
            "convert it: onnx.version_converter.convert_version(onnx.load(FILE), 17)",
        )
    return opset


def _check(model: ModelProto, path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(path if _declared(model) else _with_shapes(path))
    except Exception as error:  # the checker's own, and protobuf's for text that is none
        raise _damaged(path, error) from error
    if model.graph.sparse_initializer:
        raise UnsupportedError(f"{path} stores weights as sparse tensors", "export the network with dense weights")


def _input(graph: GraphProto, path: Path) -> tuple[str, int | None, tuple[int, ...]]:
    """The network's input: its name, the extent of its batch (None: any), and its shape without the batch axis."""
    from onnx import TensorProto

    weights = {item.name for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in weights]
    for kind, found in (("input", inputs), ("output", list(graph.output))):
        if len(found) != 1:
            names = ", ".join(item.name for item in found) or "none"
            raise UnsupportedError(f"{path} has {len(found)} {kind}s ({names})", f"export it with one {kind}")
    (value,) = inputs
    if not value.type.tensor_type.HasField("shape"):
        raise UnsupportedError(
            f"input {value.name} of {path} declares no shape", "export the network with the shape of its input"
        )
    for kind, found in (("input", value), ("output", graph.output[0])):
        number = found.type.tensor_type.elem_type
        if number != TensorProto.FLOAT:
            known = number in TensorProto.DataType.values()
            held = TensorProto.DataType.Name(number).lower() if known else f"of the unknown type {number}"
            raise UnsupportedError(f"{kind} {found.name} of {path} is {held}", "export the network in float32")
    extents = _extents(value)
    if len(extents) < 2:
        raise UnsupportedError(
            f"input {value.name} of {path} has too few axes: effcli needs a batch axis and one more",
            "export the network with batches as its input",
        )
    for axis, extent in enumerate(extents):
        if axis and isinstance(extent, str):
            raise UnsupportedError(
                f"axis {axis} of input {value.name} of {path} is dynamic ({extent})",
                "export it with a fixed size; only the batch, axis 0, may be dynamic",
            )
    batch, *shape = extents
    return value.name, batch if isinstance(batch, int) else None, tuple(int(extent) for extent in shape)


def _extents(value: ValueInfoProto) -> list[int | str]:
    """The extent of each axis, or its name where it is dynamic."""
    return [
        item.dim_value if item.HasField("dim_value") and item.dim_value > 0 else item.dim_param or "without a name"
        for item in value.type.tensor_type.shape.dim
    ]


def _check_operators(graph: GraphProto, name: str) -> None:
    """Refuse a file that computes what effcli cannot translate from the input `name`, before anything is translated."""
    live = {name}
    missing: list[NodeProto] = []
    for node in graph.node:
        if _foldable(node) and (node.op_type == "Shape" or live.isdisjoint(node.input)):
            continue
        live.update(node.output)
        if node.domain not in _DEFAULT_DOMAINS or node.op_type not in OPERATORS:
            missing.append(node)
    if missing:
        first, *others = (describe(node) for node in missing)
        also = f" (neither are {', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
        raise UnsupportedError(f"{first} is not supported{also}", EXPORT)


def _foldable(node: NodeProto) -> bool:
    """Whether constants go in as constants come out: not with subgraphs, nor where chance has a part."""
    nested = any(item.HasField("g") or item.graphs for item in node.attribute)
    return node.domain in _DEFAULT_DOMAINS and node.op_type not in _RANDOM and not nested


def _translated(graph: GraphProto, translation: Translation, name: str, shape: tuple[int, ...], path: Path) -> Graph:
    """The graph of the file, whose input `name` has `shape` without the batch axis."""
    translation.input(name, shape)
    _translate_nodes(graph, translation)
    value = translation.values[graph.output[0].name]
    if not isinstance(value, fx.Node):
        raise UnsupportedError(f"the output of {path} does not depend on its input", "export the network again")
    return translation.finish(value, Facts(origin="ONNX file", shape=shape))


def _translate_nodes(graph: GraphProto, translation: Translation) -> None:
    from onnx.numpy_helper import to_array

    values = translation.values
    values.update((item.name, to_array(item)) for item in graph.initializer)
    translation.allow(sum(value.nbytes for value in values.values() if isinstance(value, np.ndarray)))
    for node in graph.node:
        unknown = [name for name in node.input if name and name not in values]
        if unknown:
            raise UnsupportedError(f"{describe(node)} reads {unknown[0]}, which effcli does not compute", EXPORT)
        inputs = {name: values[name] for name in node.input if name}
        constants = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        try:
            if len(constants) == len(inputs):
                values.update(translation.folded(node, constants))
            elif node.op_type == "Shape":
                values[node.output[0]] = _shape(Operator(translation, node))
            else:
                results = OPERATORS[node.op_type](Operator(translation, node))
                values.update(zip(node.output, results if isinstance(results, tuple) else (results,), strict=False))
                translation.check(node, inputs)
        except (EffcliError, MemoryError):
            raise
        except Exception as error:  # what torch, numpy and onnx raise for a node that is wrong shares no base
            raise UnsupportedError(
                f"{describe(node)} cannot be translated: {first_line(error)}",
                "look for the mistake with onnx.checker.check_model(FILE, full_check=True), or export it again",
            ) from error


def _shape(op: Operator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    extents = op.shape(op.activation())
    return np.array(extents[op.attribute("start", 0) : op.attribute("end", len(extents))], dtype=np.int64)


def _check_batches(graph: Graph, others: list[Graph], path: Path) -> None:
    """Refuse a graph in which a batch's size or its other inputs have a part in an output.

    others: the same network traced with batches of other sizes.
    """
    for other in others:
        if str(other.module.graph) != str(graph.module.graph) or not _same_weights(graph, other):
            raise UnsupportedError(
                f"{path} computes with the size of its batch", "export the network so that it does not"
            )
    inputs = graph.examples(3, torch.Generator().manual_seed(0))
    try:
        alone = torch.cat([graph.run(one) for one in inputs.unsqueeze(1)])
        together = graph.run(inputs)
        largest = float(alone.abs().nan_to_num(posinf=0).max()) if alone.numel() else 0.0
        torch.testing.assert_close(together, alone, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True)
    except (AssertionError, CheckpointError) as error:
        raise UnsupportedError(
            f"{path} does not work on batches of any size: {first_line(error)}",
            "export it with a dynamic batch axis, so that each input of a batch stands for itself",
        ) from error


def _same_weights(graph: Graph, other: Graph) -> bool:
    first, second = graph.module.state_dict(), other.module.state_dict()
    return first.keys() == second.keys() and all(
        value.shape == second[key].shape and np.array_equal(value.numpy(), second[key].numpy(), equal_nan=True)
        for key, value in first.items()
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or no ONNX file: {first_line(error)}", _AGAIN)
