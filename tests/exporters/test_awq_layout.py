"""The AWQ export against a reader of the published GEMM layout, written here in plain loops.

Where gptqmodel is installed it loads the files too, through stock transformers, in a process of its own: it changes the
environment when it is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_graphs import residual
from torch import Tensor

from effcli import runtime
from effcli.errors import UnsupportedError
from effcli.exporters import awq as exporter
from effcli.exporters._affine_layers import HalfScales
from effcli.formats import Affine, AffineWeight
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ids, found = load_file(sys.argv[1])["ids"], {}
for folder in sys.argv[3:]:
    network, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=torch.bfloat16
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.inference_mode():
        found[folder] = network(input_ids=ids, use_cache=False).logits.float().contiguous()
save_file(found, sys.argv[2])
"""


def compressed(folder: Path, kind: str, step: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A small network of architecture `kind` after one step, in `folder/out`."""
    source = architectures.make(kind, folder / "source", dtype, **changes)
    (folder / "out").mkdir()
    parsed = parse_pass(step) if isinstance(step, str) else step
    sweep(source, folder / "out", PassStep.model_validate(parsed), None, folder / "work")
    return folder / "out"


def packed(weight: AffineWeight) -> dict[str, Tensor]:
    return exporter.pack("layer", weight, HalfScales())


def nibble(words: list[int], output: int) -> int:
    """The 4 bits of one output: in its word, outputs 0, 2, 4, 6, 1, 3, 5, 7 stand from the low bits up."""
    word, place = divmod(output, 8)
    position = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}[place]
    return (words[word] >> (4 * position)) & 15


def read(tensors: dict[str, Tensor]) -> Tensor:
    """weight[o, i] = scales[g, o] · (code(i, o) - zero(g, o)), g = i // group size; float32 (out, in)."""
    scales, codes, zeros = (tensors[name].tolist() for name in ("scales", "qweight", "qzeros"))
    size = len(codes) // len(scales)
    rows = []
    for o in range(len(scales[0])):
        row = []
        for i in range(len(codes)):
            g = i // size
            row.append(scales[g][o] * (nibble(codes[i], o) - nibble(zeros[g], o)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def test_by_hand() -> None:
    """One input channel, eight outputs with the codes 0 to 7: from the high bits down 7 5 3 1 6 4 2 0."""
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    zero = torch.arange(8, 16, dtype=torch.uint8).unsqueeze(1)
    made = packed(AffineWeight(Affine(4, "channel"), codes, torch.full((8, 1), 0.5, dtype=torch.float16), zero))
    assert made["qweight"].tolist() == [[0x75316420]]
    assert made["qzeros"].tolist() == [[0xFDB9ECA8 - (1 << 32)]]
    assert made["scales"].tolist() == [[0.5] * 8]
    assert [tensor.dtype for tensor in made.values()] == [torch.int32, torch.int32, torch.float16]
    assert read(made).tolist() == [[-4.0]] * 8


@given(
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(["group", "channel", "tensor"]),
    symmetric=st.booleans(),
    rows=st.sampled_from([8, 40]),
)
def test_any_codes_read_as_the_layout_says(seed: int, strategy: Any, symmetric: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    format = Affine(4, strategy, 5 if strategy == "group" else 0, symmetric)
    codes = torch.randint(0, 16, (rows, 15), generator=generator, dtype=torch.uint8)
    shape = format.scale_shape((rows, 15))
    scale = torch.rand(shape, generator=generator).to(torch.float16)
    zero = None if symmetric else torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    weight = AffineWeight(format, codes, scale, zero)
    found = packed(weight)
    assert torch.equal(read(found), weight.dequantize(torch.float32))
    assert torch.equal(exporter.unpack(found), weight.dequantize(torch.float32))


@pytest.mark.parametrize(("size", "word"), [(1e5, "more than float16 holds"), (1e-9, "too small for float16")])
def test_scales_that_float16_cannot_hold_are_refused(size: float, word: str) -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
    weight = AffineWeight(Affine(4, "channel", 0, True), codes, torch.full((8, 1), size))
    with pytest.raises(UnsupportedError, match=word) as caught:
        packed(weight)
    assert "layer" in caught.value.cause and caught.value.remedy


CASES: list[tuple[str, Any]] = [
    ("llama", "linear:bits=4,group_size=32"),
    ("opt", "linear:bits=4,group_size=64,symmetric=true"),
    ("qwen2", {"linear": {"bits": 4, "group_size": 32, "ignore": ["*.down_proj", "*.1.self_attn.q_proj"]}}),
]


@pytest.mark.parametrize(("kind", "step"), CASES)
def test_a_checkpoint_reads_as_the_layout_says(kind: str, step: Any, tmp_path: Path) -> None:
    source = compressed(tmp_path, kind, step, torch.bfloat16)
    done = exporter.AWQ().export(source, tmp_path / "target")
    assert done.target == "awq" and "largest difference 0 of" in done.checked and done.remarks == ()
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    config = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    options = step["linear"] if isinstance(step, dict) else dict(parse_pass(step)["linear"])
    ignored = config.pop("modules_to_not_convert")
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": options["group_size"],
        "zero_point": True,
    }
    assert (ignored is None) == ("ignore" not in options)
    weights = open_weights(source)
    layers = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    assert layers == weights.stored.keys() and not layers & set(ignored or ())
    for name in sorted(layers)[:3]:
        own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        kept = weights.packed(name)
        assert kept is not None and torch.equal(read(own), kept.dequantize(torch.float32))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel")
def test_gptqmodel_loads_it(tmp_path: Path) -> None:
    folders, expected = [], []
    ids = torch.randint(1000, (2, 24), generator=torch.Generator().manual_seed(0))
    for number, (kind, step) in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = compressed(folder, kind, step, torch.bfloat16)
        exporter.AWQ().export(source, folder / "target")
        folders.append(str(folder / "target"))
        with torch.inference_mode():
            expected.append(runtime.load(source, packed=False)(input_ids=ids, use_cache=False).logits.float())
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "ids.safetensors"), str(tmp_path / "logits.safetensors")]
    subprocess.run([*command, *folders], check=True, capture_output=True, text=True)
    found = load_file(tmp_path / "logits.safetensors")
    for folder_name, reference in zip(folders, expected, strict=True):
        assert float((found[folder_name] - reference).norm()) <= 2e-2 * float(reference.norm()), folder_name


def test_float32_scales_are_rounded_and_remarked(tmp_path: Path) -> None:
    done = exporter.AWQ().export(compressed(tmp_path, "llama", "linear:bits=4,group_size=32"), tmp_path / "target")
    (remark,) = done.remarks
    assert remark.startswith("scales became float16, which rounds them in 14 layers")


@pytest.mark.parametrize(
    ("kind", "step", "changes", "reason"),
    [
        ("llama", "linear:bits=3,group_size=32", {}, "3 bits, not 4"),
        ("llama", {"linear": {"bits": 4, "layers": {"*.down_proj": {"group_size": 32}}}}, {}, "in groups of 32 where"),
        ("llama", "linear:bits=4,granularity=channel", {"intermediate_size": 100}, "100 output channels"),
        ("llama", {"linear": {"bits": 4, "lm_head": True}}, {}, "outside the repeated blocks"),
        ("llama", "linear:activations=int8", {}, "its inputs are int8"),
        ("llama", "ternary", {}, "no evenly spaced grid"),
        ("gpt2", "linear:bits=4", {}, "Conv1D"),
        ("mixtral", "linear:bits=4", {}, "3-D parameter"),
    ],
)
def test_what_has_no_place_is_named(kind: str, step: Any, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = compressed(tmp_path, kind, step, **changes)
    with pytest.raises(UnsupportedError) as caught:
        exporter.AWQ().export(source, tmp_path / "target")
    assert reason in caught.value.cause
    assert "gptq or safetensors" in caught.value.remedy
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("step", "remark"),
    [("linear:bits=4,group_size=8", "not of 8"), ("linear:bits=4,granularity=channel", '"backend": "torch_awq"')],
)
def test_what_gptqmodel_does_not_take_is_remarked(step: str, remark: str, tmp_path: Path) -> None:
    source = compressed(tmp_path, "llama", step, torch.bfloat16)
    assert any(remark in text for text in exporter.AWQ().export(source, tmp_path / "target").remarks)


def test_no_quantized_language_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no quantized layers"):
        exporter.AWQ().export(architectures.make("llama", tmp_path / "source"), tmp_path / "target")
    (tmp_path / "graph").mkdir()
    residual().save(tmp_path / "graph")
    with pytest.raises(UnsupportedError, match="no language model"):
        exporter.AWQ().export(tmp_path / "graph", tmp_path / "target")
