"""The end of a run in a few lines: where the output is, how to load it, and what was checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from effcli.reports.columns import SLOWER, exported_size
from effcli.reports.final import final_rows
from effcli.reports.report import Check, Report
from effcli.reports.units import ratio, size

_MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}", None: "-"}


def result_lines(report: Report, output: Path, exports: Path, verbose: bool = False) -> list[str]:
    """What stands below the table of a run that wrote `output`, and its exports to subfolders of `exports`.

    verbose: with the figures behind each check.
    """
    lines = [_written(report, output)]
    lines += [f"exported to {exports / found.target}, {exported_size(found)}" for found in report.exports]
    lines += _loading(report, json.dumps(str(output), ensure_ascii=False))
    if report.checks:
        lines += check_lines(report.checks, verbose)
        if not verbose and any(check.numbers for check in report.checks):
            lines.append(f"figures: effcli verify --verbose {output}")
    return lines


def summary_lines(report: Report, output: Path) -> list[str]:
    """The end of a quiet run that wrote `output`: whether it was verified, and where it is."""
    failed = [check.text for check in report.checks if check.passed is False]
    passed = [check.text for check in report.checks if check.passed]
    if failed:
        verified = f"NOT VERIFIED: {'; '.join(failed)}"
    else:
        verified = f"verified: {'; '.join(passed)}" if passed else f"not verified: see effcli verify {output}"
    return [verified, _written(report, output)]


def _written(report: Report, output: Path) -> str:
    return f"written to {output}, {size(report.stages[-1].nbytes)}"


def _loading(report: Report, folder: str) -> list[str]:
    """The functions that load `folder`, a literal of Python, and what each is good for."""
    packed = any(row.status == "compressed" for row in final_rows(report.stages).values())
    if not report.loader or report.layout == "graph" or not packed:
        return [f"load it: {report.loader}({folder})"] if report.loader else []
    lines = [f"load it: effcli.load({folder})", f"  computes with packed weights; {_speed(report)}"]
    if report.layout == "standard" and report.loader != "effcli.load":
        lines.append(f"load it: {report.loader}({folder})")
        lines.append("  unpacks the weights: as large in memory as the input; speed not measured")
    return lines


def _speed(report: Report) -> str:
    """How fast the packed kernels are, as measured in this run next to the input."""
    before, after = report.stages[0].speed, report.stages[-1].speed
    if before is None or after is None:
        return "speed not measured"
    decode = after.decode_tokens_per_second / before.decode_tokens_per_second
    prefill = after.prefill_tokens_per_second / before.prefill_tokens_per_second
    slower = "only " if prefill < SLOWER else ""
    return f"speed: decode {ratio(decode)}, prefill {slower}{ratio(prefill)}"


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


__all__ = ["check_lines", "result_lines", "summary_lines"]
