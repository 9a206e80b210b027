"""Adapters trained beside a language model: what each kind learns, its time, and its memory beside what a plan says.

    python benchmarks/adapters.py MODEL --text TRAIN --held-out TEXT [--steps 60] [--batch 4] [--length 128]
        [--rank 8] [--rate 0.001] [--seeds 0 1 2] [--only NAME ...] [--threads N] [--scratch DIR]

Every row trains the same windows of TRAIN for as many steps. The loss is the mean over the seeds, of 20 windows of the
text that is held out, with what stands beside the base; the spread is half the range of the seeds. Memory is the peak
of a process that plans, trains and measures, and the peak that `effcli plan` says.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from _common import checked, effcli, machine, table, threads_environment

# Passes, joined by +; the last one trains.
ROWS = {
    "finetune": "finetune",
    "LoRA": "lora:rank={rank}",
    "rsLoRA": "lora:rank={rank},rank_stabilized=true",
    "DoRA": "lora:rank={rank},dora=true",
    "PiSSA": "lora:rank={rank},init=pissa",
    "QLoRA": "nf4:double=true + lora:rank={rank}",
    "QDoRA": "nf4:double=true + lora:rank={rank},dora=true",
    "LoftQ": "nf4:double=true + lora:rank={rank},init=loftq",
    "LoRA, blocks computed again": "lora:rank={rank},checkpointing=true",
    "LoRA, moments in 8 bits": "lora:rank={rank},moments=int8",
}
HEADER = ["adapter", "trained", "loss before", "loss after", "spread", "seconds", "peak", "planned"]


def carried_out(options: argparse.Namespace, chain: str, seed: int, folder: Path) -> tuple[dict[str, Any], int]:
    """The report of one run, and the bytes that its plan says."""
    common = f"steps={options.steps},batch_size={options.batch},learning_rate={options.rate},hold_out=0.05,seed={seed}"
    passes = [step.strip() for step in chain.format(rank=options.rank).split(" + ")]
    passes[-1] += ("," if ":" in passes[-1] else ":") + common
    arguments: list[str | Path] = [options.model, "--calib", options.text]
    for step in passes:
        arguments += ["--pass", step]
    windows = f"calibration.samples={options.steps * options.batch}"
    for each in (windows, f"calibration.length={options.length}", "evaluate.latency=false", "evaluate.samples=20"):
        arguments += ["--set", each]
    if options.threads is not None:
        arguments += ["--set", f"threads={options.threads}"]
    extra = threads_environment(options.threads)
    plan = json.loads(checked(effcli("plan", *arguments, "--json"), extra).output)
    out = folder / "out"
    checked(effcli("compress", *arguments, "--eval", options.held_out, "-o", out, "--overwrite"), extra)
    return json.loads((out / "report.json").read_text(encoding="utf-8")), plan["memory_bytes"]


def row(options: argparse.Namespace, name: str, folder: Path) -> list[str]:
    losses, trained, seconds, peak = [], "", 0.0, 0
    for seed in options.seeds:
        report, planned = carried_out(options, ROWS[name], seed, folder)
        *_, before, last = report["stages"]
        losses.append(math.log(last["quality"]["perplexity"]))
        numbers = [layer["notes"].get("trained", 0) for layer in last["ledger"]]
        trained = f"{sum(numbers):,}" if any(numbers) else "all weights"
        seconds, peak = seconds + last["seconds"] / len(options.seeds), max(peak, last["peak_memory"])
    first, mean = math.log(before["quality"]["perplexity"]), sum(losses) / len(losses)
    spread = (max(losses) - min(losses)) / 2
    ratio = f"{planned / 1e6:,.0f} MB ({planned / peak:.2f})"
    return [
        name,
        trained,
        f"{first:.4f}",
        f"{mean:.4f}",
        f"{spread:.4f}",
        f"{seconds:.0f}",
        f"{peak / 1e6:,.0f} MB",
        ratio,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to learn from")
    parser.add_argument("--held-out", required=True, help="what the loss is measured on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="effcli-adapters-", dir=options.scratch) as scratch:
            rows.append(row(options, name, Path(scratch)))
        print(" | ".join(rows[-1]), flush=True)
    print(f"\n{table(HEADER, rows)}\n\nMachine: {machine(options.threads)}")


if __name__ == "__main__":
    main()
