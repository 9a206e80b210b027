"""Two runs set side by side: their figures, the layers in which they differ, and what makes them hard to compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Literal

from pydantic import Field

from effcli.options import Record
from effcli.reports import latencies, units
from effcli.reports.alike import calibrated_otherwise, other_input, quality_of, unlike
from effcli.reports.columns import kernel_text
from effcli.reports.final import final_rows
from effcli.reports.report import Classification, LedgerRow, Quality, Report, Stage

Unit = Literal["bytes", "ratio", "bits", "number", "fraction", "decibels", "milliseconds", "rate", "seconds"]
Error = Literal["output", "weight", ""]
_MILLISECONDS: Unit = "milliseconds"


class Side(Record):
    """One of the two runs, in words."""

    label: str = Field(description="the output directory, or the model where nothing was written")
    model: str
    steps: tuple[str, ...] = Field(description="the passes in order, with those that chose their options")
    kernel: str | None


class Figure(Record):
    """One measurement of both runs at their end; None where a run has not measured it."""

    key: str
    title: str
    unit: Unit
    a: float | None
    b: float | None
    obstacle: str = Field(default="", description="why the two cannot be set against each other, e.g. 'other text'")

    @property
    def change(self) -> str:
        """From A to B in words: relative, in points for a fraction, in dB for decibels; or why there is none.

        Empty where it says nothing.
        """
        if self.a is None or self.b is None:
            return ""
        if self.obstacle:
            return self.obstacle
        if self.unit == "fraction":
            return units.points(self.b, self.a)
        if self.unit == "decibels":
            # A ratio of logarithms says nothing, nor does a difference from infinity.
            return f"{self.b - self.a:+.1f} dB" if math.isfinite(self.b - self.a) else ""
        return units.change(self.b, self.a)


class LayerDifference(Record):
    """A layer that the two runs store differently or restore with another error; None on the side that lacks it."""

    name: str
    format_a: str | None
    format_b: str | None
    bits_a: float | None
    bits_b: float | None
    error: Error = Field(description="which error is told: one that both sides have measured where there is one")
    error_a: float | None
    error_b: float | None


class Comparison(Record):
    """What `effcli compare A B` found. `layers` has the largest ratio of errors first."""

    a: Side
    b: Side
    figures: tuple[Figure, ...]
    caveats: tuple[str, ...]
    layers: tuple[LayerDifference, ...]
    same_layers: int
    last_pass_alone: bool = Field(
        default=False, description="whether a layer went through several passes: its error is that of the last one"
    )


def compare(a: Report, b: Report) -> Comparison:
    """Compare the last stages of two runs. Figures that neither has measured are left out."""
    runtimes = latencies.runtime_names([a.stages[-1], b.stages[-1]])
    side_a, side_b = _figures(a, runtimes), _figures(b, runtimes)
    reasons = unlike(a, b, runtimes)
    marks = {key: reason.mark for reason in reversed(reasons) for key in reason.keys}
    figures = tuple(
        Figure(key=key, title=title, unit=unit, a=value, b=side_b[index][3], obstacle=marks.get(key, ""))
        for index, (key, title, unit, value) in enumerate(side_a)
        if value is not None or side_b[index][3] is not None
    )
    rows_a, rows_b = final_rows(a.stages), final_rows(b.stages)
    names = list(dict.fromkeys([*rows_a, *rows_b]))
    calibrated = calibrated_otherwise(a, b)
    found = [_difference(name, rows_a.get(name), rows_b.get(name), not calibrated) for name in names]
    layers = sorted((layer for layer in found if layer is not None), key=_distance, reverse=True)
    label_a, label_b = _labels(a, b)
    return Comparison(
        a=_side(a, label_a),
        b=_side(b, label_b),
        figures=figures,
        caveats=(
            *other_input(a, b),
            *(reason.sentence for reason in reasons),
            *([calibrated] if calibrated else []),
            *_remarks(a, b, marks, runtimes),
            *_unrecorded(a, label_a),
            *_unrecorded(b, label_b),
        ),
        layers=tuple(layers),
        same_layers=sum(layer is None for layer in found),
        last_pass_alone=_went_through_several(a) or _went_through_several(b),
    )


def _figures(report: Report, runtimes: Sequence[str]) -> list[tuple[str, str, Unit, float | None]]:
    first, last = report.stages[0], report.stages[-1]
    quality, speed = last.quality or Quality(), last.speed
    classified = quality.classification or Classification(images=0)
    timed = {name: latencies.latency_in(last, name) for name in runtimes}
    passes = report.stages[1:]
    seconds = [stage.seconds for stage in passes if stage.seconds is not None]
    memory = [stage.peak_memory for stage in passes if stage.peak_memory is not None]
    return [
        ("nbytes", "size", "bytes", last.nbytes),
        ("ratio", "ratio to its input", "ratio", first.nbytes / last.nbytes if last.nbytes else None),
        ("bits_per_weight", "bits per weight", "bits", last.bits_per_weight),
        ("perplexity", "perplexity", "number", quality.perplexity),
        ("kl", "KL, nats", "number", quality.kl),
        ("accuracy", "accuracy", "fraction", quality.accuracy),
        ("top1", "top-1", "fraction", classified.top1),
        ("top5", "top-5", "fraction", classified.top5),
        ("agreement", "agreement", "fraction", classified.agreement),
        ("sqnr", "SQNR, dB", "decibels", classified.sqnr),
        *(
            (f"latency {name}", f"latency, {name}, ms", _MILLISECONDS, found.milliseconds if found else None)
            for name, found in timed.items()
        ),
        ("prefill", "prefill, tok/s", "rate", speed.prefill_tokens_per_second if speed else None),
        ("decode", "decode, tok/s", "rate", speed.decode_tokens_per_second if speed else None),
        ("peak_memory", "peak memory of the run", "bytes", max(memory, default=None)),
        ("seconds", "time of all passes", "seconds", sum(seconds) if seconds else None),
    ]


def _side(report: Report, label: str) -> Side:
    speed = report.stages[-1].speed
    return Side(
        label=label,
        model=report.model,
        steps=tuple(map(_step, report.stages[1:])),
        kernel=kernel_text(speed) if speed else None,
    )


def _step(stage: Stage) -> str:
    search = stage.search
    return f"{stage.name} (by {search.name})" if search and search.name else stage.name


def _labels(a: Report, b: Report) -> tuple[str, str]:
    """The shortest names that tell the two apart: the last part of the path where that is enough."""
    long = (a.output or a.model, b.output or b.model)
    short = (PurePath(long[0]).name or long[0], PurePath(long[1]).name or long[1])
    if short[0] != short[1]:
        return short
    return long if long[0] != long[1] else (f"A: {short[0]}", f"B: {short[1]}")


def _went_through_several(report: Report) -> bool:
    """Whether several passes have measured an error of one layer."""
    measured = [
        row.name
        for stage in report.stages
        for row in stage.ledger
        if row.status != "kept" and not (row.weight_error is row.output_error is None)
    ]
    return len(measured) > len(set(measured))


def _difference(name: str, a: LedgerRow | None, b: LedgerRow | None, outputs: bool) -> LayerDifference | None:
    """The difference between two rows of one layer, None when there is none.

    outputs: whether the errors of outputs were measured on the same inputs.
    """
    kind, error_a, error_b = _errors(a, b, outputs)
    # Sums of one run are repeated to about six digits on another number of threads.
    alike = error_a is None or error_b is None or error_a == error_b or math.isclose(error_a, error_b, rel_tol=1e-4)
    if alike and a and b and a.format == b.format and a.bits_per_weight == b.bits_per_weight:
        return None
    return LayerDifference(
        name=name,
        format_a=a.format if a else None,
        format_b=b.format if b else None,
        bits_a=a.bits_per_weight if a else None,
        bits_b=b.bits_per_weight if b else None,
        error=kind,
        error_a=error_a,
        error_b=error_b,
    )


def _errors(a: LedgerRow | None, b: LedgerRow | None, outputs: bool) -> tuple[Error, float | None, float | None]:
    """The error that both rows have, of outputs before that of weights, or else one that a single row has."""
    found: list[tuple[Error, float | None, float | None]] = [
        ("weight", a.weight_error if a else None, b.weight_error if b else None)
    ]
    if outputs:
        found.insert(0, ("output", a.output_error if a else None, b.output_error if b else None))
    best = max(found, key=lambda errors: -errors[1:].count(None))
    return ("", None, None) if best[1] is best[2] is None else best


def _distance(layer: LayerDifference) -> tuple[float, float]:
    """How far apart the errors are, as a power of 2 to one decimal, then the larger of them.

    Layers without two finite errors stand above those with.
    """
    a, b = layer.error_a, layer.error_b
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf, math.inf
    tiny = 1e-30
    return round(abs(math.log2(max(a, tiny) / max(b, tiny))), 1), max(a, b)


def _unrecorded(report: Report, label: str) -> list[str]:
    """What the ledger of a report leaves out, so that layers are not compared by what the passes made of them."""
    if not final_rows(report.stages):
        return [f"{label} has no ledger: its layers are not known"]
    empty = [stage.name for stage in report.stages[1:] if not stage.ledger]
    return [f"{label} has no ledger of {name}: what it did to the layers is not known" for name in empty]


def _remarks(a: Report, b: Report, marks: Mapping[str, str], runtimes: Sequence[str]) -> list[str]:
    """What is to be known of figures that were taken alike; marks: of those that were not."""
    found = []
    one, two = quality_of(a), quality_of(b)
    if "accuracy" not in marks and _within_chance(one.accuracy, one.accuracy_stderr, two.accuracy, two.accuracy_stderr):
        found.append("the accuracies differ by less than two standard errors")
    first, second = (found.classification or Classification(images=0) for found in (one, two))
    if "top1" not in marks and _within_chance(first.top1, first.top1_stderr, second.top1, second.top1_stderr):
        found.append("the top-1 figures differ by less than two standard errors")
    for name in runtimes:
        timed_a, timed_b = (latencies.latency_in(report.stages[-1], name) for report in (a, b))
        if timed_a and timed_b and timed_a.runtime != timed_b.runtime:
            found.append(f"latency of {name} is that of {timed_a.runtime} and of {timed_b.runtime}")
    return found


def _within_chance(a: float | None, stderr_a: float | None, b: float | None, stderr_b: float | None) -> bool:
    """Whether two fractions differ, but by less than two standard errors of their difference."""
    if a is None or b is None or stderr_a is None or stderr_b is None:
        return False
    return 0 < abs(a - b) < 2 * math.hypot(stderr_a, stderr_b)
