"""Does memory grow with depth? The peak of `compress --pass awq` on random-weight Llamas of 16 and of 32 layers.

    python benchmarks/depth.py [--layers 16 32] [--hidden 2048] [--intermediate 5632] [--samples 8] [--scratch DIR]

The checkpoints are written block by block into a scratch folder, which is removed. Each compression is a process of
its own; its peak is what the system says of it. Goals: from the shallowest to the deepest model the peak grows by
10 % at most, and stays under 2 GB.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from _common import HERE, checked, effcli, machine, megabytes, table, threads_environment, weight_bytes

# The model, its parts on their way and the output, beside some room.
DISK_FACTOR = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()
    block = options.hidden * (4 * options.hidden + 3 * options.intermediate) * 2
    needed = int(max(options.layers) * block * DISK_FACTOR)
    free = shutil.disk_usage(options.scratch).free
    if free < needed:
        raise SystemExit(f"{options.scratch} has {megabytes(free)} free, not {megabytes(needed)}: give --scratch")
    rows, peaks = [], []
    for layers in sorted(options.layers):
        with tempfile.TemporaryDirectory(prefix="effcli-depth-", dir=options.scratch) as scratch:
            model, output = Path(scratch) / "model", Path(scratch) / "out"
            sizes = {"layers": layers, "hidden": options.hidden, "intermediate": options.intermediate}
            arguments = [f"--{key}={value}" for key, value in {**sizes, "heads": options.heads}.items()]
            checked([sys.executable, HERE / "_random_llama.py", model, *arguments])
            step = f"awq:bits={options.bits},group_size={options.group_size}"
            command = effcli("compress", model, "-o", output, "--pass", step, "--no-eval", "--quiet")
            command += ["--set", f"calibration.samples={options.samples}"]
            command += ["--set", f"calibration.length={options.length}"]
            result = checked(command, threads_environment(options.threads))
            peaks.append(result.peak)
            line = [str(layers), megabytes(weight_bytes(model)), megabytes(weight_bytes(output))]
            rows.append([*line, f"{result.seconds:.0f}", megabytes(result.peak)])
            print(" | ".join(rows[-1]), file=sys.stderr)
    print(
        f"Llama, hidden {options.hidden}, intermediate {options.intermediate}, random weights; awq, "
        f"{options.bits} bits in groups of {options.group_size}; {options.samples} windows of {options.length}.\n"
    )
    print(table(["layers", "input", "output", "seconds", "peak memory"], rows))
    growth = peaks[-1] / peaks[0] - 1
    print(f"\nGrowth of the peak: {growth:+.1%} (goal: at most 10 %); deepest: {megabytes(peaks[-1])} (goal: 2000 MB)")
    print(f"\nMachine: {machine(options.threads)}")
    if growth > 0.1 or peaks[-1] > 2e9:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
