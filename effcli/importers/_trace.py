"""A network as torch.export records it: one aten graph in which every weight is an input, and how it is made."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from effcli import errors
from effcli.errors import UnsupportedError
from effcli.graphs.graph import where
from effcli.graphs.trial import MOST_NUMBERS, Sizes

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH = re.compile(r"-packages[/\\]torch[/\\]")
_HERE = str(Path(__file__).parent)
_ONE_OUTPUT = "wrap it in a module that takes one tensor and returns one"
_EVAL = "export it again after `.eval()`"


@dataclass(frozen=True)
class Trace:
    """graph: placeholders, calls of operators, and an output that is one node; every node has `meta["source"]`.

    weights: name and value of each placeholder that is not the input; shape: of one input, without the batch axis;
    batch: the only size of the batch that it was recorded for, None when it was for all.
    """

    graph: fx.Graph
    weights: Mapping[str, tuple[str, Tensor]]
    shape: tuple[int, ...]
    batch: int | None = None


# Sizes and type of a tensor that a graph takes; a size that is no int is not fixed.
Input = tuple[tuple[Any, ...], torch.dtype]


def trace_module(module: nn.Module, shape: tuple[int, ...]) -> Trace:
    """Record what `module` does in evaluation to a batch of float32 (n, *shape), for every n.

    `UnsupportedError`, with the line that is to blame, when torch.export cannot, or can for one n only.
    """
    return from_program(export_module(module, shape))


def export_module(module: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    """What torch.export records of `module`; see `trace_module`."""
    # Two, because torch.export takes a batch of one for a constant.
    example = torch.zeros(2, *shape)
    try:
        return _export(module, example, {0: Dim.DYNAMIC})
    except Exception as error:  # whatever the network's own code raises, and torch.export over it
        if "Constraints violated" in str(error):
            raise _fixed_batch(module, example) from error
        raise UnsupportedError(
            f"torch.export cannot record the network: {first_line(error)}{blame(error)}",
            "its forward must take one tensor of this shape and not depend on the values in it",
        ) from error


def from_program(program: ExportedProgram) -> Trace:
    signature = program.graph_signature
    weights: dict[str, tuple[str, Tensor]] = {}
    inputs: list[str] = []
    for spec in signature.input_specs:
        name, target = spec.arg.name, spec.target
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        elif target in program.state_dict:
            weights[name] = (target, program.state_dict[target].detach())
        elif target is not None and isinstance(program.constants.get(target), Tensor):
            weights[name] = (target, program.constants[target])
        else:
            raise UnsupportedError(f"the network holds {target}, which is no tensor", "keep it out of `forward`")
    changed = [spec.target for spec in signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    taken: dict[str, Input | None] = {
        name: (tuple(value.shape), value.dtype) if isinstance(value := values.get(name), Tensor) else None
        for name in inputs
    }
    for node in program.graph.nodes:
        stack = [str(frame) for entry in (node.meta.get("nn_module_stack") or {}).values() for frame in entry]
        node.meta["source"] = source(node.meta.get("stack_trace"), stack)
    return assemble(program.graph, weights, taken, changed)


def assemble(
    graph: fx.Graph,
    weights: Mapping[str, tuple[str, Tensor]],
    inputs: Mapping[str, Input | None],
    changed: list[str | None],
) -> Trace:
    """A trace of its parts, checked. inputs: by name, None for what is no tensor; changed: buffers that it writes."""
    if changed:
        raise UnsupportedError(f"the network changes its own {changed[0] or 'state'} while it runs", _EVAL)
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and not _known(node.target)):
            raise UnsupportedError(f"{where(node)} is not an operator of aten", "replace it by plain tensor operations")
    tensors = [taken for taken in inputs.values() if taken is not None]
    if len(tensors) != 1:
        raise UnsupportedError(f"the network takes {len(tensors)} tensors", _ONE_OUTPUT)
    ((sizes, dtype),) = tensors
    if not dtype.is_floating_point:
        name = str(dtype).removeprefix("torch.")
        raise UnsupportedError(f"the network takes inputs of {name}", "a graph takes floating-point numbers")
    moving = [axis for axis, size in enumerate(sizes) if axis and not isinstance(size, int)]
    if moving or not sizes:
        what = f"axis {moving[0]} of its input has no fixed size" if moving else "its input has no batch axis"
        raise UnsupportedError(f"the network is not of one shape: {what}", "export it with only the batch dynamic")
    _single_output(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in weights and inputs.get(node.name) is None:
            node.replace_all_uses_with(None)
            graph.erase_node(node)
    return Trace(graph, weights, tuple(sizes[1:]), sizes[0] if isinstance(sizes[0], int) else None)


def _single_output(graph: fx.Graph) -> None:
    """Make the output node's argument the one tensor that the network returns."""
    end = next(node for node in graph.nodes if node.op == "output")
    values = end.args[0] if isinstance(end.args[0], tuple | list) else end.args
    if len(values) != 1 or not isinstance(values[0], fx.Node):
        raise UnsupportedError(f"the network returns {len(values)} values", _ONE_OUTPUT)
    end.args = (values[0],)


def source(stack_trace: str | None, modules: list[str]) -> str:
    """Where a node comes from: 'file.py:39 in forward', or its module's class and path where no line was recorded.

    modules: path and class of every module around the node, in turn, from the outermost in.
    """
    frames = [frame for frame in _FRAME.findall(stack_trace or "") if not _TORCH.search(frame[0])]
    if frames:
        file, line, function = frames[-1]
        return f"{Path(file).name}:{line} in {function}"
    if len(modules) < 2:
        return ""
    path, kind = modules[-2], modules[-1].rpartition(".")[2].strip("'>")
    return f"{kind} {path}".strip()


def first_line(error: BaseException) -> str:
    """What an exception says first, as a part of a sentence."""
    return errors.first_line(error).rstrip(".")


def _known(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    return getattr(target, "__module__", None) in ("_operator", "math", "torch")


def _export(module: nn.Module, example: Tensor, dynamic: dict[int, Any] | None) -> ExportedProgram:
    with torch.no_grad(), _quietly():
        return torch.export.export(module.eval(), (example,), dynamic_shapes=(dynamic,), strict=False)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch.export prints the graph that it has so far when it fails; what matters is in the error."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor without its values."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def record(trace: Trace, batch: int) -> dict[fx.Node, Any]:
    """What every node gives for a batch of that size: a `Shape`, a list of them, or a number."""
    found: dict[fx.Node, Any] = {}

    class Recorder(Sizes):
        def run_node(self, n: fx.Node) -> Any:
            try:
                value = super().run_node(n)
            except Exception as error:  # whatever an operator says about shapes that it cannot take
                raise UnsupportedError(
                    f"{where(n)} does not take a batch of {batch}: {first_line(error)}",
                    "take the size of the batch from the input, as `x.flatten(1)` does, and export with it dynamic",
                ) from error
            found[n] = _shape(value)
            for made in found[n] if isinstance(found[n], list) else [found[n]]:
                if isinstance(made, Shape) and n.op != "placeholder" and math.prod(made.sizes) > batch * MOST_NUMBERS:
                    raise UnsupportedError(
                        f"{where(n)} makes {math.prod(made.sizes):,} numbers of {batch} inputs",
                        "export a smaller network",
                    )
            return value

    with FakeTensorMode() as mode, torch.no_grad():
        values = [
            mode.from_tensor(trace.weights[node.name][1])
            if node.name in trace.weights
            else torch.empty(batch, *trace.shape)
            for node in trace.graph.nodes
            if node.op == "placeholder"
        ]
        recorder = Recorder(nn.Module(), graph=trace.graph)
        # It would add the graph to every error.
        recorder.extra_traceback = False
        recorder.run(*values)
    return found


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), value.dtype)
    return [_shape(item) for item in value] if isinstance(value, list | tuple) else value


def _fixed_batch(module: nn.Module, example: Tensor) -> UnsupportedError:
    """Why a network runs with batches of one size only: the node that fails with another size, where one does."""
    trace = from_program(_export(module, example, None))
    try:
        record(trace, len(example) + 1)
    except UnsupportedError as error:
        return error
    return UnsupportedError(
        "the network does not do the same to batches of every size",
        "its forward must not compare the size of the batch with a number",
    )


def blame(error: BaseException) -> str:
    """The last line outside torch that an error passed through, as ' (net.py:39 in forward)'."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", _HERE)) and not _TORCH.search(frame.filename):
            return f" ({Path(frame.filename).name}:{frame.lineno} in {frame.name})"
    return ""
