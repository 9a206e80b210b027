"""Latency in onnxruntime: the int8 export of convolutional networks against their float32 export, one input at a time.

    python benchmarks/onnx_vision.py [MODEL ...] [--threads 1] [--rounds 300]

MODEL: whatever `effcli compress` reads as a graph (default: sample:cnn). Ranges are calibrated on normal random inputs,
for the numbers in a network do not change its speed. Both sessions are held in memory and take turns, so that a busy
moment hits them alike; figures are medians. Then where the int8 network's time goes, by kernel, from onnxruntime's own
profile of it. Goal: ResNet-56 at least twice as fast.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import machine, table

from effcli.exporters import onnx as exporter
from effcli.files import locate as samples
from effcli.importers import read
from effcli.layers.contract import Observed
from effcli.passes.quantize import int8
from effcli.platform import onnx_session


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["sample:cnn"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    rows, profiles = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(options.models):
            name = Path(model).parent.name if model.endswith((".pt2", ".onnx")) else model
            folders = exports(model, Path(scratch) / str(number))
            for threads in options.threads:
                sessions = [onnx_session.open_session(folder, threads) for folder in folders]
                slow, fast = turns(sessions, options.rounds)
                rows.append([name, str(threads), f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.2f}"])
            profiles.append(f"{name}, int8: {', '.join(profile(folders[1], options.rounds))}")
    print(table(["network", "threads", "float32, ms", "int8, ms", "ratio"], rows), end="\n\n")
    print("\n".join(profiles))
    print(f"\n{onnx_session.version()}. {machine()}")


def exports(model: str, scratch: Path) -> tuple[Path, Path]:
    """The float32 and the int8 export of a model."""
    graph = read(samples.locate(model))
    inputs = torch.randn(64, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    made = int8.Int8().transform(graph, Observed(lambda: iter([inputs])))
    folders = []
    for kind, network in (("float", graph), ("int8", made.network)):
        checkpoint = scratch / kind
        checkpoint.mkdir(parents=True)
        network.save(checkpoint)
        exporter.ONNX().export(checkpoint, scratch / f"{kind}-onnx")
        folders.append(scratch / f"{kind}-onnx")
    return folders[0], folders[1]


def turns(sessions: list[Any], rounds: int) -> list[float]:
    """Median milliseconds of each session for one input, taking turns."""
    times: list[list[float]] = [[] for _ in sessions]
    feeds = [feed(session) for session in sessions]
    for number in range(rounds + 10):
        for session, inputs, found in zip(sessions, feeds, times, strict=True):
            start = time.perf_counter()
            session.run(None, inputs)
            if number >= 10:
                found.append(time.perf_counter() - start)
    return [1000 * statistics.median(found) for found in times]


def profile(folder: Path, rounds: int) -> list[str]:
    """Microseconds of each kernel for one input, the largest first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    for _ in range(rounds):
        session.run(None, feed(session))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return [f"{name} {total / rounds:.0f} us" for name, total in spent.most_common(6)]


def feed(session: Any) -> dict[str, np.ndarray[Any, Any]]:
    port = session.get_inputs()[0]
    return {port.name: np.zeros((1, *port.shape[1:]), np.float32)}


if __name__ == "__main__":
    main()
