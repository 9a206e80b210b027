"""Integer weights of compressed layers: tables rounded once, signs exactly, and what has to be rounded again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from any_format import weight_in
from hypothesis import given
from hypothesis import strategies as st

from effcli.formats import Affine, Codebook, CodebookWeight, Gaps, Quantized, Sparse
from effcli.formats.codebook import fixed_table
from effcli.graphs.rows import Rows, look_up, numbers_in, rows_of


def kmeans(bits: int, strategy: Any, shape: tuple[int, int], seed: int = 0, group: int = 0) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    format = Codebook("kmeans", bits, strategy, group, dtype=torch.float32)
    table = torch.randn(format.blocks(shape), 1 << bits, generator=generator).sort(1).values
    codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
    return CodebookWeight(format, codes, table)


def rows_from(stored: Quantized, least: float = 0.0) -> Rows:
    weight = stored.dequantize(torch.float64).numpy()
    return rows_of(weight, stored, np.full(len(weight), least), 0.25, False)


def test_a_table_by_hand() -> None:
    """Entries -1, 0, ½, 2 with the scale 2 / 127: -63.5 and 31.75 are rounded, halves to even."""
    format = Codebook("kmeans", 2, "tensor", dtype=torch.float32)
    codes = torch.tensor([[0, 1, 2, 3] * 3, [3, 3, 0, 0] * 3], dtype=torch.uint8)
    stored = CodebookWeight(format, codes, torch.tensor([[-1.0, 0.0, 0.5, 2.0]]))
    rows = rows_from(stored)
    assert rows.table is not None and rows.table.tolist() == [[-64, 0, 32, 127]]
    assert rows.codes[:, :4].tolist() == [[-64, 0, 32, 127], [127, 127, -64, -64]]
    np.testing.assert_allclose(rows.scales, [2 / 127] * 2, rtol=1e-7)
    assert (rows.bits, rows.rounded_again, rows.raised, rows.unrolled) == (2, False, 0, False)


@given(st.integers(1, 4), st.sampled_from(["tensor", "channel"]), st.integers(1, 5), st.integers(0, 99))
def test_entries_are_within_half_a_step(bits: int, strategy: str, out: int, seed: int) -> None:
    stored = kmeans(bits, strategy, (out, 70), seed)
    rows = rows_from(stored)
    assert rows.table is not None and rows.bits == (2 if bits <= 2 else 4) and not rows.rounded_again
    np.testing.assert_array_equal(look_up(rows.table, stored.codes.numpy()), rows.codes)
    error = np.abs(rows.codes * rows.scales[:, None] - stored.dequantize(torch.float64).numpy())
    assert (error <= rows.scales[:, None] * 0.5001).all()
    # What shares a table shares a scale, and its largest weight is at the end.
    assert len(np.unique(rows.scales)) == (1 if strategy == "tensor" else out)
    assert np.abs(rows.codes).max() == 127


def test_an_entry_that_no_weight_takes_costs_no_precision() -> None:
    stored = kmeans(4, "tensor", (4, 70))
    stored.table[0, 15] = 1e6
    stored.codes[stored.codes == 15] = 3
    rows = rows_from(stored)
    assert rows.scales.max() < 0.1 and rows.table is not None and rows.table[0, 15] == 127


@pytest.mark.parametrize("values", [Affine(4, "channel", symmetric=True), Codebook("ternary", 2, "tensor")], ids=str)
def test_integers_of_sparse_weights_stay_as_they_are(values: Any) -> None:
    stored = weight_in(Sparse(Gaps(4), values), (4, 70))
    rows = rows_from(stored)
    np.testing.assert_allclose(rows.codes * rows.scales[:, None], stored.dequantize(torch.float64).numpy(), rtol=1e-6)
    assert (rows.bits, rows.rounded_again) == (values.bits, False)
    assert (rows.codes == 0).mean() > 0.5


@pytest.mark.parametrize(
    ("bits", "strategy", "shape"), [(5, "tensor", (4, 70)), (8, "tensor", (4, 70)), (4, "channel", (64, 9))]
)
def test_tables_that_save_nothing_are_unrolled(bits: int, strategy: str, shape: tuple[int, int]) -> None:
    """The same integers, stored one by one: of more than 4 bits, or with tables as large as what they save."""
    stored = kmeans(bits, strategy, shape)
    rows = rows_from(stored)
    assert (rows.bits, rows.table, rows.unrolled, rows.rounded_again) == (8, None, True, False)
    error = np.abs(rows.codes * rows.scales[:, None] - stored.dequantize(torch.float64).numpy())
    assert (error <= rows.scales[:, None] * 0.5001).all()


def test_a_table_of_zeros_and_a_bias_that_does_not_fit() -> None:
    stored = kmeans(4, "channel", (3, 70))
    stored.table[1] = 0
    rows = rows_from(stored)
    assert rows.scales[1] == 0.25 and not rows.codes[1].any() and rows.raised == 0
    raised = rows_from(stored, least=1.0)
    assert raised.scales.tolist() == [1.0] * 3 and raised.raised == 2
    # One table, one scale: that of the row that needs most.
    weight = kmeans(4, "tensor", (3, 70))
    one = rows_of(weight.dequantize(torch.float64).numpy(), weight, np.array([0.0, 2.0, 0.0]), 0.25, False)
    assert one.scales.tolist() == [2.0] * 3 and one.raised == 3


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_signs_are_exact(kind: Any, strategy: Any) -> None:
    shape = (5, 12)
    format = Codebook(kind, 1 if kind == "binary" else 2, strategy, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2 if kind == "binary" else 3, shape, generator=generator).to(torch.uint8)
    scale = torch.rand(format.blocks(shape), generator=generator) + 0.1
    if strategy == "channel":
        scale[2] = 0
    stored = CodebookWeight(format, codes, fixed_table(kind), scale)
    rows = rows_from(stored)
    assert (rows.bits, rows.table, rows.rounded_again) == (2, None, False)
    assert np.abs(rows.codes).max() == 1 and (rows.scales > 0).all()
    np.testing.assert_array_equal(rows.codes * rows.scales[:, None], stored.dequantize(torch.float64).numpy())


def test_groups_and_scaled_inputs_are_rounded_again() -> None:
    grouped = kmeans(4, "group", (4, 64), group=16)
    nf4 = CodebookWeight(
        Codebook("nf4", 4, "group", 16, dtype=torch.float32),
        grouped.codes,
        fixed_table("nf4"),
        torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.1,
    )
    plain = kmeans(4, "tensor", (4, 64))
    scaled = CodebookWeight(plain.format, plain.codes, plain.table, None, torch.full((64,), 2.0))
    for stored in (grouped, nf4, scaled):
        rows = rows_from(stored)
        assert rows.rounded_again and (rows.bits, rows.table, rows.unrolled) == (8, None, False)


def test_weights_that_a_table_lacks() -> None:
    table = np.array([[1, 2], [3, 3]], np.int8)
    assert numbers_in(table, np.array([[2, 1], [3, 3]], np.int8)).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(ValueError, match="the table lacks"):
        numbers_in(table, np.array([[2, 1], [3, 1]], np.int8))
    with pytest.raises(IndexError):
        look_up(table, np.array([[0], [2]], np.uint8))
