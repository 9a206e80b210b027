"""A matrix product with one row of inputs."""

from __future__ import annotations

from dataclasses import dataclass

from effcli.exporters.firmware import packing
from effcli.exporters.firmware.program import Constant
from effcli.exporters.firmware.requantize import Requantized, constants
from effcli.exporters.firmware.scope import Scope
from effcli.graphs.integer import Array

# Inputs that are widened at once where widening all of them would take more memory than the sums of all outputs.
_CHUNK = 128
# Sums of products of two sums of an input and a weight, at most 510 · 256 for two inputs, stay below 2^31.
MOST_INPUTS = 32768


@dataclass(frozen=True, kw_only=True)
class Linear(Requantized):
    """All outputs of a linear layer, or of a convolution whose window is its whole input."""

    chunk: int = 0
    bits: int = 8
    size: tuple[int, int] = (0, 0)

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("linear",)

    @property
    def features(self) -> tuple[str, ...]:
        return (f"LINEAR{self.bits}",)

    def emit(self, scope: Scope) -> str:
        known = (*self.bounds, *self.size, self.chunk, self.bits)
        shifts = "shifts" if self.shifted else "0"
        parameters = ["const int8_t *in", "int8_t *out", "void *scratch", "const void *weights"]
        parameters += ["const int32_t *constants", *(["const uint8_t *shifts"] if self.shifted else [])]
        parameters += ["int32_t zero_out"]
        body = (
            f"    net_linear(in, out, scratch, weights, constants, {shifts}, zero_out, {', '.join(map(str, known))});"
        )
        name = scope.functions.add("linear", parameters, body)
        return f"{name}(in0, out, {scope.scratch}, {self.requantization(scope)}, {self.output.zero});"

    def instructions(self) -> tuple[float, float]:
        inputs, outputs = self.size
        extra = 4 * inputs + 20 * outputs
        return 1.25 * self.macs + extra, 1.8 * self.macs + extra


def chunk(inputs: int, outputs: int) -> int:
    """How many inputs to widen at once, for the least scratch memory."""
    whole = -(-inputs // packing.BLOCK) * packing.BLOCK
    return min(whole, _CHUNK, key=lambda size: scratch(inputs, outputs, size))


def scratch(inputs: int, outputs: int, size: int) -> int:
    """Bytes for `size` widened inputs, and for the sums between chunks."""
    return 2 * size + (4 * outputs if size < inputs else 0)


def packed(weight: Array, size: int, bits: int, arrays: dict[str, Array]) -> dict[str, Constant]:
    """The constants of weights (out, in) for chunks of `size` inputs; arrays: bias, multiplier and shift."""
    weights = Constant("uint32_t" if bits == 4 else "uint8_t", packing.quads(weight, size, bits))
    halved = (arrays["bias"].astype("int64") - packing.cross_terms(weight) + 2**31) % 2**32 - 2**31
    return {"weights": weights, **constants(arrays["bias"], arrays["multiplier"], arrays["shift"], halved)}
