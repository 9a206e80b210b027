"""A matrix product with one row of inputs."""

from __future__ import annotations

from dataclasses import dataclass

from effcli.exporters.firmware import packing
from effcli.exporters.firmware.program import Constant
from effcli.exporters.firmware.requantize import Requantized, constants
from effcli.exporters.firmware.scope import Scope
from effcli.exporters.firmware.tables import Weights, constant
from effcli.graphs.integer import Array

# Inputs that are widened at once where widening all of them would take more memory than the sums of all outputs.
_CHUNK = 128
# Sums of products of two sums of an input and a weight, at most 510 · 256 for two inputs, stay below 2^31.
MOST_INPUTS = 32768
# Instructions for a multiplication: with DSP instructions, and in plain C.
_MULTIPLICATION = {"bytes": (1.25, 1.8), "nibbles": (1.9, 2.43), "pairs": (1.86, 3.0), "table": (3.94, 4.6)}


@dataclass(frozen=True, kw_only=True)
class Linear(Requantized):
    """All outputs of a linear layer, or of a convolution whose window is its whole input."""

    chunk: int = 0
    size: tuple[int, int] = (0, 0)

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("linear_inputs", *(("table", "linear_table") if self.looked_up else ()), "linear")

    @property
    def features(self) -> tuple[str, ...]:
        if self.looked_up:
            stem = "LINEAR_PAIRS" if self.paired else "LINEAR_TABLE"
            return stem, f"{stem}{self.bits}"
        return (f"LINEAR{self.bits}",)

    def emit(self, scope: Scope) -> str:
        known = (*self.bounds, *self.size, self.chunk, self.bits, self.table_step, int(self.paired))
        parameters = ["const int8_t *in", "int8_t *out", "void *scratch", *self.parameters(), "int32_t zero_out"]
        body = f"    net_linear(in, out, scratch, {self.passed()}, zero_out, {', '.join(map(str, known))});"
        name = scope.functions.add("linear", parameters, body)
        return f"{name}(in0, out, {scope.scratch}, {self.requantization(scope)}, {self.output.zero});"

    def instructions(self) -> tuple[float, float]:
        inputs, outputs = self.size
        extra = 4 * inputs + 20 * outputs
        dsp, plain = _MULTIPLICATION[self.kind_of_weights]
        return dsp * self.macs + extra, plain * self.macs + extra


def chunk(inputs: int, outputs: int) -> int:
    """How many inputs to widen at once, for the least scratch memory."""
    whole = -(-inputs // packing.BLOCK) * packing.BLOCK
    return min(whole, _CHUNK, key=lambda size: scratch(inputs, outputs, size))


def scratch(inputs: int, outputs: int, size: int) -> int:
    """Bytes for `size` widened inputs, and for the sums between chunks."""
    return 2 * size + (4 * outputs if size < inputs else 0)


def packed(weights: Weights, size: int, arrays: dict[str, Array]) -> dict[str, Constant]:
    """The constants of weights (out, in) for chunks of `size` inputs; arrays: bias, multiplier and shift."""
    stored = constant(packing.quads(weights.stored, size, weights.bits), unsigned=True)
    halved = (arrays["bias"].astype("int64") - packing.cross_terms(weights.padded()) + 2**31) % 2**32 - 2**31
    requantized = constants(arrays["bias"], arrays["multiplier"], arrays["shift"], halved)
    return {"weights": stored, **weights.constants(multiple=4), **requantized}
