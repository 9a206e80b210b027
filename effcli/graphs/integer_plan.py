"""How large the integer network of a graph will be, before anything is calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from effcli.formats import Packing
from effcli.graphs.graph import Graph, calls
from effcli.graphs.integer import Weighted
from effcli.graphs.lowering import check
from effcli.layers.layer import LayerSite
from effcli.run.plan import Row

# Multiplier int32, shift uint8 and bias int32 of an output channel; the ledger counts the first two to the weight.
_RESCALING, _BIAS = 5, 4


def plan_integer(graph: Graph, prepared: Graph, formats: Mapping[str, Packing]) -> tuple[list[Row], int]:
    """A row for each layer and each embedding of `graph`, and the bytes of all constants of its integer network.

    prepared: what is lowered in its place; formats: of the layers as the steps before leave them. `UnsupportedError`
    for what has no integer counterpart.
    """
    rows, total = [], 0
    for site in graph.sites():
        format, weights = _stored(site, formats.get(site.name))
        nbytes = weights + _RESCALING * site.rows
        rows.append(_row(site.name, site.kind, site.shape, format, nbytes))
        total += (nbytes + _BIAS * site.rows) * len(list(calls(graph, site.name)))
    layers = {row.name for row in rows}
    assembly = check(prepared)
    for made in assembly.steps:
        if not isinstance(made, Weighted) or made.layer not in layers:
            total += sum(assembly.arrays[f"{made.name}.{suffix}"].nbytes for suffix in made.arrays)
    for name, module in graph.module.named_modules():
        if isinstance(module, nn.Embedding):
            # A row for each of the 256 codes.
            shape = (module.num_embeddings, module.embedding_dim)
            rows.append(_row(f"{name}.weight", "embedding", shape, "int8 tensor", 256 * module.embedding_dim))
    return rows, total


def _stored(site: LayerSite, before: Packing | None) -> tuple[str, int]:
    """The format of a layer's integers, and the bytes of its codes, and its table where it keeps one."""
    if before is not None and before.signed_bits:
        bits = 2 if before.signed_bits <= 2 else 4 if before.signed_bits <= 4 else 8
        return f"int{bits} channel sym", _packed(site, bits)
    if before is not None and before.learned and before.strategy != "group" and before.bits <= 4:
        bits, table = 2 if before.bits <= 2 else 4, 2**before.bits * (1 if before.strategy == "tensor" else site.rows)
        if site.rows * math.ceil(site.columns * bits / 8) + table < site.rows * site.columns:
            return f"kmeans{bits} {before.strategy} int8", _packed(site, bits) + table
    return "int8 channel sym", _packed(site, 8)


def _packed(site: LayerSite, bits: int) -> int:
    """Bytes of the codes; those of less than 8 bits take whole words in each row."""
    return site.rows * (site.columns if bits == 8 else math.ceil(site.columns * bits / 32) * 4)


def _row(name: str, kind: str, shape: tuple[int, ...], format: str, nbytes: int) -> Row:
    return Row(
        name=name,
        kind=kind,
        shape=shape,
        format=format,
        bits_per_weight=8 * nbytes / max(math.prod(shape), 1),
        nbytes=nbytes,
        status="compress",
    )


__all__ = ["plan_integer"]
