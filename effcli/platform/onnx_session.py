"""onnxruntime as effcli uses it: on the CPU, silent, and with its exceptions mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version as package_version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import CheckpointError, DataError, EffcliError, MachineError, UnsupportedError, UserError
from effcli.platform.stopwatch import repeated

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

    Arrays = Mapping[str, np.ndarray[Any, Any]]

PACKAGES = ("onnx", "onnxruntime", "onnxscript")

# For comparisons, which are of a file and not of this processor: without VNNI instructions onnxruntime's default
# saturates sums of two products of int8.
EXACT = {"session.x64quantprecision": "1"}

_FATAL_ONLY = 4
_FEWEST_RUNS = 3

# What onnxruntime says of a file that is sound but asks for more than this version has.
_LACKING = (
    "No Op registered",
    "is not a registered function/op",
    "Could not find an implementation",
    "under development",
    "Unsupported model IR version",
)


def installed() -> bool:
    """Whether all packages of the extra `onnx` are there."""
    return all(find_spec(name) is not None for name in PACKAGES)


def require(*packages: str) -> None:
    """Raise `UserError` unless `packages` (default: all of the extra `onnx`) are installed."""
    missing = [name for name in packages or PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here", "pip install 'effcli[onnx]'")


def version() -> str:
    """The runtime by name and version, e.g. 'onnxruntime 1.32.0'."""
    return f"onnxruntime {package_version('onnxruntime')}"


def open_session(
    path: str | Path, threads: int | None = None, entries: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """The ONNX file `path` (or the `model.onnx` of a folder), ready to run on the CPU.

    threads: for one operator, 1 or more (default: onnxruntime's choice, one per core); operators run one after
    another. entries: session configuration by key, e.g. `{"session.qdq_matmulnbits_accuracy_level": "0"}`.
    Raises `CheckpointError` for a file that is missing or damaged, `UnsupportedError` for one that asks for an
    operator or version that this onnxruntime does not have, `UserError` when onnxruntime is not installed.
    """
    require("onnxruntime")
    import onnxruntime

    path = Path(path)
    path = path / "model.onnx" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"there is no {path}", "give an ONNX file, or a folder with a model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no base
        raise _opening_failed(path, error) from error


def run(session: onnxruntime.InferenceSession, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """All outputs by name. inputs: by name, in the shapes and dtypes that the file declares.

    Raises `DataError` for inputs that do not fit, `MachineError` when onnxruntime fails at work.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # its classes share no base
        if type(error).__name__ in ("InvalidArgument", "ValueError"):
            wanted = ", ".join(f"{item.name} {item.type} {item.shape}" for item in session.get_inputs())
            raise DataError(
                f"the ONNX file cannot take this input: {_one_line(error)}", f"it takes {wanted}"
            ) from error
        raise MachineError(
            f"onnxruntime failed: {_one_line(error)}", "export it again; if that fails as well, report it with the file"
        ) from error


def time_one(session: onnxruntime.InferenceSession, inputs: Arrays, seconds: float = 2.0) -> list[float]:
    """Seconds of each run on `inputs`, one after another for about `seconds` and at least 3 runs, after a warm-up."""
    return repeated(lambda: run(session, inputs), seconds, _FEWEST_RUNS)


def _opening_failed(path: Path, error: Exception) -> EffcliError:
    """The error for a file that onnxruntime does not open."""
    text = _one_line(error)
    if type(error).__name__ == "NotImplemented" or any(part in str(error) for part in _LACKING):
        return UnsupportedError(
            f"{version()} cannot run {path}: {text}", "install a newer onnxruntime, or export for an older one"
        )
    return CheckpointError(f"{path} is damaged or no ONNX file: {text}", "write or copy it again, its data file too")


def _one_line(error: Exception) -> str:
    """What onnxruntime says, without its codes, source places and line ends."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    # A place in the source: a path and a line, mostly with the function's signature.
    text = re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", text)
    text = re.sub(r"\b\w+\.cc:\d+ \w+ ", "", text)
    return text.removesuffix(".")
