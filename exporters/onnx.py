"""Export to ONNX for onnxruntime; what is written follows from the checkpoint.

A language model becomes a graph with its key-value cache in and out, packed layers as `MatMulNBits`. A network read as
a graph becomes float32 or float16. An integer network becomes int8 with every value between `QuantizeLinear` and
`DequantizeLinear`. Each file is checked, run in onnxruntime, and compared with effcli's own arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from effcli.errors import UnsupportedError
from effcli.exporters._target import nbytes, replacing
from effcli.files.checkpoint import copy_companions, read_config, write_text
from effcli.files.exporter import Exporter
from effcli.files.layout import check_uniform, network_config
from effcli.graphs.graph import is_graph
from effcli.graphs.integer import is_integer
from effcli.platform import onnx_session
from effcli.reports.report import Exported, Latency, Speed


class ONNX(Exporter):
    """An ONNX export."""

    precision: Literal["float32", "float16"] = Field("float32", description="Of what is not quantized.")
    dequantize: bool = Field(False, description="Write dense weights where they are packed; the file grows.")
    activations: Literal["int8"] | None = Field(
        None, description="Quantize the inputs of 8-bit linear layers as they come, and multiply in integers."
    )
    accuracy_level: Literal[0, 4] = Field(
        0, description="Of `MatMulNBits`: 0 multiplies in float, 4 in int8, faster and less exact."
    )

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the finished checkpoint `source` to `target/model.onnx`, whole or not at all.

        Raises `UnsupportedError` for a layer or an operator that has no place in ONNX, `UserError` where the onnx
        packages are missing, `OutputError` when `target` exists (without `overwrite`) or cannot be written.
        """
        onnx_session.require()
        remarks: tuple[str, ...] = ()
        with replacing(source, target, overwrite) as folder:
            if is_integer(source):
                checked, remarks = _integer(source, folder, self)
            elif is_graph(source):
                checked = _graph(source, folder, self)
            else:
                checked, remarks = _language(source, folder, self)
        return Exported(target="onnx", nbytes=nbytes(target), checked=checked, remarks=remarks)

    def speed(self, folder: Path, prefill: int, decode: int, threads: int | None = None) -> Speed:
        """Time a language model that `export` wrote to `folder` in onnxruntime."""
        from effcli.exporters._onnx_language import latency

        return latency(folder, prefill, decode, threads)

    def latency(self, folder: Path, threads: int | None = None) -> Latency:
        """Time a graph that `export` wrote to `folder` in onnxruntime."""
        from effcli.graphs.timing import of_onnx

        return of_onnx(folder, threads)


def _integer(source: Path, folder: Path, config: ONNX) -> tuple[str, tuple[str, ...]]:
    from effcli.exporters._onnx_integer import REMARK, export_integer

    _refuse(config, "an integer network", ("precision", "dequantize", "activations", "accuracy_level"))
    return export_integer(source, folder), (REMARK,)


def _graph(source: Path, folder: Path, config: ONNX) -> str:
    from effcli.exporters._onnx_graph import export_graph

    _refuse(config, "a network read as a graph", ("accuracy_level",))
    return export_graph(
        source, folder, precision=config.precision, dequantize=config.dequantize, activations=config.activations
    )


def _language(source: Path, folder: Path, config: ONNX) -> tuple[str, tuple[str, ...]]:
    from effcli.exporters._onnx_language import export_language

    check_uniform(read_config(source))
    # Tokenizer and config go along, so that the folder is all that a program needs.
    copy_companions(source, folder)
    text = json.dumps(network_config(read_config(source)), indent=2, sort_keys=True)
    write_text(folder / "config.json", f"{text}\n")
    described = export_language(
        source,
        folder,
        dequantize=config.dequantize,
        precision=config.precision,
        activations=config.activations,
        accuracy_level=config.accuracy_level,
    )
    return described.line, described.remarks


def _refuse(config: ONNX, what: str, names: tuple[str, ...]) -> None:
    """Raise `UnsupportedError` for an option that says nothing of this kind of checkpoint."""
    for name in names:
        if getattr(config, name) != ONNX.model_fields[name].default:
            raise UnsupportedError(f"onnx.{name} says nothing of {what}", "leave the option out")
