"""Codes for a table: by hand, from a file and back, and what each format says of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcli.files.layout import Stored
from effcli.formats import (
    Codebook,
    CodebookWeight,
    Kind,
    Strategy,
    format_from_json,
    huffman,
    unpack,
)
from effcli.formats.codebook import fixed_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_weight(
    shape: tuple[int, int],
    kind: Kind,
    bits: int,
    strategy: Strategy,
    group: int = 0,
    coded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    format = Codebook(kind, bits, strategy, group if strategy == "group" else 0, huffman=coded, dtype=dtype)
    levels = 3 if kind == "ternary" else 1 << bits
    codes = torch.randint(levels, shape, generator=generator).to(torch.uint8)
    blocks = format.blocks(shape)
    if kind == "kmeans":
        table = torch.randn(blocks, 1 << bits, generator=generator).to(dtype).sort(1).values
        return CodebookWeight(format, codes, table)
    return CodebookWeight(format, codes, fixed_table(kind), torch.rand(blocks, generator=generator).to(dtype))


def test_dequantizing_by_hand() -> None:
    codes = torch.tensor([[0, 1, 3, 2], [3, 3, 0, 1]], dtype=torch.uint8)
    table = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [10.0, 20.0, 30.0, 40.0]])
    tensor = CodebookWeight(Codebook("kmeans", 2, "tensor"), codes, table[:1])
    assert tensor.dequantize().tolist() == [[-1, 0, 2, 0.5], [2, 2, -1, 0]]
    rows = CodebookWeight(Codebook("kmeans", 2, "channel"), codes, table)
    assert rows.dequantize().tolist() == [[-1, 0, 2, 0.5], [40, 40, 10, 20]]
    groups = CodebookWeight(Codebook("kmeans", 2, "group", 2), codes, torch.cat([table, -table]))
    assert groups.dequantize().tolist() == [[-1, 0, 40, 30], [-2, -2, -10, -20]]
    scaled = rows.with_input_scale(torch.tensor([1.0, 2.0, 4.0, 0.5]))
    assert scaled.effective().tolist() == [[-1, 0, 0.5, 1], [40, 20, 2.5, 40]]
    signs = CodebookWeight(
        Codebook("binary", 1, "group", 2, dtype=torch.bfloat16),
        torch.tensor([[0, 1, 1, 1]], dtype=torch.uint8),
        fixed_table("binary"),
        torch.tensor([0.5, 3.0], dtype=torch.bfloat16),
    )
    assert signs.dequantize().tolist() == [[-0.5, 0.5, 3, 3]] and signs.dtype == torch.bfloat16
    three = CodebookWeight(
        Codebook("ternary", 2, "channel"), torch.tensor([[0], [1], [2]], dtype=torch.uint8), fixed_table("ternary"),
        torch.tensor([1.5, 2.0, 2.5]),
    )  # fmt: skip
    assert three.dequantize().tolist() == [[-1.5], [0], [2.5]]


@given(
    kind=st.sampled_from(["kmeans", "binary", "ternary"]),
    bits=st.integers(1, 8),
    rows=st.integers(0, 9),
    groups=st.integers(0, 5),
    group=st.integers(1, 20),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    coded=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_a_file_holds_the_weight_and_nbytes_its_size(
    kind: Kind,
    bits: int,
    rows: int,
    groups: int,
    group: int,
    strategy: Strategy,
    coded: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    bits = {"binary": 1, "ternary": 2}.get(kind, bits)
    weight = make_weight((rows, groups * group), kind, bits, strategy, group, coded, dtype, seed)
    packed = weight.pack()
    format = format_from_json(weight.format.to_json())
    assert format == weight.format
    restored = unpack(format, packed)
    assert isinstance(restored, CodebookWeight)
    assert torch.equal(restored.codes, weight.codes) and restored.codes.dtype == torch.uint8
    assert torch.equal(restored.table, weight.table) and restored.table.dtype == weight.table.dtype
    assert restored.dtype == restored.dequantize().dtype == dtype
    torch.testing.assert_close(restored.dequantize(), weight.dequantize(), rtol=0, atol=0)
    held = sum(tensor.nbytes for tensor in packed.values())
    assert weight.nbytes == held
    promised = weight.format.nbytes(weight.shape, dtype.itemsize)
    assert held <= promised if coded else held == promised
    assert all(tensor.is_contiguous() for tensor in packed.values())
    if coded:
        entropy = huffman.entropy(weight.codes.reshape(-1)) * weight.codes.numel() / 8
        assert packed["weight_packed"].nbytes >= entropy - 1e-6


def test_dequantizing_rounds_once() -> None:
    """The product of an entry and a scale is rounded to the network's dtype, not each factor."""
    weight = make_weight((8, 32), "kmeans", 4, "group", 8)
    torch.testing.assert_close(weight.dequantize(torch.float16), weight.dequantize().half(), rtol=0, atol=0)
    scaled = make_weight((8, 32), "ternary", 2, "channel")
    wanted = (scaled.codes.double() - 1) * scaled.scale.double().unsqueeze(1)  # type: ignore[union-attr]
    torch.testing.assert_close(scaled.dequantize(torch.bfloat16), wanted.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["kmeans", "binary", "ternary"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_rows_are_joined(kind: Kind, strategy: Strategy) -> None:
    bits = {"kmeans": 3, "binary": 1, "ternary": 2}[kind]
    parts = [make_weight((rows, 8), kind, bits, strategy, 4, seed=rows) for rows in (2, 3, 1)]
    joined = parts[0].join(parts[1:])
    assert isinstance(joined, CodebookWeight)
    assert joined.format.strategy == ("group" if strategy == "group" else "channel")
    wanted = torch.cat([part.dequantize() for part in parts])
    torch.testing.assert_close(joined.dequantize(), wanted, rtol=0, atol=0)
    torch.testing.assert_close(unpack(joined.format, joined.pack()).dequantize(), wanted, rtol=0, atol=0)


def test_formats_are_values() -> None:
    format = Codebook("kmeans", 5, "group", 16, huffman=True, dtype=torch.bfloat16)
    assert str(format) == "kmeans5 g16 huffman"
    assert (str(Codebook("binary", 1, "channel")), str(Codebook("ternary", 2, "tensor"))) == (
        "binary channel",
        "ternary tensor",
    )
    assert (format.block((4, 64)), format.blocks((4, 64))) == (16, 16)
    assert (Codebook("kmeans", 1, "tensor").blocks((4, 64)), Codebook("kmeans", 1, "channel").blocks((4, 64))) == (1, 4)
    assert Codebook("kmeans", 1, "tensor").blocks((0, 64)) == Codebook("kmeans", 1, "channel").blocks((3, 0)) == 0
    # 80 codes of 5 bits, one table of 32 numbers of 2 bytes for each row, and the shape.
    assert Codebook("kmeans", 5, "channel").nbytes((2, 40)) == math.ceil(80 * 5 / 32) * 4 + 2 * 32 * 2 + 16
    wrong: list[dict[str, Any]] = [
        {"kind": "kmeans", "bits": 9, "strategy": "tensor"},
        {"kind": "kmeans", "bits": 0, "strategy": "tensor"},
        {"kind": "binary", "bits": 2, "strategy": "tensor"},
        {"kind": "ternary", "bits": 1, "strategy": "tensor"},
        {"kind": "kmeans", "bits": 4, "strategy": "group"},
        {"kind": "kmeans", "bits": 4, "strategy": "channel", "group_size": 8},
        {"kind": "kmeans", "bits": 4, "strategy": "tensor", "double": True},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError):
            Codebook(**arguments)
    with pytest.raises(ValueError, match="does not divide"):
        format.blocks((4, 40))


@pytest.mark.parametrize("kind", ["kmeans", "binary", "ternary"])
def test_a_checkpoint_describes_the_layer_and_its_format(kind: Kind) -> None:
    format = make_weight((2, 8), kind, {"kmeans": 3, "binary": 1, "ternary": 2}[kind], "channel").format
    stored = Stored(format, "conv", True)
    assert Stored.from_json(stored.to_json()) == stored
    assert stored.obstacle


def test_damage_is_noticed() -> None:
    weight = make_weight((4, 8), "kmeans", 3, "channel", coded=True)
    packed = weight.pack()
    damaged = [
        {**packed, "weight_table": packed["weight_table"][:, :4]},
        {**packed, "weight_table": packed["weight_table"][:3]},
        {**packed, "weight_lengths": torch.full((16,), 4, dtype=torch.uint8)},
    ]
    for tensors in damaged:
        with pytest.raises(ValueError, match=r"table of shape|symbols in a code"):
            unpack(weight.format, tensors)
