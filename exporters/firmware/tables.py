"""Weights that are entries of a table: a step's numbers and table as C stores them, and when pairs are worth it.

C reads a number, loads its entry and multiplies. Where one table serves a whole layer, a kernel with instructions that
multiply two numbers at once first writes the entries of every two numbers to scratch memory, 1 KiB for 16 entries, and
then finds two weights with one load. 2-bit weights without a table are taken as entries of -2, -1, 0 and 1, which
needs half the flash of 4 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from effcli.exporters.firmware import packing
from effcli.exporters.firmware.program import Constant
from effcli.graphs.integer import Array, IntegerNetwork, Weighted
from effcli.graphs.rows import look_up

# Multiplications, each a little cheaper with pairs, that outweigh writing them.
_WORTH = {4: 2048, 2: 128}


class Weights(NamedTuple):
    """A step's weights as they are stored: int8 in the shape of the step's, of `bits` bits, and no table.

    With a table, int8 (1 or out, 2^bits): their numbers in it, uint8.
    """

    stored: Array
    bits: int
    table: Array | None = None

    def arranged(self, stored: Array) -> Weights:
        """The same weights in another order or shape."""
        return self._replace(stored=stored)

    def paired(self, macs: int) -> bool:
        """Whether to write the entries of every two numbers before so many multiplications."""
        return self.table is not None and len(self.table) == 1 and macs >= _WORTH[self.bits]

    def scratch(self, macs: int) -> int:
        """Bytes of these entries."""
        return 4 << (2 * self.bits) if self.paired(macs) else 0

    @property
    def step(self) -> int:
        """How much further on the next channel's table lies; 0 where all share one."""
        return 1 << self.bits if self.table is not None and len(self.table) > 1 else 0

    def padded(self) -> Array:
        """The weights int8 (out, n) of `stored` (out, n), n filled up to whole blocks as the kernels see it."""
        rows = packing.padded(self.stored, packing.BLOCK, 1)
        return rows if self.table is None else look_up(self.table, rows)

    def constants(self, multiple: int = 1) -> dict[str, Constant]:
        """The table, where there is one, of `multiple` channels or several times as many."""
        if self.table is None:
            return {}
        table = packing.padded(self.table, multiple, 0) if self.step else self.table
        return {"table": Constant("int8_t", table)}


def weights(network: IntegerNetwork, step: Weighted) -> Weights:
    """The weights of a step that is neither depthwise nor a lookup of its own."""
    weight, table = network.array(step, "weight"), network.codebook(step)
    if table is not None:
        entries = packing.padded(table, 1 << step.weight_bits, 1)
        return Weights(network.codes(step).reshape(weight.shape), step.weight_bits, entries)
    if step.weight_bits == 2:
        return Weights((weight + 2).astype(np.uint8), 2, np.array([[-2, -1, 0, 1]], np.int8))
    return Weights(weight, step.weight_bits)


def constant(values: Array, unsigned: bool) -> Constant:
    """Packed weights as a constant of C; unsigned: whether single bytes are."""
    kinds = {4: "uint32_t", 2: "uint16_t", 1: "uint8_t" if unsigned else "int8_t"}
    return Constant(kinds[values.itemsize], values)
