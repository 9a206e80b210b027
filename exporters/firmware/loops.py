"""Nested C loops over the strides of a copy."""

from __future__ import annotations

from effcli.exporters.firmware.layout import Copy, Level

_NAMES = "ijklmnop"


def nest(copied: Copy, statements: str, same_output: bool = False) -> str:
    """Loops around `statements`, in which {0} stands for the output's position and {1} for the input's.

    same_output: positions of the output run from 0 up in steps of 1, one for each round.
    """
    levels = [Level(*level) for level in copied.levels if level[0] != 1] or [Level(1, 1, 1)]
    if len(levels) > len(_NAMES):
        raise ValueError(f"a copy of {len(levels)} nested loops")
    names = _NAMES[: len(levels)]
    declared = ", ".join(names)
    positions = [
        _position(first, [level[1 + which] for level in levels], names)
        for which, first in enumerate((copied.first_output, copied.first_input))
    ]
    lines = [f"    int32_t {declared};"]
    if same_output and len(levels) > 1:
        lines[0] = f"    int32_t {declared}, place = 0;"
        positions[0] = "place"
        statements += "\n++place;"
    for depth, (name, level) in enumerate(zip(names, levels, strict=True)):
        opened = " {" if depth == len(levels) - 1 else ""
        lines.append(f"{'    ' * (depth + 1)}for ({name} = 0; {name} < {level.extent}; ++{name}){opened}")
    inner = "    " * (len(levels) + 1)
    lines += [inner + line.format(*positions) for line in statements.splitlines()]
    lines.append("    " * len(levels) + "}")
    return "\n".join(lines)


def _position(first: int, strides: list[int], names: str) -> str:
    terms = [
        name if stride == 1 else f"{name} * {stride}" for name, stride in zip(names, strides, strict=True) if stride
    ]
    text = " + ".join([*([str(first)] if first or not terms else []), *terms])
    return text.replace("+ -", "- ")
