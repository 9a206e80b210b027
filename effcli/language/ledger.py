"""The ledger of a language model: the lines of what no pass takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effcli.files.checkpoint import DTYPES, Entry
from effcli.language.weights import Weights
from effcli.layers.layer import LayerSite
from effcli.layers.result import CARRIED, MATRIX, dense_row
from effcli.reports.report import LedgerRow


def other_rows(weights: Weights) -> list[LedgerRow]:
    """What is no layer: embeddings, other matrices, and tensors that the network does not use."""
    state = weights.skeleton.model.state_dict()
    matrices = [
        dense_row(name, "embedding", tuple(state[name].shape), weights.dtype_of(name), MATRIX)
        for name in weights.skeleton.parameters()
        if not weights.sites(name) and state[name].ndim > 1
    ]
    return matrices + carried_rows(weights.carried())


def carried_rows(carried: Mapping[str, Entry]) -> list[LedgerRow]:
    """Tensors that the network does not use, by their names in the files."""
    return [dense_row(name, "other", entry.shape, DTYPES[entry.dtype], CARRIED) for name, entry in carried.items()]


def tied_row(site: LayerSite, dtype: torch.dtype, reason: str) -> LedgerRow:
    """The line of a head that is stored as the input embedding: no bytes of its own."""
    row = dense_row(site.name, site.kind, site.shape, dtype, reason)
    return row.model_copy(update={"nbytes": 0, "bits_per_weight": 0.0})


__all__ = ["carried_rows", "other_rows", "tied_row"]
