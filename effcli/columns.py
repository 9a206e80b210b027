"""The table of a run, column by column, before it is known where it will be shown.

One row for the input and one per pass. A column without a single figure is left out. Each cell has its figure and
a note below it, which sets the figure against the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from effcli import human

if TYPE_CHECKING:
    from effcli.report import Report, Speed, Stage

Tone = Literal["", "bad"]
EMPTY_TEXT = "-"


@dataclass(frozen=True)
class Cell:
    """A figure, what is to be said of it, and whether it is a step back."""

    text: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Column:
    """A column of the table: `cells` has one entry per stage, None where nothing was measured."""

    key: str
    title: str
    unit: str
    cells: tuple[Cell | None, ...]
    numeric: bool = True


def columns(report: Report) -> list[Column]:
    """The columns of `report` that hold at least one figure, in reading order."""
    makers: list[tuple[str, str, str, Callable[[Stage, Stage], Cell | None]]] = [
        ("size", "size", "", _size),
        ("bits", "bits", "/weight", _bits),
        ("perplexity", "perplexity", "", _perplexity),
        ("kl", "KL", "nats", _kl),
        ("accuracy", "accuracy", "", _accuracy),
        ("prefill", "prefill", "tok/s", _prefill),
        ("decode", "decode", "tok/s", _decode),
        ("memory", "peak memory", "", _memory),
        ("seconds", "time", "", _seconds),
        ("kernel", "kernel", "", _kernel),
    ]
    first = report.stages[0]
    step = Column("step", "step", "", tuple(Cell(stage.name) for stage in report.stages), numeric=False)
    found = [step]
    for key, title, unit, make in makers:
        cells = tuple(make(stage, first) for stage in report.stages)
        if any(cells):
            found.append(Column(key, title, unit, cells, numeric=key != "kernel"))
    return found


def kernel_text(speed: Speed) -> str:
    """The kernels behind the figures of `speed`, the one at prefill only where it is another."""
    if speed.prefill_kernel and speed.prefill_kernel != speed.kernel:
        return f"{speed.kernel}; prefill {speed.prefill_kernel}"
    return speed.kernel


def conditions(stages: Sequence[Stage]) -> list[str]:
    """Under what conditions the figures were taken: on how many tokens, with how many threads, on what."""
    found: list[str] = []
    for stage in stages:
        quality, speed = stage.quality, stage.speed
        if quality and quality.tokens and (quality.perplexity is not None or quality.kl is not None):
            found.append(f"perplexity and KL over {human.count(quality.tokens, 'token')}")
        if quality and quality.examples and quality.accuracy is not None:
            found.append(f"accuracy over {human.count(quality.examples, 'example')}")
        if speed:
            threads = human.count(speed.threads, "thread")
            found.append(f"speed on {speed.device}, {threads}, prompt of {human.count(speed.prefill_tokens, 'token')}")
    return list(dict.fromkeys(found))


def _size(stage: Stage, first: Stage) -> Cell | None:
    if stage is first or not stage.nbytes:
        return Cell(human.size(stage.nbytes))
    ratio = first.nbytes / stage.nbytes
    return Cell(human.size(stage.nbytes), human.ratio(ratio), "bad" if ratio < 1 else "")


def _bits(stage: Stage, first: Stage) -> Cell | None:
    return Cell(human.bits(stage.bits_per_weight))


def _perplexity(stage: Stage, first: Stage) -> Cell | None:
    value = stage.quality.perplexity if stage.quality else None
    before = first.quality.perplexity if first.quality else None
    if value is None:
        return None
    # Four digits: at a perplexity of 29.35 the third decides between two good methods.
    note = "" if stage is first or before is None else human.change(value, before)
    return Cell(human.significant(value, 4), note, "" if math.isfinite(value) else "bad")


def _kl(stage: Stage, first: Stage) -> Cell | None:
    if stage.quality is None or stage.quality.kl is None:
        return None
    return Cell(human.significant(stage.quality.kl))


def _accuracy(stage: Stage, first: Stage) -> Cell | None:
    quality, before = stage.quality, first.quality
    if quality is None or quality.accuracy is None:
        return None
    text = human.fraction(quality.accuracy, quality.accuracy_stderr)
    if stage is first or before is None or before.accuracy is None:
        return Cell(text)
    # Within two standard errors of one measurement a loss is not told from chance.
    lost = before.accuracy - quality.accuracy > 2 * (quality.accuracy_stderr or 0)
    return Cell(text, human.points(quality.accuracy, before.accuracy), "bad" if lost else "")


def _prefill(stage: Stage, first: Stage) -> Cell | None:
    return _rate(stage, first, lambda speed: speed.prefill_tokens_per_second)


def _decode(stage: Stage, first: Stage) -> Cell | None:
    return _rate(stage, first, lambda speed: speed.decode_tokens_per_second)


def _rate(stage: Stage, first: Stage, of: Callable[[Speed], float]) -> Cell | None:
    if stage.speed is None:
        return None
    rate = of(stage.speed)
    if stage is first or first.speed is None or not of(first.speed):
        return Cell(human.significant(rate))
    ratio = rate / of(first.speed)
    # Two runs of one kernel differ by a few percent.
    return Cell(human.significant(rate), human.ratio(ratio), "bad" if ratio < 0.95 else "")


def _memory(stage: Stage, first: Stage) -> Cell | None:
    return None if stage.peak_memory is None else Cell(human.size(stage.peak_memory))


def _seconds(stage: Stage, first: Stage) -> Cell | None:
    return None if stage.seconds is None else Cell(human.duration(stage.seconds))


def _kernel(stage: Stage, first: Stage) -> Cell | None:
    return None if stage.speed is None else Cell(kernel_text(stage.speed))
