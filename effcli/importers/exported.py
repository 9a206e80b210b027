"""Exported graphs: the `.pt2` files of `torch.export.save`, alone or as `model.pt2` in a directory."""

from __future__ import annotations

from pathlib import Path

from effcli.graphs.graph import Graph
from effcli.importers._archive import read_archive
from effcli.importers._rules import lower

FILE_NAME = "model.pt2"


def read_exported(path: Path) -> Graph:
    """Read a `.pt2` file. `CheckpointError` when it is none, `UnsupportedError` for what a graph cannot hold.

    Nothing in the file is executed. What was exported for one size of the batch is taken if it runs with others.
    """
    return lower(read_archive(path), "exported graph")
