"""Read a file of one's own into a graph: a NumPy archive with a chain of linear layers, `0.weight`, `0.bias` and so on.

`read_chain(path).save(folder)` makes of an empty folder a checkpoint that every command of effcli takes as MODEL.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from effcli.errors import CheckpointError
from effcli.graphs.graph import Builder, Facts, Graph


def read_chain(path: Path) -> Graph:
    """Read `path`: linear layers with a ReLU between them. `CheckpointError` when it is no such file."""
    try:
        with np.load(path) as arrays:
            tensors = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
        layers = [_linear(tensors, number) for number in range(max(1, len(tensors) // 2))]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, BadZipFile) as error:
        raise CheckpointError(f"{path} holds no chain of linear layers: {error}", "write it again") from error
    builder = Builder()
    value = builder.input()
    for number, layer in enumerate(layers):
        # Every weight with inputs is a module, everything else the call of an aten operator.
        value = builder.call("aten.relu.default", value) if number else value
        value = builder.module(f"layers.{number}", layer, value, source=str(number))
    return builder.finish(value, Facts(origin="archive of linear layers", shape=(layers[0].in_features,)))


def _linear(tensors: dict[str, torch.Tensor], number: int) -> nn.Linear:
    weight, bias = tensors[f"{number}.weight"], tensors[f"{number}.bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer
