"""The table of a run, column by column, before it is known where it will be shown.

One row for the input and one per pass. A column without a single figure is left out. Each cell has its figure and
a note below it, which sets the figure against the input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from effcli.reports import latencies, units
from effcli.reports.final import bits_line, zeros_line

if TYPE_CHECKING:
    from effcli.reports.report import Classification, Exported, Latency, Report, Speed, Stage, Training

    Maker = Callable[[Stage, Stage], "Cell | None"]

Tone = Literal["", "bad"]
EMPTY_TEXT = "-"
# Below this ratio a speed is a step back: two runs of one kernel differ by a few percent.
SLOWER = 0.95


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
    makers: list[tuple[str, str, str, Maker]] = [
        ("size", "size", "", _size),
        ("bits", "bits", "/weight", _bits),
        ("perplexity", "perplexity", "", _perplexity),
        ("kl", "KL", "nats", _kl),
        ("accuracy", "accuracy", "", _accuracy),
        ("top1", "top-1", "", _top1),
        ("top5", "top-5", "", _top5),
        ("agreement", "agreement", "", _agreement),
        ("sqnr", "SQNR", "dB", _sqnr),
        *_macs_makers(report.stages),
        *_latency_makers(report.stages),
        ("prefill", "prefill", "tok/s", _prefill),
        ("decode", "decode", "tok/s", _decode),
        ("memory", "peak memory", "", _memory),
        ("seconds", "time", "", _seconds),
        ("kernel", "kernel", "", _kernel),
    ]
    first = report.stages[0]
    step = Column("step", "step", "", tuple(map(_step, report.stages)), numeric=False)
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


def became(stage: Stage) -> str:
    """What became of the layers of one step, in words: '20 layers compressed, 1 kept'."""
    number = Counter(row.status for row in stage.ledger)
    done = [f"{units.count(number[how], 'layer')} {how}" for how in ("compressed", "changed") if number[how]]
    return f"{', '.join(done) or 'no layer compressed'}, {number['kept']:,} kept"


def export_lines(report: Report) -> list[str]:
    """One line for each export: its size, how fast it runs, and what running it next to the checkpoint showed."""
    lines = []
    for found in report.exports:
        parts = [exported_size(found)]
        for latency in found.latencies:
            parts.append(f"{latency.runtime} {units.significant(latency.milliseconds)} ms")
        if found.speed is not None:
            prefill, decode = found.speed.prefill_tokens_per_second, found.speed.decode_tokens_per_second
            speeds = f"prefill {units.significant(prefill)} tok/s, decode {units.significant(decode)} tok/s"
            parts.append(f"{found.speed.kernel}: {speeds} with {units.count(found.speed.threads, 'thread')}")
        lines.append(f"{found.target}: " + "; ".join([*parts, *filter(None, [found.checked]), *found.remarks]))
    return lines


def exported_size(found: Exported) -> str:
    """The size of an export's files, and what fills them where they are no weights: '605 kB of C source'."""
    return f"{units.size(found.nbytes)} of {found.content}" if found.content else units.size(found.nbytes)


def training_text(training: Training) -> str:
    """How many steps, from what loss to what, and whose weights were kept."""
    parts = [units.count(training.steps, "step")]
    if training.curve:
        first, last = (units.significant(training.curve[at][1]) for at in (0, -1))
        parts.append(f"loss {first} to {last}")
    kept = f"the weights of step {training.kept:,} are kept" if training.kept else "no step made the error less"
    return f"{', '.join(parts)}; {kept}"


def conditions(stages: Sequence[Stage]) -> list[str]:
    """What the bits per weight are made of, and how the figures were taken: on how many tokens, on what."""
    found = [line for line in (bits_line(stages), zeros_line(stages)) if line]
    for stage in stages:
        quality, speed = stage.quality, stage.speed
        classified = quality.classification if quality else None
        if quality and quality.tokens and (quality.perplexity is not None or quality.kl is not None):
            found.append(f"perplexity and KL over {units.count(quality.tokens, 'token')}")
        if quality and quality.examples and quality.accuracy is not None:
            found.append(f"accuracy over {units.count(quality.examples, 'example')}")
            found += [
                f"{stage.name}: {units.fraction(task.accuracy, task.accuracy_stderr)} of "
                f"{units.count(task.examples, 'example')} in {task.name}"
                for task in quality.tasks
            ]
        if classified and classified.images:
            found.append(f"classification of {units.count(classified.images, 'image')}")
        if speed:
            threads = units.count(speed.threads, "thread")
            found.append(f"speed on {speed.device}, {threads}, prompt of {units.count(speed.prefill_tokens, 'token')}")
    return list(dict.fromkeys([*found, *latencies.conditions(stages)]))


def latency_cell(latency: Latency, stage: Stage, first: Stage) -> Cell:
    """Milliseconds for one input, and how many times as fast as the network that came in."""
    ratio = None if stage is first else latencies.speedup(latency, first)
    text = units.significant(latency.milliseconds)
    return Cell(text) if ratio is None else Cell(text, units.ratio(ratio), _slower(ratio))


def _step(stage: Stage) -> Cell:
    """The pass that was carried out, and below it the one that chose its options."""
    return Cell(stage.name, f"by {stage.search.name}" if stage.search and stage.search.name else "")


def _size(stage: Stage, first: Stage) -> Cell | None:
    if stage is first or not stage.nbytes:
        return Cell(units.size(stage.nbytes))
    ratio = first.nbytes / stage.nbytes
    return Cell(units.size(stage.nbytes), units.ratio(ratio), "bad" if ratio < 1 else "")


def _bits(stage: Stage, first: Stage) -> Cell | None:
    return Cell(units.bits(stage.bits_per_weight))


def _perplexity(stage: Stage, first: Stage) -> Cell | None:
    value = stage.quality.perplexity if stage.quality else None
    before = first.quality.perplexity if first.quality else None
    if value is None:
        return None
    # Four digits: at a perplexity of 29.35 the third decides between two good methods.
    note = "" if stage is first or before is None else units.change(value, before)
    return Cell(units.significant(value, 4), note, "" if math.isfinite(value) else "bad")


def _kl(stage: Stage, first: Stage) -> Cell | None:
    if stage.quality is None or stage.quality.kl is None:
        return None
    return Cell(units.significant(stage.quality.kl))


def _accuracy(stage: Stage, first: Stage) -> Cell | None:
    quality, before = stage.quality, first.quality
    if quality is None or quality.accuracy is None:
        return None
    reference = before.accuracy if before and stage is not first else None
    return _fraction(quality.accuracy, reference, quality.accuracy_stderr)


def _top1(stage: Stage, first: Stage) -> Cell | None:
    found, before = _classification(stage), _classification(first)
    if found is None or found.top1 is None:
        return None
    return _fraction(found.top1, before.top1 if before and stage is not first else None, found.top1_stderr)


def _top5(stage: Stage, first: Stage) -> Cell | None:
    found, before = _classification(stage), _classification(first)
    if found is None or found.top5 is None:
        return None
    cell = _fraction(found.top5, before.top5 if before and stage is not first else None, None)
    # Its standard error is not recorded: nothing says whether a loss is one.
    return Cell(cell.text, cell.note)


def _agreement(stage: Stage, first: Stage) -> Cell | None:
    found = _classification(stage)
    return None if found is None or found.agreement is None else Cell(units.fraction(found.agreement))


def _sqnr(stage: Stage, first: Stage) -> Cell | None:
    found = _classification(stage)
    return None if found is None or found.sqnr is None else Cell(units.significant(found.sqnr))


def _classification(stage: Stage) -> Classification | None:
    return stage.quality.classification if stage.quality else None


def _fraction(value: float, before: float | None, stderr: float | None) -> Cell:
    text = units.fraction(value, stderr)
    if before is None:
        return Cell(text)
    # Within two standard errors of one measurement a loss is not told from chance.
    lost = before - value > 2 * (stderr or 0)
    return Cell(text, units.points(value, before), "bad" if lost else "")


def _macs_makers(stages: Sequence[Stage]) -> list[tuple[str, str, str, Maker]]:
    """A column of multiplications, beside those of speed, where a step takes some of them away."""
    fewer = any((stage.macs or 0) < (first.macs or 0) for first, stage in pairwise(stages) if stage.macs is not None)
    return [("macs", "MACs", "", _macs)] if fewer else []


def _macs(stage: Stage, first: Stage) -> Cell | None:
    if stage.macs is None:
        return None
    note = "" if stage is first or not first.macs else units.ratio(first.macs / max(stage.macs, 1))
    return Cell(units.quantity(stage.macs), note)


def _latency_makers(stages: Sequence[Stage]) -> list[tuple[str, str, str, Maker]]:
    """One column per runtime, called by its name where there are several."""
    names = latencies.runtime_names(stages)

    def maker(name: str) -> Maker:
        def make(stage: Stage, first: Stage) -> Cell | None:
            found = latencies.latency_in(stage, name)
            return latency_cell(found, stage, first) if found else None

        return make

    return [(f"latency {name}", name if len(names) > 1 else "latency", "ms", maker(name)) for name in names]


def _prefill(stage: Stage, first: Stage) -> Cell | None:
    return _rate(stage, first, lambda speed: speed.prefill_tokens_per_second)


def _decode(stage: Stage, first: Stage) -> Cell | None:
    return _rate(stage, first, lambda speed: speed.decode_tokens_per_second)


def _rate(stage: Stage, first: Stage, of: Callable[[Speed], float]) -> Cell | None:
    if stage.speed is None:
        return None
    rate = of(stage.speed)
    if stage is first or first.speed is None or not of(first.speed):
        return Cell(units.significant(rate))
    ratio = rate / of(first.speed)
    return Cell(units.significant(rate), units.ratio(ratio), _slower(ratio))


def _slower(ratio: float) -> Tone:
    return "bad" if ratio < SLOWER else ""


def _memory(stage: Stage, first: Stage) -> Cell | None:
    return None if stage.peak_memory is None else Cell(units.size(stage.peak_memory))


def _seconds(stage: Stage, first: Stage) -> Cell | None:
    return None if stage.seconds is None else Cell(units.duration(stage.seconds))


def _kernel(stage: Stage, first: Stage) -> Cell | None:
    return None if stage.speed is None else Cell(kernel_text(stage.speed))
