"""Whoever began a piece of work is told of its steps; nobody else is."""

from __future__ import annotations

from effcli.platform.rehearsal import Rehearsal
from effcli.platform.steps import each, expect, telling, tick


def test_steps_are_told_as_they_are_known() -> None:
    told: list[tuple[int, int]] = []
    with telling(lambda done, total: told.append((done, total))):
        expect(2)
        assert list(each(["a", "b"])) == ["a", "b"]
        expect(1)
        tick()
        # More than was expected.
        tick()
    assert told == [(0, 2), (1, 2), (2, 2), (2, 3), (3, 3), (4, 4)]


def test_nobody_hears_of_other_work() -> None:
    told: list[int] = []
    with telling(lambda done, total: told.append(done)), telling(lambda done, total: None):
        tick()
    tick()
    expect(3)
    assert list(each(["a"])) == ["a"] and told == []


def test_in_a_rehearsal_each_counts_for_its_block() -> None:
    seconds = 0.0
    with Rehearsal({"layers.0": 1, "layers.1": 9}, lambda: seconds) as going:
        for _ in each(["embedding", "layers.0.weight", "layers.1.weight"]):
            seconds += 1
        assert going.now() == 1 + 1 + 9
