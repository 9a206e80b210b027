"""The LeNet example on a few steps of training: its file is what the entropy of its codes promises."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import effcli
from effcli.graphs.graph import WEIGHTS_NAME

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "lenet.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lenet", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_networks_are_those_of_the_paper(script: ModuleType) -> None:
    for name, count in (("lenet-300-100", 266_610), ("lenet-5", 431_080)):
        network = script.NETWORKS[name]()
        assert sum(parameter.numel() for parameter in network.parameters()) == count
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.slow
def test_trained_and_compressed(
    script: ModuleType,
    asset: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = asset("mnist_5k") / "mnist5k.npz"
    options = ["--network=lenet-300-100", "--steps=500", "--calibration=1000", "--tuning=2"]
    monkeypatch.setattr(sys, "argv", ["lenet.py", str(data), "-o", str(tmp_path), *options])
    script.main()
    printed = capsys.readouterr().out
    promised = int(re.findall(r"entropy promises ([\d,]+)", printed)[0].replace(",", ""))
    size = (tmp_path / "lenet-300-100" / WEIGHTS_NAME).stat().st_size
    # Within 2 % after whole training; weights that are still close to where they started use all entries about equally
    # often, where Huffman's whole bits cost most.
    assert promised < size < 1.025 * promised
    assert f"file: {size:,} bytes" in printed
    stages = effcli.Report.read(tmp_path / "lenet-300-100").stages
    found: list[Any] = [stage.quality.classification for stage in stages if stage.quality is not None]
    before, shared, trained = found
    assert before.top1 > 0.7
    assert trained.top1 > before.top1 - 0.01 and trained.agreement > 0.98
    # Decibels, on images that the tables were not trained on.
    assert trained.sqnr > shared.sqnr + 1
