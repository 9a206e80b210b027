"""The steps of work that begins in one place and is done in another, such as an export: who began it is told of each.

Whoever takes steps needs no one to tell: outside of `telling` nobody hears of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from effcli.platform.rehearsal import counted


@dataclass
class _Told:
    progress: Callable[[int, int], None]
    done: int = 0
    total: int = 0

    def tell(self) -> None:
        self.progress(self.done, max(self.total, self.done))


_CURRENT: ContextVar[_Told | None] = ContextVar("steps", default=None)


@contextmanager
def telling(progress: Callable[[int, int], None]) -> Iterator[None]:
    """Have `progress` called with (done, total) for each step within the context."""
    token = _CURRENT.set(_Told(progress))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def expect(steps: int) -> None:
    """So many steps will be taken besides those that are known of."""
    told = _CURRENT.get()
    if told is not None:
        told.total += steps
        told.tell()


def tick() -> None:
    """A step is done."""
    told = _CURRENT.get()
    if told is not None:
        told.done += 1
        told.tell()


def each(names: Iterable[str]) -> Iterator[str]:
    """The names of tensors or layers, a step for each; a rehearsal counts each for those its block stands for."""
    for name in names:
        with counted(name):
            yield name
        tick()


__all__ = ["each", "expect", "telling", "tick"]
