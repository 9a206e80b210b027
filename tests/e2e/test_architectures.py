"""Every architecture through `linear` and `awq`: each linear compressed or named, folds exact, outputs that load."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import effcli
from effcli import runtime
from effcli.files.checkpoint import Checkpoint, read_config
from effcli.files.layout import is_own, network_config
from effcli.language import verify
from effcli.language.skeleton import Skeleton
from effcli.reports.report import Report

OWN_LAYOUT = {"gpt2", "mixtral"}
CALIBRATION = {"samples": 4, "length": 32, "batch_size": 2}
# Linears that truly have no producer: behind a GELU, or one expert of several that read a norm.
UNPAIRED = {
    "gpt2": {"mlp.c_proj"},
    "gpt_neox": {"mlp.dense_4h_to_h"},
    "falcon": {"mlp.dense_4h_to_h"},
    "falcon_new": {"mlp.dense_4h_to_h"},
    "bloom": {"mlp.dense_4h_to_h"},
    "mixtral": {"mlp.experts.gate_up_proj"},
}


@pytest.fixture(scope="module", params=architectures.NAMES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make(request.param, tmp_path_factory.mktemp("models") / request.param)


def compress(source: Path, output: Path, step: str) -> Report:
    return effcli.compress(source, [step], output, calibration=CALIBRATION, evaluate=False)


def ids() -> Tensor:
    return torch.randint(architectures.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(ids()).logits.float()


@pytest.mark.parametrize("step", ["linear:bits=4,group_size=32", "awq:bits=4,group_size=32"])
def test_every_linear_is_compressed_or_named_and_the_output_loads(source: Path, tmp_path: Path, step: str) -> None:
    report = compress(source, tmp_path / "out", step)

    ledger = {row.name: row for row in report.stages[-1].ledger}
    network = Skeleton(source, read_config(source))
    linears = {site.name for k in range(len(network.blocks)) for site in network.block_layers(k)}
    assert linears and linears <= ledger.keys()
    for name, row in ledger.items():
        assert row.status == "compressed" if name in linears else row.reason

    result = verify.verify(tmp_path / "out")
    assert result.passed, result.line
    assert is_own(read_config(tmp_path / "out")) == (source.name in OWN_LAYOUT)


def test_stock_loaders_refuse_what_they_cannot_read(source: Path, tmp_path: Path) -> None:
    if source.name not in OWN_LAYOUT:
        compress(source, tmp_path / "out", "linear:bits=4,group_size=32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(model), logits(runtime.load(tmp_path / "out", packed=False)))
        return
    report = compress(source, tmp_path / "out", "linear:bits=4,group_size=32")
    assert any("own layout" in remark for remark in report.stages[-1].remarks)
    with pytest.raises(ValueError, match="effcli"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    network = type(Skeleton(source, read_config(source)).model)
    with pytest.raises(OSError, match="no file named"):
        network.from_pretrained(tmp_path / "out")


def test_folded_scales_change_nothing_but_the_rounding(source: Path, tmp_path: Path) -> None:
    """At 8 bits without clipping what remains is rounding; a wrong fold would be off by the scales themselves."""
    report = compress(source, tmp_path / "out", "awq:bits=8,group_size=16,clip=false")
    rows = [row for row in report.stages[-1].ledger if row.status == "compressed"]
    unpaired = {row.name for row in rows if row.reason.startswith("unscaled")}
    expected = UNPAIRED.get(source.name, set())
    assert {name for name in unpaired if not any(part in name for part in expected)} == set()
    assert all(row.output_error is not None and row.output_error < 1e-3 for row in rows)
    if source.name == "mixtral":
        return  # rounding may send a token to another expert, and then outputs are not comparable
    original, compressed = logits(runtime.load(source)), logits(runtime.load(tmp_path / "out", packed=False))
    assert (original - compressed).norm() < 0.02 * original.norm()


def test_parts_are_described_as_they_stand(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out", "linear:bits=3,group_size=32")
    checkpoint = Checkpoint.open(tmp_path / "out")
    stage = report.stages[-1]
    assert stage.nbytes == checkpoint.nbytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    listed = sum(row.nbytes for row in stage.ledger)
    small = sum(e.nbytes for name, e in checkpoint.entries.items() if len(e.shape) < 2 and "weight_shape" not in name)
    assert listed + small == sum(entry.nbytes for entry in checkpoint.entries.values())
    assert network_config(checkpoint.config)["model_type"] == network_config(read_config(source))["model_type"]
