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
    """A task with weights. bounds: the codes between which its outputs are clamped."""

    bounds: tuple[int, int] = (-128, 127)

    @property
    def shifted(self) -> bool:
        """Whether its outputs need shifts of their own."""
        return "shifts" in self.arrays

    def requantization(self, scope: Scope) -> str:
        """The arguments `weights, constants[, shifts]` of a kernel."""
        names = [scope.constant("weights"), scope.constant("constants")]
        return ", ".join([*names, scope.constant("shifts")] if self.shifted else names)


def constants(bias: Array, multiplier: Array, shift: Array, halved_bias: Array | None = None) -> dict[str, Constant]:
    """Biases with multipliers, and shifts unless all are 32. halved_bias: biases where products are halved."""
    halved = packing.requantization(halved_bias, multiplier) if halved_bias is not None else None
    found = {"constants": Constant("int32_t", packing.requantization(bias, multiplier), halved)}
    if np.any(shift != _HIGH_WORD):
        found["shifts"] = Constant("uint8_t", shift.astype(np.uint8))
    return found
