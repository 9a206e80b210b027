"""The export targets by name. Explicit, so that listing them imports neither torch nor the exporters themselves.

An exporter `exporters/<target>.py` holds `Config`, its options, and `export(source, target, config, overwrite) ->
Exported`: it writes the finished checkpoint `source` to the directory `target`, whole or not at all. It may hold
`table(target)`, records of what it wrote that the command line shows.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

from effcli import onnx_session
from effcli.errors import UnsupportedError, UserError, did_you_mean


class Entry(NamedTuple):
    """Where an exporter lives, and one line about it."""

    module: str
    summary: str
    packages: tuple[str, ...] = ()  # what it needs beside effcli's own dependencies, all in the extra of its name


TARGETS: dict[str, Entry] = {
    "safetensors": Entry("effcli.exporters.safetensors", "Packed weights for transformers and vLLM, or dense ones."),
    "onnx": Entry(
        "effcli.exporters.onnx",
        "Graphs for onnxruntime: float, int8, language models of packed weights.",
        onnx_session.PACKAGES,
    ),
    "bitsandbytes": Entry("effcli.exporters.bitsandbytes", "NF4 layers for transformers and PEFT, as in QLoRA."),
    "gptq": Entry("effcli.exporters.gptq", "Packed weights in the layout of GPTQ, for transformers and vLLM."),
    "awq": Entry("effcli.exporters.awq", "4-bit weights in the layout of AWQ, for transformers and vLLM."),
    "c": Entry("effcli.exporters.c", "Firmware for a microcontroller from an integer network."),
    "pt2": Entry("effcli.exporters.pt2", "A graph that torch.export.load reads, weights dense."),
}


def check(target: str) -> None:
    """Raise `UnsupportedError` unless this version exports to `target`."""
    if target in TARGETS:
        return
    raise UnsupportedError(f"there is no export target {target!r}", did_you_mean(target, TARGETS))


def require(target: str) -> None:
    """Raise `UserError` unless the packages that an export to `target` needs are installed."""
    check(target)
    missing = [name for name in TARGETS[target].packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"an export to {target} needs {' and '.join(missing)}, not installed here",
            f"pip install 'effcli[{target}]'",
        )


def load(target: str) -> ModuleType:
    """The module that exports to `target`."""
    check(target)
    return import_module(TARGETS[target].module)


__all__ = ["TARGETS", "Entry", "check", "load", "require"]
