"""Exported graphs: the `.pt2` files of `torch.export.save`, alone or as `model.pt2` in a directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from effcli.graphs.graph import Graph
from effcli.importers._archive import read_archive
from effcli.importers._rules import lower
from effcli.importers._trace import export_module

FILE_NAME = "model.pt2"


def read_exported(path: Path) -> Graph:
    """Read a `.pt2` file. `CheckpointError` when it is none, `UnsupportedError` for what a graph cannot hold.

    Nothing in the file is executed. What was exported for one size of the batch is taken if it runs with others.
    """
    return lower(read_archive(path), "exported graph")


def write_exported(module: nn.Module, shape: tuple[int, ...], path: Path) -> str:
    """Write what `module` does in evaluation to a batch of float32 (n, *shape) as a `.pt2` file; a digest of it.

    The module stays as it is. The digest is of the operators and the weights, and not of the lines of Python that they
    come from: a notebook gives these other names each time. `UnsupportedError` for what torch.export cannot record.
    """
    modes = {each: each.training for each in module.modules()}
    try:
        program = export_module(module, shape)
    finally:
        for each, training in modes.items():
            each.training = training
    torch.export.save(program, path)
    found = hashlib.sha256(f"{shape} {program.graph} {program.graph_signature}".encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            found.update(f"\0{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
