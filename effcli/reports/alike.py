"""Which figures of two runs were taken alike, and which say nothing of each other: other data, another machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from effcli.reports import latencies, units
from effcli.reports.final import final_rows
from effcli.reports.report import Classification, Latency, Quality, Report, Speed


@dataclass(frozen=True)
class Unlike:
    """Figures of the two runs that were not taken alike. mark: what stands in place of their change."""

    keys: tuple[str, ...]
    mark: str
    sentence: str


def unlike(a: Report, b: Report, runtimes: Sequence[str]) -> list[Unlike]:
    """The figures that say nothing of each other; runtimes: those whose latencies stand side by side."""
    return [*_other_texts(a, b), *_other_questions(a, b), *_other_images(a, b), *_other_machines(a, b, runtimes)]


def _other_texts(a: Report, b: Report) -> list[Unlike]:
    keys, one, two = ("perplexity", "kl"), quality_of(a), quality_of(b)
    if not any(getattr(one, key) is not None and getattr(two, key) is not None for key in keys):
        return []
    other = _on_other_data(a, b, "perplexity", _first_perplexities(a, b))
    on = _called(a, b, "perplexity", "texts") if other else _counted(one.tokens, two.tokens, "token")
    return _measured(keys, "other text", "perplexity and KL were", on)


def _other_questions(a: Report, b: Report) -> list[Unlike]:
    one, two = quality_of(a), quality_of(b)
    if one.accuracy is None or two.accuracy is None:
        return []
    other = _on_other_data(a, b, "choices")
    on = _called(a, b, "choices", "questions") if other else _counted(one.examples, two.examples, "example")
    return _measured(("accuracy",), "other questions", "accuracy was", on)


def _other_images(a: Report, b: Report) -> list[Unlike]:
    one, two = quality_of(a).classification, quality_of(b).classification
    if one is None or two is None:
        return []
    before = [quality_of(report, 0).classification or Classification(images=0) for report in (a, b)]
    other = _on_other_data(a, b, "images", (before[0].top1, before[1].top1))
    on = _called(a, b, "images", "images") if other else _counted(one.images, two.images, "image")
    return _measured(("top1", "top5", "agreement", "sqnr"), "other images", "classification was", on)


def _measured(keys: tuple[str, ...], mark: str, what: str, on: str) -> list[Unlike]:
    """Figures that were measured on what differs, in words; nothing where that is empty."""
    return [Unlike(keys, mark, f"{what} measured on {on}: not comparable")] if on else []


def _counted(one: int, two: int, noun: str) -> str:
    """How much of the same data two runs took; empty where it is as much."""
    return "" if one == two else f"{one:,} and {units.count(two, noun)}"


def _other_machines(a: Report, b: Report, runtimes: Sequence[str]) -> list[Unlike]:
    last_a, last_b, mark = a.stages[-1], b.stages[-1], "other machine"
    timed: list[tuple[str, tuple[str, ...], Speed | Latency | None, Speed | Latency | None]] = [
        ("speed", ("prefill", "decode"), last_a.speed, last_b.speed),
        *(
            (f"latency of {name}", (f"latency {name}",), latencies.latency_in(last_a, name), found)
            for name in runtimes
            for found in [latencies.latency_in(last_b, name)]
        ),
    ]
    found = [
        Unlike(keys, mark, f"{what} was measured on different machines or with different threads: not comparable")
        for what, keys, one, two in timed
        if one and two and ((one.device, one.threads) != (two.device, two.threads) or a.machine != b.machine)
    ]
    prompts = [stage.speed.prefill_tokens for stage in (last_a, last_b) if stage.speed]
    if len(set(prompts)) > 1:
        sentence = f"prefill was measured with prompts of {prompts[0]} and {units.count(prompts[1], 'token')}"
        found.append(Unlike(("prefill",), "other prompt", f"{sentence}: not comparable"))
    return found


def _on_other_data(a: Report, b: Report, key: str, before: tuple[float | None, float | None] | None = None) -> bool:
    """Whether `evaluate.KEY` names other data in one run than in the other.

    before: where data that are not named may be a part of the calibration data, a figure of the two inputs, which one
    network does not have twice on different data.
    """
    one, two = (_identity(report, _files(report, key)) for report in (a, b))
    if one or two:
        return one != two
    if before is None or _identity(a, _calibration(a)) == _identity(b, _calibration(b)):
        return False
    return None in before or not math.isclose(before[0] or 0.0, before[1] or 0.0, rel_tol=1e-3)


def calibrated_otherwise(a: Report, b: Report) -> str:
    """What is to be said of two runs whose errors of outputs were measured on different data; empty where not."""
    measured = all(any(row.output_error is not None for row in final_rows(report.stages).values()) for report in (a, b))
    if not measured or _identity(a, _calibration(a)) == _identity(b, _calibration(b)):
        return ""
    names = (", ".join(PurePath(name).name for name in _calibration(report)) for report in (a, b))
    return f"calibrated on different data{_both(*names)}: layers are compared by the error of their weights"


def _calibration(report: Report) -> tuple[str, ...]:
    """The calibration data that the recipe names."""
    found = report.recipe.get("calibration")
    name = found.get("data") if isinstance(found, Mapping) else None
    return (name,) if isinstance(name, str) else ()


def _files(report: Report, key: str) -> tuple[str, ...]:
    """The evaluation data that the recipe names under `evaluate.KEY`; none where it takes what is at hand."""
    found = report.recipe.get("evaluate")
    value = found.get(key) if isinstance(found, Mapping) else None
    names = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    return tuple(name for name in names if isinstance(name, str))


def _identity(report: Report, names: Sequence[str]) -> tuple[str, ...]:
    """What tells these data from others: their content, as far as it was recorded, and the split of a folder."""
    return tuple(f"{report.data.get(name, name)}{name[name.rfind('#') :] if '#' in name else ''}" for name in names)


def _called(a: Report, b: Report, key: str, nouns: str) -> str:
    """`different texts (a.txt and b.txt)`, by the names of the data under `evaluate.KEY`."""
    return f"different {nouns}" + _both(
        *(", ".join(PurePath(name).name for name in _files(report, key)) for report in (a, b))
    )


def _both(one: str, two: str) -> str:
    """The names of two things behind what they are, empty where there is none: ' (a.txt and the default)'."""
    if one == two:
        return f", both called {one}" if one else ""
    return f" ({one or 'the default'} and {two or 'the default'})"


def quality_of(report: Report, stage: int = -1) -> Quality:
    return report.stages[stage].quality or Quality()


def _first_perplexities(a: Report, b: Report) -> tuple[float | None, float | None]:
    return quality_of(a, 0).perplexity, quality_of(b, 0).perplexity


def other_input(a: Report, b: Report) -> list[str]:
    """What is to be said where the runs began with different networks."""
    if a.model != b.model:
        return [f"the runs began with different models: {a.model} and {b.model}"]
    other = _other_network(a, b)
    return [] if other is None else [f"the runs began with different networks, both called {a.model}: {other}"]


def _other_network(a: Report, b: Report) -> str | None:
    """What shows that two models of one name are not the same network; None where nothing does."""
    first_a, first_b = a.stages[0], b.stages[0]
    if first_a.weights != first_b.weights:
        return f"{first_a.weights:,} and {first_b.weights:,} weights"
    if first_a.nbytes != first_b.nbytes:
        return f"{units.size(first_a.nbytes)} and {units.size(first_b.nbytes)}"
    rows_a, rows_b = final_rows(a.stages), final_rows(b.stages)
    for name in sorted(rows_a.keys() & rows_b.keys()):
        one, two = rows_a[name].shape, rows_b[name].shape
        if one != two:
            return f"{name} is {units.shape(one)} in one and {units.shape(two)} in the other"
    both = _first_perplexities(a, b)
    # One network over the same tokens gives one perplexity, but for rounding.
    if None in both or quality_of(a, 0).tokens != quality_of(b, 0).tokens or _on_other_data(a, b, "perplexity", both):
        return None
    if not math.isclose(both[0] or 0.0, both[1] or 0.0, rel_tol=0.01):
        return f"perplexity {units.significant(both[0] or 0.0, 4)} and {units.significant(both[1] or 0.0, 4)}"
    return None


__all__ = ["Unlike", "calibrated_otherwise", "other_input", "quality_of", "unlike"]
