"""Pools: the largest code of a window, or its rescaled sum."""

from __future__ import annotations

from dataclasses import dataclass

from effcli.exporters.firmware.program import Spatial, Task
from effcli.exporters.firmware.scope import Scope


@dataclass(frozen=True, kw_only=True)
class Pool(Task):
    """A pool over an image with channels last."""

    spatial: Spatial

    @property
    def kernels(self) -> tuple[str, ...]:
        return "rows", "pool"

    def distance(self, index: int) -> int | None:
        return self.spatial.distance(1, read_first=False)


@dataclass(frozen=True, kw_only=True)
class MaxPool(Pool):
    @property
    def features(self) -> tuple[str, ...]:
        return ("MAX_POOL",)

    def emit(self, scope: Scope) -> str:
        s = self.spatial
        known = (s.width, s.channels, s.out_width, *s.kernel, s.stride[1], s.padding[2], s.dilation[1])
        parameters = ["const int8_t *const *rows", "int8_t *out"]
        name = scope.functions.add(
            "max_pool", parameters, f"    net_max_pool_row(rows, out, {', '.join(map(str, known))});"
        )
        return f"{name}(rows0, out);"

    def instructions(self) -> tuple[float, float]:
        s = self.spatial
        total = 8.0 * self.output.nbytes * s.kernel[0] * s.kernel[1]
        return total, total


@dataclass(frozen=True, kw_only=True)
class AveragePool(Pool):
    """rescaling: multiplier and shift."""

    bounds: tuple[int, int] = (-128, 127)
    rescaling: tuple[int, int] = (0, 1)

    @property
    def features(self) -> tuple[str, ...]:
        return ("AVERAGE_POOL",)

    def emit(self, scope: Scope) -> str:
        s = self.spatial
        known: tuple[int, ...] = (self.inputs[0].zero, self.output.zero, *self.bounds, *self.rescaling)
        known += (s.width, s.channels, s.out_width, *s.kernel, s.stride[1], s.padding[2])
        parameters = ["const int8_t *const *rows", "int8_t *out"]
        name = scope.functions.add(
            "average_pool", parameters, f"    net_average_pool_row(rows, out, {', '.join(map(str, known))});"
        )
        return f"{name}(rows0, out);"

    def instructions(self) -> tuple[float, float]:
        s = self.spatial
        total = self.output.nbytes * (6.0 * s.kernel[0] * s.kernel[1] + 40)
        return total, total
