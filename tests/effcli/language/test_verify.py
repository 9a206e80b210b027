from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli import formats
from effcli.cli import main
from effcli.errors import CheckpointError, UserError
from effcli.files import locate as samples
from effcli.language import verify
from effcli.language.sweep import sweep
from effcli.language.verify import Agreement
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

SAMPLE = samples.SAMPLES["sample:lm"]


def compress(source: Path, target: Path, step: str) -> Path:
    target.mkdir()
    sweep(source, target, PassStep.model_validate(parse_pass(step)), None, target.parent / "work")
    return target


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(SAMPLE, tmp_path_factory.mktemp("standard") / "out", "linear:bits=4,group_size=32")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose transposed weights have no place in the standard format."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "source")
    return compress(folder / "source", folder / "out", "linear:bits=4,group_size=16")


def test_agreement_by_hand() -> None:
    reference = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    found = Agreement.of(torch.tensor([[[3.0, 4.0], [0.3, 0.4]]]), reference, 0.1)
    assert found.largest == pytest.approx(0.4)
    assert found.relative == pytest.approx(0.1)
    assert found.top1 == 0.5
    same = Agreement.of(reference, reference, 0.0)
    assert same.passed and same.told("effcli") == "equal those of effcli"
    near = Agreement.of(1.0038 * reference, reference, 0.02)
    assert near.passed and near.told("effcli") == "differ by 0.38% from those of effcli", "not the same"
    assert (
        Agreement.of(2 * reference, reference, 0.1)
        .told("effcli")
        .endswith("differ by 100% from those of effcli, too much")
    )
    # A wrong scale, to which a cosine would be blind.
    assert not Agreement.of(2 * reference, reference, 0.1).passed
    assert not Agreement.of(reference * torch.nan, reference, 0.1).passed
    assert not Agreement.of(reference[..., :1], reference, 0.1).passed


def test_a_dense_checkpoint() -> None:
    found = verify.verify("sample:lm")
    assert found.passed and found.layout == "dense" and found.packed is None
    assert found.stock is not None and found.stock.largest == 0.0


def test_the_standard_layout(standard: Path) -> None:
    found = verify.verify(standard)
    assert found.passed and found.layout == "compressed-tensors"
    # Both compute (q - zero) · scale and round once.
    assert found.stock is not None and found.stock.largest == 0.0
    assert found.packed is not None and found.packed.relative < found.packed.tolerance
    assert found.line.startswith("verified: reloaded with transformers ")
    data = json.loads(found.to_json())
    assert data["passed"] is True and data["stock"]["top1"] == 1.0


@pytest.mark.parametrize("name", ["missing", "org/missing", "sample:ln", "sample:cnn"])
def test_an_input_that_cannot_be_read_is_named(name: str, standard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(standard), "--against", name]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: --against {name}: ") and "VERIFIED" not in printed.out


def test_effclis_own_layout(own: Path) -> None:
    found = verify.verify(own)
    assert found.passed and found.layout == "effcli"
    assert found.refused is True and found.stock is None
    assert found.packed is not None
    assert "refuses it, as it must" in found.line


def test_random_weights_are_caught(standard: Path, tmp_path: Path) -> None:
    """Without this one key the stock loader gives random logits and no error."""
    broken = shutil.copytree(standard, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    del config["quantization_config"]["dequantize"]
    (broken / "config.json").write_text(json.dumps(config))
    found = verify.verify(broken)
    assert not found.passed
    assert found.line.startswith("NOT VERIFIED")


def test_a_wrong_kernel_is_caught(standard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = verify.loading.QuantizedLinear.__init__

    def shifted(self: Any, weight: formats.AffineWeight, *rest: Any) -> None:
        prepare(self, dataclasses.replace(weight, codes=weight.codes ^ 1), *rest)

    monkeypatch.setattr(verify.loading.QuantizedLinear, "__init__", shifted)
    found = verify.verify(standard)
    assert not found.passed
    assert found.stock is not None and found.stock.passed
    assert found.packed is not None and not found.packed.passed


def test_a_loader_that_takes_the_own_layout_is_caught(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "load_stock", lambda path, trust: verify.loading.load(path))
    found = verify.verify(own)
    assert not found.passed and found.refused is False


def test_a_loader_that_fails_is_reported(standard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, trust: bool) -> Any:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(verify, "load_stock", fail)
    found = verify.verify(standard)
    assert not found.passed
    assert "cannot load it: no such kernel" in found.line and "more" not in found.line


def test_without_compressed_tensors(standard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError) as caught:
        verify.verify(standard)
    assert caught.value.remedy == "pip install compressed-tensors"


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        verify.verify(tmp_path)
