"""Convolutions: windows of two pixels times two channels, and filters of one channel each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effcli.exporters.firmware import packing
from effcli.exporters.firmware.program import Constant, Spatial, Task
from effcli.exporters.firmware.requantize import Requantized
from effcli.exporters.firmware.scope import Scope
from effcli.exporters.firmware.tables import Weights, constant
from effcli.graphs.integer import Array

# The kernel sums in 32 bits what the network's lowering has shown to fit; patches hold two pixels of 16 bits.
_PATCH_BYTES = 2 * 2
# Instructions for a multiplication: with DSP instructions, and in plain C.
_MULTIPLICATION = {"bytes": (1.0, 2.06), "nibbles": (1.58, 2.3), "pairs": (1.53, 2.77), "table": (2.29, 2.8)}


@dataclass(frozen=True, kw_only=True)
class Convolution(Requantized):
    """Any convolution of an image with channels last, dense or in groups."""

    spatial: Spatial
    groups: int = 1

    @property
    def kernels(self) -> tuple[str, ...]:
        if self.looked_up:
            return "rows", "patch", "table", "dot_table", "convolution"
        return "rows", "patch", f"dot{self.bits}", "convolution"

    @property
    def features(self) -> tuple[str, ...]:
        if self.looked_up:
            return ("DOT_TABLE", "DOT_PAIRS") if self.paired else ("DOT_TABLE",)
        return (f"DOT{self.bits}",)

    def distance(self, index: int) -> int | None:
        return self.spatial.distance(2, read_first=self.groups == 1)

    def alone(self) -> Task:
        s = self.spatial
        if s.kernel != (1, 1) or s.stride != (1, 1) or s.padded or s.height == 1:
            return self
        # Pixels side by side, so that an odd width costs nothing.
        row = replace(s, height=1, width=s.height * s.width, out_height=1, out_width=s.height * s.width)
        (tensor,) = self.inputs
        return replace(self, spatial=row, inputs=(tensor.as_row(),), output=self.output.as_row(), windows=(row.window,))

    def emit(self, scope: Scope) -> str:
        s = self.spatial
        low, high = self.bounds
        known: tuple[int, ...] = (
            low,
            high,
            s.width,
            s.channels,
            s.out_width,
            s.out_channels,
            self.groups,
            *s.kernel,
            s.stride[1],
        )
        known += (s.padding[2], s.dilation[1], int(s.padded), self.bits, self.table_step, int(self.paired))
        parameters = ["const int8_t *const *rows", "int8_t *out", "void *scratch", *self.parameters()]
        parameters += ["int32_t zero", "int32_t zero_out"]
        body = f"    net_convolution_row(rows, out, scratch, {self.passed()}, zero,"
        body += f" zero_out, {', '.join(map(str, known))});"
        name = scope.functions.add("convolution", parameters, body)
        zeros = self.inputs[0].zero, self.output.zero
        return f"{name}(rows0, out, {scope.scratch}, {self.requantization(scope)}, {zeros[0]}, {zeros[1]});"

    def instructions(self) -> tuple[float, float]:
        s = self.spatial
        pixels = s.out_height * (s.out_width + s.out_width % 2)
        numbers = pixels * s.kernel[0] * s.kernel[1] * s.channels
        multiplied = numbers * s.out_channels // self.groups
        outputs = pixels * s.out_channels
        # Runs of whole words are widened by words.
        filled = 2 if s.channels // self.groups % 4 == 0 else 14
        dsp, plain = _MULTIPLICATION[self.kind_of_weights]
        return (
            dsp * multiplied + filled * numbers + 14 * outputs,
            plain * multiplied + (filled + 2) * numbers + 15 * outputs,
        )


@dataclass(frozen=True, kw_only=True)
class Depthwise(Requantized):
    """A convolution with one filter for each channel."""

    spatial: Spatial

    @property
    def kernels(self) -> tuple[str, ...]:
        return "rows", "depthwise"

    def distance(self, index: int) -> int | None:
        return self.spatial.distance(1, read_first=False)

    @property
    def taps(self) -> int:
        return self.spatial.kernel[0] * self.spatial.kernel[1]

    def emit(self, scope: Scope) -> str:
        s = self.spatial
        low, high = self.bounds
        known = (low, high, s.width, s.channels, s.out_width, *s.kernel, s.stride[1], s.padding[2], s.dilation[1])
        shifts = "shifts" if self.shifted else "0"
        parameters = ["const int8_t *const *rows", "int8_t *out", "const int8_t *weights", "const int32_t *constants"]
        parameters += [*(["const uint8_t *shifts"] if self.shifted else []), "const int8_t *blank", "int32_t zero_out"]
        body = f"    net_depthwise_row(rows, out, weights, constants, {shifts}, blank, zero_out, "
        body += f"{', '.join(map(str, known))});"
        name = scope.functions.add("depthwise", parameters, body)
        return f"{name}(rows0, out, {self.requantization(scope)}, {scope.constant('blank')}, {self.output.zero});"

    def instructions(self) -> tuple[float, float]:
        s = self.spatial
        pixels = s.out_height * s.out_width
        outputs = pixels * s.out_channels
        extra = pixels * self.taps * 12 + outputs * 12
        return 2.9 * self.macs + extra, 4.5 * self.macs + extra


def packed(weights: Weights, groups: int) -> dict[str, Constant]:
    """Weights (out, in / groups, height, width) of a dense or grouped convolution, windows with channels last."""
    rows = weights.stored.transpose(0, 2, 3, 1).reshape(len(weights.stored), -1)
    values = packing.pairs(rows, groups, weights.bits)
    return {"weights": constant(values, unsigned=False), **weights.constants()}


def packed_filters(weight: Array) -> Constant:
    """Weights (channels, 1, height, width) of a depthwise convolution."""
    return Constant("int8_t", packing.filters(weight.reshape(len(weight), -1)))


def scratch(spatial: Spatial, groups: int) -> int:
    """Bytes of a patch."""
    numbers = spatial.kernel[0] * spatial.kernel[1] * spatial.channels // groups
    return _PATCH_BYTES * packing.BLOCK * -(-numbers // packing.BLOCK)


def options(weights: Weights, spatial: Spatial, groups: int) -> dict[str, Any]:
    """The options of a `Convolution` that follow from how its weights are stored."""
    row = spatial.out_width * weights.stored.size
    return {
        "bits": weights.bits,
        "table_step": weights.step,
        "paired": weights.paired(row),
        "scratch": scratch(spatial, groups) + weights.scratch(row),
    }


def blank(spatial: Spatial, zero: int) -> Constant:
    """A pixel of padding."""
    return Constant("int8_t", np.full(spatial.channels, zero, np.int8))


__all__ = ["Convolution", "Depthwise", "Task", "blank", "options", "packed", "packed_filters", "scratch"]
