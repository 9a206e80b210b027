"""Export to a NumPy archive: every tensor of a network read as a graph under its name, dense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from effcli.errors import CheckpointError, UnsupportedError, writing
from effcli.files.exporter import Exporter, nbytes, replacing
from effcli.graphs.graph import Graph, is_graph
from effcli.options import Options
from effcli.reports.report import Exported

FILE_NAME = "weights.npz"


class Row(Options):
    """An array as the command line shows it."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


class Npz(Exporter):
    """Dense weights as a NumPy archive."""

    half: bool = Field(False, description="Store numbers of 16 bits in place of 32.")

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the graph `source` as `target/weights.npz`, whole or not at all."""
        if not is_graph(source):
            raise UnsupportedError(f"{source} holds no graph with floating weights", "export it to safetensors")
        state = Graph.read(source).module.state_dict()
        arrays = {name: (tensor.half() if self.half else tensor).numpy() for name, tensor in state.items()}
        with replacing(source, target, overwrite) as folder, writing(target):
            np.savez(folder / FILE_NAME, **arrays)
        return Exported(target="npz", nbytes=nbytes(target), checked=f"{len(arrays)} arrays")

    def table(self, folder: Path) -> list[Row]:
        """What stands in the archive."""
        try:
            with np.load(folder / FILE_NAME) as arrays:
                return [Row(name=name, shape=array.shape, nbytes=array.nbytes) for name, array in arrays.items()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no {FILE_NAME} that can be read", "export it again") from error
