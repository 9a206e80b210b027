"""From a network of torch to firmware: architectures that the generator was not written for, and a keyword spotter."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import vision_architectures
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, MobileNetV1Config, MobileNetV2Config

from effcli.exporters.firmware import check, targets
from effcli.exporters.firmware.generate import generate
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork
from effcli.importers import read
from effcli.passes.quantize import int8

ROOT = Path(__file__).resolve().parents[2]


def integer_network(graph: Graph, count: int = 8) -> IntegerNetwork:
    """The integer network of `graph`, calibrated on random inputs."""
    inputs = torch.randn(count, *graph.facts.shape, generator=torch.Generator().manual_seed(0))

    def batches() -> Iterator[Tensor]:
        yield inputs

    prepared, _ = int8.prepare(graph)
    network = int8.quantize(int8.Int8(), prepared, int8.observe(prepared, batches())).network
    assert isinstance(network, IntegerNetwork)
    return network


def same_everywhere(network: IntegerNetwork, folder: Path, *names: str) -> int:
    """Compare the C of `network` on its probe inputs on each target; the size of its arena."""
    generated = generate(network, "network")
    check.write_sources(folder, generated, "network")
    assert network.probe is not None
    for name in names:
        target = targets.find(name)
        if targets.missing(target):
            pytest.skip(f"needs {', '.join(targets.missing(target))}")
        check.compare(network, generated.program, folder, "network", target, network.probe[:4])
    return generated.plan.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("name", vision_architectures.NAMES)
def test_classifiers_of_transformers(name: str, tmp_path: Path) -> None:
    graph = read(vision_architectures.make(name, tmp_path / "source"))
    (tmp_path / "c").mkdir()
    same_everywhere(integer_network(graph), tmp_path / "c", "host", "cortex-m4")


@pytest.mark.slow
@pytest.mark.parametrize("config", [MobileNetV1Config, MobileNetV2Config])
def test_a_mobilenet_at_96_pixels(config: Callable[..., object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = AutoModelForImageClassification.from_config(config(image_size=96, depth_multiplier=0.25))
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 96, 96))
    network.eval().save_pretrained(tmp_path / "source")
    (tmp_path / "c").mkdir()
    arena = same_everywhere(integer_network(read(tmp_path / "source"), 4), tmp_path / "c", "host", "cortex-m7")
    # The largest tensor alone, 48 x 48 with 24 or 8 channels beside the input, does not fit twice.
    assert arena < 96 * 1024


class VoiceDetector(nn.Module):
    """Sound or no sound: convolutions along time, dilated, with a gate and a skip, and two logits a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv1d(1, 12, 9, stride=4, padding=4)
        self.spread = nn.Conv1d(12, 12, 3, padding=2, dilation=2, groups=12)
        self.mix = nn.Conv1d(12, 12, 1)
        self.gate = nn.Conv1d(12, 12, 1)
        self.exit = nn.Conv1d(12, 2, 5, padding=2)
        self.pool = nn.MaxPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        y = nn.functional.hardswish(self.spread(x))
        x = x + self.mix(y) * torch.sigmoid(self.gate(y))
        out: Tensor = self.exit(self.pool(x)).transpose(1, 2)
        return out


def exported(module: nn.Module, example: Tensor, path: Path) -> Graph:
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return read(path)


def test_a_voice_detector_on_every_core(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = exported(VoiceDetector(), torch.randn(2, 1, 160), tmp_path / "model.pt2")
    (tmp_path / "c").mkdir()
    network = integer_network(graph)
    same_everywhere(network, tmp_path / "c", *targets.TARGETS)


@pytest.mark.slow
def test_the_keyword_spotter_of_the_examples(
    asset: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = asset("tiny_dscnn_kws")
    monkeypatch.setattr(sys, "argv", ["keyword_spotter.py", str(folder), "--clips", "300", "-o", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / "keyword_spotter.py"), run_name="__main__")
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert printed["every layer of every clip equal"] == "True"
    assert printed["accuracy in Python"] == printed["accuracy on Arm Cortex-M4"]
    assert float(printed["accuracy in Python"].rstrip("%")) > 88
