"""A report is written whole, read back equal, and refused with a reason when it cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from effcli.errors import CheckpointError, OutputError
from effcli.reports.report import (
    FILE_NAME,
    SCHEMA_VERSION,
    ActivationRange,
    Classification,
    ClassRow,
    Histogram,
    Quality,
    Record,
    Report,
)


def test_round_trip(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    assert Report.read(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_an_infinite_perplexity_is_not_read_back_as_unmeasured(bare_report: Report, tmp_path: Path) -> None:
    lost = bare_report.stages[1].model_copy(update={"quality": Quality(perplexity=math.inf, kl=math.nan)})
    bare_report.model_copy(update={"stages": (bare_report.stages[0], lost)}).write(tmp_path)
    quality = Report.read(tmp_path).stages[1].quality
    assert quality is not None
    assert quality.perplexity == math.inf
    assert quality.kl is not None and math.isnan(quality.kl)


def test_another_schema_version_is_named(report: Report, tmp_path: Path) -> None:
    report.model_copy(update={"schema_version": SCHEMA_VERSION + 1}).write(tmp_path)
    with pytest.raises(CheckpointError, match=f"schema version {SCHEMA_VERSION + 1}") as caught:
        Report.read(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        json.dumps({"schema_version": SCHEMA_VERSION}),
        json.dumps({"schema_version": SCHEMA_VERSION, "stages": "none"}),
    ],
)
def test_a_corrupt_file_is_a_user_error(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a report"):
        Report.read(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not a report"):
        Report.read(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=FILE_NAME):
        Report.read(tmp_path)


def test_a_full_disk_leaves_the_old_report(
    report: Report, bare_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(tmp_path)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="no space left"):
        bare_report.write(tmp_path)
    monkeypatch.undo()
    assert Report.read(tmp_path) == report


def test_a_run_has_at_least_its_input(bare_report: Report) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate(bare_report.model_dump() | {"stages": []})


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (ActivationRange, {"name": "a", "edges": [0, 1, 2], "counts": [3, -1], "low": 0, "high": 1, "observer": "x"}),
        (Histogram, {"layer": "a", "edges": [0, 1, 2], "before": [3, -1], "after": [1, 1]}),
        (ClassRow, {"name": "a", "images": 4, "recall": 1.5, "precision": None}),
        (ClassRow, {"name": "a", "images": -4, "recall": 0.5, "precision": None}),
        (Classification, {"images": 4, "confusion": [[1, -1], [2, 2]]}),
        (Classification, {"images": 4, "top1": -0.1}),
        (Quality, {"accuracy": 2.0, "examples": 3}),
    ],
)
def test_counts_and_fractions_that_cannot_be(kind: type[Record], data: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"greater than or equal to 0|less than or equal to 1"):
        kind.model_validate(data)
