"""A graph as ONNX, float32 or float16; packed weights stay packed behind `DequantizeLinear`.

torch's exporter translates the operators. Then the initializer of each packed layer gives way to its codes, scales and
zero points, unchanged: the file is as small as the checkpoint, and onnxruntime restores the weights as it loads.
"""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from effcli import onnx_session
from effcli.errors import UnsupportedError, writing
from effcli.formats import AffineWeight
from effcli.graphs.graph import Graph

FILE_NAME = "model.onnx"
# The first with blocks in DequantizeLinear and 4-bit tensors.
OPSET = 21
_COMPARED = 8
# Protobuf ends at 2 GiB; with room for the graph itself.
_EXTERNAL = 1_900_000_000
_TYPES = {4: TensorProto.UINT4, 8: TensorProto.UINT8}


def export_graph(source: Path, folder: Path, *, precision: str = "float32", dequantize: bool = False) -> str:
    """Write the graph `source` to `folder/model.onnx`; what onnxruntime makes of it, in one line."""
    graph = Graph.read(source)
    model = _translated(graph, torch.float16 if precision == "float16" else torch.float32)
    packed = 0 if dequantize or precision == "float16" else _pack(model, graph)
    with writing(folder):
        large = model.ByteSize() > _EXTERNAL
        onnx.save(model, folder / FILE_NAME, save_as_external_data=large, location=f"{FILE_NAME}.data")
    onnx.checker.check_model(str(folder / FILE_NAME), full_check=not large)
    line = _compare(graph, folder)
    dense = len(graph.stored) - packed
    return f"{line}; {packed} layers packed" + (f", {dense} dense" if dense else "") if graph.stored else line


def _translated(graph: Graph, dtype: torch.dtype) -> Any:
    module = graph.module.to(dtype)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        # What the exporter and its helpers say is of no use to a user who did not call them.
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                module,
                (torch.zeros(2, *graph.facts.shape, dtype=dtype),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["output"],
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # a family of its own
            cause = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            raise UnsupportedError(f"torch cannot export this graph to ONNX: {cause}", "export it to pt2") from error
        finally:
            logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    _forget_origin(model)
    model.producer_name, model.producer_version = "effcli", version("effcli")
    helper.set_model_props(model, {"effcli.origin": graph.facts.origin, "effcli.opset": str(OPSET)})
    return model


def _forget_origin(model: Any) -> None:
    """Leave out what names files of the machine that exported it."""
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info, model.graph):
        item.doc_string = ""
        del item.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]


def _pack(model: Any, graph: Graph) -> int:
    """Put the stored codes where a layer's dense weight stands unchanged; how many layers that was."""
    dense = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for name, weight in graph.stored.items():
        tensor = dense.get(f"{name}.weight")
        if tensor is None or weight.input_scale is not None:
            continue
        values = numpy_helper.to_array(tensor)
        dense_weight: torch.Tensor = graph.layer(name).weight  # type: ignore[assignment]
        shape = tuple(dense_weight.shape)
        # A batch norm that the translation merged into the weight leaves no place for the codes.
        expected = weight.dequantize(torch.float32).numpy().reshape(shape)
        if values.shape != shape or not np.array_equal(values, expected):
            continue
        constants, attributes = _constants(name, weight, shape)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(constants)
        names = [constant.name for constant in constants[:3]]
        if len(shape) > 2 and weight.format.strategy == "group":
            # Blocks lie along an axis, so grouped codes of a convolution are restored flat.
            flat = f"{name}.weight.flat"
            nodes.append(helper.make_node("DequantizeLinear", names, [flat], name=flat, **attributes))
            restored = [flat, constants[3].name]
            nodes.append(helper.make_node("Reshape", restored, [f"{name}.weight"], name=f"{name}.restored"))
        else:
            nodes.append(
                helper.make_node("DequantizeLinear", names, [f"{name}.weight"], name=f"{name}.restored", **attributes)
            )
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return len({name for node in nodes for name in node.output if not name.endswith(".flat")})


def _constants(name: str, weight: AffineWeight, shape: tuple[int, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Initializers of codes, scale, zero point (and the shape, for groups in a convolution); the node's attributes."""
    format = weight.format
    grouped = format.strategy == "group"
    kind = _TYPES[4 if format.bits <= 4 else 8]
    codes = weight.codes.numpy() if grouped else weight.codes.numpy().reshape(shape)
    scale = weight.scale.float().numpy()
    zero = np.full(scale.shape, format.fixed_zero, np.uint8) if weight.zero is None else weight.zero.numpy()
    if format.strategy == "tensor":
        scale, zero = scale.reshape(()), zero.reshape(())
    elif format.strategy == "channel":
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    attributes: dict[str, Any] = {} if format.strategy == "tensor" else {"axis": 1 if grouped else 0}
    if grouped:
        attributes["block_size"] = format.group_size
    return [
        _tensor(f"{name}.weight.codes", codes, kind),
        numpy_helper.from_array(scale, f"{name}.weight.scale"),
        _tensor(f"{name}.weight.zero", zero, kind),
        *([numpy_helper.from_array(np.array(shape, dtype=np.int64), f"{name}.weight.shape")] if grouped else []),
    ], attributes


def _tensor(name: str, codes: Any, kind: int) -> Any:
    """Unsigned codes as a tensor of 8 bits, or of 4, two to a byte with the first in the low half."""
    if kind == TensorProto.UINT8:
        return numpy_helper.from_array(np.ascontiguousarray(codes), name)
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8)).reshape(-1, 2)
    packed = (flat[:, 0] | flat[:, 1] << 4).astype(np.uint8)
    return helper.make_tensor(name, kind, codes.shape, packed.tobytes(), raw=True)


def _compare(graph: Graph, folder: Path) -> str:
    graph.module.float()
    inputs = torch.randn(_COMPARED, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    session = onnx_session.open_session(folder)
    port = session.get_inputs()[0]
    half = port.type == "tensor(float16)"
    given = inputs.numpy().astype(np.float16 if half else np.float32)
    (theirs,) = onnx_session.run(session, {port.name: given}).values()
    ours = graph.run(inputs).numpy()
    flat = ours.reshape(_COMPARED, -1), theirs.astype(np.float32).reshape(_COMPARED, -1)
    agreement = float(np.mean(flat[0].argmax(1) == flat[1].argmax(1)))
    largest = float(np.abs(flat[0] - flat[1]).max())
    return (
        f"{onnx_session.version()}, opset {OPSET}: top-1 agreement {agreement:.1%}, largest difference {largest:.2g} "
        f"of {np.abs(flat[0]).max():.2g}"
    )
