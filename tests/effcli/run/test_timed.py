"""How long the phases of a run took, by a clock that stands unless it is told."""

from __future__ import annotations

import pytest

from effcli.run.listener import Silent, phases, told
from effcli.run.timed import Timed


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_phases_of_one_name_are_summed_in_the_order_in_which_they_began() -> None:
    clock = Clock()
    listener = Timed(Silent(), clock)
    for name, seconds in (("awq", 2.0), ("awq: perplexity", 1.0), ("awq", 3.0)):
        with told(listener, name) as progress:
            clock.now += seconds / 2
            # Its total is known only now: it is the same phase.
            progress(0, 4)
            clock.now += seconds / 2
        clock.now += 100
    with phases(listener, "verifying")("running the input"):
        pass
    found = [(phase.name, phase.seconds) for phase in listener.phases]
    assert found == [("awq", 5.0), ("awq: perplexity", 1.0), ("verifying: running the input", 0.0)]


def test_a_phase_that_fails_has_taken_its_time_too() -> None:
    clock = Clock()
    listener = Timed(Silent(), clock)
    with pytest.raises(ValueError, match="full"), told(listener, "awq"):
        clock.now += 2.0
        raise ValueError("full")
    assert [phase.seconds for phase in listener.phases] == [2.0]
