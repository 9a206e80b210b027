"""What smaller networks of the same kind lose, and how much faster they are: channels, heads or blocks removed.

    python benchmarks/structured.py MODEL --chain "channels:ratio=0.25,what=feed_forward,criterion=reconstruction"
        [--chain "channels:ratio=0.4,criterion=reconstruction + finetune:epochs=3"] --set calibration.data=FILE
        [--set evaluate.images=FILE] [--threads N] [--scratch DIR]

Each chain, passes joined by +, is carried out on MODEL into a scratch folder. A row for the input and one for every
step: size, multiplications, quality and measured speed, each with its ratio to the input. A speed-up is to be held
against the ratio of multiplications beside it. Take times on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _common import machine, megabytes, table

if TYPE_CHECKING:
    from effcli.reports.report import Stage

HEADER = ["chain", "weights", "size", "MACs", "quality", "prefill tok/s", "decode tok/s", "latency ms", "seconds"]


def beside(value: float | None, before: float | None, shown: str, faster_is_more: bool = True) -> str:
    """A figure with its ratio to that of the input."""
    if value is None:
        return ""
    if not before or value == before:
        return shown
    return f"{shown} ({value / before if faster_is_more else before / value:.2f}x)"


def quality(stage: Stage) -> str:
    found = stage.quality
    if found is None:
        return ""
    if found.perplexity is not None:
        return f"perplexity {found.perplexity:.2f}"
    top1 = found.classification.top1 if found.classification is not None else None
    return "" if top1 is None else f"top-1 {100 * top1:.2f} %"


def line(name: str, stage: Stage, first: Stage) -> list[str]:
    speed, before = stage.speed, first.speed
    latency, before_latency = (one.latencies[0].milliseconds if one.latencies else None for one in (stage, first))
    rates = [
        beside(rate, before and own(before), f"{rate:.0f}") if speed is not None and (rate := own(speed)) else ""
        for own in (lambda one: one.prefill_tokens_per_second, lambda one: one.decode_tokens_per_second)
    ]
    return [
        name,
        f"{stage.weights:,}",
        beside(stage.nbytes, first.nbytes, megabytes(stage.nbytes), faster_is_more=False),
        beside(stage.macs, first.macs, f"{(stage.macs or 0) / 1e6:,.1f} M", faster_is_more=False),
        quality(stage),
        *rates,
        beside(latency, before_latency, f"{latency or 0:.2f}", faster_is_more=False),
        "" if stage.seconds is None else f"{stage.seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--chain", action="append", required=True, help="passes, joined by +")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()

    from effcli.run import pipeline
    from effcli.run.recipe import from_arguments

    rows: list[list[str]] = []
    for chain in options.chain:
        with tempfile.TemporaryDirectory(prefix="effcli-structured-", dir=options.scratch) as scratch:
            passes = [step.strip() for step in chain.split(" + ")]
            output, threads = str(Path(scratch) / "out"), options.threads
            recipe = from_arguments(options.model, passes=passes, output=output, threads=threads, overrides=options.set)
            report = pipeline.run(recipe)
        first = report.stages[0]
        if not rows:
            rows.append(line("input", first, first))
        for number, stage in enumerate(report.stages[1:], start=1):
            rows.append(line(" + ".join(passes[:number]), stage, first))
        print(" | ".join(rows[-1]), flush=True)
    print(f"\n{table(HEADER, rows)}\n\nMachine: {machine(options.threads)}")


if __name__ == "__main__":
    main()
