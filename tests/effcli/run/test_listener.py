"""What a run tells its listener of the progress of one piece of work."""

from __future__ import annotations

import pytest

from effcli.layers.result import unseen
from effcli.run.listener import Silent, phases, told


class Heard(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def progress_start(self, name: str, total: int, unit: str = "block") -> None:
        self.heard.append(("start", name, total, unit))

    def progress(self, done: int) -> None:
        self.heard.append(("done", done))

    def progress_end(self) -> None:
        self.heard.append(("end",))


def test_progress_starts_once_and_ends_once() -> None:
    listener = Heard()
    with told(listener, "linear", "layer") as progress:
        for done in range(3):
            progress(done, 2)
    begun = [("start", "linear", 0, "layer"), ("start", "linear", 2, "layer")]
    assert listener.heard == [*begun, ("done", 0), ("done", 1), ("done", 2), ("end",)]


def test_progress_ends_with_an_error() -> None:
    listener = Heard()
    with pytest.raises(OSError, match="full"), told(listener, "auto: sensitivity") as progress:
        progress(1, 5)
        raise OSError("full")
    begun = [("start", "auto: sensitivity", 0, "block"), ("start", "auto: sensitivity", 5, "block")]
    assert listener.heard == [*begun, ("done", 1), ("end",)]


def test_what_counts_nothing_is_told_too() -> None:
    listener = Heard()
    with told(listener, "linear"):
        pass
    assert listener.heard == [("start", "linear", 0, "block"), ("end",)]


def test_phases_of_a_checkpoint() -> None:
    listener = Heard()
    begin = phases(listener, "awq")
    with begin("perplexity") as progress:
        progress(1, 8)
    with begin("speed", "token"), unseen("inside"):
        pass
    assert listener.heard == [
        ("start", "awq: perplexity", 0, "step"),
        ("start", "awq: perplexity", 8, "step"),
        ("done", 1),
        ("end",),
        ("start", "awq: speed", 0, "token"),
        ("end",),
    ]
