"""Emitted C on this machine: compiled as a shared library, and every layer's bytes read back."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effcli.errors import MachineError
from effcli.exporters.firmware import targets, tools
from effcli.exporters.firmware.bench import bare
from effcli.exporters.firmware.source import fill

Codes = NDArray[np.int8]

_FAILURES = {
    1: "it refuses its arena",
    2: "it writes beside its arena",
    3: "there is no memory for its arena",
    4: "its layers write more for one input than for another",
}


class HostLibrary:
    """The network `name` in `folder`, its sources in `src`. flags: further ones of the compiler.

    Raises `UserError` where there is no compiler, `MachineError` when it fails. warnings: what the compiler said.
    """

    def __init__(self, folder: Path, name: str, flags: Sequence[str] = ("-O2",)) -> None:
        target = targets.find("host")
        targets.require(target)
        self.name = name
        # A loaded library needs its file no more.
        with tempfile.TemporaryDirectory(prefix="effcli-") as temporary:
            work = Path(temporary)
            (work / "host.c").write_text(fill(bare("host.c"), name, ()), encoding="utf-8")
            source = folder.resolve() / "src"
            options = ["-std=c99", "-shared", "-fPIC", *flags, f"-I{source}", "-o", "network.so"]
            files: list[tools.Word] = [*sorted(source.glob("*.c")), work / "host.c"]
            self.warnings = tools.compile([*target.command, *options, *files], work)
            try:
                self._library = ctypes.CDLL(str(work / "network.so"))
            except OSError as error:
                raise MachineError(
                    f"the compiled {name} cannot be loaded: {error}",
                    f"see whether {target.command[0]} makes code for this machine",
                ) from error
        facts = np.zeros(3, np.uint32)
        self._library.host_facts(_address(facts))
        self.input_bytes, self.output_bytes, self.layer_count = (int(fact) for fact in facts)

    def run(self, inputs: Codes) -> Codes:
        """Outputs int8 (n, output bytes) of inputs int8 (n, input bytes), in the order of the network's memory."""
        inputs, outputs = self._prepared(inputs)
        self._checked(self._library.host_compute(_address(inputs), _address(outputs), ctypes.c_uint32(len(inputs))))
        return outputs

    def layers(self, inputs: Codes) -> list[Codes]:
        """What each layer writes for inputs int8 (n, input bytes), n at least 1: int8 (n, bytes) each."""
        inputs, outputs = self._prepared(inputs)
        sizes = np.zeros(self.layer_count, np.uint32)
        self._checked(self._library.host_count(_address(inputs), _address(outputs), _address(sizes)))
        found = [np.zeros((len(inputs), size), np.int8) for size in sizes]
        buffers = np.array([layer.ctypes.data for layer in found], np.uintp)
        addresses = [_address(array) for array in (inputs, outputs, sizes, buffers)]
        count = ctypes.c_uint32(len(inputs))
        self._checked(self._library.host_compute_layers(*addresses[:2], count, *addresses[2:]))
        return found

    def _prepared(self, inputs: Codes) -> tuple[Codes, Codes]:
        """The inputs as they lie in memory, and room for the outputs."""
        if inputs.dtype != np.int8 or inputs.ndim != 2 or inputs.shape[1] != self.input_bytes:
            raise ValueError(f"{self.name} takes int8 (n, {self.input_bytes}), not {inputs.dtype} {inputs.shape}")
        return np.ascontiguousarray(inputs), np.zeros((len(inputs), self.output_bytes), np.int8)

    def _checked(self, status: int) -> None:
        if status:
            raise MachineError(f"the C of {self.name} fails: {_FAILURES[status]}", "report it with the network")


def _address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
