"""The folder of an export: sources, tests, and what Make, CMake, Arduino, PlatformIO and Zephyr need to use them."""

from __future__ import annotations

import re
from importlib import resources
from importlib.resources.abc import Traversable

from effcli.exporters.firmware import bench
from effcli.exporters.firmware.cost import Cost
from effcli.exporters.firmware.generate import Generated
from effcli.exporters.firmware.source import fill
from effcli.exporters.firmware.targets import Target
from effcli.reports.escaping import makefile, markdown

# Where each template goes.
_TEMPLATES = {
    "Makefile": "Makefile",
    "CMakeLists.txt": "CMakeLists.txt",
    "main.c": "test/main.c",
    "library.properties": "library.properties",
    "library.json": "library.json",
    "sketch.ino": "examples/hello/hello.ino",
    "zephyr/module.yml": "zephyr/module.yml",
    "zephyr/CMakeLists.txt": "zephyr/CMakeLists.txt",
    "zephyr/Kconfig": "zephyr/Kconfig",
    "README.md": "README.md",
}


def files(generated: Generated, name: str, target: Target) -> dict[str, str]:
    """Every file of an export by its path: text in UTF-8. A single header needs no project around it."""
    if f"{name}.c" not in generated.sources:
        return {**generated.sources, **generated.documents}
    found = dict(generated.documents)
    for file, text in generated.sources.items():
        found[f"{'test' if file == f'{name}_test.c' else 'src'}/{file}"] = text
    root = resources.files("effcli.exporters.firmware")
    values = _values(generated, name, target)
    words = {key: makefile(value) for key, value in values.items()}
    for template, path in _TEMPLATES.items():
        found[path] = _filled(_read(root / "project", template), words if path == "Makefile" else values)
    if target.board is not None:
        found["Makefile"] += _filled(_read(root / "project", "qemu.mk"), words)
        for file in bench.bare_files("main", target.board):
            found[f"qemu/{file}"] = fill(bench.bare(file), name, ())
    return found


def _read(folder: Traversable, path: str) -> str:
    for part in path.split("/"):
        folder = folder / part
    return folder.read_text(encoding="utf-8")


def _filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], text)


def _values(generated: Generated, name: str, target: Target) -> dict[str, str]:
    """What the placeholders of the templates stand for."""
    cost, board = generated.cost, target.board
    values = {"name": name, "NAME": name.upper(), "core": target.core, "layers": layer_table(cost), "qemu": ""}
    numbers = {"arena": cost.arena, "stack": cost.stack, "constants": cost.constants, "code": cost.code}
    values |= {key: str(number) for key, number in (numbers | {"flash": cost.flash}).items()}
    if board is not None:
        values["qemu"] = f"- `make qemu`: the self test on a bare {target.core} in QEMU\n"
        values["compiler"] = target.compiler
        values["flags"] = " ".join([*target.flags, *bench.FLAGS])
        values["linking"] = " ".join([*bench.LINK, "-T", f"qemu/{board.script}", "-lgcc"])
        values["emulator"] = " ".join(bench.emulator(board))
    return values


def layer_table(cost: Cost) -> str:
    """The layers as a Markdown table, with their sum."""
    lines = [
        "| layer | kind | RAM | scratch | weights | requantization | multiplications | instructions | in plain C |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for layer in cost.layers:
        row = (
            markdown(layer.name),
            layer.kind,
            layer.ram,
            layer.scratch,
            layer.weights,
            layer.requantization,
            layer.macs,
        )
        lines.append(f"| {' | '.join(map(str, row))} | {layer.instructions} | {layer.plain} |")
    sums = [
        sum(getattr(layer, key) for layer in cost.layers)
        for key in ("weights", "requantization", "macs", "instructions", "plain")
    ]
    lines.append(f"| all | | {cost.arena} | | {' | '.join(map(str, sums))} |")
    return "\n".join(lines)
