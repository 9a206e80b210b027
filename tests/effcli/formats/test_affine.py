"""Packed codes: a case by hand, compressed-tensors' own packing, and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.formats import (
    Activations,
    Affine,
    AffineWeight,
    Dense,
    Strategy,
    format_from_json,
    pack_bits,
    quantize_codes,
    unpack,
    unpack_bits,
)

BITS = range(1, 9)


def make_weight(
    shape: tuple[int, int],
    bits: int,
    strategy: Strategy,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    seed: int = 0,
) -> AffineWeight:
    generator = torch.Generator().manual_seed(seed)
    format = Affine(bits, strategy, group if strategy == "group" else 0, symmetric)
    scales = format.scale_shape(shape)

    def codes(size: tuple[int, int]) -> Tensor:
        return torch.randint(0, 2**bits, size, generator=generator).to(torch.uint8)

    scale = (torch.rand(scales, generator=generator) * 0.01 + 0.002).to(dtype)
    return AffineWeight(format, codes(shape), scale, None if symmetric else codes(scales))


def test_packing_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    assert pack_bits(codes, 4).tolist() == [[0x87654321 - 2**32, 0x9]]
    # 11 codes of 3 bits fill 33: the last straddles, its two low bits in the first word and its high bit in the next.
    codes = torch.tensor([[0] * 10 + [0b101]], dtype=torch.uint8)
    assert pack_bits(codes, 3).tolist() == [[0b01 << 30, 0b1]]
    assert unpack_bits(torch.tensor([[0b01 << 30, 0b1]], dtype=torch.int32), 3, 11).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (4, 32), (5, 77), (41, 1271)])
def test_packing_is_that_of_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized", exc_type=ImportError)
    codes = make_weight(shape, bits, "channel", 0, True, torch.float32).codes
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = helpers.pack_to_int32(signed, bits)
    torch.testing.assert_close(pack_bits(codes, bits), packed, rtol=0, atol=0)
    torch.testing.assert_close(unpack_bits(packed, bits, shape[1]), codes, rtol=0, atol=0)
    restored = helpers.unpack_from_int32(pack_bits(codes, bits), bits, torch.Size(shape))
    torch.testing.assert_close(restored, signed, rtol=0, atol=0)


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 9), columns=st.integers(1, 130), seed=st.integers(0, 99))
def test_unpacking_inverts_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = make_weight((rows, columns), bits, "tensor", 0, True, torch.float32, seed).codes
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_bits(words, bits, columns), codes)


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.integers(1, 40),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_file_holds_the_weight_and_nbytes_its_size(
    bits: int, rows: int, groups: int, group: int, strategy: Strategy, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = make_weight((rows, groups * group), bits, strategy, group, symmetric, dtype)
    packed = weight.pack()
    restored = unpack(weight.format, packed)
    assert torch.equal(restored.codes, weight.codes)
    assert torch.equal(restored.scale, weight.scale) and restored.scale.dtype == dtype
    assert restored.zero is weight.zero is None or torch.equal(restored.zero, weight.zero)  # type: ignore[arg-type]
    held = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert weight.format.nbytes(weight.shape, dtype.itemsize) == held
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_dequantizing_by_hand() -> None:
    format = Affine(4, "group", 2)
    weight = AffineWeight(
        format,
        codes=torch.tensor([[0, 15, 7, 8], [3, 3, 1, 2]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 2.0], [1.0, 0.25]]),
        zero=torch.tensor([[5, 8], [3, 0]], dtype=torch.uint8),
        input_scale=torch.tensor([1.0, 2.0, 4.0, 0.5]),
    )
    assert weight.dequantize().tolist() == [[-2.5, 5.0, -2.0, 0.0], [0.0, 0.0, 0.25, 0.5]]
    assert weight.effective().tolist() == [[-2.5, 2.5, -0.5, 0.0], [0.0, 0.0, 0.0625, 1.0]]
    symmetric = AffineWeight(Affine(4, "channel", symmetric=True), weight.codes, torch.tensor([[1.0], [2.0]]))
    assert symmetric.dequantize().tolist() == [[-8.0, 7.0, -1.0, 0.0], [-10.0, -10.0, -14.0, -12.0]]


@given(bits=st.sampled_from(BITS), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_codes_are_the_nearest(bits: int, symmetric: bool, seed: int) -> None:
    format = Affine(bits, "group", 8, symmetric)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 16, generator=generator)
    scale = torch.rand(3, 2, generator=generator) + 0.01
    zero = torch.full_like(scale, format.fixed_zero)
    codes = quantize_codes(weight, scale, float(format.fixed_zero) if symmetric else zero, format)
    stored = None if symmetric else zero.to(torch.uint8)
    error = (AffineWeight(format, codes, scale, stored).dequantize() - weight).abs()
    every = (torch.arange(format.levels + 1) - format.fixed_zero) * scale.unsqueeze(-1)
    nearest = (format.grouped(weight).unsqueeze(-1) - every.unsqueeze(2)).abs().amin(-1)
    torch.testing.assert_close(format.grouped(error), nearest, rtol=1e-4, atol=1e-6)


def test_formats_are_values() -> None:
    format = Affine(3, "group", 64, symmetric=True)
    assert Affine.from_json(format.to_json()) == format
    assert (str(format), str(Affine(8, "channel")), str(Dense(torch.bfloat16))) == (
        "int3 g64 sym",
        "int8 channel asym",
        "bfloat16",
    )
    assert Dense(torch.bfloat16).nbytes((3, 5)) == 30
    wrong: list[tuple[int, Strategy, int]] = [(9, "tensor", 0), (4, "group", 0), (4, "channel", 32)]
    for arguments in wrong:
        with pytest.raises(ValueError):
            Affine(*arguments)
    with pytest.raises(ValueError, match="does not divide"):
        format.scale_shape((4, 100))


@pytest.mark.parametrize("bits", BITS)
def test_one_word_unpacks_whatever_its_stride(bits: int) -> None:
    codes = (torch.arange(3) % 2**bits).to(torch.uint8).unsqueeze(0)
    words = pack_bits(codes, bits)
    strided = torch.stack([words, words], dim=2)[:, :, 0]
    torch.testing.assert_close(unpack_bits(strided, bits, 3), codes, rtol=0, atol=0)


def integer_weight(activations: Activations, strategy: Strategy = "channel", rows: int = 2) -> AffineWeight:
    codes = torch.tensor([[0, 128, 255], [127, 129, 1]], dtype=torch.uint8).repeat(rows // 2, 1)
    format = Affine(8, strategy, 0, True, activations)
    scale = torch.full(format.scale_shape((rows, 3)), 0.5, dtype=torch.bfloat16)
    static = activations == "tensor"
    return AffineWeight(
        format,
        codes,
        scale,
        activation_scale=torch.tensor([0.25], dtype=torch.bfloat16) if static else None,
        activation_zero=torch.tensor([-3], dtype=torch.int8) if static else None,
    )


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_weights_of_int8_inputs_stand_in_a_file_as_signed_bytes(activations: Activations, strategy: Strategy) -> None:
    weight = integer_weight(activations, strategy)
    assert weight.signed.tolist() == [[-128, 0, 127], [-1, 1, -127]]
    assert weight.dequantize(torch.float32).tolist() == [[-64, 0, 63.5], [-0.5, 0.5, -63.5]]
    packed = weight.pack()
    assert packed["weight"].dtype == torch.int8
    assert set(packed) == {"weight", "weight_scale"} | (
        {"input_scale", "input_zero_point"} if activations == "tensor" else set()
    )
    assert weight.format.nbytes(weight.shape, 2) == sum(tensor.nbytes for tensor in packed.values())
    format = format_from_json(weight.format.to_json())
    assert format == weight.format and "int8 inputs per" in str(format)
    restored = unpack(format, packed)
    assert isinstance(restored, AffineWeight)
    assert torch.equal(restored.codes, weight.codes) and torch.equal(restored.scale, weight.scale)
    assert restored.activation_scale is weight.activation_scale


def test_int8_inputs_need_weights_that_leave_one_rescaling() -> None:
    wrong: list[tuple[int, Strategy, int, bool]] = [
        (4, "channel", 0, True),
        (8, "group", 32, True),
        (8, "channel", 0, False),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="int8 activations need"):
            Affine(*arguments, "token")
    with pytest.raises(ValueError, match="fixed scale"):
        AffineWeight(Affine(8, "channel", 0, True, "tensor"), torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1))
    with pytest.raises(ValueError, match="no explicit scale"):
        integer_weight("token").with_input_scale(torch.ones(3))


def test_rows_are_joined() -> None:
    first, second = (make_weight((rows, 8), 4, "tensor", 0, False, torch.float32, rows) for rows in (2, 3))
    joined = first.join([second])
    assert joined.format == Affine(4, "channel")
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    static = integer_weight("tensor")
    assert static.join([static]).format == static.format
    other = AffineWeight(
        static.format,
        static.codes,
        static.scale,
        activation_scale=torch.tensor([1.0]),
        activation_zero=static.activation_zero,
    )
    with pytest.raises(ValueError, match="one scale"):
        static.join([other])
