"""What convolutions and linears have in common: sums of 32 bits that become codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from effcli.exporters.firmware import packing
from effcli.exporters.firmware.program import Constant, Task
from effcli.exporters.firmware.scope import Scope
from effcli.graphs.integer import Array

# The shift for which one high-word multiplication rescales.
_HIGH_WORD = 32


@dataclass(frozen=True, kw_only=True)
class Requantized(Task):
    """A task with weights. bounds: the codes between which its outputs are clamped.

    bits: of a stored weight; table_step, paired: see `tables.Weights`.
    """

    bounds: tuple[int, int] = (-128, 127)
    bits: int = 8
    table_step: int = 0
    paired: bool = False

    @property
    def kind_of_weights(self) -> str:
        """What the instructions for a multiplication depend on: bytes, nibbles, or entries found two or one at once."""
        if self.looked_up:
            return "pairs" if self.paired else "table"
        return "bytes" if self.bits == 8 else "nibbles"

    @property
    def looked_up(self) -> bool:
        """Whether its weights are numbers of entries of a table."""
        return "table" in self.arrays

    @property
    def shifted(self) -> bool:
        """Whether its outputs need shifts of their own."""
        return "shifts" in self.arrays

    def requantization(self, scope: Scope) -> str:
        """The arguments of `parameters`, as they are in flash."""
        names = ("weights", "table", "constants", "shifts")
        return ", ".join(scope.constant(name) for name in names if name in self.arrays)

    def parameters(self) -> list[str]:
        """The parameters of a function that takes what a kernel wants besides its inputs."""
        kinds = {"weights": "void", "table": "int8_t", "constants": "int32_t", "shifts": "uint8_t"}
        return [f"const {kind} *{name}" for name, kind in kinds.items() if name in self.arrays]

    def passed(self) -> str:
        """What such a function hands on to the kernel: null where there is none."""
        names = ("weights", "table", "constants", "shifts")
        return ", ".join(name if name in self.arrays else "0" for name in names)


def constants(bias: Array, multiplier: Array, shift: Array, halved_bias: Array | None = None) -> dict[str, Constant]:
    """Biases with multipliers, and shifts unless all are 32. halved_bias: biases where products are halved."""
    halved = packing.requantization(halved_bias, multiplier) if halved_bias is not None else None
    found = {"constants": Constant("int32_t", packing.requantization(bias, multiplier), halved)}
    if np.any(shift != _HIGH_WORD):
        found["shifts"] = Constant("uint8_t", shift.astype(np.uint8))
    return found
