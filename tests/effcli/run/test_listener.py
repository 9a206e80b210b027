"""What a run tells its listener of the progress of one piece of work."""

from __future__ import annotations

import pytest

from effcli.run.listener import Silent, told


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
    assert listener.heard == [("start", "linear", 2, "layer"), ("done", 0), ("done", 1), ("done", 2), ("end",)]


def test_progress_ends_with_an_error() -> None:
    listener = Heard()
    with pytest.raises(OSError, match="full"), told(listener, "auto: sensitivity") as progress:
        progress(1, 5)
        raise OSError("full")
    assert listener.heard == [("start", "auto: sensitivity", 5, "block"), ("done", 1), ("end",)]


def test_what_never_started_does_not_end() -> None:
    listener = Heard()
    with told(listener, "linear"):
        pass
    assert listener.heard == []
