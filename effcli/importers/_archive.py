"""The files of `torch.export.save`, read as what they are: JSON and plain bytes in a zip archive.

`torch.export.load` is not used: it unpickles without restraint whatever the file says is pickled (example inputs,
custom objects, tensor subclasses), and evaluates the file's symbolic expressions as Python. Here nothing of the file
is executed: pickled tensors are refused, the example inputs are not read, and a size is a number or unknown.
"""

from __future__ import annotations

import math
import operator
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._export.serde import schema
from torch._export.serde.serialize import _dict_to_dataclass

from effcli.errors import CheckpointError, EffcliError, UnsupportedError, behind, first_line
from effcli.files.documents import parse_json
from effcli.graphs.graph import function
from effcli.importers._trace import Input, Trace, assemble, source

SCHEMA_MAJOR = 8
# Of the archive.
_VERSION = b"0"
# Far above what torch writes: bytes of a graph's JSON, numbers of a tensor that stores fewer, and how much smaller than
# its content a member of some size is.
_DESCRIPTION = 256 << 20
_EXPANDED = 1 << 24
_LARGE, _SHRUNK = 64 << 20, 100
_REMEDY = "export the network again with torch.export.save"
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
# Torch's numbers of types, those too that no tensor of a graph has here.
_EVERY_DTYPE = {kind.value for kind in schema.ScalarType} - {0}
_LAYOUTS = {7: torch.strided}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
# A size that may vary, alone in an expression.
_SYMBOL = re.compile(r"(?:Symbol\(')?(\w+)(?:'(?:, \w+=\w+)*\))?")
_PLAIN = ("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings", "as_int_lists")
# What a graph computes with sizes.
_SIZES: dict[str, Callable[..., Any]] = {
    f"{module}.{name}": getattr(owner, name)
    for module, owner, names in (
        ("_operator", operator, "add sub mul truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ getitem"),
        ("math", math, "ceil floor trunc"),
        ("torch", torch, "sym_not sym_max sym_min sym_float sym_int sym_ite sym_sum"),
    )
    for name in names.split()
}


def read_archive(path: Path) -> Trace:
    """Read a `.pt2` file. `CheckpointError` when it is none or damaged, `UnsupportedError` for what it may not hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).trace()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", "give a .pt2 file") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is truncated, or no exported graph: {error}", _REMEDY) from error
    except OSError as error:
        if behind(error) is not None:
            raise
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", _REMEDY) from error
    except (EffcliError, MemoryError):
        raise
    except Exception as error:  # what zipfile, zlib and torch raise for damage shares no base
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}".splitlines()[0], _REMEDY) from error


class _Reader:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        names = archive.namelist()
        for info in archive.infolist():
            # It compares what the directory says of a member with what stands before its content.
            archive.open(info).close()
        marks = [name for name in names if name.rpartition("/")[2] == "archive_format"]
        if len(marks) != 1 or archive.read(marks[0]) != b"pt2":
            raise CheckpointError(
                f"{path} is no graph of torch.export.save from torch 2.8 or later; effcli does not execute pickles",
                _REMEDY,
            )
        self.root = marks[0].removesuffix("archive_format")
        # Torch's own reader is asked what it asks before it executes anything.
        torch._C.PyTorchFileReader(str(path)).get_all_records()
        version = archive.read(f"{self.root}archive_version")
        if version != _VERSION:
            raise CheckpointError(f"{path} has version {version[:20]!r} of its archive, effcli reads 0", _REMEDY)
        models = [name for name in names if name.startswith(f"{self.root}models/") and name.endswith(".json")]
        if len(models) != 1:
            raise UnsupportedError(f"{path} holds {len(models)} graphs", "save one graph to a file")
        self.model = models[0].rpartition("/")[2].removesuffix(".json")
        self.nodes: dict[str, Any] = {}

    def trace(self) -> Trace:
        data = self.json(f"models/{self.model}.json", schema.ExportedProgram)
        major = data["schema_version"]["major"]
        if major != SCHEMA_MAJOR:
            raise CheckpointError(
                f"{self.path} is of torch {data.get('torch_version')} with schema {major}, effcli reads {SCHEMA_MAJOR}",
                "export the network again with torch 2.11 to 2.13",
            )
        described, signature = data["graph_module"]["graph"], data["graph_module"]["signature"]
        for name, meta in described["tensor_values"].items():
            _check_value(name, meta)
            _check_ranges(name, meta, data["range_constraints"])
        graph = fx.Graph()
        weights, inputs = self.inputs(graph, described, signature["input_specs"])
        taken, known = described["inputs"], signature["input_specs"]
        if len(taken) != len(known):
            raise ValueError(f"the number of inputs is {len(taken)} in the graph and {len(known)} in its signature")
        tensors = [value["name"] for argument in taken for kind, value in argument.items() if kind == "as_tensor"]
        missing = next((name for name in tensors if name not in described["tensor_values"]), None)
        if missing is not None:
            raise ValueError(f"the input {missing} is described nowhere")
        made = [name for item in described["nodes"] for output in item["outputs"] for name in _names(output)]
        made += [value["name"] for argument in taken for value in argument.values() if isinstance(value, dict)]
        twice = next((name for name, count in Counter(made).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"the value {twice} is made twice")
        for item in described["nodes"]:
            _check_described(item, described["tensor_values"])
            self.node(graph, item)
        kinds = [next(iter(spec.items())) for spec in signature["output_specs"]]
        changed = [
            str(spec.get("buffer_name") or spec.get("user_input_name") or "state")
            for kind, spec in kinds
            if kind != "user_output"
        ]
        graph.output(tuple(self.argument(value) for value in described["outputs"]))
        graph.lint()
        return assemble(graph, weights, inputs, list(changed))

    def json(self, name: str, kind: type) -> Any:
        """A member as JSON, which torch's own `kind` can be made of."""
        member = f"{self.root}{name}"
        data = parse_json(self.bytes(member, _DESCRIPTION), f"{name} in {self.path}", remedy=_REMEDY)
        try:
            _dict_to_dataclass(kind, data)  # type: ignore[no-untyped-call]
        except Exception as error:  # it raises whatever it trips over
            raise CheckpointError(
                f"{name} in {self.path} is damaged: {type(error).__name__} {first_line(error)}", _REMEDY
            ) from error
        return data

    def bytes(self, member: str, most: int) -> bytes:
        """At most so many bytes of a member, however many it would unpack to."""
        info = self.archive.getinfo(member)
        if info.file_size > max(_LARGE, _SHRUNK * info.compress_size):
            raise CheckpointError(f"{member} in {self.path} unpacks to {info.file_size:,} bytes", _REMEDY)
        with self.archive.open(info) as file:
            return file.read(most)

    def inputs(
        self, graph: fx.Graph, described: dict[str, Any], specs: list[dict[str, Any]]
    ) -> tuple[dict[str, tuple[str, Tensor]], dict[str, Input | None]]:
        """The weights, and what else the graph takes."""
        stored = {
            "parameter": ("weights", "parameter_name"),
            "buffer": ("weights", "buffer_name"),
            "tensor_constant": ("constants", "tensor_constant_name"),
        }
        payloads = {
            kind: self.json(f"data/{kind}/{self.model}_{kind}_config.json", schema.PayloadConfig)["config"]
            for kind in ("weights", "constants")
        }
        for folder, named in payloads.items():
            for name, payload in named.items():
                self.check(folder, name, payload)
        weights: dict[str, tuple[str, Tensor]] = {}
        inputs: dict[str, Input | None] = {}
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind == "constant_input":
                continue
            if kind not in (*stored, "user_input"):
                raise UnsupportedError(f"{self.path} holds a {kind}, which is no tensor", _REMEDY)
            # The argument of a user's input says what it is; a number or None has no name, and no placeholder.
            argument = content["arg"] if kind in stored else next(iter(content["arg"].values()))
            if not isinstance(argument, dict):
                continue
            node = self.nodes[argument["name"]] = graph.placeholder(_name(argument["name"]))
            if kind in stored:
                folder, key = stored[kind]
                # A buffer that is not persistent stands among the constants.
                folder = folder if content[key] in payloads[folder] else "constants"
                if not all(content[key].split(".")):
                    raise ValueError(f"{content[key]!r} is no name of a weight")
                weights[node.name] = content[key], self.tensor(folder, content[key], payloads[folder][content[key]])
            else:
                meta = described["tensor_values"].get(argument["name"])
                sizes = tuple(size.get("as_int") for size in meta["sizes"]) if meta else ()
                inputs[node.name] = (sizes, _DTYPES[meta["dtype"]]) if meta else None
        return weights, inputs

    def check(self, folder: str, name: str, payload: dict[str, Any]) -> None:
        """Raise where a tensor's bytes are no whole numbers of its type, or its device is none.

        So torch does, of tensors too that the graph does not read.
        """
        if payload["use_pickle"]:
            return
        _check_device(payload["tensor_meta"]["device"])
        size = self.archive.getinfo(f"{self.root}data/{folder}/{payload['path_name']}").file_size
        if size % _DTYPES[payload["tensor_meta"]["dtype"]].itemsize:
            raise ValueError(f"{name} stores {size:,} bytes, which are no whole numbers")

    def tensor(self, folder: str, name: str, payload: dict[str, Any]) -> Tensor:
        if payload["use_pickle"]:
            raise UnsupportedError(
                f"{self.path} holds {name} as a pickle, and effcli does not execute pickles",
                "make it a plain tensor before the export",
            )
        meta = payload["tensor_meta"]
        sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
        offset, dtype = meta["storage_offset"]["as_int"], _DTYPES[meta["dtype"]]
        numbers = (*sizes, *strides, offset)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(sizes) != len(strides):
            raise ValueError(f"{name} has sizes {sizes}, strides {strides} and offset {offset}")
        if 0 in sizes:
            return torch.zeros(sizes, dtype=dtype)
        # A tensor may be a part of what is stored, and only up to its last number is it read.
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        needed = (last + 1) * dtype.itemsize
        data = bytearray(self.bytes(f"{self.root}data/{folder}/{payload['path_name']}", needed))
        if len(data) < needed or math.prod(sizes) > max(last + 1, _EXPANDED):
            raise ValueError(f"{name} stores {len(data):,} bytes, and has {math.prod(sizes):,} numbers")
        return torch.frombuffer(data, dtype=dtype).as_strided(sizes, strides, offset).contiguous()

    def node(self, graph: fx.Graph, item: dict[str, Any]) -> None:
        metadata = item["metadata"]
        modules = metadata.get("nn_module_stack", "").rpartition(";")[2].split(",")[1:]
        origin = source(metadata.get("stack_trace"), modules)
        aten = item["target"].startswith("torch.ops.aten.")
        if not aten and item["target"] not in _SIZES:
            at = f" ({origin})" if origin else ""
            raise UnsupportedError(
                f"{item['target']}{at} is not an operator of aten", "replace it by plain tensor operations"
            )
        target = function(item["target"].removeprefix("torch.ops.")) if aten else _SIZES[item["target"]]
        values = [self.argument(entry["arg"]) for entry in item["inputs"]]
        positional, keywords = values, dict[str, Any]()
        if aten:
            given = dict(zip((entry["name"] for entry in item["inputs"]), values, strict=True))
            if len(given) < len(values):
                raise ValueError(f"{item['target']} is given an argument twice")
            positional, keywords = _by_schema(target, given)
        names = [name for output in item["outputs"] for name in _names(output)]
        several = len(names) != 1 or "as_tensors" in item["outputs"][0]
        made = graph.create_node(
            "call_function", target, tuple(positional), keywords, item.get("name") if several else names[0]
        )
        made.meta["source"] = origin
        if not several:
            self.nodes[names[0]] = made
            return
        for index, name in enumerate(names):
            self.nodes[name] = graph.create_node("call_function", operator.getitem, (made, index), {}, name)
            self.nodes[name].meta["source"] = origin

    def argument(self, described: dict[str, Any]) -> Any:
        """An argument of a node: a node, or a plain value."""
        ((kind, value),) = described.items()
        if kind in _PLAIN:
            return value
        if kind == "as_none":
            return None
        if kind == "as_float":
            # Infinity and NaN are strings, as JSON has no numbers for them.
            return float(value)
        if kind in ("as_floats", "as_float_lists"):
            return [self.argument({"as_floats" if isinstance(v, list) else "as_float": v}) for v in value]
        if kind in ("as_tensor", "as_name"):
            return self.nodes[value["name"] if isinstance(value, dict) else value]
        if kind == "as_tensors":
            return [self.nodes[item["name"]] for item in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
            return self.argument(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"):
            return [self.argument(item) for item in value]
        if kind == "as_scalar_type":
            return _DTYPES[value]
        if kind == "as_memory_format":
            return _MEMORY_FORMATS[value]
        if kind == "as_layout":
            return _LAYOUTS[value]
        if kind == "as_device":
            return torch.device("cpu")
        raise UnsupportedError(f"{self.path}: an operator takes {kind.removeprefix('as_')}", "use plain tensors")


def _by_schema(target: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an operator, which are stored by name: those that stand first by position, others by keyword."""
    arguments = target._schema.arguments
    unknown = given.keys() - {argument.name for argument in arguments}
    missing = [one.name for one in arguments if one.name not in given and not one.has_default_value()]
    if unknown or missing:
        raise ValueError(f"{target} takes no {min(unknown)!r}" if unknown else f"{target} lacks its {missing[0]!r}")
    first = list(takewhile(lambda one: one.name in given and not one.kwarg_only, arguments))
    keywords = given.keys() - {one.name for one in first}
    return [given[one.name] for one in first], {name: value for name, value in given.items() if name in keywords}


def _check_device(described: dict[str, Any]) -> None:
    """Raise where torch has no such device, whether this machine has it or not."""
    index = described["index"]
    torch.device(described["type"]) if index is None else torch.device(described["type"], index)


def _check_value(name: str, meta: dict[str, Any]) -> None:
    """Raise where the shape, type or device that a graph gives for a value is none."""
    _check_device(meta["device"])
    if meta["dtype"] not in _EVERY_DTYPE or len(meta["sizes"]) != len(meta["strides"]):
        raise ValueError(f"the value {name} has no type, or other strides than sizes")
    if type(meta["requires_grad"]) is not bool:
        raise ValueError(f"the value {name} says nothing of its gradient")
    for size in (*meta["sizes"], *meta["strides"], meta["storage_offset"]):
        number = size.get("as_int", 0)
        if type(number) is not int or number < 0:
            raise ValueError(f"the value {name} has the size {number}")


def _check_ranges(name: str, meta: dict[str, Any], ranges: Mapping[str, Any]) -> None:
    """Raise where a size that may vary is not in the range that the file gives for it."""
    for size in (*meta["sizes"], *meta["strides"]):
        content = size.get("as_expr") or {}
        symbol, hint = _SYMBOL.fullmatch(content.get("expr_str", "")), content.get("hint") or {}
        limits = ranges.get(symbol[1]) if symbol else None
        number = hint.get("as_int")
        if limits is None or number is None:
            continue
        least, most = limits["min_val"], limits["max_val"]
        if (least is not None and number < least) or (most is not None and number > most):
            raise ValueError(f"the value {name} has the size {number}, which lies outside its range")


def _name(name: str) -> str:
    """A name that fx writes into Python code as it stands, refused where it is more than a word."""
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name of a value")
    return name


def _check_described(item: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a node that makes a tensor of which the file says no type: torch refuses it, too."""
    for output in item["outputs"]:
        ((kind, _),) = output.items()
        missing = [name for name in _names(output) if kind.startswith("as_tensor") and name not in values]
        if missing:
            raise ValueError(f"{missing[0]} is made by a node and described nowhere")


def _names(output: dict[str, Any]) -> list[str]:
    """The values that one output of a node holds."""
    ((kind, value),) = output.items()
    if kind == "as_none":
        return []
    if kind == "as_tensors":
        return [item["name"] for item in value]
    return [str(value.get("name") or value.get("as_name"))]


__all__ = ["SCHEMA_MAJOR", "read_archive"]
