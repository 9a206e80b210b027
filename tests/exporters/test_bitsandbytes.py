"""The bitsandbytes export: its tensors are those that bitsandbytes saves, and stock transformers loads it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from small_graphs import residual
from torch import Tensor

from effcli import runtime
from effcli.errors import CheckpointError, MachineError, OutputError, UnsupportedError
from effcli.exporters import bitsandbytes as exporter
from effcli.files.checkpoint import Checkpoint
from effcli.formats import CodebookWeight
from effcli.language.sweep import sweep
from effcli.layers.contract import Layer
from effcli.passes.quantize import nf4
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep


def compressed(folder: Path, kind: str, step: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A small network of architecture `kind` after one step, in `folder/out`."""
    source = architectures.make(kind, folder / "source", dtype, **changes)
    (folder / "out").mkdir()
    parsed = parse_pass(step) if isinstance(step, str) else step
    sweep(source, folder / "out", PassStep.model_validate(parsed), None, folder / "work")
    return folder / "out"


def logits(network: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = network.eval()(input_ids=ids, use_cache=False).logits.float()
    return found


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        # What they say of each other's deprecations is theirs.
        warnings.simplefilter("ignore")
        network, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return network


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [((512, 192), torch.bfloat16), ((41, 1271), torch.float32)])
def test_the_tensors_are_those_that_bitsandbytes_saves(
    shape: tuple[int, int], dtype: torch.dtype, double: bool
) -> None:
    """An even and an odd number of weights; the JSON is compared as what it says."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = Layer("layer", "linear", weight.float(), dtype)
    made = nf4.NF4(double=double).apply(layer).weight
    assert isinstance(made, CodebookWeight)
    found = exporter.pack(made)
    data, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    expected = {"weight": data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    key = "weight.quant_state.bitsandbytes__nf4"
    assert json.loads(bytes(found.pop(key).tolist())) == json.loads(bytes(expected.pop(key).tolist()))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def test_by_hand() -> None:
    """Codes 15 and 0 share a byte, the first in the high half; the odd last one stands before the code of zero."""
    made = nf4.NF4(block_size=32).apply(Layer("layer", "linear", torch.tensor([[2.0, -2.0, 2.0]]), torch.float32))
    assert isinstance(made.weight, CodebookWeight)
    packed = exporter.pack(made.weight)
    assert packed["weight"].tolist() == [[0xF0], [0xF7]]
    assert packed["weight.absmax"].tolist() == [2]
    assert exporter.unpack(packed).tolist() == [[2, -2, 2]]


@pytest.mark.parametrize(
    ("kind", "step", "dtype"),
    [
        ("llama", "nf4", torch.float32),
        ("llama", "nf4:double=true", torch.bfloat16),
        # Conv1D: bitsandbytes stores its weight as (out, in), like a linear's.
        ("gpt2", "nf4:double=true", torch.float32),
        ("opt", "nf4:block_size=128", torch.float32),
        ("qwen2", {"nf4": {"ignore": ["*.down_proj"], "layers": {"*.1.*": {"double": True}}}}, torch.float32),
        ("llama", {"nf4": {"lm_head": True}}, torch.float32),
    ],
)
def test_stock_transformers_loads_it(kind: str, step: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """With the logits of effcli's own loader: biases, tied heads, layers left out, some quantized twice."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if step == "nf4:block_size=128" and bitsandbytes.functional.has_avx512bf16():
        # Its products on such a processor want rows of whole blocks; this network is 64 wide.
        step = "nf4"
    source = compressed(tmp_path, kind, step, dtype, tie_word_embeddings=True)
    done = exporter.BitsAndBytes().export(source, tmp_path / "target")
    assert done.target == "bitsandbytes" and done.remarks == () and "largest difference 0 of" in done.checked
    network = stock(tmp_path / "target")
    reference = runtime.load(source, packed=False)
    quantized = {name for name, m in network.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert quantized == set(json.loads((source / "config.json").read_text())["effcli"]["layers"])
    ids = torch.randint(1000, (2, 24), generator=torch.Generator().manual_seed(0))
    found, expected = logits(network, ids), logits(reference, ids)
    # On a processor with bfloat16 products bitsandbytes rounds inputs and constants to it, whatever the dtype.
    exact = dtype is torch.float32 and not bitsandbytes.functional.has_avx512bf16()
    tolerance = 1e-5 if exact else 2e-2
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    packed = logits(runtime.load(source), ids)
    assert float((found - packed).norm()) <= 2 * tolerance * float(packed.norm())


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    source = compressed(tmp_path, "llama", "nf4:double=true")
    for name in ("one", "two"):
        exporter.BitsAndBytes().export(source, tmp_path / name)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second and "tokenizer.json" in first
    with pytest.raises(OutputError, match="exists"):
        exporter.BitsAndBytes().export(source, tmp_path / "one")


@pytest.mark.parametrize(
    ("kind", "step", "reason"),
    [
        ("llama", "linear:bits=4,group_size=32", "int4 g32 asym is not NF4"),
        ("llama", "binary", "binary channel is not NF4"),
        ("llama", "nf4:block_size=48", "blocks of 48"),
        ("mixtral", "nf4", "3-D parameter"),
    ],
)
def test_what_has_no_place_is_named(kind: str, step: str, reason: str, tmp_path: Path) -> None:
    source = compressed(tmp_path, kind, step)
    with pytest.raises(UnsupportedError) as caught:
        exporter.BitsAndBytes().export(source, tmp_path / "target")
    assert reason in caught.value.cause and ".layers.0." in caught.value.cause and "nf4" in caught.value.remedy
    assert not (tmp_path / "target").exists()


def test_no_quantized_language_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no quantized layers"):
        exporter.BitsAndBytes().export(architectures.make("llama", tmp_path / "source"), tmp_path / "target")
    (tmp_path / "graph").mkdir()
    residual().save(tmp_path / "graph")
    with pytest.raises(UnsupportedError, match="no language model"):
        exporter.BitsAndBytes().export(tmp_path / "graph", tmp_path / "target")


def test_a_file_that_says_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = compressed(tmp_path, "llama", "nf4")
    whole = exporter.pack

    def damaged(weight: CodebookWeight) -> dict[str, Tensor]:
        tensors = whole(weight)
        return {**tensors, "weight": tensors["weight"].flip(0)}

    monkeypatch.setattr(exporter, "pack", damaged)
    with pytest.raises(MachineError, match="reads back as something else"):
        exporter.BitsAndBytes().export(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effcli.exporters import _packed

    source = compressed(tmp_path, "llama", "nf4")
    exporter.BitsAndBytes().export(source, tmp_path / "one")
    monkeypatch.setattr(_packed, "SHARD_BYTES", 20_000)
    exporter.BitsAndBytes().export(source, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert one.entries.keys() == many.entries.keys()
    for name in one.entries:
        assert torch.equal(one.read(name), many.read(name))


@pytest.mark.parametrize("damage", [b"", b"{", b"3", b'{"blocksize": 64}', b'{"blocksize": 0, "shape": [1, 64]}'])
def test_a_damaged_state_is_named(damage: bytes) -> None:
    state = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(CheckpointError, match=f"{state} is"):
        exporter.unpack({state: torch.tensor(list(damage), dtype=torch.uint8)})
