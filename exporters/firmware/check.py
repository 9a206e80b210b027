"""Emitted C against the reference executor: every layer of every input, to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effcli.errors import MachineError
from effcli.exporters.firmware import bench
from effcli.exporters.firmware.bench import Measured
from effcli.exporters.firmware.generate import Generated
from effcli.exporters.firmware.host import HostLibrary
from effcli.exporters.firmware.program import Array, Program
from effcli.exporters.firmware.targets import Target
from effcli.exporters.firmware.vectors import Expected
from effcli.graphs.integer import IntegerNetwork

Rows = NDArray[np.bool_]


def compare(
    network: IntegerNetwork,
    program: Program,
    folder: Path,
    name: str,
    target: Target,
    codes: Array,
    plain: bool = False,
) -> Measured | None:
    """Run the C of `network` in `folder` on input codes int8 (n, *shape), n at least 1; what was measured in QEMU.

    program: what the C was written from; plain: in QEMU without DSP instructions. On the host every byte of every
    layer is compared and nothing measured; in QEMU the outputs and a checksum of every layer. Raises `MachineError`
    that names the first layer and input that differ, `UserError` where a compiler or QEMU is not installed.
    """
    expected = Expected(network, program, codes)
    if target.board is None:
        library = HostLibrary(folder, name)
        found = library.layers(expected.inputs)
        differ = [_rows_differ(*pair) for pair in zip(found, expected.layers, strict=True)]
        _require_same(program, expected, differ, library.run(expected.inputs), target)
        return None
    measured = bench.measure(folder, name, target, expected.inputs, plain=plain)
    differ = list((measured.checksums != expected.sums()).T)
    _require_same(program, expected, differ, measured.outputs, target)
    return measured


def write_sources(folder: Path, generated: Generated, name: str) -> None:
    """Write the C into `folder` as `compare` wants it; a single header gets files that hold its two implementations."""
    texts = {f"{'test' if file == f'{name}_test.c' else 'src'}/{file}": t for file, t in generated.sources.items()}
    if f"src/{name}.c" not in texts:
        for path, part in ((f"src/{name}.c", ""), (f"test/{name}_test.c", "TEST_")):
            texts[path] = f'#define {name.upper()}_{part}IMPLEMENTATION\n#include "{name}.h"\n'
    write_texts(folder, texts)


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by their paths below `folder`."""
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def _require_same(program: Program, expected: Expected, differ: list[Rows], outputs: Array, target: Target) -> None:
    """Raise `MachineError` for the first layer of which some input differs; differ: for each layer bool (n,)."""
    names = [*(task.layer for task in program.tasks), "the output"]
    for name, rows in zip(names, [*differ, _rows_differ(outputs, expected.outputs)], strict=True):
        if rows.any():
            where = f"{int(rows.sum())} of {len(rows)} inputs, the first of them input {int(rows.argmax())}"
            raise MachineError(
                f"the C computes something else on {target.core}: {name} differs for {where}",
                "do not use this export, and report it with the network",
            )


def _rows_differ(found: Array, expected: Array) -> Rows:
    """For each of n inputs whether its row differs; all of them where the widths do."""
    if found.shape != expected.shape:
        return np.ones(len(expected), np.bool_)
    result: Rows = (found != expected).any(1)
    return result
