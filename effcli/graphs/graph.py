"""A network as one graph of layers: what every network that reads no text is to the passes, whatever file it came from.

The graph is a `torch.fx.GraphModule`. Every weight with inputs is a module (`MODULES`), named as in the original
network; everything else is a call of an aten operator. There is one input and one output, and their first axis is the
batch. On disk it is a checkpoint of effcli's own layout: `config.json`, `graph.json` with the nodes, and the weights in
`effcli.safetensors`, packed where a pass packed them. Nothing in it is code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from effcli.errors import CheckpointError, DataError, EffcliError, SelectionError, UnsupportedError, first_line, foreign
from effcli.files.checkpoint import Checkpoint, read_config, write_shard, write_text
from effcli.files.documents import check_model, read_model
from effcli.files.layout import LAYOUT_VERSION, OWN_TYPE, Stored, holds, own_part
from effcli.formats import Mask, Quantized, unpack
from effcli.graphs.trial import largest
from effcli.inputs.preprocess import Preprocess
from effcli.layers.edits import Place
from effcli.layers.input_rounding import round_inputs
from effcli.layers.layer import LayerSite
from effcli.options import Options

FILE_NAME = "graph.json"
WEIGHTS_NAME = "effcli.safetensors"

# The modules a graph may hold, with the arguments that make each again.
MODULES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv1d": (
        nn.Conv1d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
    "Conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "BatchNorm1d": (nn.BatchNorm1d, ("num_features", "eps", "affine")),
    "BatchNorm2d": (nn.BatchNorm2d, ("num_features", "eps", "affine")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "GroupNorm": (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    "Embedding": (nn.Embedding, ("num_embeddings", "embedding_dim")),
}

# How many numbers kernels, strides and the like have.
_AXES: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
_DAMAGED = "make the checkpoint again from the original network"
_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "device": torch.device,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}
# Operators that reach files.
_FORBIDDEN = {"from_file", "save"}
# Numbers of one value of a batch, above which the batch is taken in parts: 512 MiB of float32.
_ROOM = 1 << 27
# torch.fx writes a graph as Python and runs that: what a file calls its modules must not get out of a string there.
_NAME = re.compile(r"[^\s\"'\\]+")


class Facts(Options):
    """What is to be known of a graph besides its nodes."""

    origin: str = Field(description="what it was read from, e.g. 'exported graph' or 'transformers resnet'")
    shape: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(description="of one input, without the batch axis")
    classes: tuple[str, ...] | None = Field(default=None, description="names of the classes")
    preprocess: Preprocess = Field(default=Preprocess(), description="from pixels to inputs")
    config: dict[str, Any] | None = Field(default=None, description="the transformers config, where there is one")
    remarks: tuple[str, ...] = Field(default=(), description="what the user should know of how it was read")
    rescaled: tuple[str, ...] = Field(
        default=(), description="modules whose output channels are multiples of the original network's"
    )


class _NodeRecord(Options):
    """One node of `graph.json`."""

    name: str
    op: Literal["placeholder", "get_attr", "call_module", "call_function", "output"]
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str = ""


class _TensorRecord(Options):
    shape: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**31)], ...]
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


class _Document(Options):
    """`graph.json`."""

    nodes: tuple[_NodeRecord, ...]
    modules: dict[str, dict[str, Any]]
    tensors: dict[str, _TensorRecord]


class Graph:
    """A network as a graph. `stored` holds the compressed layers by name; the modules hold their dequantized weights.

    `masks` says which weights were kept of pruned layers that are not compressed; those of compressed ones say it
    themselves. Whatever weight a pruned layer is given, what was removed stays 0.

    Modules whose inputs are int8 round them with a hook (`effcli.layers.input_rounding`), wherever the graph runs.
    Every node carries its source, such as 'networks.py:39 in forward' or an ONNX node's name, in
    `node.meta["source"]`.
    """

    def __init__(self, module: fx.GraphModule, facts: Facts, stored: Mapping[str, Quantized] | None = None) -> None:
        self.module = module.eval()
        self.facts = facts
        self.stored: dict[str, Quantized] = dict(stored or {})
        self.masks: dict[str, Mask] = {}
        # Of the largest value for one input, once it is known.
        self._numbers: int | None = None

    def copy(self) -> Graph:
        """A graph of its own, whose compressed weights and masks are shared."""
        made = Graph(copy.deepcopy(self.module), self.facts, self.stored)
        made.masks = dict(self.masks)
        return made

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def input(self) -> fx.Node:
        return next(node for node in self.nodes if node.op == "placeholder")

    @property
    def output(self) -> fx.Node:
        """The node whose value the network returns."""
        (value,) = next(node for node in self.nodes if node.op == "output").args
        assert isinstance(value, fx.Node)
        return value

    @property
    def device(self) -> torch.device:
        """Where the graph runs: where its tensors are."""
        return next((tensor.device for tensor in self.module.state_dict().values()), torch.device("cpu"))

    @property
    def names_device(self) -> bool:
        """Whether a node names a device, so that the graph cannot run on another one."""
        values = (value for node in self.nodes for value in (*node.args, *node.kwargs.values()))
        return any(isinstance(value, torch.device) for value in values)

    def to(self, device: torch.device) -> Graph:
        """The graph itself, moved to `device`; one whose nodes name a device stays where it is."""
        if not self.names_device and device != self.device:
            self.module.to(device)
        return self

    def layer(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, None for an operator."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def sites(self) -> list[LayerSite]:
        """The weights with inputs, in the order in which they first run."""
        found: dict[str, LayerSite] = {}
        for node in self.nodes:
            module = self.module_of(node)
            name = str(node.target)
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                rows, columns = module.weight.shape[0], module.weight[0].numel()
                found.setdefault(name, LayerSite(name, "conv", f"{name}.weight", rows, columns, groups=module.groups))
            elif isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                found.setdefault(name, LayerSite(name, "linear", f"{name}.weight", rows, columns))
        return list(found.values())

    def left_alone(self, step: str, lm_head: bool) -> dict[str, str]:
        """See `effcli.layers.selection.Layered`: none. `lm_head` means a language model's output head."""
        if lm_head:
            raise SelectionError(
                f"{step}.lm_head: a network read as a graph has no language model's output head",
                "leave lm_head out; the last layer is taken like any other, and `ignore` keeps it",
            )
        return {}

    def places(self) -> dict[str, Place]:
        """All that may get a new value: layers, and other parameters and buffers of floating-point numbers."""
        layers = {site.parameter: site for site in self.sites()}
        return {
            layers[key].name if key in layers else key: Place(layers[key].shape, layers[key].kind)
            if key in layers
            else Place(tuple(value.shape), "other")
            for key, value in self.module.state_dict().items()
            if value.is_floating_point()
        }

    def set_weight(self, name: str, weight: Quantized | Tensor, effective: Tensor | None = None) -> None:
        """Give layer `name` a weight (out, in): compressed, to be stored as it is, or dense.

        effective: the weight as float32 (out, in), worked out unless given. Where the weight asks for inputs of int8
        the layer rounds them from now on. A sparse weight of floating-point numbers is a dense one with a mask.
        """
        parameter: Tensor = self.layer(name).weight  # type: ignore[assignment]
        mask = self.mask(name)
        if mask is not None and isinstance(weight, Quantized):
            weight = mask.over(weight)
        if effective is None:
            effective = weight.effective(torch.float32) if isinstance(weight, Quantized) else weight
        if mask is not None:
            effective = effective.masked_fill(~mask.kept, 0)
        with torch.no_grad():
            parameter.copy_(effective.reshape(parameter.shape))
        round_inputs(self.layer(name), weight)
        self.stored.pop(name, None)
        mask = Mask.of(weight) if isinstance(weight, Quantized) else mask
        self.masks.pop(name, None)
        if isinstance(weight, Quantized) and not weight.format.floating:
            self.stored[name] = weight
        elif mask is not None:
            self.masks[name] = mask

    def mask(self, name: str) -> Mask | None:
        """What was kept of the weights of layer `name`; None where nothing was removed."""
        found = self.masks.get(name) or Mask.of(self.stored.get(name))
        return None if found is None else found.to(self.device)

    def held(self, site: LayerSite) -> Quantized | Tensor:
        """The weight of a layer (out, in) as it is stored: compressed, sparse, or dense."""
        if site.name in self.stored:
            return self.stored[site.name]
        weight: Tensor = self.layer(site.name).weight  # type: ignore[assignment]
        dense = site.view(weight.detach())
        mask = self.mask(site.name)
        return dense if mask is None else mask.over(dense)

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of some layers are int8."""
        return any(weight.format.rounds_inputs for weight in self.stored.values())

    def set_bias(self, name: str, bias: Tensor) -> None:
        """Give layer `name` the bias (out,), whether it had one or not."""
        self.layer(name).bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def mark_rescaled(self, name: str) -> None:
        """Note that the output channels of module `name` are no longer the original network's, but multiples."""
        rescaled = dict.fromkeys((*self.facts.rescaled, name))
        self.facts = self.facts.model_copy(update={"rescaled": tuple(rescaled)})

    def become(self, other: Graph) -> None:
        """Take over a graph of other sizes; `UnsupportedError` where that does not run, and this one is as it was."""
        try:
            numbers = largest(other.module, self.facts.shape)
        except ValueError as error:
            raise UnsupportedError(f"the network does not run with these sizes: {error}", "choose others") from error
        self.module, self.masks, self._numbers = other.module, other.masks, numbers

    def weights(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def run(self, inputs: Tensor) -> Tensor:
        """The output of a batch of inputs float32 (n, *shape), on the CPU wherever the graph runs."""
        if tuple(inputs.shape[1:]) != self.facts.shape:
            raise DataError(
                f"inputs of shape {tuple(inputs.shape[1:])} for a network that takes {self.facts.shape}",
                "the first axis is the batch; reshape or preprocess the inputs",
            )
        with _running(), torch.inference_mode():
            device = self.device
            parts = [self.module(part.to(device)).cpu() for part in torch.split(inputs, self._fitting(len(inputs)))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _fitting(self, count: int) -> int:
        """How many of `count` inputs to take at once, at least one: so many that no value leaves its room."""
        if count > 1 and self._numbers is None:
            try:
                self._numbers = largest(self.module, self.facts.shape)
            except ValueError:
                # Running it will tell.
                self._numbers = 0
        return max(1, min(count, _ROOM // max(self._numbers or 0, 1)))

    def examples(self, count: int, generator: torch.Generator) -> Tensor:
        """Random inputs float32 (count, *shape): normal numbers, or numbers of rows that all of its embeddings have."""
        rows = [module.num_embeddings for module in self.module.modules() if isinstance(module, nn.Embedding)]
        if rows:
            return torch.randint(min(rows), (count, *self.facts.shape), generator=generator).float()
        return torch.randn(count, *self.facts.shape, generator=generator)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by the name of its node, for a batch of one; the batch axis is left out."""
        own = {node.name for node in self.nodes if node.op == "get_attr"}
        return {name: size if name in own else size[1:] for name, size in self.whole_shapes().items()}

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by the name of its node, for a batch of one, its first axis included."""
        found: dict[str, tuple[int, ...]] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    found[n.name] = tuple(value.shape)
                return value

        with _running(), torch.inference_mode():
            Recorder(self.module).run(torch.zeros(1, *self.facts.shape, device=self.device))
        return found

    def save(self, folder: Path) -> None:
        """Write the graph as a checkpoint into `folder`, which exists."""
        tensors: dict[str, Tensor] = {}
        sites = {site.name: site for site in self.sites()}
        held = {name: self.held(sites[name]) for name in sorted({*self.stored, *self.masks})}
        written = {name: weight for name, weight in held.items() if isinstance(weight, Quantized)}
        for key, value in self.module.state_dict().items():
            owner, _, own = key.rpartition(".")
            if own == "weight" and owner in written:
                packed = written[owner].pack()
                tensors.update({f"{owner}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()})
            elif own != "num_batches_tracked":
                tensors[key] = value.cpu().contiguous()
        layers = {
            name: Stored(weight.format, sites[name].kind, weight.input_scale is not None).to_json()
            for name, weight in written.items()
        }
        described = {
            "version": LAYOUT_VERSION,
            "kind": "graph",
            "facts": self.facts.model_dump(mode="json"),
            "layers": layers,
        }
        write_shard(folder / WEIGHTS_NAME, tensors)
        write_text(folder / FILE_NAME, json.dumps(_to_json(self.module), indent=1) + "\n")
        config = {"model_type": OWN_TYPE, "effcli": described}
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the operations, what is known of the network, and its weights."""
        found = hashlib.sha256(json.dumps(_to_json(self.module)).encode() + repr(self.facts).encode())
        for name, tensor in self.module.state_dict().items():
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest()

    @staticmethod
    def read(folder: Path) -> Graph:
        """Read the checkpoint in `folder`; `CheckpointError` when it is damaged or incomplete."""
        if not is_graph(folder):
            raise CheckpointError(f"{folder} holds no graph", "give a directory that effcli wrote from a network")
        described = own_part(read_config(folder))
        facts = check_model(Facts, described.facts, f"effcli.facts in {folder / 'config.json'}", remedy=_DAMAGED)
        try:
            document = read_model(_Document, folder / FILE_NAME, remedy=_DAMAGED)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / FILE_NAME} is damaged: {error.cause}", _DAMAGED) from error
        try:
            module = _from_document(document)
            numbers = largest(module, facts.shape)
        except EffcliError:
            raise
        except Exception as error:  # whatever torch says of arguments that are none, or of nodes that do not fit
            raise CheckpointError(f"{folder / FILE_NAME} is damaged: {first_line(error)}", _DAMAGED) from error
        graph = Graph(module, facts)
        graph._numbers = numbers
        graph._fill(Checkpoint.open(folder), described.stored())
        return graph

    def _fill(self, checkpoint: Checkpoint, layers: Mapping[str, Stored]) -> None:
        sites = {site.name: site for site in self.sites()}
        for name, item in layers.items():
            if name not in sites:
                raise CheckpointError(f"config.json describes {name}, which is no layer of the graph", _DAMAGED)
            prefix = f"{name}."
            tensors = {
                key.removeprefix(prefix): checkpoint.read(key) for key in checkpoint.entries if key.startswith(prefix)
            }
            tensors.pop("bias", None)
            try:
                self.set_weight(name, unpack(item.format, tensors, sites[name].shape))
            except ValueError as error:
                raise CheckpointError(
                    f"{checkpoint.path} does not hold {name} as {item.format}: {error}", _DAMAGED
                ) from error
        for key, value in self.module.state_dict(keep_vars=True).items():
            owner, _, own = key.rpartition(".")
            if own == "weight" and owner in layers:
                continue
            if own == "num_batches_tracked":
                # No file has it, and nothing reads it where batch norms do not train.
                value.zero_()
                continue
            if key not in checkpoint.entries:
                raise CheckpointError(f"{checkpoint.path} lacks the tensor {key}", _DAMAGED)
            tensor = checkpoint.read(key)
            if tensor.shape != value.shape:
                raise CheckpointError(
                    f"{key} has the shape {tuple(tensor.shape)}, the graph needs {tuple(value.shape)}", _DAMAGED
                )
            with torch.no_grad():
                value.copy_(tensor)


class Builder:
    """Puts a graph together, node by node, for whoever reads one from a file."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()

    def input(self, name: str = "input") -> fx.Node:
        return self._made(self.graph.placeholder(_identifier(name)), "")

    def module(self, name: str, module: nn.Module, *inputs: fx.Node, source: str = "") -> fx.Node:
        """Call `module`, which stands in the network as `name`; a name in use must mean the same module."""
        if type(module).__name__ not in MODULES:
            raise UnsupportedError(
                f"{name} is a {type(module).__name__}, which a graph does not hold",
                "put operators of torch in its place",
            )
        _place(self.root, name, module.requires_grad_(False))
        return self._made(self.graph.create_node("call_module", name, tuple(inputs), {}, _identifier(name)), source)

    def call(self, operation: str, *args: Any, source: str = "", **kwargs: Any) -> fx.Node:
        """Call an operator by name, such as 'aten.relu.default' or 'operator.getitem'."""
        name = operation.split(".")[1]
        return self._made(
            self.graph.create_node("call_function", function(operation), args, kwargs, _identifier(name)), source
        )

    def tensor(self, name: str, value: Tensor, source: str = "") -> fx.Node:
        """A constant or a parameter that belongs to no layer, such as a position embedding."""
        _place(self.root, name, value.detach())
        return self._made(self.graph.create_node("get_attr", name, (), {}, _identifier(name)), source)

    def finish(self, output: fx.Node, facts: Facts) -> Graph:
        self._made(self.graph.output(output), "")
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        # Made again, it holds only what the nodes that are left refer to.
        return Graph(fx.GraphModule(module, module.graph), facts)

    @staticmethod
    def _made(node: fx.Node, source: str) -> fx.Node:
        node.meta["source"] = source
        return node


@contextmanager
def _running() -> Iterator[None]:
    """Map what torch raises while a graph runs: what shapes alone allow may still not fit a value."""
    with foreign(lambda cause: CheckpointError(f"the network does not run: {cause}", _DAMAGED)):
        yield


def class_count(graph: Graph) -> int | None:
    """How many classes the network tells apart, None when its output is no vector of logits."""
    shape = graph.shapes()[graph.output.name]
    return shape[0] if len(shape) == 1 and shape != graph.facts.shape else None


def class_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The list `classes` of a config, or its `id2label` unless that only counts; None without either."""
    classes = config.get("classes")
    if isinstance(classes, list) and classes:
        return tuple(str(name) for name in classes)
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not labels:
        return None
    if not all(re.fullmatch(r"[0-9]{1,9}", str(key)) for key in labels):
        raise CheckpointError(
            "config.json is damaged: a key of id2label is no number", "restore it, or remove id2label"
        )
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def is_graph(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that `Graph.save` wrote."""
    return holds(folder, FILE_NAME, "graph")


def operation(node: fx.Node) -> str:
    """What a node does, as one word: 'Conv2d' for a module, 'aten.relu.default' for an operator, else its `op`."""
    if node.op == "call_module":
        assert node.graph.owning_module is not None
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    return _function_name(node.target) if node.op == "call_function" else node.op


def where(node: fx.Node) -> str:
    """A node for an error message: its name, what it does, and the line or the ONNX node it comes from."""
    source = node.meta.get("source")
    return f"{node.name} ({operation(node)}{f', {source}' if source else ''})"


def function(name: str) -> Callable[..., Any]:
    """The operator called 'aten.relu.default' or 'operator.getitem'; `UnsupportedError` when there is none."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    found: Any = None
    if len(parts) == 3 and parts[0] == "aten" and parts[1] not in _FORBIDDEN:
        found = getattr(getattr(torch.ops.aten, parts[1], None), parts[2], None)
    if found is None:
        raise UnsupportedError(f"this torch has no operator {name}", "the graph needs another version of torch")
    operator_found: Callable[..., Any] = found
    return operator_found


def _function_name(target: Any) -> str:
    for name, found in _FUNCTIONS.items():
        if target is found:
            return name
    return str(target)


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _place(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Put a module or a tensor at a dotted path, with plain modules on the way."""
    if not _NAME.fullmatch(path):
        raise CheckpointError(f"{path!r} cannot be the name of a layer", "rename it where the network was made")
    *parents, own = path.split(".")
    for part in parents:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            root.add_module(part, child)
        root = child
    if isinstance(value, nn.Module):
        if root._modules.get(own, value) is not value:
            raise ValueError(f"two modules are called {path}")
        root.add_module(own, value)
    elif value.is_floating_point():
        root.register_parameter(own, nn.Parameter(value, requires_grad=False))
    else:
        root.register_buffer(own, value)


def _to_json(module: fx.GraphModule) -> dict[str, Any]:
    modules: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    nodes = []
    for node in module.graph.nodes:
        target = _function_name(node.target) if node.op == "call_function" else str(node.target)
        if node.op == "call_module":
            modules[target] = _describe(module.get_submodule(target))
        elif node.op == "get_attr":
            owner, _, own = target.rpartition(".")
            value = getattr(module.get_submodule(owner), own)
            tensors[target] = {"shape": list(value.shape), "dtype": _plain(value.dtype)["dtype"]}
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": target,
                "args": [_plain(arg) for arg in node.args],
                "kwargs": {key: _plain(arg) for key, arg in node.kwargs.items()},
                "source": node.meta.get("source", ""),
            }
        )
    return {"nodes": nodes, "modules": modules, "tensors": tensors}


def _from_document(document: _Document) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    for name, described in document.modules.items():
        _place(root, name, _made(described))
    for name, tensor in document.tensors.items():
        _place(root, name, torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)))
    nodes: dict[str, fx.Node] = {}
    for item in document.nodes:
        names = [*item.kwargs, *([item.target] if item.op == "placeholder" else [])]
        written = all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
        if not written or not _NAME.fullmatch(item.target):
            raise ValueError(f"{item.name} has a name that torch.fx cannot write")
        target = function(item.target) if item.op == "call_function" else item.target
        args = tuple(_restored(arg, nodes) for arg in item.args)
        kwargs = {key: _restored(arg, nodes) for key, arg in item.kwargs.items()}
        node = graph.create_node(item.op, target, args, kwargs, item.name)
        node.meta["source"] = item.source
        nodes[item.name] = node
    ends = [item.op for item in document.nodes if item.op in ("placeholder", "output")]
    if ends != ["placeholder", "output"] or document.nodes[-1].op != "output":
        raise ValueError("a graph has one input, and one output at its end")
    (value,) = document.nodes[-1].args
    if not isinstance(_restored(value, nodes), fx.Node):
        raise ValueError("the output is no value of the graph")
    graph.lint()
    # A batch norm in training mode wants more than one value a channel.
    return fx.GraphModule(root, graph).eval()


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    described: dict[str, Any] = {"type": kind}
    for name in MODULES[kind][1]:
        value = getattr(module, name)
        # Constructors take flags where modules keep tensors.
        described[name] = value is not None if name == "bias" else list(value) if isinstance(value, tuple) else value
    return described


def _made(described: dict[str, Any]) -> nn.Module:
    """The module of a description, its weights not yet filled in."""
    if not isinstance(described.get("type"), str) or described["type"] not in MODULES:
        raise ValueError(f"there is no module {described.get('type')!r}")
    kind, names = MODULES[described["type"]]
    missing = [name for name in names if name not in described]
    if missing:
        raise ValueError(f"a {described['type']} without {missing[0]}")
    arguments = {name: described[name] for name in names}
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    for name, value in arguments.items():
        # Torch would repeat a single number, where whoever reads the module sees a layer of another kind.
        if kind in _AXES and isinstance(value, tuple) and len(value) != _AXES[kind]:
            raise ValueError(f"a {described['type']} whose {name} is {value}")
    with torch.device("cpu"):
        # Initialising values that are overwritten would be wasted work.
        module: nn.Module = nn.utils.skip_init(kind, **arguments)  # type: ignore[no-untyped-call]
    return module.requires_grad_(False)


def _plain(value: Any) -> Any:
    """An argument of a node as JSON."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedError(f"an operator takes {value!r}, which a graph cannot hold", "keep it out of `forward`")


def _restored(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_restored(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if not isinstance(content, str) or kind not in ("node", "float", *_CONSTANTS):
        raise ValueError(f"{value!r} is no argument of a node")
    if kind == "node":
        if content not in nodes:
            raise ValueError(f"no node before is called {content}")
        return nodes[content]
    if kind == "device":
        return torch.device(content)
    if kind == "float":
        return float(content)
    found = getattr(torch, content, None)
    if not isinstance(found, _CONSTANTS[kind]):
        raise ValueError(f"torch has no {kind} {content}")
    return found


def calls(graph: Graph, name: str) -> Iterator[fx.Node]:
    """The nodes that call layer `name`."""
    return (node for node in graph.nodes if node.op == "call_module" and str(node.target) == name)


def macs(graph: Graph) -> dict[str, int]:
    """Multiplications of each layer for one input: its output's numbers times its weight's columns."""
    shapes = graph.shapes()
    found: dict[str, int] = {}
    for site in graph.sites():
        made = sum(math.prod(shapes[node.name]) for node in calls(graph, site.name))
        found[site.name] = made * site.columns
    return found


__all__ = [
    "MODULES",
    "Builder",
    "Facts",
    "Graph",
    "calls",
    "class_names",
    "function",
    "is_graph",
    "macs",
    "operation",
    "where",
]
