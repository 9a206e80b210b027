"""The export targets by name. Explicit, so that listing them imports neither torch nor the exporters themselves.

An exporter `exporters/<target>.py` holds one class, an `effcli.files.exporter.Exporter`: its options and how it writes.
Other packages add theirs through the entry points `effcli.exporters`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from effcli.errors import UnsupportedError, UserError, did_you_mean
from effcli.platform import onnx_session, registry
from effcli.platform.registry import Entry, Registry

if TYPE_CHECKING:
    from effcli.files.exporter import Exporter


TARGETS: dict[str, Entry] = {
    "safetensors": Entry(
        "effcli.exporters.safetensors:Safetensors", "Packed weights for transformers and vLLM, or dense ones."
    ),
    "onnx": Entry(
        "effcli.exporters.onnx:ONNX",
        "Graphs for onnxruntime: float, int8, language models of packed weights.",
        onnx_session.PACKAGES,
    ),
    "bitsandbytes": Entry(
        "effcli.exporters.bitsandbytes:BitsAndBytes", "NF4 layers for transformers and PEFT, as in QLoRA."
    ),
    "gptq": Entry("effcli.exporters.gptq:GPTQ", "Packed weights in the layout of GPTQ, for transformers and vLLM."),
    "awq": Entry("effcli.exporters.awq:AWQ", "4-bit weights in the layout of AWQ, for transformers and vLLM."),
    "c": Entry("effcli.exporters.c:C", "Firmware for a microcontroller from an integer network."),
    "pt2": Entry("effcli.exporters.pt2:PT2", "A graph that torch.export.load reads, weights dense."),
}

REGISTRY: Registry[Exporter] = Registry(
    "export target", registry.EXPORTERS, ("effcli.files.exporter:Exporter",), TARGETS
)


def check(target: str) -> None:
    """Raise `UnsupportedError` unless there is an export to `target`."""
    if REGISTRY.find(target) is None:
        raise UnsupportedError(f"there is no export target {target!r}", did_you_mean(target, REGISTRY.known()))


def require(target: str) -> None:
    """Raise `UserError` unless the packages that an export to `target` needs are installed."""
    check(target)
    wanted = TARGETS[target].packages if target in TARGETS else ()
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise UserError(
            f"an export to {target} needs {' and '.join(missing)}, not installed here",
            f"pip install 'effcli[{target}]'",
        )


def load(target: str) -> type[Exporter]:
    """The class that exports to `target`."""
    check(target)
    return REGISTRY.load(target)


__all__ = ["REGISTRY", "TARGETS", "check", "load", "require"]
