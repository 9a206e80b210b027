"""Files of codes for tables: stock loaders refuse them, effcli loads them, and running them packed changes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import effcli
from effcli.cli import main
from effcli.errors import RecipeError
from effcli.formats import CodebookWeight
from effcli.graphs.graph import Graph
from effcli.language import verify
from effcli.language.weights import open_weights

STEPS = (
    "kmeans:bits=4",
    "kmeans:bits=3,granularity=tensor,huffman=false",
    "kmeans:bits=2,granularity=group,group_size=16,weighted=true,refit=1",
    "binary",
    "ternary:granularity=group,group_size=16,huffman=true",
)
CALIBRATION = {"samples": 4, "length": 32, "batch_size": 2}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make(request.param, tmp_path_factory.mktemp("models") / request.param)


def logits(model: Any) -> Tensor:
    ids = torch.randint(architectures.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found: Tensor = model(ids).logits.float()
    return found


@pytest.mark.parametrize("step", STEPS)
def test_language_models(source: Path, tmp_path: Path, step: str) -> None:
    out = tmp_path / "out"
    report = effcli.compress(source, [step], out, calibration=CALIBRATION, evaluate=False)
    assert any("own layout" in remark for remark in report.stages[-1].remarks)
    with pytest.raises(ValueError, match="effcli"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(OSError, match="no file named"):
        type(AutoModelForCausalLM.from_pretrained(source)).from_pretrained(out)
    rows = [row for row in report.stages[-1].ledger if row.status == "compressed"]
    weights = open_weights(out)
    for row in rows:
        held = weights.packed(row.name)
        assert isinstance(held, CodebookWeight)
        assert sum(tensor.nbytes for tensor in held.pack().values()) == row.nbytes
        assert 0 < row.notes["entropy"] <= held.format.bits
    dense = logits(effcli.load(out, packed=False))
    torch.testing.assert_close(logits(effcli.load(out)), dense, rtol=2e-2, atol=2e-2 * float(dense.abs().max()))
    assert verify.verify(out).passed


@pytest.mark.parametrize("step", ["kmeans:bits=5", "kmeans:bits=4,refit=1", "binary", "ternary:huffman=true"])
def test_networks_read_as_graphs(tmp_path: Path, step: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    command = ["compress", "sample:cnn", f"--pass={step}", "--no-eval", "--quiet", "--set=calibration.samples=16"]
    assert main([*command, "-o", str(out)]) == 0, capsys.readouterr().err
    with pytest.raises(ValueError, match="effcli"):
        AutoModelForImageClassification.from_pretrained(out)
    inputs = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    graph = Graph.read(out)
    torch.testing.assert_close(effcli.load(out)(inputs), graph.run(inputs), rtol=0, atol=0)
    assert all(isinstance(weight, CodebookWeight) for weight in graph.stored.values()) and graph.stored
    assert main(["verify", str(out)]) == 0, capsys.readouterr().err
    assert main([*command, "-o", str(again)]) == 0
    assert (out / "effcli.safetensors").read_bytes() == (again / "effcli.safetensors").read_bytes()


def test_shared_weights_are_trained_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """K-means, then its tables: the outputs come closer to what they were."""
    out = tmp_path / "out"
    steps = ["--pass=fold", "--pass=kmeans:bits=3", "--pass=centroids:epochs=3"]
    command = ["compress", "sample:cnn", *steps, "--set=calibration.samples=64", "--set=calibration.batch_size=8"]
    assert (
        main([*command, "--set=evaluate.samples=200", "--set=evaluate.latency=false", "-o", str(out), "--quiet"]) == 0
    ), capsys.readouterr().err
    report = effcli.Report.read(out)
    sqnr = [stage.quality.classification.sqnr for stage in report.stages if stage.quality]  # type: ignore[union-attr]
    # On images that were not trained on, in decibels.
    assert sqnr[3] is not None and sqnr[2] is not None and sqnr[3] > sqnr[2] + 1
    assert any("error of the outputs" in remark for remark in report.stages[-1].remarks)


@pytest.mark.slow
def test_killed_while_tables_are_trained(tmp_path: Path) -> None:
    """What the same command makes after a kill is what a run without one makes, from the step that was reached."""
    killing = (
        "import os, signal, sys\n"
        "from effcli.cli import main\n"
        "from effcli.training import loop\n"
        "loop.SNAPSHOT_SECONDS = 0.0\n"
        "save, begun = loop._Run._save, int(sys.argv[1])\n"
        "def saving(run):\n"
        "    save(run)\n"
        "    if run.step == begun:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop._Run._save = saving\n"
        "epoch = loop._Run._epoch\n"
        "def telling(run):\n"
        "    print('from', run.step)\n"
        "    epoch(run)\n"
        "loop._Run._epoch = telling\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    steps = ["--pass=fold", "--pass=kmeans:bits=3", "--pass=centroids:epochs=3", "--threads=1", "--no-eval", "--quiet"]
    command = ["compress", "sample:cnn", *steps, "--set=calibration.samples=32", "--set=calibration.batch_size=8"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main([*command, "-o", str(whole)]) == 0
    # In the second of three epochs of four steps.
    for at, begins in ((6, "from 0"), (99, "from 6")):
        call = [sys.executable, "-c", killing, str(at), *command, "-o", str(out)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == (0 if at == 99 else -signal.SIGKILL), done.stderr
        assert done.stdout.splitlines()[0] == begins
    for name in ("effcli.safetensors", "graph.json", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    one, other = (effcli.Report.read(folder).stages[-1].training for folder in (out, whole))
    assert one == other and one is not None
    assert not (tmp_path / ".out.effcli").exists()


def test_tables_of_a_language_model_are_refitted_instead(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="centroids takes networks read as a graph"):
        effcli.compress(source, ["kmeans:bits=4", "centroids"], tmp_path / "out", evaluate=False)
