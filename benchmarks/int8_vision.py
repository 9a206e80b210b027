"""What does static int8 cost on small networks? Every observer of ranges, against the float network.

    python benchmarks/int8_vision.py [--networks NAME ...] [--observers NAME ...] [--images 10000] [--calibration 512]

Networks and data are those of the folder EFFCLI_ASSETS (or ../shared/assets beside the checkout). Images are calibrated
on training images. Keywords have test data only: calibrated on the first of them, reported on all and on the rest. The
auto-encoder has no data: its inputs are the smallest x with W x + b = μ + σ z, z normal and independent, where W, b, μ
and σ are the first layer's and its batch norm's, so that the layer returns what the batch norm saw in training; what
else x holds has no influence on the network.

The integer network runs in the reference executor. Goals: at most 0.5 points of accuracy lost, at least 30 dB.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from _common import HERE, machine, table
from numpy.typing import NDArray
from torch import Tensor

from effcli.graphs import executor
from effcli.graphs.graph import Graph
from effcli.importers import read
from effcli.layers.ranges import Method
from effcli.passes.quantize import int8

ASSETS = Path(os.environ.get("EFFCLI_ASSETS") or HERE.parents[1] / "shared" / "assets")
LARGEST_DROP = 0.005
LEAST_DECIBELS = 30.0
# Inputs per step of the float network.
BATCH = 250


@dataclass(frozen=True)
class Task:
    """Calibration inputs and test inputs float32 (n, *shape); labels (n,) or None; held: tests not calibrated on."""

    calibration: Tensor
    tests: Tensor
    labels: NDArray[np.integer] | None = None
    held: slice | None = None


def images(graph: Graph, name: str, count: int, calibration: int) -> Task:
    """CIFAR-10: raw 0..255 for MLPerf Tiny's network, normalised as in training for the others."""
    folder = ASSETS / "cifar10_jpeg"
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def inputs(pixels: NDArray[np.uint8]) -> Tensor:
        values = torch.from_numpy(pixels).float()
        if not name.startswith("tiny_"):
            values = (values / 255 - mean) / std
        return values.permute(0, 3, 1, 2).contiguous()

    tests, labels = loader.load_test(str(folder))
    seen, _ = loader.load_train(str(folder), calibration)
    return Task(inputs(seen), inputs(tests[:count]), labels[:count])


def keywords(graph: Graph, name: str, count: int, calibration: int) -> Task:
    data = np.load(ASSETS / name / "data.npz")
    features = (torch.from_numpy(data["features_int8"]).float() - float(data["zero_point"])) * float(data["scale"])
    features = features.unsqueeze(1)
    used = min(calibration, len(features) // 4)
    return Task(features[:used], features[:count], data["labels"][:count], slice(used, None))


def spectra(graph: Graph, name: str, count: int, calibration: int) -> Task:
    layer, norm = (graph.layer(str(node.target)) for node in graph.nodes[1:3])
    assert isinstance(layer, torch.nn.Linear) and isinstance(norm, torch.nn.BatchNorm1d)
    assert norm.running_mean is not None and norm.running_var is not None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count + calibration, layer.out_features, generator=generator)
    wanted = norm.running_mean + norm.running_var.sqrt() * noise - layer.bias
    inputs = (wanted.double() @ torch.linalg.pinv(layer.weight.double()).T).float()
    return Task(inputs[count:], inputs[:count])


NETWORKS: dict[str, Callable[[Graph, str, int, int], Task]] = {
    "tiny_resnet8_cifar10": images,
    "cifar10_resnet20_jpegft": images,
    "cifar10_resnet56": images,
    "tiny_dscnn_kws": keywords,
    "tiny_fc_autoencoder_toycar": spectra,
}


def accuracy(outputs: NDArray[np.float32], task: Task, part: slice = slice(None)) -> float | None:
    return None if task.labels is None else float((outputs.argmax(1) == task.labels)[part].mean())


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--observers", nargs="+", choices=get_args(Method), default=list(get_args(Method)))
    parser.add_argument("--images", type=int, default=10000, help="test inputs at most")
    parser.add_argument("--calibration", type=int, default=512, help="calibration inputs at most")
    parser.add_argument("--weights", choices=["minmax", "least_squares"], default="minmax", help="range of weights")
    parser.add_argument("--no-bias-correction", action="store_true")
    options = parser.parse_args()
    rows, missed = [], []
    for name in options.networks:
        graph = read(ASSETS / name / "model.pt2")
        task = NETWORKS[name](graph, name, options.images, options.calibration)
        expected = torch.cat([graph.run(batch) for batch in task.tests.split(BATCH)]).numpy()
        prepared, _ = int8.prepare(graph)
        statistics = int8.observe(prepared, iter(task.calibration.split(64)))
        for observer in options.observers:
            config = int8.Int8(observer=observer, range=options.weights, bias_correction=not options.no_bias_correction)
            network = int8.quantize(config, prepared, statistics).network
            assert not isinstance(network, Graph)
            start = time.perf_counter()
            found = executor.run_float(network, task.tests.numpy())
            seconds = time.perf_counter() - start
            decibels = 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())
            before, after = accuracy(expected, task), accuracy(found, task)
            line = [name, observer, percent(before), percent(after)]
            if before is not None and after is not None:
                drop = before - after
                held = accuracy(found, task, task.held) if task.held else None
                agreement = float((found.argmax(1) == expected.argmax(1)).mean())
                line += [f"{100 * drop:+.2f}", percent(held), percent(agreement)]
                reached = drop <= LARGEST_DROP
            else:
                line += [""] * 3
                reached = bool(decibels >= LEAST_DECIBELS)
            rows.append([*line, f"{decibels:.1f}", f"{seconds:.0f}"])
            print(" | ".join(rows[-1]), flush=True)
            if not reached and observer == int8.Int8().observer:
                missed.append(name)
    header = ["network", "observer", "float %", "int8 %", "lost", "held out %", "agreement %", "dB", "seconds"]
    print(f"\n{table(header, rows)}\n\nMachine: {machine(torch.get_num_threads())}")
    if missed:
        raise SystemExit(f"the default observer misses the goal on {', '.join(missed)}")


if __name__ == "__main__":
    main()
