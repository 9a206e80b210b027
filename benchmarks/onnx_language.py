"""Decode and prefill in onnxruntime: the 4-bit ONNX export of a language model against its float32 export.

    python benchmarks/onnx_language.py CHECKPOINT [--pass linear:bits=4,group_size=64] [--threads 1 2] [--prefill 128]

Exports the checkpoint in float32 and, compressed by one pass, as MatMulNBits at accuracy levels 0 (float32 arithmetic)
and 4 (inputs quantized to 8 bits by block). All sessions are held in memory and take turns within each repetition, so
that a busy moment hits them alike; figures are medians, of one thread that thread's processor time, which a busy
machine disturbs least. Differences of logits are against the same weights, dequantized, in float32 by torch. Goal: 4
bits decode faster than float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import checked, effcli, machine, table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pass", dest="step", default="linear:bits=4,group_size=64")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="effcli-onnx-", dir=options.scratch) as scratch:
        packed = Path(scratch) / "packed"
        checked(effcli("compress", options.checkpoint, "-o", packed, "--pass", options.step, "--no-eval", "--quiet"))
        # torch only from here on: see _common.run.
        from effcli.exporters._onnx_language import export_language
        from effcli.platform import onnx_session

        exports = {
            "float32": export_language(options.checkpoint, Path(scratch) / "float32"),
            "level 0": export_language(packed, Path(scratch) / "level-0"),
            "level 4": export_language(packed, Path(scratch) / "level-4", accuracy_level=4),
        }
        print(
            f"{options.checkpoint.name}, {options.step}; prefill of {options.prefill} tokens, decode of "
            f"{options.decode} behind them; medians of {options.repeats}; {onnx_session.version()}.\n"
        )
        rows = [
            [name, f"{done.nbytes / 1e6:.1f} MB", f"{done.prompt.largest:.1e}", f"{done.prompt.relative:.1e}"]
            for name, done in exports.items()
        ]
        print(table(["export", "size", "largest logit difference", "relative"], rows), end="\n\n")
        rows = []
        for threads in options.threads:
            sessions = {name: onnx_session.open_session(done.path, threads) for name, done in exports.items()}
            rows += _compare(sessions, threads, options.prefill, options.decode, options.repeats)
    header = ["threads", "export", "prefill, tokens/s", "ratio", "decode, tokens/s", "ratio"]
    print(table(header, rows))
    print(f"\nMachine: {machine()}")


def _compare(sessions: dict[str, Any], threads: int, prefill: int, decode: int, repeats: int) -> list[list[str]]:
    """One row for each session; ratios above 1 are faster than the first."""
    import numpy as np

    from effcli.exporters._onnx_language import empty_past, forward

    clock = time.thread_time if threads == 1 else time.perf_counter
    ids = np.random.default_rng(0).integers(5, 1000, size=(1, prefill + decode))
    reads: dict[str, list[float]] = {name: [] for name in sessions}
    writes: dict[str, list[float]] = {name: [] for name in sessions}
    for repeat in range(repeats + 1):
        for name, session in sessions.items():
            past, seconds = empty_past(session, 1), []
            for tokens in (ids[:, :prefill], *np.split(ids[:, prefill:], decode, axis=1)):
                start = clock()
                _, past = forward(session, tokens, past)
                seconds.append(clock() - start)
            # The first repetition is the warm-up.
            if repeat:
                reads[name].append(seconds[0])
                writes[name].append(statistics.median(seconds[1:]))
    first = next(iter(sessions))
    rows = []
    for name in sessions:
        # Ratios of neighbours in time, then their median.
        faster = [
            statistics.median(base / own for base, own in zip(times[first], times[name], strict=True))
            for times in (reads, writes)
        ]
        speeds = prefill / statistics.median(reads[name]), 1 / statistics.median(writes[name])
        rows.append(
            [str(threads), name, f"{speeds[0]:.0f}", f"{faster[0]:.2f}", f"{speeds[1]:.1f}", f"{faster[1]:.2f}"]
        )
    return rows


if __name__ == "__main__":
    main()
