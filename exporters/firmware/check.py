"""Emitted C against the reference executor: every layer of every input, to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effcli.errors import MachineError
from effcli.exporters.firmware import bench, vectors
from effcli.exporters.firmware.bench import Measured
from effcli.exporters.firmware.generate import Generated
from effcli.exporters.firmware.host import HostLibrary
from effcli.exporters.firmware.layout import Places
from effcli.exporters.firmware.program import Array, Program
from effcli.exporters.firmware.targets import Target
from effcli.graphs import executor
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
    expected = _Expected(network, program, codes)
    if target.board is None:
        library = HostLibrary(folder, name)
        found = library.layers(expected.inputs)
        differ = [_rows_differ(*pair) for pair in zip(found, expected.layers, strict=True)]
        expected.require_same(differ, library.run(expected.inputs), target)
        return None
    measured = bench.measure(folder, name, target, expected.inputs, plain=plain)
    sums = np.stack([vectors.checksums(layer) for layer in expected.layers], 1)
    expected.require_same(list((measured.checksums != sums).T), measured.outputs, target)
    return measured


def write_sources(folder: Path, generated: Generated, name: str) -> None:
    """Write the C into `folder` as `compare` wants it; a single header gets files that hold its two implementations."""
    texts = {f"{'test' if file == f'{name}_test.c' else 'src'}/{file}": t for file, t in generated.sources.items()}
    if f"src/{name}.c" not in texts:
        for path, part in ((f"src/{name}.c", ""), (f"test/{name}_test.c", "TEST_")):
            texts[path] = f'#define {name.upper()}_{part}IMPLEMENTATION\n#include "{name}.h"\n'
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


class _Expected:
    """What the reference executor gives for input codes, each int8 (n, bytes) in the order of the C's memory."""

    def __init__(self, network: IntegerNetwork, program: Program, codes: Array) -> None:
        values = executor.run(network, codes, keep=True)
        self.names = [task.layer for task in program.tasks]
        self.inputs = _placed(values[network.program.input], program.input.places)
        self.layers = [_placed(values[task.output.value], task.output.places) for task in program.tasks]
        self.outputs = _placed(values[network.program.output], program.output.places)

    def require_same(self, differ: list[Rows], outputs: Array, target: Target) -> None:
        """Raise `MachineError` for the first layer of which some input differs; differ: for each layer bool (n,)."""
        differ = [*differ, _rows_differ(outputs, self.outputs)]
        for name, rows in zip([*self.names, "the output"], differ, strict=True):
            if rows.any():
                where = f"{int(rows.sum())} of {len(rows)} inputs, the first of them input {int(rows.argmax())}"
                raise MachineError(f"the C computes something else on {target.core}: {name} differs for {where}")


def _placed(codes: Array, places: Places) -> Array:
    return codes.reshape(len(codes), -1)[:, places]


def _rows_differ(found: Array, expected: Array) -> Rows:
    """For each of n inputs whether its row differs; all of them where the widths do."""
    if found.shape != expected.shape:
        return np.ones(len(expected), np.bool_)
    result: Rows = (found != expected).any(1)
    return result
