"""Timing one call often enough to trust its median."""

from __future__ import annotations

import time
from collections.abc import Callable

from effcli.platform.rehearsal import now, skip


def repeated(call: Callable[[], object], seconds: float, fewest: int) -> list[float]:
    """Seconds of each call, one after another for about `seconds` and at least `fewest` times, after a warm-up."""
    call()
    times: list[float] = []
    begin = now()
    while len(times) < fewest or now() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if len(times) == fewest:
            skip(seconds - (now() - begin))
    return times
