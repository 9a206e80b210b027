"""How much memory does merging an adapter take, against PEFT's `merge_and_unload`?

    python benchmarks/merge_memory.py MODEL [--threads 1]

A LoRA of rank 16 with random numbers on every linear layer of MODEL is merged by effcli and by PEFT, each in a process
of its own, and both results are compared. A process that merges nothing tells what the libraries take by themselves.
Goal: at least three times less than PEFT above that. Needs `peft`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import HERE, checked, machine, megabytes, table, threads_environment, weight_bytes

GOAL = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    options = parser.parse_args()
    rows, above = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"

        def child(way: str, out: str = "none") -> tuple[int, float]:
            command = [sys.executable, HERE / "_merging.py", way, options.model, adapter, Path(scratch) / out]
            found = checked(command, threads_environment(options.threads))
            return found.peak, found.seconds

        child("adapter")
        for way in ("effcli", "peft"):
            idle, _ = child(f"{way}-idle")
            peak, seconds = child(way, way)
            above[way] = max(peak - idle, 1)
            rows.append([way, megabytes(idle), megabytes(peak), megabytes(above[way]), f"{seconds:.1f}"])
        sizes = [megabytes(weight_bytes(folder)) for folder in (options.model, adapter)]
        differing = difference(Path(scratch) / "effcli", Path(scratch) / "peft")
    print(f"{options.model.name}: {sizes[0]}, adapter {sizes[1]}\n")
    print(table(["by", "idle", "peak", "above idle", "seconds"], rows))
    ratio = above["peft"] / above["effcli"]
    print(f"\n{ratio:.1f} times less above idle (goal: {GOAL:.0f}); largest difference of a weight: {differing:.2g}")
    print(f"\nMachine: {machine(options.threads)}")
    if ratio < GOAL:
        raise SystemExit(1)


def difference(first: Path, second: Path) -> float:
    """The largest difference of two weights, as a share of the largest weight of their tensor."""
    from safetensors.torch import load_file

    def tensors(folder: Path) -> dict[str, Any]:
        return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}

    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    return max(float((one[k].float() - two[k].float()).abs().max() / two[k].float().abs().max()) for k in one)


if __name__ == "__main__":
    main()
