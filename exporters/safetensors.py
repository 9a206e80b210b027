"""Export to a stock safetensors checkpoint: packed where the standard format has a place for every layer, else dense.

A checkpoint in the standard layout goes over byte for byte. With `dequantize` every compressed layer becomes a dense
one of the network's dtype, written block by block, under the names that the architecture's own checkpoints have. A
network read as a graph becomes `model.safetensors` with the names of the network that it was read from: a Hugging Face
image classifier loads again as one, any other with `load_state_dict` of its own class.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.exporters._classifier import write_classifier
from effcli.exporters._obstacles import by_reason, some
from effcli.exporters._packed import write_tensors
from effcli.exporters._target import replacing
from effcli.files.checkpoint import (
    STOCK_STEM,
    Checkpoint,
    copy_checkpoint,
    copy_companions,
    weight_files,
    write_shard,
    write_text,
)
from effcli.files.exporter import Exporter
from effcli.files.layout import check_alone, check_uniform, is_own, network_config, stored_layers
from effcli.graphs.graph import Graph, is_graph
from effcli.graphs.integer import is_integer
from effcli.language.weights import open_weights
from effcli.reports.report import Exported


class Safetensors(Exporter):
    """A safetensors export."""

    dequantize: bool = Field(False, description="Write dense weights that any loader reads; the file grows.")

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the finished checkpoint `source` to the directory `target`, whole or not at all.

        Raises `UnsupportedError` when a layer has no place in the standard format and `dequantize` is not asked for, or
        a classifier is no longer the one of its config; `OutputError` when `target` exists (without `overwrite`) or
        cannot be written.
        """
        if is_integer(source):
            raise UnsupportedError(f"{source} is an integer network, which has no float weights", "export it to onnx")
        if is_graph(source):
            return _export_graph(source, target, self, overwrite)
        check_alone(source)
        checkpoint = Checkpoint.open(source)
        own = is_own(checkpoint.config)
        check_uniform(checkpoint.config)
        if own and not self.dequantize:
            raise _no_place(checkpoint)
        with replacing(source, target, overwrite) as folder:
            if self.dequantize and (own or "quantization_config" in checkpoint.config):
                copy_companions(source, folder)
                _write_dense(checkpoint, folder)
            else:
                copy_checkpoint(source, folder)
        return Exported(target="safetensors", nbytes=sum(file.stat().st_size for file in weight_files(target)))


def _export_graph(source: Path, target: Path, config: Safetensors, overwrite: bool) -> Exported:
    graph = Graph.read(source)
    packed = [site.name for site in graph.sites() if site.name in graph.stored]
    if packed and not config.dequantize:
        raise UnsupportedError(
            f"the standard format has no place for packed layers of a graph: {some(packed)}",
            "--dequantize writes dense weights; onnx holds packed ones",
        )
    checked, remarks = "", tuple[str, ...]()
    with replacing(source, target, overwrite) as folder:
        write_shard(folder / f"{STOCK_STEM}.safetensors", _state(graph))
        if graph.facts.config is not None:
            checked, remarks = write_classifier(graph, folder)
        elif graph.facts.classes is not None:
            text = json.dumps({"classes": graph.facts.classes}, indent=2)
            write_text(folder / "config.json", f"{text}\n")
    return Exported(
        target="safetensors",
        nbytes=sum(file.stat().st_size for file in weight_files(target)),
        checked=checked,
        remarks=remarks,
    )


def _state(graph: Graph) -> dict[str, Tensor]:
    """The tensors that `load_state_dict` of the network's own class asks for."""
    tensors = graph.module.state_dict()
    for name in tensors:
        if name.endswith(".num_batches_tracked"):
            # A checkpoint leaves it out, for it says nothing in evaluation.
            tensors[name] = torch.zeros((), dtype=torch.int64)
    return tensors


def _no_place(checkpoint: Checkpoint) -> UnsupportedError:
    """The error that names the layers without a place in the standard format, by reason."""
    layers = stored_layers(checkpoint.config, {})
    obstacles = {name: item.obstacle for name, item in layers.items() if item.obstacle}
    return UnsupportedError(
        f"the standard format has no place for {by_reason(obstacles) or 'this layout'}",
        "--dequantize writes dense weights that any loader reads; effcli.load reads the checkpoint as it is",
    )


def _write_dense(checkpoint: Checkpoint, folder: Path) -> None:
    write_tensors(open_weights(checkpoint.path), folder, None)
    write_text(folder / "config.json", json.dumps(network_config(checkpoint.config), indent=2, sort_keys=True) + "\n")
