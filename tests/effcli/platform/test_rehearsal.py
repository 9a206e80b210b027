"""A rehearsal's clock, which goes on for what is left out; its own clock stands unless it is told."""

from __future__ import annotations

import pytest
import torch

from effcli.platform import rehearsal
from effcli.platform.rehearsal import FEW, Rehearsal, counted, few, now, once, skip
from effcli.platform.stopwatch import repeated


class Clock:
    def __init__(self) -> None:
        self.seconds = 7.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_outside_of_a_rehearsal_nothing_is_left_out() -> None:
    assert rehearsal.ongoing() is None
    assert list(few(range(100))) == list(range(100))
    assert list(few(iter("abcdef"), 6, lasting=1.0)) == list("abcdef")
    made = [[1], [2]]
    assert once(lambda: "layer", lambda: made[0]) is made[0] and once(lambda: "layer", lambda: made[1]) is made[1]
    before = now()
    with counted("blocks.1"):
        skip(1e9)
    assert now() < before + 1e6


def test_of_a_loop_all_but_the_first_stand_for_the_rest(clock: Clock) -> None:
    with Rehearsal(clock=clock):
        done = []
        for number in few(range(100)):
            done.append(number)
            clock.seconds += 50 if number == 0 else number
        assert done == [0, 1, 2]
        # 50 once, then 1 and 2 for 99 items.
        assert now() == pytest.approx(7 + 50 + 1.5 * 99)
        assert list(few(range(FEW))) == [0, 1, 2]
    assert rehearsal.ongoing() is None


def test_a_loop_that_lasts_a_while(clock: Clock) -> None:
    with Rehearsal(clock=clock):
        done = 0
        for _ in few(range(1000), lasting=5.0):
            done += 1
            clock.seconds += 1
        assert (done, now()) == (6, 7 + 1000)
        done = 0
        for _ in few((number for number in range(10)), 10, lasting=0.5):
            done += 1
            clock.seconds += 1
        assert (done, now()) == (2, 7 + 1000 + 10)


def test_a_loop_that_ends_by_itself_counts_as_it_is(clock: Clock) -> None:
    with Rehearsal(clock=clock):
        for number in few(range(100)):
            clock.seconds += 1
            if number == 1:
                break
        assert now() == 7 + 2


def test_blocks_count_for_those_that_they_stand_for(clock: Clock) -> None:
    with Rehearsal({"layers.0": 1, "layers.1": 29}, clock) as going:
        for name in ("embedding.weight", "layers.10.bias"):
            with counted(name):
                clock.seconds += 1
        assert not going.reached and now() == 7 + 2
        with counted("layers.0.bias"):
            clock.seconds += 1
        assert going.reached and now() == 7 + 3
        with counted("layers.1"):
            # What is done for a layer in a block counts with the block.
            with counted("layers.1.mlp.weight"):
                clock.seconds += 1
            for _ in few(range(10)):
                clock.seconds += 1
        assert now() == 7 + 3 + 29 * 11
        # A block that stands for itself keeps others from nothing.
        with counted("layers.0"), counted("layers.1"):
            clock.seconds += 1
        assert now() == 7 + 3 + 29 * 12
        with pytest.raises(ValueError, match="full"), counted("layers.1"):
            clock.seconds += 1
            raise ValueError("full")
        assert now() == 7 + 3 + 29 * 12 + 1


def test_work_of_one_kind_is_done_once(clock: Clock) -> None:
    calls = 0

    def make() -> torch.Tensor:
        nonlocal calls
        calls += 1
        clock.seconds += 4
        return torch.full((2,), float(calls))

    with Rehearsal({"layers.0": 1, "layers.1": 3}, clock):
        first = once(lambda: "8 x 8", make)
        with counted("layers.1"):
            second = once(lambda: "8 x 8", make)
        assert calls == 1 and torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
        assert now() == 7 + 4 + 3 * 4
        assert float(once(lambda: "8 x 4", make)[0]) == 2


def test_what_lasts_a_while_is_skipped(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rehearsal(clock=clock):
        times = repeated(lambda: None, seconds=1e6, fewest=5)
        assert len(times) == 5
        assert now() == pytest.approx(7 + 1e6)
    assert len(repeated(lambda: None, seconds=0.0, fewest=4)) == 4
