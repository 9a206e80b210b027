"""The modules that stand in for dense ones: same numbers, packed memory, and at home in a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcli.formats import (
    Affine,
    AffineWeight,
    Codebook,
    CodebookWeight,
    DoubleQuantized,
    Quantized,
    quantize_codes,
)
from effcli.formats.codebook import fixed_table
from effcli.language.modules import QuantizedExperts, QuantizedLinear


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose more to waking threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantize(dense: Tensor, bits: int = 4, group: int = 32, input_scale: Tensor | None = None) -> AffineWeight:
    """Nearest codes of `dense` (out, in), asymmetric, on scales that float32 and bf16 both hold."""
    format = Affine(bits, "group", group)
    grouped = format.grouped(dense)
    scale = ((grouped.amax(-1) - grouped.amin(-1)) / format.levels).bfloat16().to(dense.dtype)
    zero = (-grouped.amin(-1) / scale).round().clamp(0, format.levels)
    return AffineWeight(format, quantize_codes(dense, scale, zero, format), scale, zero.to(torch.uint8), input_scale)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    weight = AffineWeight(
        Affine(4, "group", 2),
        codes=torch.tensor([[0, 15, 7, 8], [3, 3, 1, 2]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 2.0], [1.0, 0.25]]),
        zero=torch.tensor([[5, 8], [3, 0]], dtype=torch.uint8),
        input_scale=torch.tensor([1.0, 2.0, 4.0, 0.5]),
    )
    linear = QuantizedLinear(weight, torch.tensor([10.0, -1.0]))
    assert (linear.in_features, linear.out_features) == (4, 2)
    # Ŵ = [[-2.5, 5, -2, 0], [0, 0, 0.25, 0.5]], x / s = [1, 1, 1, 2]
    assert linear(torch.tensor([[1.0, 2.0, 4.0, 1.0]])).tolist() == [[10.5, 0.25]]
    assert linear.weight.tolist() == [[-2.5, 2.5, -0.5, 0.0], [0.0, 0.0, 0.0625, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("out", "columns", "group"), [(401, 1271, 41), (48, 128, 32)])
def test_linear_is_the_dense_layer(out: int, columns: int, group: int, bits: int, dtype: torch.dtype) -> None:
    scale = random(columns, seed=1).abs() + 0.5
    weight = quantize(random(out, columns) * 0.02, bits, group, scale)
    dense = nn.Linear(columns, out)
    dense.load_state_dict({"weight": weight.effective(torch.float32), "bias": random(out, seed=2)})
    linear = QuantizedLinear(weight, dense.bias).to(dtype)
    for rows in (1, 41):
        x = random(rows, 3, columns, seed=3)
        y, expected = linear(x.to(dtype)), dense(x).detach()
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().mean()))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_memory_is_packed(bits: int) -> None:
    linear = QuantizedLinear(quantize(random(256, 512), bits, 128))
    held = sum(buffer.nbytes for buffer in linear.buffers())
    # At most two copies of four bits, or one of eight, with scales and zeros of 32 bits for 128 weights each.
    assert held <= 256 * 512 * (9.3 if bits < 8 else 8.8) / 8
    assert held == linear.packed.nbytes
    assert not list(linear.parameters()) and not linear.state_dict()
    assert f"format=int{bits} g128 asym" in repr(linear) and "kernel=" in repr(linear)


def every_format(out: int, columns: int) -> dict[str, Quantized]:
    """A weight (out, in) in each format, by the operation that multiplies with it."""
    codes = torch.randint(0, 256, (out, columns), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    rows, blocks = random(out, 1, seed=1).abs() * 0.01, -(-out * columns // 64)
    double = DoubleQuantized(codes.view(-1)[:blocks], random(-(-blocks // 256), seed=2).abs(), torch.tensor(0.5))
    fixed = {"activation_scale": torch.tensor([0.05]), "activation_zero": torch.tensor([-20], dtype=torch.int8)}
    table = random(out, 8, seed=3).sort(1).values
    return {
        "int4pack": quantize(random(out, columns)),
        "int8 token": AffineWeight(Affine(8, "channel", 0, True, "token"), codes, rows),
        "int8 tensor": AffineWeight(Affine(8, "channel", 0, True, "tensor"), codes, rows, **fixed),
        "nf4": CodebookWeight(Codebook("nf4", 4, "group", 64), codes >> 4, fixed_table("nf4"), random(blocks).abs()),
        "nf4 double": CodebookWeight(Codebook("nf4", 4, "group", 64, True), codes >> 4, fixed_table("nf4"), double),
        "kmeans": CodebookWeight(Codebook("kmeans", 3, "channel"), codes >> 5, table),
        "binary": CodebookWeight(Codebook("binary", 1, "channel"), codes >> 7, fixed_table("binary"), rows.view(-1)),
    }


@pytest.mark.parametrize("name", every_format(1, 32))
def test_every_format(name: str) -> None:
    weight = every_format(48, 96)[name]
    linear = QuantizedLinear(weight, random(48, seed=4))
    assert torch.equal(linear.weight, weight.effective())
    assert f"format={weight.format}" in repr(linear)
    x = random(5, 96, seed=6)
    y, expected = linear(x), F.linear(x, weight.effective(), linear.bias)
    if "int8" in name:
        # Inputs are off by up to half a step each.
        step = 0.05 if "tensor" in name else x.abs().amax(1, keepdim=True) / 127.5
        bound = 0.5001 * step * weight.effective().abs().sum(1)
        assert bool(((y - expected).abs() <= bound).all()) and not torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().mean()))
    again = copy.deepcopy(linear).to("cpu")
    assert torch.equal(again(x), y)
    assert {buffer.device.type for buffer in again.to("meta").buffers()} == {"meta"}
    expert = QuantizedExperts([weight])[0]
    assert torch.equal(F.linear(x, expert, linear.bias), y) and expert.dtype == torch.float32


def test_an_input_scale_in_every_format() -> None:
    scale = random(96, seed=7).abs() + 0.5
    for name, weight in every_format(48, 96).items():
        if "int8" in name:
            continue
        linear = QuantizedLinear(weight.with_input_scale(scale))
        x = random(3, 96, seed=8)
        torch.testing.assert_close(linear(x), (x / scale) @ weight.dequantize().T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear.weight, weight.dequantize() / scale)


def test_quantized_scales_stay_quantized() -> None:
    linear = QuantizedLinear(every_format(256, 512)["nf4 double"])
    assert sum(buffer.nbytes for buffer in linear.buffers()) < 256 * 512 * 4.2 / 8


def test_moves_and_copies() -> None:
    weight = quantize(random(64, 128))
    linear = QuantizedLinear(weight, random(64))
    x = random(2, 128)
    before = linear(x)
    again = copy.deepcopy(linear).to("cpu")
    torch.testing.assert_close(again(x), before, rtol=0, atol=0)
    assert {buffer.data_ptr() for buffer in again.buffers()} >= {t.data_ptr() for t in again.packed.tensors().values()}
    # Another dtype moves the bias; the scales stay what the file said.
    assert linear.to(torch.bfloat16).packed.dtype == torch.float32
    assert linear.bias is not None and linear.bias.dtype == torch.bfloat16
    meta = again.to("meta")
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_to_a_gpu() -> None:
    linear = QuantizedLinear(quantize(random(64, 128)), random(64))
    x = random(3, 128)
    here = linear(x)
    there = linear.to("cuda")
    assert "triton" in repr(there)
    torch.testing.assert_close(there(x.cuda()).cpu(), here, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.to("cpu")(x), here, rtol=0, atol=0)


def test_gradients_flow_through() -> None:
    weight = quantize(random(48, 64))
    linear = QuantizedLinear(weight)
    x = random(5, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(gradient, weight.dequantize().sum(0).expand(5, -1))


def test_experts() -> None:
    stack = random(3, 48, 64)
    weights: list[AffineWeight | Tensor] = [quantize(stack[0]), stack[1], quantize(stack[2], 8)]
    experts = QuantizedExperts(weights)
    dense = torch.stack([w.dequantize() if isinstance(w, AffineWeight) else w for w in weights])
    x, bias = random(7, 64), random(48)
    assert experts.shape == dense.shape and len(experts) == 3
    for number in (0, 1, 2, -1):
        for index in (number, torch.tensor(number)):
            expert = experts[index]
            assert expert.shape == (48, 64) and expert.dtype == torch.float32 and expert.device.type == "cpu"
            torch.testing.assert_close(F.linear(x, expert), x @ dense[number].T)
            torch.testing.assert_close(F.linear(input=x, weight=expert, bias=bias), x @ dense[number].T + bias)
            # What is no F.linear is served by a dense copy.
            torch.testing.assert_close(x @ expert.T, x @ dense[number].T)
            torch.testing.assert_close(torch.matmul(expert, x.T), dense[number] @ x.T)
    assert not experts.state_dict() and not list(experts.parameters())
    with pytest.raises(IndexError):
        experts[3]


def test_experts_stored_by_inputs_and_outputs() -> None:
    stack = random(2, 48, 64)
    first = quantize(stack[0])
    experts = QuantizedExperts([first, stack[1]], transposed=True)
    x = random(7, 64)
    assert experts.shape == (2, 64, 48) and experts[0].shape == experts[1].shape == (64, 48)
    for number, dense in enumerate((first.dequantize(), stack[1])):
        torch.testing.assert_close(x @ experts[number], x @ dense.T)
        torch.testing.assert_close(torch.matmul(x, experts[number]), x @ dense.T)
        torch.testing.assert_close(F.linear(x, experts[number].T), x @ dense.T)


def test_experts_in_mixtral() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=128,
    )
    config._experts_implementation = "eager"
    dense = MixtralForCausalLM(config).eval().requires_grad_(False)
    packed = copy.deepcopy(dense)
    for layer, other in zip(dense.model.layers, packed.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.mlp.experts, name)
            weights = [quantize(expert) for expert in stack]
            stack.copy_(torch.stack([weight.dequantize() for weight in weights]))
            delattr(other.mlp.experts, name)
            setattr(other.mlp.experts, name, QuantizedExperts(weights))
    tokens = torch.randint(0, 128, (2, 17))
    torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits)
