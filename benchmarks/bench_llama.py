"""Decode and prefill of a 7B Llama's layers: packed 4-bit weights in effcli's runtime against bfloat16.

    python benchmarks/bench_llama.py [--threads 1 2] [--groups 64 128] [--layers 8] [--prefill 128] [--decode 32]

Random weights, hidden 4096, intermediate 11008, 32 heads, a vocabulary so small that the head does not count; the
4-bit models are made from the bfloat16 one by `effcli compress --pass linear`. All models are held in memory and take
turns within each repetition, so that a busy moment hits them alike; figures are medians, of one thread that thread's
processor time, which a busy machine disturbs least. Goals: decode at least 2.0 times bfloat16, prefill at least 0.9.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import HERE, checked, effcli, machine, table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="effcli-llama-", dir=options.scratch) as scratch:
        dense = Path(scratch) / "dense"
        sizes = {key: getattr(options, key) for key in ("layers", "hidden", "intermediate", "heads")}
        checked([sys.executable, HERE / "_random_llama.py", dense, *(f"--{key}={size}" for key, size in sizes.items())])
        folders = {"bfloat16": dense}
        for group in options.groups:
            name = f"{options.bits} bits, groups of {group}"
            folders[name] = Path(scratch) / f"group-{group}"
            step = f"linear:bits={options.bits},group_size={group}"
            checked(effcli("compress", dense, "-o", folders[name], "--pass", step, "--no-eval", "--quiet"))
        # torch only from here on: see _common.run.
        import effcli as package

        networks = {name: package.load(folder) for name, folder in folders.items()}
    print(
        f"Llama, {options.layers} layers of hidden {options.hidden}, intermediate {options.intermediate}; prefill of "
        f"{options.prefill} tokens, decode of {options.decode} behind them; ms, medians of {options.repeats}.\n"
    )
    rows = []
    for threads in options.threads:
        rows += _compare(networks, threads, options.prefill, options.decode, options.repeats)
    header = ["threads", "weights", "prefill", "ratio to bfloat16", "decode", "ratio to bfloat16", "kernels"]
    print(table(header, rows))
    print(f"\nMachine: {machine()}")


def _compare(networks: dict[str, Any], threads: int, prefill: int, decode: int, repeats: int) -> list[list[str]]:
    """One row for each network; ratios are of speeds, so above 1 is faster than the first network."""
    import torch

    from effcli.language.caching import cache_name
    from effcli.language.latency import kernel_name

    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    ids = torch.randint(5, 1000, (1, prefill), generator=torch.Generator().manual_seed(0))
    reads: dict[str, list[float]] = {name: [] for name in networks}
    writes: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, network in networks.items():
                seconds, out = _timed(clock, network, ids, use_cache=True, logits_to_keep=1)
                steps = []
                for _ in range(decode):
                    token = out.logits[:, -1:].argmax(-1)
                    cache = cache_name(network.forward)
                    step, out = _timed(clock, network, token, use_cache=True, **{cache: out[cache]})
                    steps.append(step)
                # The first repetition is the warm-up.
                if repeat:
                    reads[name].append(seconds)
                    writes[name].append(statistics.median(steps))
    first = next(iter(networks))
    rows = []
    for name, network in networks.items():
        read, written = statistics.median(reads[name]), statistics.median(writes[name])
        # Ratios of neighbours in time, then their median.
        faster = [
            statistics.median(base / own for base, own in zip(times[first], times[name], strict=True))
            for times in (reads, writes)
        ]
        kernels = dict.fromkeys(kernel_name(network, count) for count in (prefill, 1))
        row = [str(threads), name, f"{read * 1e3:.1f}", f"{faster[0]:.2f}", f"{written * 1e3:.2f}", f"{faster[1]:.2f}"]
        rows.append([*row, "; ".join(kernels)])
    return rows


def _timed(clock: Callable[[], float], network: Any, ids: Any, **options: Any) -> tuple[float, Any]:
    start = clock()
    out = network(ids, **options)
    return clock() - start, out


if __name__ == "__main__":
    main()
