"""What `effcli eval` prints of a language model and of a classifier."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from vision_report import classification, quality

from effcli import exporters, passes
from effcli.options import Options
from effcli.reports.report import Classification, Quality
from effcli.reports.screen import options_table, quality_table, records_table, targets_table


def drawn(found: Quality) -> list[str]:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(quality_table(found))
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_a_language_model() -> None:
    assert drawn(Quality(perplexity=30.8, tokens=34304)) == ["perplexity 30.80 34,304 tokens"]


def test_a_classifier() -> None:
    lines = drawn(quality(2))
    assert lines[:4] == [
        "top-1 87.4±0.3% 10,000 images",
        "top-5 99.3% 10,000 images",
        "agreement 96.4% same class as the reference's",
        "SQNR 24.8 dB outputs against the reference's",
    ]
    assert lines[5] == "10 classes" and lines[6] == "class recall precision images"
    assert "cat 71.2% 77.6% 1,000" in lines


def test_only_what_was_measured() -> None:
    assert drawn(Quality(classification=Classification(images=1, agreement=0.5))) == [
        "agreement 50.0% same class as the reference's"
    ]


def test_of_very_many_classes_the_worst() -> None:
    count = 60
    matrix = [[k if j == k else (60 - k) * (j == 0) for j in range(count)] for k in range(count)]
    matrix[59] = [0] * count
    lines = drawn(Quality(classification=classification(matrix, [f"c{k}" for k in range(count)])))
    assert "40 of 60 classes, lowest recall first" in lines
    shown = [line.split()[0] for line in lines if line.startswith("c") and not line.startswith("class")]
    # The first class has 60 of its 60 images taken for itself; the last was never tested.
    assert shown == [f"c{k}" for k in range(1, 41)]


class Part(Options):
    """As `effcli plan` and an export to C show them."""

    layers: str
    count: int
    shape: tuple[int, ...]
    format: str
    nbytes: int
    ram: int
    macs: int | None = None
    status: str = ""


PARTS = [
    Part(layers=name, count=30, shape=(1536, 576), format="int4 g64 asym", nbytes=nbytes, ram=1024, status="compress")
    for name, nbytes in (
        ("model.layers.*.self_attn.v_proj", 12_300_000),
        ("model.layers.*.mlp.down_proj", 400),
        ("lm_head", 56_600_000),
    )
]


@pytest.mark.parametrize("width", [80, 100])
def test_names_of_layers_go_on_behind_a_dot(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(records_table("", PARTS))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    first = [line.split(" ")[0] for line in lines[2:]]
    assert "".join(first) == "".join(part.layers for part in PARTS)
    whole = {part for name in PARTS for part in name.layers.split(".")}
    assert {word for part in first for word in part.split(".")} - {""} == whole, "no word is cut"


class Task(Options):
    """A layer of firmware."""

    layer: str
    kind: str
    ram: int
    flash: int
    macs: int
    instructions: int


def test_names_without_dots_go_on_behind_an_underscore() -> None:
    """At 80 columns a table of firmware keeps every figure."""
    name = "stage2_depthwise_convolution_with_a_name_that_is_long"
    row = Task(layer=name, kind="convolution", ram=15_700, flash=37_400, macs=18_063_360, instructions=40_123_456)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(records_table("", [row]))
    assert isinstance(console.file, io.StringIO)
    header, _, first, *_ = lines = console.file.getvalue().splitlines()
    assert header.split() == ["layer", "kind", "RAM", "flash", "MACs", "instructions"]
    assert first.split()[1:] == ["convolution", "15.7", "kB", "37.4", "kB", "18,063,360", "40,123,456"]
    assert "".join(line.split()[0] for line in lines[2:]) == name


def test_sizes_have_units_and_columns_are_called_what_they_hold() -> None:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(records_table("", PARTS))
    assert isinstance(console.file, io.StringIO)
    header, _, first, *_ = console.file.getvalue().splitlines()
    assert header.split() == ["layer", "count", "shape", "format", "size", "RAM", "status"]
    assert "12.3 MB" in first and "1.02 kB" in first


@pytest.mark.parametrize("width", [80, 100])
def test_the_options_of_export_targets(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(targets_table({name: exporters.load(name) for name in exporters.TARGETS}))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for name in exporters.TARGETS:
        assert f"--to {name}" in text
    assert "--max-ram" in text and "--dequantize" in text and "--precision" in text
    assert max(map(len, text.splitlines())) <= width


def test_common_options_stand_before_rare_ones() -> None:
    for name in passes.PASSES:
        options = passes.load(name)
        assert set(options.rare) <= set(options.model_fields), name
        console = Console(width=80, file=io.StringIO(), color_system=None)
        console.print(options_table(name, "", options))
        assert isinstance(console.file, io.StringIO)
        common, *rare = console.file.getvalue().split("rare options")
        listed = [[line.split(" ")[0] for line in part.splitlines()] for part in (common, *rare)]
        assert bool(rare) == bool(options.rare)
        assert set(options.rare) <= set(listed[-1])
        assert (set(options.model_fields) - set(options.rare)) <= set(listed[0])
