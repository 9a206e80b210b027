from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, make
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("onnxruntime", exc_type=ImportError)
pytest.importorskip("onnxscript", exc_type=ImportError)

from effcli import runtime
from effcli.errors import DataError, NumericsError, UnsupportedError, UserError
from effcli.exporters import _onnx_language as language
from effcli.exporters import _onnx_language_layers as layers
from effcli.exporters._onnx_language_layers import Arithmetic, Blocks
from effcli.exporters._onnx_language_trace import quiet
from effcli.files import locate as samples
from effcli.files.checkpoint import Checkpoint
from effcli.files.layout import Stored
from effcli.formats import Affine, AffineWeight
from effcli.kernels import int8_matmul
from effcli.language.sweep import sweep
from effcli.platform import onnx_session
from effcli.run.overrides import parse_pass
from effcli.run.recipe import PassStep

ONE_BLOCK = {"num_hidden_layers": 1}


def quantized(source: Path, folder: Path, step: str) -> Path:
    folder.mkdir(parents=True)
    sweep(source, folder, PassStep.model_validate(parse_pass(step)), None, folder.parent / "work")
    return folder


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """One random block of an architecture after a pass; the original lies beside it as `source`."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, step: str) -> Path:
        if (kind, step) not in made:
            folder = tmp_path_factory.mktemp(kind)
            make(kind, folder / "source", **ONE_BLOCK)
            made[kind, step] = quantized(folder / "source", folder / "out", step)
        return made[kind, step]

    return get


def weight_of(format: Affine, shape: tuple[int, int], seed: int = 0, scaled: bool = False) -> AffineWeight:
    """Random codes, scales and zero points in `format`."""
    generator = torch.Generator().manual_seed(seed)

    def integers(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(format.levels + 1, shape, generator=generator, dtype=torch.uint8)

    scales = format.scale_shape(shape)
    return AffineWeight(
        format,
        integers(shape),
        torch.rand(scales, generator=generator) + 0.1,
        None if format.symmetric else integers(scales),
        torch.rand(shape[1], generator=generator) + 0.5 if scaled else None,
    )


def run_layer(module: Any, weight: AffineWeight, x: Tensor, folder: Path) -> Tensor:
    """x through the ONNX file of one layer."""
    for name, value in layers.tensors(module, weight).items():
        module.register_buffer(name, value.to(module.get_buffer(name).dtype))
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            module,
            (x[:2],),
            dynamo=True,
            opset_version=18,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
    program.save(folder / "model.onnx")
    session = onnx_session.open_session(folder, threads=1, entries=onnx_session.EXACT)
    (y,) = onnx_session.run(session, {session.get_inputs()[0].name: x.numpy()}).values()
    return torch.from_numpy(y)


def test_codes_are_packed_low_bits_first_and_blocks_padded() -> None:
    weight = AffineWeight(
        Affine(4, "channel"),
        torch.arange(1, 19, dtype=torch.uint8).remainder(16)[None],
        torch.tensor([[0.5]]),
        torch.tensor([[7]], dtype=torch.uint8),
    )
    blocks = Blocks(1, 18, 4, 16, True)
    found = blocks.tensors(weight)
    assert found["weight_codes"].tolist() == [[[0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED, 0x0F], [0x21] + [0] * 7]]
    assert found["weight_scale"].tolist() == [[0.5, 0.5]]
    assert found["weight_zero_point"].tolist() == [[0x77]]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == blocks.shapes


def test_fewer_bits_keep_their_values_in_wider_codes() -> None:
    weight = AffineWeight(
        Affine(3, "group", 16, symmetric=True),
        torch.tensor([[0, 4, 7] + [4] * 13], dtype=torch.uint8),
        torch.ones(1, 1),
    )
    found = layers.as_blocks(weight.format, weight.shape).tensors(weight)
    # -4, 0 and 3 around the zero of 4-bit codes, which is 8.
    assert found["weight_codes"].flatten().tolist() == [0x84, 0x8B] + [0x88] * 6
    assert "weight_zero_point" not in found


FORMATS = st.builds(
    lambda bits, strategy, group, symmetric: Affine(bits, strategy, group if strategy == "group" else 0, symmetric),
    st.integers(1, 8),
    st.sampled_from(["tensor", "channel", "group"]),
    st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256, 512]),
    st.booleans(),
)


@given(FORMATS, st.integers(1, 41), st.integers(1, 3), st.integers(1, 401), st.integers(0, 2**16))
def test_every_format_with_a_place_keeps_its_values(
    format: Affine, rows: int, groups: int, columns: int, seed: int
) -> None:
    """Unpacked again as the operator's documentation says, in float64."""
    columns = groups * format.group_size if format.strategy == "group" else columns
    weight = weight_of(format, (rows, columns), seed)
    blocks = layers.as_blocks(format, weight.shape)
    found = {name: tensor.numpy() for name, tensor in blocks.tensors(weight).items()}
    codes = np.unpackbits(found["weight_codes"], axis=-1, bitorder="little")
    codes = codes.reshape(rows, -1, blocks.bits) @ (1 << np.arange(blocks.bits))
    zeros = np.full((rows, blocks.number), 1 << (blocks.bits - 1))
    if blocks.zeros:
        bits = np.unpackbits(found["weight_zero_point"], axis=-1, bitorder="little")
        zeros = (bits.reshape(rows, -1, blocks.bits) @ (1 << np.arange(blocks.bits)))[:, : blocks.number]
    values = (codes.reshape(rows, blocks.number, blocks.size) - zeros[..., None]).astype(np.float64)
    values *= found["weight_scale"][..., None]
    expected = weight.dequantize(torch.float64)
    torch.testing.assert_close(torch.from_numpy(values.reshape(rows, -1)[:, :columns]), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("format", "shape", "scaled"),
    [
        (Affine(4, "group", 16), (41, 48), True),
        (Affine(3, "group", 96, symmetric=True), (41, 192), False),
        (Affine(8, "channel"), (7, 401), False),
        (Affine(2, "tensor"), (1, 5), False),
        (Affine(6, "group", 512), (17, 1024), False),
    ],
    ids=str,
)
def test_a_packed_layer_in_onnxruntime(format: Affine, shape: tuple[int, int], scaled: bool, tmp_path: Path) -> None:
    weight = weight_of(format, shape, scaled=scaled)
    stored = Stored(format, input_scale=scaled)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    module = layers.replacement(stored, shape, Arithmetic(), torch.float32, bias=True)
    bias = torch.arange(shape[0], dtype=torch.float32)
    module.bias = bias
    y = run_layer(module, weight, x, tmp_path)
    expected = x.double() @ weight.effective(torch.float64).t() + bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("strategy", "scaled"), [("channel", True), ("tensor", False)])
def test_an_integer_layer_in_onnxruntime(strategy: Any, scaled: bool, tmp_path: Path) -> None:
    format = Affine(8, strategy, symmetric=True)
    weight = weight_of(format, (41, 33), scaled=scaled)
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(1))
    module = layers.replacement(
        Stored(format, input_scale=scaled), weight.shape, Arithmetic(activations="int8"), torch.float32, bias=False
    )
    y = run_layer(module, weight, x, tmp_path)
    scaled_x = (x if weight.input_scale is None else x / weight.input_scale).double()
    low, high = min(float(scaled_x.min()), 0), max(float(scaled_x.max()), 0)
    step = (high - low) / 255
    zero = round(-low / step)
    levels = ((scaled_x / step).round() + zero).clamp(0, 255)
    expected = (levels - zero) * step @ weight.dequantize(torch.float64).t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("shape", [(41, 72), (5, 17)])
def test_a_layer_whose_inputs_are_int8_in_onnxruntime(activations: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    """As the integer kernel multiplies it, on tokens of very different loudness and one of zeros."""
    format = Affine(8, "channel", symmetric=True)
    weight = weight_of(format, shape)
    fixed = {"activation_scale": torch.tensor([0.05]), "activation_zero": torch.tensor([-7], dtype=torch.int8)}
    format = dataclasses.replace(format, activations=activations)
    weight = dataclasses.replace(weight, format=format, **(fixed if activations == "tensor" else {}))
    module = layers.replacement(Stored(format), shape, Arithmetic(), torch.float32, bias=False)
    assert layers.kernel(Stored(format), Arithmetic()) == "MatMulInteger 8 bits"
    x = torch.randn(6, shape[1], generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 6).unsqueeze(1)
    x[3] = 0
    y = run_layer(module, weight, x, tmp_path)
    torch.testing.assert_close(y, int8_matmul.reference(x, weight), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_network_whose_inputs_are_int8(
    dequantize: bool, compressed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = compressed("llama", "linear:activations=int8")
    made = language.export_language(source, tmp_path / "out", dequantize=dequantize)
    assert made.prompt.passed and made.step.passed, made.line
    assert made.prompt.relative < 0.03
    assert made.kernels.get("MatMulInteger 8 bits", 0) == (0 if dequantize else 7)
    assert any("stay floating" in remark for remark in made.remarks) == dequantize


@pytest.mark.parametrize(
    ("format", "columns", "size"),
    [
        (Affine(4, "group", 64), 576, 64),
        (Affine(4, "group", 96), 576, 32),
        (Affine(4, "group", 1024), 2048, 256),
        (Affine(4, "group", 8), 64, None),
        (Affine(4, "group", 24), 48, None),
        (Affine(8, "channel"), 5, 16),
        (Affine(8, "channel"), 100, 128),
        (Affine(8, "tensor"), 4096, 128),
    ],
    ids=str,
)
def test_block_sizes(format: Affine, columns: int, size: int | None) -> None:
    assert layers.block_size(format, columns) == size


@pytest.mark.parametrize(
    ("stored", "arithmetic", "cause"),
    [
        (Stored(Affine(4, "group", 8)), Arithmetic(), "a.0, a.1, a.2 and 1 more (groups of 8, not a multiple of 16)"),
        (Stored(Affine(4, "group", 32), "expert"), Arithmetic(), "(an expert is a slice of a 3-D parameter)"),
        (Stored(Affine(8, "group", 32), "conv"), Arithmetic(), "(a conv is not a linear)"),
        (Stored(Affine(4, "channel", symmetric=True)), Arithmetic(activations="int8"), "(int4 channel sym)"),
        (Stored(Affine(8, "channel")), Arithmetic(activations="int8"), "(int8 channel asym)"),
        (Stored(Affine(8, "group", 64, symmetric=True)), Arithmetic(activations="int8"), "(int8 g64 sym)"),
    ],
)
def test_layers_without_a_place_are_named(stored: Stored, arithmetic: Arithmetic, cause: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        layers.check({f"a.{k}": stored for k in range(4)}, arithmetic)
    assert caught.value.cause.endswith(cause) and "a.0" in caught.value.cause
    assert ("symmetric: true" if arithmetic.activations else "--dequantize") in caught.value.remedy


def test_int8_activations_need_layers() -> None:
    layers.check({}, Arithmetic())
    with pytest.raises(UnsupportedError, match="this checkpoint has none"):
        layers.check({}, Arithmetic(activations="int8"))


def test_remarks_say_what_was_widened_and_what_is_slow() -> None:
    three = {"a": Stored(Affine(3, "channel")), "b": Stored(Affine(3, "channel")), "c": Stored(Affine(6, "channel"))}
    widened = ["2 layers of 3 bits stored as 4-bit codes", "1 layer of 6 bits stored as 8-bit codes"]
    found = layers.remarks(three, Arithmetic())
    assert [remark[: len(start)] for remark, start in zip(found, widened, strict=False)] == widened
    assert "level 4 has a fast kernel" in found[2]
    assert len(layers.remarks(three, Arithmetic(accuracy_level=4))) == 2
    assert layers.remarks({"a": Stored(Affine(4, "group", 64))}, Arithmetic()) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_compressed_network_with_its_cache(kind: str, compressed: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Prompt, two cached steps of different lengths, a batch of three with padding on the left."""
    source = compressed(kind, "linear:bits=4,group_size=32")
    described = language.export_language(source, tmp_path)
    assert described.kernels["MatMulNBits 4 bits level 0"] >= 4
    assert described.prompt.relative < 1e-4 and described.step.relative < 1e-4
    assert "opset 18" in described.line and "top-1 100.0%" in described.line
    ids = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        network = runtime.load(source, packed=False)
        expected = network(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    session = onnx_session.open_session(tmp_path, threads=1)
    names = {item.name for item in session.get_inputs()}
    assert names == {
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"
    }  # fmt: skip
    past = language.empty_past(session, 3)
    for begin, end in ((0, 7), (7, 11), (11, 12)):
        out = onnx_session.run(
            session,
            {
                "input_ids": ids[:, begin:end].numpy(),
                "attention_mask": mask[:, :end].numpy(),
                "position_ids": positions[:, begin:end].numpy(),
                **past,
            },
        )
        logits = torch.from_numpy(out.pop("logits"))
        kept = mask[:, begin:end].bool()
        torch.testing.assert_close(logits[kept], expected[:, begin:end][kept], rtol=1e-4, atol=1e-4)
        past = {name.replace("present", "past_key_values"): value for name, value in out.items()}
    assert past["past_key_values.0.key"].shape[2] == 12


def test_what_the_file_says(compressed: Callable[[str, str], Path], tmp_path: Path) -> None:
    import onnx

    source = compressed("gpt2", "linear:bits=4,group_size=32")
    described = language.export_language(source, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert described.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    model = onnx.load(tmp_path / "model.onnx")
    assert model.producer_name == "effcli"
    assert {item.domain: item.version for item in model.opset_import} == {"": 18, "com.microsoft": 1}
    said = {item.key: item.value for item in model.metadata_props}
    assert said["effcli.opset"] == "18" and said["effcli.kernel"] == "MatMulNBits 4 bits level 0"
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()
    held = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    # The head is the embedding: one tensor, read by two nodes.
    (tied,) = [name for name, value in held.items() if value.shape == (VOCABULARY, 64)]
    assert sum(tied in node.input for node in model.graph.node) == 2
    # Conv1D's codes, stored as they are: the same bytes as compressed-tensors' words of 4-bit codes, low first.
    stem = "transformer.h.0.attn.c_attn"
    words = Checkpoint.open(source).read(f"{stem}.weight_packed")
    assert held[f"{stem}.weight_codes"].tobytes() == words.numpy().tobytes()
    scales = Checkpoint.open(source).read(f"{stem}.weight_scale")
    torch.testing.assert_close(torch.from_numpy(held[f"{stem}.weight_scale"].copy()), scales, rtol=0, atol=0)


def test_dequantized_and_dense(compressed: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = compressed("llama", "linear:bits=4,group_size=32")
    described = language.export_language(source, tmp_path, dequantize=True)
    assert described.kernels == {"MatMul float32": 8}
    ids = np.array([[1, 2, 3]])
    with torch.inference_mode():
        network = runtime.load(source, packed=False)
        expected = network.generate(torch.from_numpy(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert language.generate(tmp_path, ids, 5).tolist() == expected.tolist()


def test_float16(compressed: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = compressed("llama", "linear:bits=4,group_size=32")
    described = language.export_language(source, tmp_path, precision="float16")
    assert described.prompt.relative < 5e-3
    assert described.remarks == ("7 layers had scales that float16 rounds",)
    session = onnx_session.open_session(tmp_path, entries=onnx_session.EXACT)
    assert session.get_outputs()[0].type == "tensor(float16)"
    assert language.generate(session, np.array([[1, 2], [3, 4]]), 0).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("step", "options", "kernel"),
    [
        ("linear:bits=8,symmetric=true,granularity=channel", {"activations": "int8"}, "MatMulInteger 8 bits"),
        ("linear:bits=8,group_size=32", {"accuracy_level": 4}, "MatMulNBits 8 bits level 4"),
    ],
)
def test_quantized_inputs(
    step: str, options: Any, kernel: str, compressed: Callable[[str, str], Path], tmp_path: Path
) -> None:
    described = language.export_language(compressed("llama", step), tmp_path, **options)
    assert described.kernels == {kernel: 7, "MatMul float32": 1}
    # Rounding to 8 bits shows, and stays small.
    assert 1e-4 < described.prompt.relative < 0.05
    speed = language.latency(tmp_path, prefill=4, decode=2, threads=1)
    assert speed.kernel == f"onnxruntime {kernel}" and speed.threads == 1 and speed.prefill_tokens == 4
    assert speed.decode_tokens_per_second > 0 and speed.prefill_tokens_per_second > 0


def test_experts_are_exported_dense_and_refused_packed(compressed: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = compressed("mixtral", "linear:bits=4,group_size=32")
    with pytest.raises(UnsupportedError, match="an expert is a slice"):
        language.export_language(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    described = language.export_language(source, tmp_path / "out", dequantize=True)
    assert described.kernels["gathered experts float32"] == 8
    assert "the experts of every token" in described.remarks[0]


def test_positions_that_a_network_does_not_take(tmp_path: Path) -> None:
    make("bloom", tmp_path / "source", **ONE_BLOCK)
    language.export_language(tmp_path / "source", tmp_path / "out")
    session = onnx_session.open_session(tmp_path / "out", entries=onnx_session.EXACT)
    assert "position_ids" not in {item.name for item in session.get_inputs()}


def test_an_architecture_without_keys_and_values(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError) as caught:
        language.export_language(tmp_path / "source", tmp_path / "out")
    assert caught.value.cause.startswith("the architecture mamba cannot be traced to ONNX: ")
    assert "\n" not in caught.value.cause
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make("llama", tmp_path / "source", **ONE_BLOCK)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    network.lm_head.weight.data[0, 0] = 1e6
    network.save_pretrained(tmp_path / "source")
    with pytest.raises(NumericsError, match=r"lm_head\.weight is not finite"):
        language.export_language(tmp_path / "source", tmp_path / "out", precision="float16")


def test_requests_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = samples.resolve("sample:lm")
    with pytest.raises(UserError, match="dequantize removes"):
        language.export_language(source, tmp_path / "out", dequantize=True, activations="int8")
    with pytest.raises(UnsupportedError, match="accuracy level 2"):
        language.export_language(source, tmp_path / "out", accuracy_level=2)  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError):
        language.export_language(tmp_path, tmp_path / "out")
    monkeypatch.setattr(onnx_session, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnx and onnxruntime and onnxscript"):
        language.export_language(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ids", [np.zeros((1, 0), np.int64), np.zeros(3, np.int64)])
def test_a_prompt_without_tokens(ids: Any) -> None:
    with pytest.raises(DataError, match="a prompt has the shape"):
        language.generate(None, ids, 1)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample:lm", "lm_gpt2_1m_mini", "lm_opt_1m_mini", "lm_gptneox_1m_mini"])
def test_real_networks_write_what_transformers_writes(name: str, asset: Callable[[str], Path], tmp_path: Path) -> None:
    """Greedy text of the exported 4-bit network and of the dequantized one, both in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = samples.resolve(name) if name.startswith("sample:") else asset(name)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).save_pretrained(tmp_path / "source")
    source = quantized(tmp_path / "source", tmp_path / "out", "linear:bits=4,group_size=32")
    ids = AutoTokenizer.from_pretrained(path)("Once upon a time there was", return_tensors="pt").input_ids
    with torch.inference_mode():
        network = runtime.load(source, packed=False)
        expected = network.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)  # type: ignore[operator]
    described = language.export_language(source, tmp_path / "onnx")
    assert described.prompt.top1 == 1 and described.step.top1 == 1
    assert language.generate(tmp_path / "onnx", ids.numpy(), 24).tolist() == expected.tolist()
