"""The end of a run in a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from effcli.reports.report import Check, Exported, Report
from effcli.reports.result import check_lines, result_lines


def test_where_it_is_how_it_loads_and_what_was_checked(report: Report) -> None:
    made = report.model_copy(update={"exports": (Exported(target="onnx", nbytes=12_000_000),)})
    lines = result_lines(made, Path("out/small"), Path("out/small/exports"))
    assert lines[0].startswith("written: out/small, ")
    assert lines[1:] == [
        "exported: out/small/exports/onnx, 12.0 MB",
        'load it: transformers.AutoModelForCausalLM.from_pretrained("out/small")',
        "verified:",
        "  \N{CHECK MARK} transformers 5.23.0 loads it and computes the same logits as effcli",
        "figures: effcli verify --verbose out/small",
    ]
    assert max(map(len, lines)) <= 80, "figures are not in the way"
    verbose = result_lines(made, Path("out/small"), Path("out/small/exports"), verbose=True)
    assert verbose[-1] == "    largest logit difference 2.1e-05 (1.0e-06 relative), top-1 100.0%"


def test_a_run_that_measured_nothing(report: Report) -> None:
    bare = report.model_copy(update={"checks": (), "verified": None})
    assert len(result_lines(bare, Path("out"), Path("out/exports"))) == 2


@pytest.mark.parametrize(("passed", "second"), [(True, "\N{CHECK MARK} b"), (None, "- b")])
def test_what_was_found(passed: bool | None, second: str) -> None:
    lines = check_lines([Check(text="a", passed=True), Check(text="b", passed=passed)])
    assert lines == ["verified:", "  \N{CHECK MARK} a", f"  {second}"]


def test_what_failed_comes_first() -> None:
    checks = [Check(text="a", passed=True), Check(text="b", passed=False, numbers="3"), Check(text="c", passed=False)]
    assert check_lines(checks) == ["NOT VERIFIED: b", "  \N{BALLOT X} c", "  \N{CHECK MARK} a"]
    assert check_lines(checks, verbose=True)[1] == "    3"
