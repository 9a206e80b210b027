"""Checkpoints that other tools quantized: read without rounding, merged into, compressed further, exported dense."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import architectures
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import effcli
from effcli.errors import CheckpointError, UnsupportedError
from effcli.exporters import load as exporter
from effcli.files.foreign import read_awq, read_gptq, read_int8
from effcli.language import verify
from effcli.language.weights import open_weights

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("llama") / "model", torch.bfloat16)


def by_bitsandbytes(source: Path, target: Path, **options: Any) -> Any:
    """The model as bitsandbytes quantizes it, written to `target`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
        model.save_pretrained(target)
    return model.eval()


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes_weights_are_those_of_bitsandbytes(kind: str, llama: Path, tmp_path: Path) -> None:
    import bitsandbytes.functional as F

    model = by_bitsandbytes(llama, tmp_path / "base", **BITSANDBYTES[kind])
    weights = open_weights(tmp_path / "base")
    assert len(weights.stored) == 14
    for name in weights.stored:
        own = model.get_submodule(name).weight
        found = weights.packed(name)
        assert found is not None
        if kind == "int8":
            expected = own.data.float() * own.SCB.unsqueeze(1) / 127
            torch.testing.assert_close(found.dequantize(torch.float32), expected, rtol=1e-6, atol=0)
        else:
            expected = F.dequantize_4bit(own.data, own.quant_state)
            assert torch.equal(found.dequantize(expected.dtype), expected)


def exported(llama: Path, folder: Path, target: str, step: dict[str, Any]) -> tuple[Path, Path]:
    """A checkpoint of effcli, and its export to the layout of another tool."""
    effcli.compress(llama, step, folder / "own", evaluate=False)
    exporter(target)().export(folder / "own", folder / target)
    return folder / "own", folder / target


EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"linear": {"bits": 4, "symmetric": True, "group_size": 32}}),
    "gptq 3": ("gptq", {"linear": {"bits": 3, "symmetric": True, "group_size": 32}}),
    "awq": ("awq", {"linear": {"bits": 4, "group_size": 32}}),
    "bitsandbytes": ("bitsandbytes", {"nf4": {"double": True}}),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_read_as_what_it_was_made_from(kind: str, llama: Path, tmp_path: Path) -> None:
    own, other = exported(llama, tmp_path, *EXPORTS[kind])
    first, second = open_weights(own), open_weights(other)
    assert first.stored.keys() == second.stored.keys()
    for name in first.stored:
        one, two = first.packed(name), second.packed(name)
        assert one is not None and two is not None
        # These layouts have scales in half precision.
        torch.testing.assert_close(two.dequantize(torch.float32), one.dequantize(torch.float32), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(
        adapters.logits(effcli.load(other)), adapters.logits(effcli.load(own)), rtol=0.05, atol=0.05
    )


def test_gptq_by_hand() -> None:
    """Two groups of four inputs of 8 bits; zeros stand less one, a word holds the codes of four inputs."""
    tensors = {
        "qweight": torch.tensor([[0x04030201], [0x08070605]], dtype=torch.int32).repeat(1, 4),
        "qzeros": torch.tensor([[0x01010101], [0x02020202]], dtype=torch.int32),
        "scales": torch.tensor([[1.0] * 4, [0.5] * 4]),
        "g_idx": torch.tensor([0] * 4 + [1] * 4),
    }
    made = read_gptq(tensors, (4, 8), offset=True).dequantize(torch.float32)
    assert made.tolist() == [[-1, 0, 1, 2, 1, 1.5, 2, 2.5]] * 4
    with pytest.raises(UnsupportedError, match="order of activations"):
        read_gptq(tensors | {"g_idx": torch.tensor([0, 1] * 4)}, (4, 8), offset=True)


def test_awq_by_hand() -> None:
    """The eight outputs of one input have the codes 0 to 7, the zero point is 1."""
    word = sum(code << 4 * place for place, code in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    tensors = {
        "qweight": torch.tensor([[word]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x11111111]], dtype=torch.int32),
        "scales": torch.full((1, 8), 2.0),
    }
    assert read_awq(tensors, (8, 1)).dequantize(torch.float32).flatten().tolist() == [-2, 0, 2, 4, 6, 8, 10, 12]


def test_int8_by_hand() -> None:
    tensors = {"weight": torch.tensor([[127, -1], [0, 2]], dtype=torch.int8), "SCB": torch.tensor([254.0, 127.0])}
    assert read_int8(tensors, (2, 2)).dequantize(torch.float32).tolist() == [[254, -2], [0, 2]]


@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_merging_into_what_bitsandbytes_quantized(kind: str, llama: Path, tmp_path: Path) -> None:
    """The adapter is added to what its codes stand for: PEFT runs it beside the same codes."""
    by_bitsandbytes(llama, tmp_path / "base", **BITSANDBYTES[kind])
    adapters.make(llama, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj"]))
    adapters.merged(tmp_path / "base", tmp_path / "out", adapter=str(tmp_path / "adapter"))
    before, after = open_weights(tmp_path / "base"), open_weights(tmp_path / "out")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{LAYER}.lora_{part}.weight"].float() for part in "AB")
    packed = before.packed(LAYER)
    assert packed is not None
    expected = (packed.dequantize(torch.float32) + 0.25 * b @ a).to(after.dtype_of(f"{LAYER}.weight"))
    torch.testing.assert_close(after.parameter(f"{LAYER}.weight"), expected)
    other = "model.layers.1.mlp.up_proj"
    assert torch.equal(after.parameter(f"{other}.weight"), before.parameter(f"{other}.weight"))
    found = verify.verify(tmp_path / "out", against=tmp_path / "base", stages=())
    assert found.against is not None and found.against.problem == ""


def test_export_writes_it_dense(llama: Path, tmp_path: Path) -> None:
    by_bitsandbytes(llama, tmp_path / "base", **BITSANDBYTES["nf4"])
    exporter("safetensors")(dequantize=True).export(tmp_path / "base", tmp_path / "dense")
    made = adapters.loaded(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    weights = open_weights(tmp_path / "base")
    assert torch.equal(made.state_dict()[f"{LAYER}.weight"], weights.parameter(f"{LAYER}.weight"))


def _changed(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    config, tensors = json.loads((target / "config.json").read_text()), load_file(target / "model.safetensors")
    change(config["quantization_config"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_what_cannot_be_read_is_refused(llama: Path, tmp_path: Path) -> None:
    _, gptq = exported(llama, tmp_path / "first", *EXPORTS["gptq"])
    _, awq = exported(llama, tmp_path / "second", *EXPORTS["awq"])
    _, nf4 = exported(llama, tmp_path / "third", *EXPORTS["bitsandbytes"])
    cases: list[tuple[Path, Any, type[Exception], str]] = [
        (gptq, lambda said, held: said.update(checkpoint_format="marlin"), UnsupportedError, "GPTQ/marlin"),
        (awq, lambda said, held: said.update(version="gemv"), UnsupportedError, "AWQ gemv"),
        (nf4, lambda said, held: said.update(bnb_4bit_quant_type="fp4"), UnsupportedError, "bitsandbytes fp4"),
        (gptq, lambda said, held: held.pop(f"{LAYER}.scales"), CheckpointError, "scales"),
        (awq, lambda said, held: held.update({f"{LAYER}.qzeros": torch.zeros(1, 1)}), CheckpointError, "qzeros"),
        (
            nf4,
            lambda said, held: held.update({f"{LAYER}.weight.quant_map": torch.zeros(16)}),
            CheckpointError,
            "not those of NF4",
        ),
    ]
    for number, (source, change, kind, text) in enumerate(cases):
        folder = _changed(source, tmp_path / f"{number}", change)
        with pytest.raises(kind, match=text):
            open_weights(folder).packed(LAYER)
