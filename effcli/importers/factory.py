"""Networks by the Python function that builds them, with weights from a safetensors file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcli.errors import CheckpointError, UnsupportedError
from effcli.files.checkpoint import read_entry, read_header
from effcli.graphs.graph import Graph
from effcli.importers._rules import lower
from effcli.importers._trace import blame, first_line, trace_module

_RETURNS = "it must return a torch.nn.Module, or a module and an example input"


def read_factory(name: str, weights: Path | None, shape: tuple[int, ...] | None) -> Graph:
    """Call `package.module:function` and read what it returns.

    weights: a safetensors file with exactly the tensors of the module; shape: of one input, without the batch axis,
    needed unless the function also returns an example. `UnsupportedError` says what is wrong with the function.
    """
    module, example = _built(name)
    if weights is not None:
        load(module, weights)
    found = None if example is None else tuple(example.shape[1:])
    if shape is None and found is None:
        raise UnsupportedError(
            f"{name} returns no example input, so its shape is unknown",
            "give the shape of an input: --set shape=[3,32,32]",
        )
    return lower(trace_module(module, shape or found or ()), f"python {name}")


def load(module: nn.Module, file: Path) -> None:
    """Fill a module from a safetensors file; `CheckpointError` names what is missing, unexpected or of another shape.

    Tensors that a module shares need only one of their names.
    """
    entries, wanted = read_header(file), module.state_dict(keep_vars=True)
    shared: dict[int, set[str]] = {}
    for key, value in wanted.items():
        shared.setdefault(id(value), set()).add(key)
    missing = [key for key, value in wanted.items() if not shared[id(value)] & entries.keys()]
    unexpected = sorted(entries.keys() - wanted.keys())
    for names, what in ((missing, "lacks"), (unexpected, "has")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            rest = "which the network needs" if what == "lacks" else "which the network does not know"
            raise CheckpointError(
                f"{file} {what} {', '.join(names[:3])}{more}, {rest}", "give the weights of this very network"
            )
    for key, entry in entries.items():
        if entry.shape != tuple(wanted[key].shape):
            raise CheckpointError(
                f"{key} has the shape {entry.shape} in {file}, the network needs {tuple(wanted[key].shape)}",
                "give the weights of this very network",
            )
        with torch.no_grad():
            wanted[key].copy_(read_entry(entry))


def _built(name: str) -> tuple[nn.Module, Tensor | None]:
    """The module and the example input that the function returns."""
    path, _, function = name.partition(":")
    with _current_directory():
        try:
            owner = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise UnsupportedError(f"{name} needs {error.name}, which is not installed", "install it") from error
            raise UnsupportedError(
                f"there is no module {error.name} to take {name} from", "run effcli where it can be imported"
            ) from error
        except Exception as error:  # whatever the user's module raises
            raise UnsupportedError(
                f"importing {path} raises {_described(error)}", "it must be importable by itself"
            ) from error
        if not callable(getattr(owner, function, None)):
            raise UnsupportedError(f"{path} has no function {function}", f"name one as {path}:function")
        try:
            built: Any = getattr(owner, function)()
        except Exception as error:  # whatever the user's function raises
            raise UnsupportedError(f"{name} raises {_described(error)}", "it is called without arguments") from error
    module, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module):
        raise UnsupportedError(f"{name} returns a {type(module).__name__}", _RETURNS)
    if example is not None and (not isinstance(example, Tensor) or example.dim() == 0):
        raise UnsupportedError(f"{name} returns a {type(example).__name__} as its example", _RETURNS)
    if example is not None and not example.is_floating_point():
        dtype = str(example.dtype).removeprefix("torch.")
        raise UnsupportedError(f"{name} takes inputs of {dtype}", "a graph takes floating-point numbers")
    return module.cpu(), example


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}{blame(error)}"


@contextmanager
def _current_directory() -> Iterator[None]:
    """Import from the current directory too, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
