"""What a transformer needs besides: products of two tensors, softmax, layer norm, embedding."""

from __future__ import annotations

from dataclasses import dataclass

from effcli.exporters.firmware.program import Task
from effcli.exporters.firmware.scope import Scope


@dataclass(frozen=True, kw_only=True)
class Rowwise(Task):
    """A task over rows of numbers that lie one after the other: how many rows, and how long each is."""

    count: int = 1
    length: int = 1

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("attention",)


@dataclass(frozen=True, kw_only=True)
class Softmax(Rowwise):
    bits: int = 8

    @property
    def features(self) -> tuple[str, ...]:
        return ("SOFTMAX",)

    def distance(self, index: int) -> int | None:
        # Each number is read for the last time just before it is written.
        return 0

    def emit(self, scope: Scope) -> str:
        parameters = ["const int8_t *in", "int8_t *out", "const uint32_t *table"]
        body = f"    net_softmax(in, out, table, {self.count}, {self.length}, {self.bits});"
        return f"{scope.functions.add('softmax', parameters, body)}(in0, out, {scope.constant('table')});"

    def instructions(self) -> tuple[float, float]:
        return 30.0 * self.output.nbytes, 30.0 * self.output.nbytes


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Rowwise):
    epsilon: int = 0
    shift: int = 8
    bounds: tuple[int, int] = (-128, 127)

    @property
    def features(self) -> tuple[str, ...]:
        return ("LAYER_NORM",)

    def distance(self, index: int) -> int | None:
        return 0

    def emit(self, scope: Scope) -> str:
        parameters = ["const int8_t *in", "int8_t *out", "const int32_t *factors"]
        known = (f"{self.epsilon}u" if self.epsilon < 2**31 else f"{self.epsilon}ull", self.shift, self.output.zero)
        values = ", ".join(map(str, (*known, *self.bounds, self.count, self.length)))
        name = scope.functions.add("layer_norm", parameters, f"    net_layer_norm(in, out, factors, {values});")
        return f"{name}(in0, out, {scope.constant('factors')});"

    def instructions(self) -> tuple[float, float]:
        total = 45.0 * self.output.nbytes + 500 * self.count
        return total, total


@dataclass(frozen=True, kw_only=True)
class Embedding(Rowwise):
    @property
    def features(self) -> tuple[str, ...]:
        return ("EMBEDDING",)

    def emit(self, scope: Scope) -> str:
        parameters = ["const int8_t *in", "int8_t *out", "const int8_t *table"]
        body = f"    net_embedding(in, out, table, {self.count}, {self.length});"
        return f"{scope.functions.add('embedding', parameters, body)}(in0, out, {scope.constant('table')});"

    def instructions(self) -> tuple[float, float]:
        return 5.0 * self.output.nbytes, 5.0 * self.output.nbytes


@dataclass(frozen=True, kw_only=True)
class MatrixProduct(Task):
    """size: batch, rows, inner, columns. steps: of both inputs over the batch and over their two axes.

    rescaling: multiplier and shift.
    """

    size: tuple[int, int, int, int] = (1, 1, 1, 1)
    steps: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (0, 0, 0))
    bounds: tuple[int, int] = (-128, 127)
    rescaling: tuple[int, int] = (0, 1)

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("attention",)

    @property
    def features(self) -> tuple[str, ...]:
        return ("MATRIX_PRODUCT",)

    def emit(self, scope: Scope) -> str:
        batch, rows, inner, columns = self.size
        (first_batch, first_row, first_step), (second_batch, second_step, second_column) = self.steps
        zeros = (*(tensor.zero for tensor in self.inputs), self.output.zero)
        known = (*zeros, *self.bounds, *self.rescaling, rows, inner, columns)
        known += (first_row, first_step, second_step, second_column)
        parameters = ["const int8_t *first", "const int8_t *second", "int8_t *out"]
        body = (
            f"    int32_t i;\n    for (i = 0; i < {batch}; ++i)\n"
            f"        net_matrix_product(first + i * {first_batch}, second + i * {second_batch}, "
            f"out + i * {rows * columns}, {', '.join(map(str, known))});"
        )
        return f"{scope.functions.add('matrix_product', parameters, body)}(in0, in1, out);"

    def instructions(self) -> tuple[float, float]:
        total = 9.0 * self.macs + 25 * self.output.nbytes
        return total, total
