"""One run in one sentence, for a reader who decides and does not measure."""

from __future__ import annotations

import math
from pathlib import PurePath

from effcli.reports import units
from effcli.reports.columns import SLOWER
from effcli.reports.html_quality import data_names
from effcli.reports.latencies import speedup
from effcli.reports.report import Quality, Report

_LOADED = {
    "standard": "it loads with transformers",
    "effcli": "it loads with effcli.load, not with transformers",
    "graph": "it loads with effcli.load",
}


def sentence(report: Report) -> str:
    """What became of size and quality, and where the result runs."""
    name = PurePath(report.model).name or report.model
    parts = [_size(report, name), _quality(report), *_where(report)]
    return "; ".join(part for part in parts if part) + "."


def _size(report: Report, name: str) -> str:
    first, last = report.stages[0], report.stages[-1]
    if len(report.stages) == 1:
        return f"{name} takes {units.size(first.nbytes)} and was measured, not compressed"
    before, after = units.size(first.nbytes), units.size(last.nbytes)
    if not last.nbytes or first.nbytes == last.nbytes:
        return f"{name} takes {after}, as before"
    if last.nbytes > first.nbytes:
        return f"{name} is {units.ratio(last.nbytes / first.nbytes)} larger: {after} instead of {before}"
    return f"{name} is {units.ratio(first.nbytes / last.nbytes)} smaller: {after} instead of {before}"


def _quality(report: Report) -> str:
    if len(report.stages) == 1:
        return ""
    before, after = report.stages[0].quality or Quality(), report.stages[-1].quality or Quality()
    names = data_names(report)
    found = []
    if before.perplexity is not None and after.perplexity is not None:
        on = f" on {names['perplexity']}" if "perplexity" in names else ""
        change = units.change(after.perplexity, before.perplexity)
        figures = f"{units.significant(after.perplexity, 4)} instead of {units.significant(before.perplexity, 4)}"
        found.append(f"its perplexity{on} is {figures}" + (f" ({change})" if change else ""))
    one, two = before.classification, after.classification
    for what, key, old, new in (
        ("questions", "accuracy", before.accuracy, after.accuracy),
        ("images", "top1", one.top1 if one else None, two.top1 if two else None),
    ):
        if old is not None and new is not None:
            of = f"the {what} in {names[key]}" if key in names else f"the {what}"
            figures = units.fraction(new) if new == old else f"{units.fraction(new)} instead of {units.fraction(old)}"
            found.append(f"it gets {figures} of {of} right" + (", as before" if new == old else ""))
    if not found and two and two.agreement is not None:
        found.append(f"its answers agree with the original's on {units.fraction(two.agreement)} of the inputs")
    return "; ".join(found) or "its quality was not measured"


def _where(report: Report) -> list[str]:
    found = [] if report.layout is None or len(report.stages) == 1 else [_LOADED[report.layout]]
    if report.exports:
        found.append(f"it is exported to {', '.join(made.target for made in report.exports)}")
    first, last = report.stages[0], report.stages[-1]
    if last is not first and first.speed and last.speed and first.speed.decode_tokens_per_second:
        ratio = last.speed.decode_tokens_per_second / first.speed.decode_tokens_per_second
        text = f"with effcli.load on {last.speed.device} it writes text {_as_fast(ratio)}"
        prefill = last.speed.prefill_tokens_per_second / (first.speed.prefill_tokens_per_second or math.inf)
        found.append(text + (f" and reads prompts {units.ratio(prefill)} as fast" if 0 < prefill < SLOWER else ""))
    elif last is not first and first.latencies and last.latencies:
        new = min(last.latencies, key=lambda latency: latency.milliseconds)
        faster = speedup(new, first)
        if faster is not None:
            taken = f"one input takes {units.significant(new.milliseconds)} ms in {new.runtime}"
            found.append(f"on {new.device} {taken}, {_as_fast(faster)}")
    return found


def _as_fast(ratio: float) -> str:
    return f"{units.ratio(ratio)} as fast as before"


__all__ = ["sentence"]
