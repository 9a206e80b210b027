"""The end of a run in a few lines: where the output is, how to load it, and what was checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from effcli.reports.columns import exported_size
from effcli.reports.report import Check, Report
from effcli.reports.units import size

_MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}", None: "-"}


def result_lines(report: Report, output: Path, exports: Path, verbose: bool = False) -> list[str]:
    """What stands below the table of a run that wrote `output`, and its exports to subfolders of `exports`.

    verbose: with the figures behind each check.
    """
    lines = [f"written: {output}, {size(report.stages[-1].nbytes)}"]
    lines += [f"exported: {exports / found.target}, {exported_size(found)}" for found in report.exports]
    if report.loader:
        lines.append(f"load it: {report.loader}({json.dumps(str(output), ensure_ascii=False)})")
    if report.checks:
        lines += check_lines(report.checks, verbose)
        if not verbose and any(check.numbers for check in report.checks):
            lines.append(f"figures: effcli verify --verbose {output}")
    return lines


def check_lines(checks: Iterable[Check], verbose: bool = False) -> list[str]:
    """What was found, one line for each, what failed first; verbose: with its figures in a line below."""
    lines: list[str] = []
    for check in sorted(checks, key=lambda check: check.passed is not False):
        failed = check.passed is False and not lines
        if not failed and not lines:
            lines.append("verified:")
        lines.append(f"NOT VERIFIED: {check.text}" if failed else f"  {_MARKS[check.passed]} {check.text}")
        if verbose and check.numbers:
            lines.append(f"    {check.numbers}")
    return lines


__all__ = ["check_lines", "result_lines"]
