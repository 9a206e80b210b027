"""What moves codes without computing, and sums over axes: loops over strides."""

from __future__ import annotations

from dataclasses import dataclass

from effcli.exporters.firmware.layout import Copy, Level
from effcli.exporters.firmware.loops import nest
from effcli.exporters.firmware.program import Task
from effcli.exporters.firmware.scope import Scope


@dataclass(frozen=True, kw_only=True)
class Move(Task):
    """Copies from each input, over a background where one is given.

    copies: one for each input; background: the code that fills what no copy writes.
    """

    copies: tuple[Copy, ...] = ()
    background: int | None = None
    called: str = "move"

    @property
    def kind(self) -> str:
        return self.called

    def emit(self, scope: Scope) -> str:
        calls = []
        if self.background is not None:
            count = self.output.row_bytes if self.windows is not None else self.output.nbytes
            whole = Copy(0, 0, (Level(count, 1, 1),))
            body = nest(whole, f"out[{{0}}] = {self.background};")
            calls.append(f"{scope.functions.add('fill', ['int8_t *out'], body)}(out);")
        for index, copied in enumerate(self.copies):
            body = nest(copied, "out[{0}] = in[{1}];")
            name = scope.functions.add("move", ["const int8_t *in", "int8_t *out"], body)
            calls.append(f"{name}(in{index}, out);")
        return "\n".join(calls)

    def instructions(self) -> tuple[float, float]:
        total = 6.0 * self.output.nbytes
        return total, total


@dataclass(frozen=True, kw_only=True)
class Mean(Task):
    """Rescaled sums. start: where the sum of each output begins; over: what is added to each.

    rescaling: multiplier and shift.
    """

    start: Copy
    over: Copy
    count: int
    bounds: tuple[int, int] = (-128, 127)
    rescaling: tuple[int, int] = (0, 1)

    def emit(self, scope: Scope) -> str:
        low, high = self.bounds
        offset = -self.count * self.inputs[0].zero
        add = nest(self.over, "sum += from[{1}];")
        body = nest(self.start, "out[{0}] = net_requantize(SUM(in + {1}) + OFFSET, FACTOR);")
        text = f"    int32_t sum = 0;\n{add}\n    return sum;"
        summed = scope.functions.add("sum", ["const int8_t *from"], text, returns="int32_t")
        factor = f"{self.rescaling[0]}, {self.rescaling[1]}, {self.output.zero}, {low}, {high}"
        body = body.replace("SUM", summed).replace("+ OFFSET", f"+ ({offset})").replace("FACTOR", factor)
        name = scope.functions.add("mean", ["const int8_t *in", "int8_t *out"], body)
        return f"{name}(in0, out);"

    def instructions(self) -> tuple[float, float]:
        total = self.output.nbytes * (5.0 * self.count + 30)
        return total, total
