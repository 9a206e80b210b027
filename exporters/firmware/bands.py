"""Bands: tasks that run side by side, row by row, so that of what passes between them only a few rows are kept.

A band computes the rows of its last task one after the other; before each, every other task computes the rows that are
needed by then and not there yet. No row is computed twice. What is read outside of the band is kept whole.
This is patch-based execution (MCUNetV2, arXiv:2110.15352) with patches of whole rows, and without its recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effcli.exporters.firmware.program import Program, Task, Tensor


@dataclass(frozen=True)
class Pace:
    """How far a task of a band has come before row y of the last task: min(height, a · y + b) rows, and all at the end.

    b may be negative: no row is computed before it is needed.
    """

    a: int
    b: int
    height: int


@dataclass(frozen=True)
class Band:
    """Tasks start to before end of a program.

    paces: of each task but the last, empty for a single task. rings: rows that are kept of each tensor that only the
    band itself needs, by name. outputs: tensors that it writes whole. distances: by (output, input) names, by how many
    bytes an input read here for the last time must start above an output so that both may overlap. scratch: bytes.
    """

    start: int
    end: int
    paces: tuple[Pace, ...]
    rings: dict[str, int]
    outputs: tuple[Tensor, ...]
    distances: dict[tuple[str, str], int]
    scratch: int

    @property
    def size(self) -> int:
        return self.end - self.start


def single(program: Program, index: int) -> Band:
    """One task on its own."""
    task = program.tasks[index].alone()
    distances: dict[tuple[str, str], int] = {}
    for position, tensor in enumerate(task.inputs):
        found = task.distance(position)
        others = [other for other, each in enumerate(task.inputs) if each.name == tensor.name]
        if found is not None and len(others) == 1:
            distances[task.output.name, tensor.name] = found
    return Band(index, index + 1, (), {}, (task.output,), distances, task.scratch)


def join(program: Program, start: int, end: int, last_use: dict[str, int]) -> Band | None:
    """Tasks `start` to before `end` as a band, None where they cannot run side by side at one pace.

    last_use: the last task that reads each tensor, by name.
    """
    tasks = program.tasks[start:end]
    if any(task.windows is None for task in tasks) or tasks[-1].output.rows == 1:
        return None
    views = {(tensor.name, tensor.rows) for task in tasks for tensor in (*task.inputs, task.output)}
    if len(views) > len({name for name, _ in views}):
        return None
    needed = _needed(tasks)
    if needed is None:
        return None
    paces = []
    for task, rows in zip(tasks[:-1], needed, strict=False):
        pace = _pace(rows, task.output.rows)
        if pace is None:
            return None
        paces.append(pace)
    # In the order of the tasks, so that the same network always gets the same addresses.
    kept = [task.output.name for task in tasks[:-1] if last_use[task.output.name] < end]
    rings, distances = _simulate(tasks, needed, kept)
    outputs = tuple(task.output for task in tasks if task.output.name not in kept)
    return Band(start, end, tuple(paces), rings, outputs, distances, max(task.scratch for task in tasks))


def _needed(tasks: Sequence[Task]) -> list[list[int]] | None:
    """For each task, how many rows must be there before (and, of the last, after) each row of the last is computed."""
    last = tasks[-1].output.rows
    rows: list[list[int]] = [[0] * last for _ in tasks]
    rows[-1] = list(range(1, last + 1))
    maker = {task.output.name: index for index, task in enumerate(tasks)}
    for index in range(len(tasks) - 1, -1, -1):
        task = tasks[index]
        if index < len(tasks) - 1:
            # At the end every layer is complete, whether its last rows are read or not.
            rows[index][-1] = task.output.rows
        assert task.windows is not None
        for tensor, window in zip(task.inputs, task.windows, strict=True):
            source = maker.get(tensor.name)
            if source is None:
                continue
            if source >= index or tensor.rows != tasks[source].output.rows:
                return None
            for y in range(last):
                wanted = window.end(rows[index][y] - 1, tensor.rows) if rows[index][y] > 0 else 0
                rows[source][y] = max(rows[source][y], wanted)
    return rows


def _pace(rows: list[int], height: int) -> Pace | None:
    """The pace that gives `rows`, whose last entry is the height."""
    inner = np.array(rows[:-1])
    if len(inner) == 0:
        return Pace(0, 0, height)
    rising = np.flatnonzero((inner > 0) & (inner < height))
    if len(rising) > 1:
        a = int(inner[rising[1]] - inner[rising[0]])
        b = int(inner[rising[0]] - a * rising[0])
    elif len(rising) == 1:
        a, b = height, int(inner[rising[0]] - height * rising[0])
    else:
        first = int(np.argmax(inner >= height)) if np.any(inner >= height) else len(inner)
        a, b = height, height * (1 - first)
    found = np.clip(a * np.arange(len(inner)) + b, 0, height)
    return Pace(a, b, height) if np.array_equal(found, inner) else None


def _simulate(
    tasks: Sequence[Task], needed: list[list[int]], kept: Sequence[str]
) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Rows that each tensor of `kept` must hold at once, and the distances between outputs and inputs from outside."""
    events = [
        (index, row)
        for y in range(tasks[-1].output.rows)
        for index in range(len(tasks))
        for row in range(needed[index][y - 1] if y else 0, needed[index][y])
    ]
    inside = {task.output.name for task in tasks}
    outside = {tensor.name: tensor for task in tasks for tensor in task.inputs if tensor.name not in inside}
    # For each event, walking backwards: the first row that is read from it on.
    lowest: dict[str, list[int]] = {name: [] for name in (*kept, *outside)}
    heights = {tensor.name: tensor.rows for task in tasks for tensor in (*task.inputs, task.output)}
    current = {name: heights[name] for name in lowest}
    for index, row in reversed(events):
        windows = tasks[index].windows
        assert windows is not None
        for tensor, window in zip(tasks[index].inputs, windows, strict=True):
            if tensor.name in current:
                current[tensor.name] = min(current[tensor.name], window.first(row))
        for name, entries in lowest.items():
            entries.append(current[name])
    for entries in lowest.values():
        entries.reverse()
    rings = {name: 1 for name in kept}
    distances: dict[tuple[str, str], int] = {}
    for position, (index, row) in enumerate(events):
        output = tasks[index].output
        if output.name in kept:
            rings[output.name] = max(rings[output.name], row + 1 - lowest[output.name][position])
            continue
        for name, tensor in outside.items():
            reach = (row + 1) * output.row_bytes - lowest[name][position] * tensor.row_bytes
            distances[output.name, name] = max(distances.get((output.name, name), 0), reach)
    return {name: min(rows, heights[name]) for name, rows in rings.items()}, distances
