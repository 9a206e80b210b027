"""What `effcli eval` prints of a language model and of a classifier."""

from __future__ import annotations

import io

from rich.console import Console
from vision_report import classification, quality

from effcli.reports.report import Classification, Quality
from effcli.reports.screen import quality_table


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
