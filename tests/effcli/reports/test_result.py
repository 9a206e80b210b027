"""The end of a run in a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from effcli.reports.report import Check, Exported, Report
from effcli.reports.result import check_lines, result_lines, summary_lines


def test_where_it_is_how_it_loads_and_what_was_checked(report: Report) -> None:
    made = report.model_copy(update={"layout": "standard", "exports": (Exported(target="onnx", nbytes=12_000_000),)})
    lines = result_lines(made, Path("out/small"), Path("out/small/exports"))
    assert lines[0].startswith("written to out/small, ")
    assert lines[1:] == [
        "exported to out/small/exports/onnx, 12.0 MB",
        'load it: effcli.load("out/small")',
        "  computes with packed weights; speed: decode 1.87x, prefill 0.97x",
        'load it: transformers.AutoModelForCausalLM.from_pretrained("out/small")',
        "  unpacks the weights: as large in memory as the input; speed not measured",
        "verified:",
        "  \N{CHECK MARK} transformers 5.23.0 loads it; its logits equal those of effcli",
        "figures: effcli verify --verbose out/small",
    ]
    assert max(map(len, lines)) <= 80, "figures are not in the way"
    verbose = result_lines(made, Path("out/small"), Path("out/small/exports"), verbose=True)
    assert verbose[-1] == "    largest logit difference 2.1e-05 (1.0e-06 relative), top-1 100.0%"


def test_a_run_that_measured_nothing(report: Report) -> None:
    bare = report.model_copy(update={"checks": (), "verified": None})
    assert len(result_lines(bare, Path("out"), Path("out/exports"))) == 3
    assert summary_lines(bare, Path("out"))[0] == "not verified: see effcli verify out"


@pytest.mark.parametrize(
    ("layout", "ledger", "lines"),
    [
        ("effcli", True, ['load it: effcli.load("out")', "  computes with packed weights; speed not measured"]),
        ("standard", False, ['load it: load("out")']),
        ("graph", True, ['load it: load("out")']),
    ],
)
def test_what_loads_it(layout: str, ledger: bool, lines: list[str], report: Report) -> None:
    stages = [
        stage.model_copy(update={"speed": None, "ledger": stage.ledger if ledger else ()}) for stage in report.stages
    ]
    made = report.model_copy(update={"layout": layout, "loader": "load", "stages": tuple(stages), "checks": ()})
    assert result_lines(made, Path("out"), Path("exports"))[1:] == lines


def test_a_slower_prefill_is_said(report: Report) -> None:
    last = report.stages[-1]
    assert last.speed is not None
    slow = last.model_copy(update={"speed": last.speed.model_copy(update={"prefill_tokens_per_second": 600.0})})
    made = report.model_copy(update={"layout": "standard", "stages": (*report.stages[:-1], slow)})
    assert "prefill only 0.49x" in "".join(result_lines(made, Path("out"), Path("exports")))


def test_a_quiet_run_ends_in_two_lines(report: Report) -> None:
    verified, written = summary_lines(report, Path("out"))
    assert verified == "verified: transformers 5.23.0 loads it; its logits equal those of effcli"
    assert written.startswith("written to out, ")
    checks = (Check(text="a", passed=True), Check(text="b", passed=False), Check(text="c"))
    assert summary_lines(report.model_copy(update={"checks": checks}), Path("out"))[0] == "NOT VERIFIED: b"


@pytest.mark.parametrize(("passed", "second"), [(True, "\N{CHECK MARK} b"), (None, "- b")])
def test_what_was_found(passed: bool | None, second: str) -> None:
    lines = check_lines([Check(text="a", passed=True), Check(text="b", passed=passed)])
    assert lines == ["verified:", "  \N{CHECK MARK} a", f"  {second}"]


def test_what_failed_comes_first() -> None:
    checks = [Check(text="a", passed=True), Check(text="b", passed=False, numbers="3"), Check(text="c", passed=False)]
    assert check_lines(checks) == ["NOT VERIFIED: b", "  \N{BALLOT X} c", "  \N{CHECK MARK} a"]
    assert check_lines(checks, verbose=True)[1] == "    3"
