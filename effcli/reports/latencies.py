"""Latencies of a network that reads no text, set side by side: which runtimes of which stages belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from effcli.reports import units

if TYPE_CHECKING:
    from effcli.reports.report import Latency, Stage


def runtime_names(stages: Iterable[Stage]) -> list[str]:
    """What the latencies of several stages stand side by side under.

    A runtime's first word, so that 'onnxruntime float32' stands beside 'onnxruntime int8'; its whole name where one
    stage was timed in two runtimes of one first word.
    """
    timed = [[found.runtime for found in stage.latencies] for stage in stages]
    words = [[_word(runtime) for runtime in runtimes] for runtimes in timed]
    shared = {word for found in words for word in found if found.count(word) > 1}
    every = (runtime for runtimes in timed for runtime in runtimes)
    return list(dict.fromkeys(name if _word(name) in shared else _word(name) for name in every))


def latency_in(stage: Stage, name: str) -> Latency | None:
    """The latency of `stage` that stands under `name`, one of `runtime_names`; None where it was not timed so."""
    same = [found for found in stage.latencies if found.runtime == name]
    kin = [found for found in stage.latencies if _word(found.runtime) == name]
    return next(iter(same or kin), None)


def speedup(latency: Latency, first: Stage) -> float | None:
    """How many times as fast as the input `first`: in the same runtime, or in the only one with its first word."""
    same = [other for other in first.latencies if other.runtime == latency.runtime]
    kin = [other for other in first.latencies if _word(other.runtime) == _word(latency.runtime)]
    before = same[0] if same else kin[0] if len(kin) == 1 else None
    return before.milliseconds / latency.milliseconds if before and latency.milliseconds else None


def conditions(stages: Sequence[Stage]) -> list[str]:
    """Under what conditions the latencies were taken: one line for all runtimes that were timed alike."""
    alike: dict[str, list[str]] = {}
    for stage in stages:
        for found in stage.latencies:
            how = f"{found.device}, {units.count(found.threads, 'thread')}, median"
            alike.setdefault(how, []).append(found.runtime)
    return [f"latency of {', '.join(dict.fromkeys(names))}: one input, {how}" for how, names in alike.items()]


def _word(runtime: str) -> str:
    return runtime.split(" ", 1)[0]
