"""Convolutions: windows of two pixels times two channels, and filters of one channel each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from effcli.exporters.firmware import packing
from effcli.exporters.firmware.program import Constant, Spatial, Task
from effcli.exporters.firmware.requantize import Requantized
from effcli.exporters.firmware.scope import Scope
from effcli.graphs.integer import Array

# The kernel sums in 32 bits what the network's lowering has shown to fit; patches hold two pixels of 16 bits.
_PATCH_BYTES = 2 * 2


@dataclass(frozen=True, kw_only=True)
class Convolution(Requantized):
    """Any convolution of an image with channels last, dense or in groups."""

    spatial: Spatial
    groups: int = 1
    bits: int = 8

    @property
    def kernels(self) -> tuple[str, ...]:
        return "rows", "patch", f"dot{self.bits}", "convolution"

    @property
    def features(self) -> tuple[str, ...]:
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
        known += (s.padding[2], s.dilation[1], int(s.padded), self.bits)
        shifts = "shifts" if self.shifted else "0"
        parameters = ["const int8_t *const *rows", "int8_t *out", "void *scratch", "const void *weights"]
        parameters += ["const int32_t *constants", *(["const uint8_t *shifts"] if self.shifted else [])]
        parameters += ["int32_t zero", "int32_t zero_out"]
        body = f"    net_convolution_row(rows, out, scratch, weights, constants, {shifts}, zero,"
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
        return multiplied + filled * numbers + 14 * outputs, 2.06 * multiplied + (filled + 2) * numbers + 15 * outputs


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


def packed(weight: Array, groups: int, bits: int) -> Constant:
    """Weights (out, in / groups, height, width) of a dense or grouped convolution, windows with channels last."""
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    values = packing.pairs(rows, groups, bits)
    return Constant("uint32_t" if bits == 4 else "int8_t", values)


def packed_filters(weight: Array) -> Constant:
    """Weights (channels, 1, height, width) of a depthwise convolution."""
    return Constant("int8_t", packing.filters(weight.reshape(len(weight), -1)))


def scratch(spatial: Spatial, groups: int) -> int:
    """Bytes of a patch."""
    numbers = spatial.kernel[0] * spatial.kernel[1] * spatial.channels // groups
    return _PATCH_BYTES * packing.BLOCK * -(-numbers // packing.BLOCK)


def blank(spatial: Spatial, zero: int) -> Constant:
    """A pixel of padding."""
    return Constant("int8_t", np.full(spatial.channels, zero, np.int8))


__all__ = ["Convolution", "Depthwise", "Task", "blank", "packed", "packed_filters", "scratch"]
