"""What compression cost: how sure a change of quality is, how large, and all checkpoints by size and quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from effcli.reports import units
from effcli.reports.report import Quality, Report, Stage
from effcli.reports.sensitivity import Point, Search, valued
from effcli.reports.svg_quality import Mark, quality_plot

# From which loss on a figure is marked, and from which more: relative for perplexity, else in points.
_LEVELS = {"perplexity": (0.0, 0.02, 0.1), "accuracy": (0.0, 0.01, 0.03), "agreement": (0.01, 0.03, 0.1)}
# What the levels are called in the page's legend.
LEVEL_NAMES = ("no loss beyond chance", "small loss", "clear loss", "large loss")
# A loss within so many standard errors is not told from chance.
_SURE = 2.0


@dataclass(frozen=True)
class Loss:
    """How much quality was lost. level: 0 to 3, by `LEVEL_NAMES`; stderr: of the change, in the unit of its text."""

    level: int
    stderr: str = ""


def stderr_text(key: str, stage: Stage) -> str:
    """The standard error of a figure that is written without one, empty where none is known."""
    quality = stage.quality
    if key != "perplexity" or quality is None or quality.perplexity_stderr is None:
        return ""
    return f"±{units.significant(quality.perplexity_stderr, 2)}"


def loss(key: str, stage: Stage, first: Stage) -> Loss | None:
    """What a stage lost of the figure in the column `key`; None where it tells no quality or was not measured."""
    before, after = first.quality, stage.quality
    if before is None or after is None or stage is first:
        return None
    if key == "perplexity" and before.perplexity and after.perplexity is not None:
        return _of_perplexity(before, after)
    if key == "accuracy" and before.accuracy is not None and after.accuracy is not None:
        return Loss(_level("accuracy", before.accuracy - after.accuracy, after.accuracy_stderr))
    one, two = before.classification, after.classification
    if key == "top1" and one and two and one.top1 is not None and two.top1 is not None:
        return Loss(_level("accuracy", one.top1 - two.top1, two.top1_stderr))
    if key == "agreement" and two and two.agreement is not None:
        return Loss(_level("agreement", 1 - two.agreement, None))
    return None


def change_stderr(before: Quality, after: Quality) -> float | None:
    """The standard error of the relative change of perplexity, where both have the losses of the same windows.

    The change of every window is taken by itself: texts that are hard for both say nothing of the difference.
    """
    if len(before.losses) != len(after.losses) or len(after.losses) < 2:
        return None
    changes = [b - a for a, b in zip(before.losses, after.losses, strict=True)]
    if not all(map(math.isfinite, changes)):
        return None
    try:
        ratio = math.exp(statistics.fmean(changes))
    except OverflowError:
        return None
    return ratio * statistics.stdev(changes) / math.sqrt(len(changes))


def _of_perplexity(before: Quality, after: Quality) -> Loss:
    assert before.perplexity and after.perplexity is not None
    relative = after.perplexity / before.perplexity - 1
    stderr = change_stderr(before, after)
    text = "" if stderr is None else f"±{100 * stderr:.1f}%"
    return Loss(_level("perplexity", relative, stderr), text)


def _level(kind: str, lost: float, stderr: float | None) -> int:
    if math.isnan(lost):
        return 3
    if lost <= _SURE * (stderr or 0.0):
        return 0
    return sum(lost > limit for limit in _LEVELS[kind])


def data_names(report: Report) -> dict[str, str]:
    """The files that the figures of a column were measured on, as the recipe names them; by the column's key."""
    wanted = report.recipe.get("evaluate")
    if not isinstance(wanted, Mapping):
        return {}
    found = {}
    for key, given in (("perplexity", "perplexity"), ("accuracy", "choices"), ("top1", "images")):
        value = wanted.get(given)
        files = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
        names = [PurePath(file).name for file in files if isinstance(file, str)]
        if names:
            found[key] = ", ".join(names)
    return found


def plots(report: Report) -> list[str]:
    """One picture for each figure of quality that two stages or more have, in the table's order."""
    names = data_names(report)
    found = []
    for title, key, of, scale in _FIGURES:
        marks = list(_marks(report.stages, key, of, scale))
        if len({mark.name for mark in marks if not mark.tried}) > 1 and len(marks) > 1:
            on = f" on {names[key]}" if key in names else ""
            found.append(quality_plot(marks, title.format(on)))
    return [plot for plot in found if plot]


def unmeasured_searches(report: Report) -> list[str]:
    """The steps whose search measured none of its choices, so that none stands in the pictures."""
    return [
        stage.name
        for stage in report.stages
        if stage.search is not None and all(point.measured is None for point in stage.search.front)
    ]


_Figure = Callable[[Quality], tuple[float | None, float | None]]
_FIGURES: tuple[tuple[str, str, _Figure, float], ...] = (
    ("perplexity{} (lower is better)", "perplexity", lambda q: (q.perplexity, q.perplexity_stderr), 1.0),
    ("accuracy{}, %", "accuracy", lambda q: (q.accuracy, q.accuracy_stderr), 100.0),
    (
        "top-1{}, %",
        "top1",
        lambda q: (q.classification.top1, q.classification.top1_stderr) if q.classification else (None, None),
        100.0,
    ),
    (
        "agreement with the input, %",
        "agreement",
        lambda q: (
            (q.classification.agreement, None) if q.classification and q.classification.top1 is None else (None, None)
        ),
        100.0,
    ),
)
# What a search calls the figure that it measured, by the key of the column.
_SEARCHED = {"perplexity": "perplexity", "top1": "accuracy"}


def _marks(stages: Sequence[Stage], key: str, of: _Figure, scale: float) -> Iterator[Mark]:
    for stage in stages:
        value, stderr = of(stage.quality) if stage.quality else (None, None)
        found = stage.search
        if found is not None and _SEARCHED.get(key) == found.measure:
            # Where all layers alike are on the front, too, their name says more.
            for point in {point.nbytes: point for point in (*found.front, *found.uniform)}.values():
                nbytes = _size(found, point, stage.nbytes)
                if point.measured is not None and nbytes is not None and point.nbytes != found.chosen.nbytes:
                    shown = f"{units.size(nbytes)}, {_figure(scale * point.measured, None)}"
                    average = valued(found.sensitivity.option, f"{point.average:.2f}")
                    name = point.name or f"{average} on average"
                    yield Mark(nbytes, scale * point.measured, name, f"{shown} (tried)", tried=True)
        if value is not None:
            error = None if stderr is None else scale * stderr
            shown = f"{units.size(stage.nbytes)}, {_figure(scale * value, error)}"
            yield Mark(stage.nbytes, scale * value, stage.name, shown, error)


def _size(found: Search, point: Point, chosen: int) -> int | None:
    """The bytes of the weight files of a choice; chosen: those of the chosen one. None where they are not known."""
    if found.sensitivity.option != "ratio":
        # A search knows the bytes of the layers alone; the rest of the network is the same for all its choices.
        return point.nbytes + chosen - found.chosen.nbytes
    # What lies between two groups counts in both, so that their sum is no size.
    return int(point.limited) if point.limited is not None and found.limited.startswith("size") else None


def _figure(value: float, stderr: float | None) -> str:
    text = units.significant(value, 4)
    return text if not stderr else f"{text} ± {units.significant(stderr, 2)}"


__all__ = [
    "LEVEL_NAMES",
    "Loss",
    "change_stderr",
    "data_names",
    "loss",
    "plots",
    "stderr_text",
    "unmeasured_searches",
]
