"""How layers are stored at the end, and what the bits per weight are made of."""

from __future__ import annotations

import pytest

from effcli.reports.columns import conditions
from effcli.reports.final import bits_line, zeros_line
from effcli.reports.report import LedgerRow, Stage


def layer(name: str, format: str, nbytes: int, status: str = "compressed") -> LedgerRow:
    return LedgerRow.model_validate(
        dict(name=name, kind="linear", shape=(100, 80), format=format, bits_per_weight=0, nbytes=nbytes, status=status)
    )


def stage(*rows: LedgerRow, bits: float = 5.17) -> Stage:
    return Stage(name="awq", nbytes=1, weights=1, bits_per_weight=bits, ledger=rows)


FIRST, SECOND = layer("q", "int4 g64 asym", 4310), layer("k", "int4 g64 asym", 4310)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            (FIRST, SECOND, layer("embed", "bfloat16", 16_000, "kept"), layer("lm_head", "bfloat16", 0, "kept")),
            "5.17 bits per weight: 2 layers at 4.31 (int4 g64 asym, with scales and zero points), embed at 16.0 "
            "(not compressed)",
        ),
        (
            (layer("q", "int8 channel sym", 8010),),
            "5.17 bits per weight: 1 layer at 8.01 (int8 channel sym, with scales)",
        ),
        (
            (FIRST, layer("k", "nf4 g64", 4500), layer("a", "float32", 1, "kept"), layer("b", "float32", 9, "kept")),
            "5.17 bits per weight: 2 layers at 4.41 (several formats, with scales and zero points), b and 1 more at "
            "0.00500 (not compressed)",
        ),
        (
            (layer("q", "sparse bitmask, bfloat16", 9000, "changed"), layer("b", "float32", 9, "kept")),
            "5.17 bits per weight: 1 layer at 9.00 (sparse bitmask, bfloat16, with the places of what is kept), b at "
            "0.00900 (not compressed)",
        ),
        ((layer("q", "float32", 32_000, "changed"),), ""),
        ((), ""),
    ],
)
def test_what_bits_per_weight_are_made_of(rows: tuple[LedgerRow, ...], line: str) -> None:
    assert bits_line([stage(*rows)]) == line
    assert conditions([stage(*rows)]) == ([line] if line else [])


def test_a_pass_that_compressed_nothing_leaves_what_the_one_before_stored() -> None:
    later = stage(layer("q", "int4 g64 asym", 4310, "kept"), layer("k", "int4 g64 asym", 4310, "kept"), bits=4.5)
    assert bits_line([stage(FIRST, SECOND), later]).startswith("4.50 bits per weight: 2 layers at 4.31 (int4")


@pytest.mark.parametrize(
    ("format", "nonzeros", "line"),
    [
        ("sparse bitmask, bfloat16", 50, "zeros: 50.0% of 100 weights"),
        ("sparse bitmask, bfloat16", None, ""),
        ("int4 g64 asym", 50, ""),
    ],
)
def test_zeros_are_told_where_layers_are_sparse(format: str, nonzeros: int | None, line: str) -> None:
    row = layer("q", format, 9000)
    made = Stage(name="a", nbytes=1, weights=100, bits_per_weight=1, nonzeros=nonzeros, ledger=(row,))
    assert zeros_line([made]) == line
    assert any(found.startswith("zeros") for found in conditions([made])) == bool(line)
