"""What does a small network take on a microcontroller, and is it the same network there?

    python benchmarks/firmware.py [--networks NAME ...] [--targets NAME ...] [--host 1000] [--device 100]

The networks of MLPerf Tiny and ResNets for CIFAR-10, quantized as `int8_vision.py` does it, exported to C. Every layer
is compared with the reference executor: byte by byte on the host, by its checksum in QEMU. Counted there at -O2: the
instructions of one inference without hooks, the stack, and the sections of the object files; the arena is exact.

Instructions are no cycles: QEMU has no wait states and no dual issue.

The peers are TensorFlow Lite for Microcontrollers with its reference kernels and with CMSIS-NN, on the same networks in
int8, Cortex-M4F, gcc -O2, softmax left out, counted in the same way; their figures stand in `PEERS` as they were
measured once. kB are 1000 bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _common import machine, table
from int8_vision import ASSETS, NETWORKS

from effcli.exporters.firmware import check, targets
from effcli.exporters.firmware.bench import Measured
from effcli.exporters.firmware.generate import Generated, generate
from effcli.graphs.integer import Array, IntegerNetwork
from effcli.importers import read
from effcli.passes.quantize import int8

# M instructions with reference kernels and with CMSIS-NN, kB of arena and of flash with CMSIS-NN.
PEERS = {
    "tiny_resnet8_cifar10": (107.5, 29.9, 55.0, 182),
    "tiny_dscnn_kws": (43.1, 7.70, 22.8, 142),
    "tiny_fc_autoencoder_toycar": (1.95, 0.583, 2.6, 313),
}
CALIBRATION = 512
DSP = ("cortex-m4", "cortex-m7", "cortex-m55")


def quantized(name: str, count: int) -> tuple[IntegerNetwork, Array]:
    """The integer network, and codes of `count` test inputs."""
    graph = read(ASSETS / name / "model.pt2")
    task = NETWORKS[name](graph, name, count, CALIBRATION)
    prepared, _ = int8.prepare(graph)
    network = int8.quantize(int8.Int8(), prepared, int8.observe(prepared, iter(task.calibration.split(64)))).network
    assert isinstance(network, IntegerNetwork)
    return network, network.quantize(task.tests.numpy()[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    emulated = [name for name, target in targets.TARGETS.items() if target.board is not None]
    parser.add_argument("--targets", nargs="+", choices=emulated, default=emulated)
    parser.add_argument("--host", type=int, default=1000, help="inputs compared on the host")
    parser.add_argument("--device", type=int, default=100, help="inputs compared on every target in QEMU")
    options = parser.parse_args()
    rows, ratios = [], []
    for name in options.networks:
        network, codes = quantized(name, options.host)
        generated = generate(network, "network")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            check.write_sources(folder, generated, "network")
            start = time.perf_counter()
            check.compare(network, generated.program, folder, "network", targets.find("host"), codes)
            print(f"{name}: {len(codes)} inputs equal on the host, {time.perf_counter() - start:.0f} s", flush=True)
            for target in options.targets:
                for plain in (False, True) if target in DSP else (True,):
                    start = time.perf_counter()
                    found = check.compare(
                        network,
                        generated.program,
                        folder,
                        "network",
                        targets.find(target),
                        codes[: options.device],
                        plain=plain and target in DSP,
                    )
                    assert found is not None
                    rows.append(row(name, target, plain, generated, found, time.perf_counter() - start))
                    print(" | ".join(rows[-1]), flush=True)
                    if target == "cortex-m4" and name in PEERS:
                        ratios.append(against(name, plain, generated, found))
    header = ["network", "core", "code", "M instructions", "arena, bytes", "stack", "flash, bytes", "seconds"]
    print(f"\n{table(header, rows)}\n")
    if ratios:
        header = ["network", "code", "instructions", "RAM", "flash"]
        print(f"Against the peers on the Cortex-M4F, ratios:\n\n{table(header, ratios)}\n")
    print(f"Machine: {machine(torch.get_num_threads())}")


def row(name: str, target: str, plain: bool, generated: Generated, found: Measured, seconds: float) -> list[str]:
    flash = found.sizes.text + found.sizes.data
    numbers = [f"{found.instructions / 1e6:.3f}", str(generated.plan.nbytes), str(found.stack), str(flash)]
    return [name, target, "plain C" if plain else "DSP", *numbers, f"{seconds:.0f}"]


def against(name: str, plain: bool, generated: Generated, found: Measured) -> list[str]:
    """Instructions against the reference kernels in plain C and against CMSIS-NN with DSP; RAM and flash against it."""
    reference, optimised, ram, flash = PEERS[name]
    instructions = found.instructions / 1e6 / (reference if plain else optimised)
    ratios = instructions, generated.plan.nbytes / 1e3 / ram, (found.sizes.text + found.sizes.data) / 1e3 / flash
    return [name, "plain C" if plain else "DSP", *(f"{ratio:.2f}" for ratio in ratios)]


if __name__ == "__main__":
    main()
