"""How long a network that reads no text takes for one input, in torch and in onnxruntime."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from effcli import exporters, importers
from effcli.files import locate as samples
from effcli.graphs.graph import Graph, is_graph
from effcli.graphs.integer import is_integer
from effcli.layers.result import Phases, unseen
from effcli.platform import onnx_session
from effcli.platform.machine import cpu_threads, device_name
from effcli.platform.stopwatch import repeated
from effcli.reports.report import Latency

_SECONDS = 1.0
_FEWEST = 5


def measure(
    model: str,
    *,
    weights: Path | None = None,
    shape: tuple[int, ...] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    phases: Phases = unseen,
) -> tuple[Latency, ...]:
    """Time one input of `model`, any network that is read as a graph, or an integer network."""
    source = samples.locate(model)
    if isinstance(source, Path) and (is_integer(source) or is_graph(source)):
        with phases("latency"):
            return of_checkpoint(source, threads)
    with phases("reading the network"):
        graph = importers.read(source, weights=weights, shape=shape, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as folder, phases("latency"):
        graph.save(Path(folder))
        return of_checkpoint(Path(folder), threads)


def of_checkpoint(path: Path, threads: int | None = None, *, onnx: bool = True) -> tuple[Latency, ...]:
    """Time one input of a checkpoint: in torch where it is floating, in onnxruntime where that is installed.

    An integer network has no kernels of its own on a computer; its reference executor is not timed, for nobody
    would run it. onnx: False leaves onnxruntime out for a floating network.
    """
    integer = is_integer(path)
    found = [] if integer else [_in_torch(Graph.read(path), threads)]
    if (onnx or integer) and onnx_session.installed():
        found.append(_in_onnxruntime(path, threads))
    return tuple(found)


def remarks() -> tuple[str, ...]:
    """What the user should know of what is not timed here."""
    return () if onnx_session.installed() else ("not timed in onnxruntime: pip install 'effcli[onnx]'",)


def _in_torch(graph: Graph, threads: int | None) -> Latency:
    inputs = torch.zeros(1, *graph.facts.shape)
    with cpu_threads(threads) as used, torch.inference_mode():
        times = repeated(lambda: graph.module(inputs), _SECONDS, _FEWEST)
    return _latency("torch float32", times, used)


def of_onnx(folder: Path, threads: int | None = None) -> Latency:
    """Time one input of the `model.onnx` in `folder`, exported from a graph or an integer network."""
    # As many as torch takes, so that the figures can be set side by side.
    with cpu_threads(threads) as used:
        session = onnx_session.open_session(folder, used)
    port = session.get_inputs()[0]
    half = port.type == "tensor(float16)"
    inputs = np.zeros((1, *port.shape[1:]), dtype=np.float16 if half else np.float32)
    quantized = _operators(folder) & {"QuantizeLinear", "DynamicQuantizeLinear"}
    kind = "int8" if quantized else "float16" if half else "float32"
    return _latency(f"onnxruntime {kind}", onnx_session.time_one(session, {port.name: inputs}, _SECONDS), used)


def _operators(folder: Path) -> set[str]:
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {node.op_type for node in model.graph.node}


def _in_onnxruntime(path: Path, threads: int | None) -> Latency:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "onnx"
        exporters.load("onnx")().export(path, target)
        return of_onnx(target, threads)


def _latency(runtime: str, times: list[float], threads: int) -> Latency:
    return Latency(
        runtime=runtime,
        milliseconds=1000 * statistics.median(times),
        fastest=1000 * min(times),
        repetitions=len(times),
        threads=threads,
        device=device_name(torch.device("cpu")),
    )
