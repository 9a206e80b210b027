"""Whether a program fits a microcontroller: which layers are to blame when it does not, and what would help."""

from __future__ import annotations

from effcli.errors import UnsupportedError
from effcli.exporters._obstacles import some
from effcli.exporters.firmware.arena import Plan
from effcli.exporters.firmware.cost import Cost
from effcli.exporters.firmware.program import Program
from effcli.reports.units import size

_BLAMED = 3


def check(program: Program, plan: Plan, cost: Cost, max_ram: int | None, max_flash: int | None) -> None:
    """Raise `UnsupportedError` when `cost` is beyond a limit in bytes."""
    problems, remedies = [], []
    if max_ram is not None and cost.ram > max_ram:
        problem, remedy = _ram(program, plan, cost, max_ram)
        problems.append(problem)
        remedies.append(remedy)
    if max_flash is not None and cost.flash > max_flash:
        problem, remedy = _flash(program, cost, max_flash)
        problems.append(problem)
        remedies.append(remedy)
    if problems:
        raise UnsupportedError("; ".join(problems), "; ".join(dict.fromkeys(remedies)))


def _ram(program: Program, plan: Plan, cost: Cost, limit: int) -> tuple[str, str]:
    peak = max(plan.live(number) for number in range(len(plan.bands)))
    over = [number for number in range(len(plan.bands)) if plan.live(number) == peak]
    names = [task.layer for number in over for task in program.tasks[plan.bands[number].start : plan.bands[number].end]]
    held = sorted(
        {(piece.nbytes, piece.kind, piece.name) for piece, _ in plan.pieces if piece.start <= over[0] <= piece.end},
        reverse=True,
    )
    held_text = ", ".join(f"{size(nbytes)} {_called(kind, name)}" for nbytes, kind, name in held[:_BLAMED])
    problem = (
        f"it needs {cost.ram:,} bytes of RAM, and {limit:,} are allowed: {cost.arena:,} of arena, "
        f"about {cost.stack:,} of stack; most in {some(names)}: {held_text}"
    )
    return problem, f"a smaller input, or fewer channels in {some(names)}"


def _called(kind: str, name: str) -> str:
    return "of scratch memory" if kind == "scratch" else f"for {name}" + (" (a few rows)" if kind == "ring" else "")


def _flash(program: Program, cost: Cost, limit: int) -> tuple[str, str]:
    largest = sorted(cost.layers, key=lambda layer: -layer.flash)[:_BLAMED]
    named = ", ".join(f"{layer.name} {size(layer.flash)}" for layer in largest)
    problem = (
        f"it needs about {cost.flash:,} bytes of flash, and {limit:,} are allowed: {cost.constants:,} of constants, "
        f"about {cost.code:,} of code; most in {named}"
    )
    wide = {task.layer for task in program.tasks if getattr(task, "bits", None) == 8 and not hasattr(task, "taps")}
    saved = sum(layer.weights // 2 for layer in cost.layers if layer.name in wide)
    if cost.flash - saved <= limit:
        return problem, "weights of 4 bits would fit: put `adaround: {bits: 4}` before int8"
    return problem, f"fewer channels in {largest[0].name}; weights of 4 bits alone would save {size(saved)}"
