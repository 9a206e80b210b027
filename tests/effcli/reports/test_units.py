"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from effcli.reports import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (29.35, "29.4"),
        (1234.5, "1234"),
        (9.999, "10.0"),
        (99.96, "100"),
        (0.0987, "0.0987"),
        (0.00123, "0.00123"),
        (0.0000213, "2.1e-05"),
        (-2.5, "-2.50"),
        (1e12, "1.0e+12"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_significant(value: float, text: str) -> None:
    assert units.significant(value) == text


def test_figures() -> None:
    shown = [units.figure(value) for value in (0.9325, 29.3497, 4584, 9999.6, 10_000, 5_985_696, float("nan"))]
    assert shown == ["0.9325", "29.35", "4584", "10000", "10,000", "5,985,696", "nan"]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (269_060_552, "269 MB"),
        (1_230_000_000, "1.23 GB"),
        (4.2e15, "4200 TB"),
    ],
)
def test_size(nbytes: float, text: str) -> None:
    assert units.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.42, "0.42s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (200.2, "3m20s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.inf, "inf"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "reference", "text"),
    [
        (34.1, 29.35, "+16.2%"),
        (29.35, 29.35, "0.0%"),
        (29.349, 29.35, "0.0%"),
        (1, 2, "-50.0%"),
        (300, 1, "+29900%"),
        (1, 0, ""),
        (math.inf, 1, ""),
    ],
)
def test_change(value: float, reference: float, text: str) -> None:
    assert units.change(value, reference) == text


def test_fractions() -> None:
    assert units.fraction(0.412) == "41.2%"
    assert units.fraction(0.412, 0.0102) == "41.2±1.0%"
    assert units.points(0.399, 0.412) == "-1.3 pt"
    assert units.points(0.412, 0.41199) == "0.0 pt"


def test_the_rest() -> None:
    assert units.ratio(2.364) == "2.36x"
    assert units.ratio(0.971) == "0.97x"
    assert units.ratio(12.34) == "12.3x"
    assert units.error(0.0042) == "4.2e-03"
    assert units.error(0) == "0"
    assert units.count(1, "layer") == "1 layer"
    assert (units.count(1, "batch"), units.count(2, "batch"), units.count(3, "class")) == (
        "1 batch",
        "2 batches",
        "3 classes",
    )
    assert units.count(1234, "token") == "1,234 tokens"
    assert (units.count(1, "epoch"), units.count(2, "epoch")) == ("1 epoch", "2 epochs")
    assert units.shape((576, 1536)) == "576 x 1536"
