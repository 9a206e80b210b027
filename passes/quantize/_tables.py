"""What passes share whose weights are codes for a table: their options, and what the ledger says of their codes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effcli.formats import Codebook, CodebookWeight, Strategy, huffman
from effcli.formats.codebook import fixed_table
from effcli.layers.contract import Layer, LayerPass, Outcome


class Shared(LayerPass):
    """Options that say what shares a table or a scale."""

    granularity: Strategy = Field(
        "channel", description="What shares a table or a scale: the tensor, an output channel, a group."
    )
    group_size: int | None = Field(
        None, ge=1, description="Numbers of a group, with granularity `group`; must divide each layer's inputs."
    )

    @model_validator(mode="after")
    def _group_size_where_it_belongs(self) -> Self:
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity 'group' needs a group_size")
        if self.granularity != "group" and self.group_size is not None:
            raise ValueError(f"a group_size needs granularity 'group', not {self.granularity!r}")
        return self


def by_block(weight: Tensor, format: Codebook) -> Tensor:
    """View weight (out, in) as (blocks, numbers that share a table or a scale)."""
    shape = weight.shape[0], weight.shape[1]
    return weight.reshape(format.blocks(shape), format.block(shape))


def ascending(table: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The same weights with every table in order: table (tables, entries), codes uint8 (out, in)."""
    order = table.argsort(dim=1, stable=True)
    places = order.argsort(dim=1).to(torch.uint8)
    index = codes.reshape(len(table), -1).long()
    return table.gather(1, order), places.gather(1, index).view_as(codes)


def scaled(format: Codebook, codes: Tensor, scale: Tensor, layer: Layer) -> Outcome:
    """The outcome for codes uint8 (out, in) of a fixed table, with a scale for each block, floating (blocks,)."""
    format = dataclasses.replace(format, dtype=layer.dtype)
    table = fixed_table(format.kind).to(codes.device)
    weight = CodebookWeight(format, codes, table, scale.to(layer.dtype))
    return Outcome(weight, described(weight, layer.dtype))


def described(weight: CodebookWeight, original: torch.dtype) -> dict[str, Any]:
    """Notes for the ledger: bits per weight that the codes' entropy promises and Huffman coding needs, and how many
    times smaller than in the `original` dtype everything that is stored of the weight is.
    """
    codes, format = weight.codes, weight.format
    notes = {"entropy": round(huffman.entropy(codes), 4)}
    if format.huffman:
        notes["coded_bits"] = round(huffman.bits_per_symbol(codes), 4)
    return {**notes, "ratio": round(codes.numel() * original.itemsize / weight.nbytes, 2)}
