"""The GPTQ export against a reader of the published layout, written here in plain loops.

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
from safetensors.torch import load_file
from small_graphs import residual
from torch import Tensor

from effcli import runtime
from effcli.errors import UnsupportedError
from effcli.exporters import gptq as exporter
from effcli.exporters._affine_layers import HalfScales
from effcli.files.foreign import GPTQ_BITS
from effcli.formats import Affine, AffineWeight
from effcli.language.sweep import sweep
from effcli.language.weights import open_weights
from effcli.layers.contract import Layer
from effcli.passes.quantize import linear
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


def compressed(folder: Path, kind: str, step: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A small network of architecture `kind` after one step, in `folder/out`."""
    source = architectures.make(kind, folder / "source", dtype)
    (folder / "out").mkdir()
    parsed = parse_pass(step) if isinstance(step, str) else step
    sweep(source, folder / "out", PassStep.model_validate(parsed), None, folder / "work")
    return folder / "out"


def quantized(weight: Tensor, dtype: torch.dtype = torch.float16, **options: Any) -> AffineWeight:
    outcome = linear.Linear(**options).apply(Layer("layer", "linear", weight, dtype))
    assert isinstance(outcome.weight, AffineWeight)
    return outcome.weight


def packed(weight: AffineWeight, checkpoint_format: Any = "gptq") -> dict[str, Tensor]:
    config = exporter.GPTQ(checkpoint_format=checkpoint_format)
    return exporter.pack("layer", weight, HalfScales(), config)


def field(words: list[int], number: int, bits: int) -> int:
    """Number `number` in a stream of 32-bit words of fields of so many bits, low bits first."""
    value = 0
    for k in range(bits):
        word, bit = divmod(number * bits + k, 32)
        value |= ((words[word] >> bit) & 1) << k
    return value


def read(tensors: dict[str, Tensor], bits: int, less_one: bool = True) -> Tensor:
    """weight[o, i] = scales[g, o] · (code(o, i) - zero(g, o)), g = g_idx[i]; float32 (out, in)."""
    scales, groups = tensors["scales"].tolist(), tensors["g_idx"].tolist()
    columns, zeros = tensors["qweight"].t().tolist(), tensors["qzeros"].tolist()
    rows = []
    for o in range(len(columns)):
        row = []
        for i, g in enumerate(groups):
            zero = field(zeros[g], o, bits) + less_one
            row.append(scales[g][o] * (field(columns[o], i, bits) - zero))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def test_by_hand() -> None:
    """One row of eight codes of 4 bits, one group: 0 1 2 ... 7 from the low bits up; zero 3 is stored as 2."""
    codes = torch.arange(8, dtype=torch.uint8).expand(8, 8)
    zero = torch.full((8, 1), 3, dtype=torch.uint8)
    made = packed(AffineWeight(Affine(4, "group", 8), codes, torch.full((8, 1), 0.5, dtype=torch.float16), zero))
    assert made["qweight"].tolist() == [[0x76543210] * 8] and made["qzeros"].tolist() == [[0x22222222]]
    assert made["scales"].tolist() == [[0.5] * 8] and made["g_idx"].tolist() == [0] * 8
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    assert read(made, 4)[0].tolist() == [(code - 3) / 2 for code in range(8)]


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_every_width_reads_as_the_layout_says(
    bits: int, granularity: str, symmetric: bool, checkpoint_format: str
) -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(bits))
    options = {"bits": bits, "granularity": granularity, "symmetric": symmetric}
    made = quantized(weight, **options, **({"group_size": 32} if granularity == "group" else {}))
    found = packed(made, checkpoint_format)
    groups = 3 if granularity == "group" else 1
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert shapes == {"qweight": (3 * bits, 32), "qzeros": (groups, bits), "scales": (groups, 32), "g_idx": (96,)}
    expected = made.dequantize(torch.float32)
    torch.testing.assert_close(read(found, bits, checkpoint_format == "gptq"), expected, rtol=0, atol=0)
    unpacked = exporter.unpack(found, exporter.GPTQ(checkpoint_format=checkpoint_format))
    torch.testing.assert_close(unpacked, expected, rtol=0, atol=0)


@given(seed=st.integers(0, 2**32), bits=st.sampled_from(GPTQ_BITS))
def test_zero_points_never_wrap(seed: int, bits: int) -> None:
    """Codes and zero go up by one where zero is 0 and a level is left; otherwise the layer is refused."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (32, 32), generator=generator, dtype=torch.uint8)
    codes[:, :16] %= (1 << bits) - 1
    zero = torch.randint(0, 2, (32, 2), generator=generator, dtype=torch.uint8)
    full = codes.view(32, 2, 16).amax(-1) == (1 << bits) - 1
    scale = torch.rand(32, 2, generator=generator).to(torch.float16)
    weight = AffineWeight(Affine(bits, "group", 16), codes, scale, zero)
    if bool(((zero == 0) & full).any()):
        with pytest.raises(UnsupportedError) as caught:
            packed(weight)
        assert "layer" in caught.value.cause and "--checkpoint-format gptq_v2" in caught.value.remedy
        weight = AffineWeight(weight.format, codes, scale, torch.where(full, 1, zero).to(torch.uint8))
    assert torch.equal(exporter.unpack(packed(weight), exporter.GPTQ()), weight.dequantize(torch.float32))
    kept = packed(weight, "gptq_v2")
    v2 = exporter.GPTQ(checkpoint_format="gptq_v2")
    assert torch.equal(exporter.unpack(kept, v2), weight.dequantize(torch.float32))


def test_scales_that_float16_rounds_are_remarked() -> None:
    half = HalfScales()
    made = quantized(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), torch.float32, bits=4)
    found = exporter.unpack(exporter.pack("layer", made, half, exporter.GPTQ()), exporter.GPTQ())
    before = made.dequantize(torch.float32)
    change = float((found - before).norm() / before.norm())
    assert 0 < change < 2**-11
    assert half.layers == 1 and half.worst == pytest.approx(change, rel=1e-3)
    (remark,) = half.remarks
    assert f"{change:.1e}" in remark and "layer" in remark
    exact = HalfScales()
    bf16 = quantized(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), torch.bfloat16, bits=4)
    exporter.pack("layer", bf16, exact, exporter.GPTQ())
    assert exact.remarks == ()


@pytest.mark.parametrize(("size", "word"), [(1e7, "more than float16 holds"), (1e-8, "too small for float16")])
def test_scales_that_float16_cannot_hold_are_refused(size: float, word: str) -> None:
    made = quantized(size * torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), torch.float32, bits=4)
    with pytest.raises(UnsupportedError, match=word) as caught:
        packed(made)
    assert "layer" in caught.value.cause and caught.value.remedy


def test_rows_of_zeros_keep_their_tiny_scale_from_mattering() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[3:7] = 0
    made = quantized(weight, torch.bfloat16, bits=4)
    assert torch.equal(read(packed(made), 4), made.dequantize(torch.float32))


CASES: list[tuple[str, Any]] = [
    ("llama", "linear:bits=4,group_size=32"),
    ("llama", "linear:bits=3,group_size=32,symmetric=true"),
    ("opt", "linear:bits=8,group_size=64"),
    ("qwen2", {"linear": {"bits": 4, "group_size": 32, "ignore": ["*.down_proj", "*.1.self_attn.q_proj"]}}),
]


@pytest.mark.parametrize(("kind", "step"), CASES)
def test_a_checkpoint_reads_as_the_layout_says(kind: str, step: Any, tmp_path: Path) -> None:
    source = compressed(tmp_path, kind, step, torch.bfloat16)
    done = exporter.GPTQ().export(source, tmp_path / "target")
    assert done.target == "gptq" and "largest difference 0 of" in done.checked and done.remarks == ()
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    config = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    weights = open_weights(source)
    layers = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    assert layers == weights.stored.keys()
    options = step["linear"] if isinstance(step, dict) else dict(parse_pass(step)["linear"])
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == "gptq" and not config["desc_act"]
    assert (config["bits"], config["group_size"]) == (options["bits"], options["group_size"])
    assert config["sym"] == options.get("symmetric", False)
    for name in sorted(layers)[:3]:
        own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        kept = weights.packed(name)
        assert kept is not None and torch.equal(read(own, config["bits"]), kept.dequantize(torch.float32))
    dense = tensors.keys() - {key for key in tensors if key.rpartition(".")[0] in layers}
    for key in dense:
        assert torch.equal(tensors[key], weights.parameter(key))
    if "ignore" in options:
        assert set(config["modules_in_block_to_quantize"][0]) == layers
        assert "-:^model[.]layers[.]1[.]self_attn[.]q_proj$" in config["dynamic"]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("gptqmodel") is None or find_spec("optimum") is None,
    reason="needs gptqmodel, and optimum, through which transformers calls it",
)
def test_gptqmodel_loads_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folders, expected = [], []
    ids = torch.randint(1000, (2, 24), generator=torch.Generator().manual_seed(0))
    for number, (kind, step) in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = compressed(folder, kind, step, torch.bfloat16)
        exporter.GPTQ().export(source, folder / "target")
        folders.append(str(folder / "target"))
        with torch.inference_mode():
            expected.append(runtime.load(source, packed=False)(input_ids=ids, use_cache=False).logits.float())
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "ids.safetensors"), str(tmp_path / "logits.safetensors")]
    subprocess.run([*command, *folders], check=True, capture_output=True, text=True)
    found = load_file(tmp_path / "logits.safetensors")
    for folder_name, reference in zip(folders, expected, strict=True):
        assert float((found[folder_name] - reference).norm()) <= 2e-2 * float(reference.norm()), folder_name


@pytest.mark.parametrize(
    ("kind", "step", "reason"),
    [
        ("llama", "linear:bits=5,group_size=32", "5 bits, not 2 or 3 or 4 or 8"),
        ("llama", {"linear": {"bits": 4, "layers": {"*.down_proj": {"bits": 8}}}}, "8 bits in groups of 64 where"),
        (
            "llama",
            {"linear": {"bits": 4, "layers": {"*.down_proj": {"group_size": 32}}}},
            "4 bits in groups of 32 where",
        ),
        ("llama", {"linear": {"bits": 4, "lm_head": True}}, "outside the repeated blocks"),
        ("llama", "linear:activations=int8", "its inputs are int8"),
        ("llama", "nf4", "nf4 g64 is no evenly spaced grid"),
        ("gpt2", "linear:bits=4", "Conv1D"),
        ("mixtral", "linear:bits=4", "3-D parameter"),
    ],
)
def test_what_has_no_place_is_named(kind: str, step: Any, reason: str, tmp_path: Path) -> None:
    source = compressed(tmp_path, kind, step)
    with pytest.raises(UnsupportedError) as caught:
        exporter.GPTQ().export(source, tmp_path / "target")
    assert reason in caught.value.cause and "safetensors" in caught.value.remedy
    assert not (tmp_path / "target").exists()


def test_an_explicit_input_scale_has_no_place(tmp_path: Path) -> None:
    source = compressed(tmp_path, "llama", "linear:bits=4")
    file = source / "config.json"
    config = json.loads(file.read_text())
    layers = {
        name: {**Affine(4, "group", 64).to_json(), "kind": "linear", "input_scale": name.endswith("o_proj")}
        for name in open_weights(source).stored
    }
    del config["quantization_config"]
    file.write_text(json.dumps({"model_type": "effcli", "effcli": {"version": 1, "config": config, "layers": layers}}))
    with pytest.raises(UnsupportedError, match=r"o_proj.* \(its input scale is explicit\)"):
        exporter.GPTQ().export(source, tmp_path / "target")


def test_widths_that_do_not_fill_words_have_no_place(tmp_path: Path) -> None:
    architectures.make("llama", tmp_path / "source", intermediate_size=100)
    (tmp_path / "out").mkdir()
    step = PassStep.model_validate(parse_pass("linear:bits=4,granularity=channel"))
    sweep(tmp_path / "source", tmp_path / "out", step, None, tmp_path / "work")
    with pytest.raises(UnsupportedError, match="100 output channels of 4 bits do not fill whole 32-bit words"):
        exporter.GPTQ().export(tmp_path / "out", tmp_path / "target")


@pytest.mark.parametrize(
    ("step", "remark"),
    [
        ("linear:bits=4,group_size=8,symmetric=true", "not of 8"),
        ("linear:bits=4,granularity=channel", '"backend": "gptq_torch"'),
    ],
)
def test_what_gptqmodel_does_not_take_is_remarked(step: str, remark: str, tmp_path: Path) -> None:
    source = compressed(tmp_path, "llama", step, torch.bfloat16)
    remarks = exporter.GPTQ().export(source, tmp_path / "target").remarks
    assert any(remark in text for text in remarks)


def test_no_quantized_language_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no quantized layers"):
        exporter.GPTQ().export(architectures.make("llama", tmp_path / "source"), tmp_path / "target")
    (tmp_path / "graph").mkdir()
    residual().save(tmp_path / "graph")
    with pytest.raises(UnsupportedError, match="no language model"):
        exporter.GPTQ().export(tmp_path / "graph", tmp_path / "target")
