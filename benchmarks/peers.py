"""Compress one checkpoint with effcli and with llmcompressor's AWQ: seconds, memory, bytes, perplexity in one table.

    python benchmarks/peers.py CHECKPOINT [--bits 4 3] [--calibration valid.txt] [--evaluation test.txt]

Each run is a process of its own, timed from its start to its end: imports, loading, compressing and saving, without
evaluation. The peer has its own virtual environment, made on first use (`--peer-environment`). Perplexity is measured
for all by the same loop with the stock loader (_perplexity.py). The texts default to wikitext2's valid.txt and
test.txt below $EFFCLI_ASSETS/text_wikitext2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from _common import HERE, Measured, checked, effcli, machine, megabytes, run, table, threads_environment, weight_bytes

PEER = ("torch==2.13.0", "llmcompressor==0.14.*")


@dataclass(frozen=True)
class Protocol:
    """What is the same for all. text: for calibration; evaluated: for perplexity."""

    checkpoint: Path
    text: Path
    evaluated: Path
    samples: int
    length: int
    windows: int
    group_size: int
    environment: dict[str, str]

    def perplexity(self, folder: Path) -> float:
        command: list[str | Path] = [sys.executable, HERE / "_perplexity.py", folder, self.evaluated]
        command += ["--tokenizer", self.checkpoint, "--windows", str(self.windows), "--length", str(self.length)]
        result = checked(command, self.environment)
        return float(json.loads(result.output.splitlines()[-1])["perplexity"])

    def ours(self, method: str, bits: int, output: Path) -> Measured:
        step = f"{method}:bits={bits},group_size={self.group_size}"
        command = effcli("compress", self.checkpoint, "-o", output, "--pass", step, "--no-eval", "--quiet")
        if method == "awq":
            command += ["--calib", self.text, "--set", f"calibration.samples={self.samples}"]
            command += ["--set", f"calibration.length={self.length}"]
        return checked(command, self.environment)

    def peer(self, python: Path, bits: int, output: Path, pinning: bool) -> Measured:
        command: list[str | Path] = [python, HERE / "_peer_llmcompressor.py", self.checkpoint, output, self.text]
        command += ["--bits", str(bits), "--group-size", str(self.group_size)]
        command += ["--samples", str(self.samples), "--length", str(self.length)]
        return run(command if pinning else [*command, "--without-pinning"], self.environment)


def peer_python(folder: Path) -> Path:
    """The Python of the peer's environment in `folder`, which is made when it does not exist."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} with {' '.join(PEER)}", file=sys.stderr)
        checked([sys.executable, "-m", "venv", folder])
        checked([python, "-m", "pip", "install", "--quiet", *PEER])
    return python


def peer_version(python: Path) -> str:
    names = "llmcompressor", "torch", "transformers"
    code = f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in {names}))"
    return checked([python, "-c", code]).output.strip()


def row(name: str, bits: str, result: Measured | None, folder: Path, protocol: Protocol) -> list[str]:
    seconds = f"{result.seconds:.1f}" if result else ""
    peak = megabytes(result.peak) if result else ""
    line = [name, bits, seconds, peak, megabytes(weight_bytes(folder)), f"{protocol.perplexity(folder):.2f}"]
    print(" | ".join(line), file=sys.stderr)
    return line


def main() -> None:
    assets = os.environ.get("EFFCLI_ASSETS")
    texts = Path(assets) / "text_wikitext2" if assets else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, default=texts and texts / "valid.txt", help="a text file")
    parser.add_argument("--evaluation", type=Path, default=texts and texts / "test.txt", help="a text file")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows")
    parser.add_argument("--threads", type=int, help="CPU threads; default: each library's own choice")
    parser.add_argument("--peer-environment", type=Path, default=cache / "effcli-benchmarks" / "llmcompressor")
    parser.add_argument("--no-peer", action="store_true", help="effcli alone")
    options = parser.parse_args()
    if options.calibration is None or options.evaluation is None:
        parser.error("give --calibration and --evaluation, or set EFFCLI_ASSETS")
    protocol = Protocol(
        options.checkpoint,
        options.calibration,
        options.evaluation,
        options.samples,
        options.length,
        options.windows,
        options.group_size,
        threads_environment(options.threads),
    )
    rows, remarks, ratios = [], [], []
    with tempfile.TemporaryDirectory(prefix="effcli-peers-") as scratch:
        folder = Path(scratch)
        python = None if options.no_peer else peer_python(options.peer_environment)
        rows.append(row("original", "16", None, options.checkpoint, protocol))
        pinning = True
        for bits in options.bits:
            results = {}
            for method in ("linear", "awq"):
                output = folder / f"{method}-{bits}"
                results[method] = protocol.ours(method, bits, output)
                rows.append(row(f"effcli {method}", str(bits), results[method], output, protocol))
            if python is None:
                continue
            output = folder / f"peer-{bits}"
            result = protocol.peer(python, bits, output, pinning)
            if result.code and pinning:
                remarks.append(
                    f"llmcompressor as released stops after {result.seconds:.0f} s: {result.last_line}\n"
                    "Its figures are with `IntermediatesCache.pin_memory` replaced by nothing "
                    "(_peer_llmcompressor.py --without-pinning)."
                )
                pinning = False
                result = protocol.peer(python, bits, output, pinning)
            if result.code:
                remarks.append(f"llmcompressor at {bits} bits fails: {result.last_line}")
                continue
            rows.append(row("llmcompressor awq", str(bits), result, output, protocol))
            ours = results["awq"]
            ratios.append(
                f"At {bits} bits effcli awq takes 1/{result.seconds / ours.seconds:.1f} of the peer's time "
                f"and {ours.peak / result.peak:.2f} of its memory."
            )
        peer = "" if python is None else f"; the peer: {peer_version(python)}"
    print(
        f"{options.checkpoint.name}, groups of {options.group_size}, asymmetric; calibrated on {options.samples} "
        f"windows of {options.length} from {options.calibration.name}; perplexity over the first "
        f"{options.windows} windows of {options.length} of {options.evaluation.name}, stock loader.\n"
    )
    print(table(["", "bits", "seconds", "peak memory", "weight files", "perplexity"], rows))
    for text in (*ratios, *remarks, f"Machine: {machine(options.threads)}{peer}"):
        print("\n" + text)


if __name__ == "__main__":
    main()
