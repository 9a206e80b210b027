"""Fast Forward (arXiv:2409.04206) beside plain Adam: the arithmetic that each takes to the same loss.

    python benchmarks/fast_forward.py MODEL --text TRAIN [--windows 512] [--length 64] [--epochs 5] [--batch 4]
        [--rate 0.0002] [--every 6] [--seeds 0 1 2] [--threads N] [--scratch DIR]

Plain Adam trains for all epochs; its least loss on the eighth of the windows that is held out is the goal. Fast Forward
trains likewise, and the epoch counts that first reaches the goal. Of the windows that are held out 32 serve its line
searches. An input of a step counts as three forwards, one of a line search or of its beginning as one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _common import checked, effcli, machine, table, threads_environment

ROWS = {"LoRA": "lora:rank=8", "DoRA": "lora:rank=8,dora=true"}
HEADER = ["adapter", "seed", "goal", "epochs", "forwards", "saved", "at the end of all epochs"]
_PROBED = 32


def trained(options: argparse.Namespace, step: str, more: str, folder: Path) -> dict[str, Any]:
    """The record of one training."""
    common = f"epochs={options.epochs},batch_size={options.batch},learning_rate={options.rate},hold_out=0.125"
    arguments: list[str | Path] = ["compress", options.model, "--calib", options.text, "--no-eval", "--overwrite"]
    arguments += ["--pass", f"{step},{common},schedule=constant,{more}", "-o", folder / "out"]
    for each in (f"calibration.samples={options.windows}", f"calibration.length={options.length}"):
        arguments += ["--set", each]
    if options.threads is not None:
        arguments += ["--set", f"threads={options.threads}"]
    checked(effcli(*arguments), threads_environment(options.threads))
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    training: dict[str, Any] = found["stages"][-1]["training"]
    return training


def forwards(options: argparse.Namespace, training: dict[str, Any], step: int) -> int:
    """Forwards of one input up to a step."""
    searches = (times for at, times in training["searched"] if at <= step)
    return 3 * step * options.batch + sum((times + 2) * _PROBED for times in searches)


def row(options: argparse.Namespace, name: str, seed: int, folder: Path) -> list[str]:
    plain = trained(options, ROWS[name], f"seed={seed}", folder)
    fast = trained(options, ROWS[name], f"seed={seed},fast_forward={options.every}", folder)
    step, goal = min(plain["errors"], key=lambda point: point[1])
    reached = next((at for at, error in fast["errors"] if error <= goal), None)
    before, last = forwards(options, plain, step), fast["errors"][-1][1]
    per_epoch = plain["errors"][1][0]
    if reached is None:
        return [name, str(seed), f"{goal:.4f}", "not reached", "", "", f"{last:.4f}"]
    after = forwards(options, fast, reached)
    epochs = f"{reached / per_epoch:.0f} of {step / per_epoch:.0f}"
    return [
        name,
        str(seed),
        f"{goal:.4f}",
        epochs,
        f"{after:,} of {before:,}",
        f"{1 - after / before:.0%}",
        f"{last:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to learn from")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--every", type=int, default=6, help="steps between two line searches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()
    rows = []
    for name in ROWS:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory(prefix="effcli-forward-", dir=options.scratch) as scratch:
                rows.append(row(options, name, seed, Path(scratch)))
            print(" | ".join(rows[-1]), flush=True)
    print(f"\n{table(HEADER, rows)}\n\nMachine: {machine(options.threads)}")


if __name__ == "__main__":
    main()
