"""What works number by number: sums and products of two tensors, and tables of functions.

Where both inputs lie as the output does, one loop runs over a row; a smaller one that is broadcast, or lies otherwise,
is read by strides.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from effcli.exporters.firmware.layout import Copy, Level
from effcli.exporters.firmware.loops import nest
from effcli.exporters.firmware.program import Task
from effcli.exporters.firmware.scope import Scope


@dataclass(frozen=True, kw_only=True)
class Pointwise(Task):
    """strides: how the second input is read where it does not lie as the output; None where it does."""

    strides: Copy | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("elementwise",)

    @abstractmethod
    def expression(self) -> str:
        """The C expression of one output of `a`, and of `b` where there are two inputs."""

    def distance(self, index: int) -> int | None:
        # What is broadcast is read more than once.
        return None if index == 1 and self.strides is not None else 0

    def emit(self, scope: Scope) -> str:
        two = len(self.inputs) == 2
        parameters = ["const int8_t *first", *(["const int8_t *second"] if two else []), "int8_t *out"]
        parameters += self.parameters()
        assign = f"out[{{0}}] = {self.expression()};"
        if self.strides is not None:
            text = "const int32_t a = first[{0}], b = second[{1}];\n" + assign
            body = nest(self.strides, text, same_output=True)
        else:
            text = "const int32_t a = first[{0}]" + (", b = second[{0}];\n" if two else ";\n") + assign
            count = self.output.row_bytes if self.windows is not None else self.output.nbytes
            body = nest(Copy(0, 0, (Level(count, 1, 1),)), text, same_output=True)
        name = scope.functions.add(self.kind, parameters, body)
        given = ["in0", *(["in1"] if two else []), "out", *self.arguments(scope)]
        return f"{name}({', '.join(given)});"

    def parameters(self) -> list[str]:
        return []

    def arguments(self, scope: Scope) -> list[str]:
        return []

    def instructions(self) -> tuple[float, float]:
        total = 11.0 * self.output.nbytes
        return total, total


@dataclass(frozen=True, kw_only=True)
class Add(Pointwise):
    """offset: with half of 2^shift, so that a shift rounds."""

    multipliers: tuple[int, int] = (0, 0)
    offset: int = 0
    shift: int = 0
    bounds: tuple[int, int] = (-128, 127)

    @property
    def features(self) -> tuple[str, ...]:
        return ("ADD",)

    def parameters(self) -> list[str]:
        return ["int32_t factor", "int32_t other", "int32_t offset"]

    def arguments(self, scope: Scope) -> list[str]:
        return [str(self.multipliers[0]), str(self.multipliers[1]), str(self.offset)]

    def expression(self) -> str:
        return f"net_add(a, b, factor, other, offset, {self.shift}, {self.bounds[0]}, {self.bounds[1]})"


@dataclass(frozen=True, kw_only=True)
class Multiply(Pointwise):
    """rescaling: multiplier and shift."""

    rescaling: tuple[int, int] = (0, 1)
    bounds: tuple[int, int] = (-128, 127)

    @property
    def features(self) -> tuple[str, ...]:
        return ("MULTIPLY",)

    def expression(self) -> str:
        known = (*(tensor.zero for tensor in self.inputs), *self.rescaling, self.output.zero, *self.bounds)
        return f"net_multiply(a, b, {', '.join(map(str, known))})"


@dataclass(frozen=True, kw_only=True)
class Table(Pointwise):
    """A function of one number."""

    @property
    def kernels(self) -> tuple[str, ...]:
        return ()

    def parameters(self) -> list[str]:
        return ["const int8_t *table"]

    def arguments(self, scope: Scope) -> list[str]:
        return [scope.constant("table")]

    def expression(self) -> str:
        return "table[a + 128]"

    def instructions(self) -> tuple[float, float]:
        return 6.0 * self.output.nbytes, 6.0 * self.output.nbytes
