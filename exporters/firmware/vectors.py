"""The test file of a network: inputs, the outputs they must give, and a checksum of every layer."""

from __future__ import annotations

import numpy as np

from effcli.exporters.firmware.layout import Places
from effcli.exporters.firmware.program import Array, Program
from effcli.exporters.firmware.source import kernel
from effcli.graphs import executor
from effcli.graphs.integer import IntegerNetwork

_BASIS, _PRIME = 2166136261, 16777619


def checksums(rows: Array) -> Array:
    """FNV-1a of 32 bits of each row, uint32 (n,), of int8 (n, bytes)."""
    state = np.full(len(rows), _BASIS, np.uint64)
    for column in rows.view(np.uint8).T:
        state = (state ^ column) * _PRIME & 0xFFFFFFFF
    return state.astype(np.uint32)


class Expected:
    """What the reference executor gives for input codes (n, *shape): int8 (n, bytes) each, as the C's memory holds it.

    layers: the outputs of all tasks.
    """

    def __init__(self, network: IntegerNetwork, program: Program, codes: Array) -> None:
        values = executor.run(network, codes, keep=True)
        self.inputs = _placed(values[network.program.input], program.input.places)
        self.layers = [_placed(values[task.output.value], task.output.places) for task in program.tasks]
        self.outputs = _placed(values[network.program.output], program.output.places)

    def sums(self) -> Array:
        """The checksum of every layer, uint32 (n, layers)."""
        return np.stack([checksums(layer) for layer in self.layers], 1)


def _placed(codes: Array, places: Places) -> Array:
    return codes.reshape(len(codes), -1)[:, places]


def test_file(network: IntegerNetwork, program: Program, codes: Array) -> str:
    """C with the test vectors for input codes (n, *shape)."""
    expected = Expected(network, program, codes)
    parts = [f"#define NET_TESTS {len(codes)}\n"]
    parts.append(_matrix("int8_t", "net_test_inputs", "NET_INPUT_BYTES", expected.inputs))
    parts.append(_matrix("int8_t", "net_test_outputs", "NET_OUTPUT_BYTES", expected.outputs))
    checked = _matrix("uint32_t", "net_test_checksums", "NET_LAYERS", expected.sums())
    parts.append(f"#if !defined(NET_NO_HOOKS)\n{checked}#endif\n")
    return "\n".join([*parts, kernel("selftest.c")])


def _matrix(kind: str, name: str, width: str, values: Array) -> str:
    rows = []
    for row in values.tolist():
        texts = [f"{number}u" if kind == "uint32_t" else str(number) for number in row]
        lines = ["     " + ", ".join(texts[start : start + 20]) for start in range(0, len(texts), 20)]
        rows.append("    {\n" + ",\n".join(lines) + "\n    }")
    body = ",\n".join(rows)
    return f"static const {kind} {name}[NET_TESTS][{width}] = {{\n{body}\n}};\n"
