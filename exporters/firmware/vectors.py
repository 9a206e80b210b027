"""The test file of a network: inputs, the outputs they must give, and a checksum of every layer."""

from __future__ import annotations

import numpy as np

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


def layers(network: IntegerNetwork, program: Program, codes: Array) -> list[Array]:
    """What every layer must hold in memory for input codes (n, *shape): int8 (n, bytes) each."""
    values = executor.run(network, codes, keep=True)
    return [values[task.output.value].reshape(len(codes), -1)[:, task.output.places] for task in program.tasks]


def test_file(network: IntegerNetwork, program: Program, codes: Array) -> str:
    """C with the test vectors for input codes (n, *shape)."""
    held = layers(network, program, codes)
    inputs = codes.reshape(len(codes), -1)[:, program.input.places]
    outputs = executor.run(network, codes).reshape(len(codes), -1)[:, program.output.places]
    sums = np.stack([checksums(each) for each in held], 1)
    parts = [f"#define NET_TESTS {len(codes)}\n"]
    parts.append(_matrix("int8_t", "net_test_inputs", "NET_INPUT_BYTES", inputs))
    parts.append(_matrix("int8_t", "net_test_outputs", "NET_OUTPUT_BYTES", outputs))
    checked = _matrix("uint32_t", "net_test_checksums", "NET_LAYERS", sums)
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
