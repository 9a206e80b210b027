"""Rehearsals: real work of which a part is done, whose time stands for what is left out.

A rehearsal runs a network with few of its blocks. `few` ends a long loop after its first items, `counted` says for
which block something is done, and with it for how many, `once` does not do again what was done for the same kind of
layer. Each adds the time of what is left out to the clock, which `now` reads. Outside of rehearsals all three change
nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

# Items of a loop that are done: the first may take longer than all others, and counts for itself alone.
FEW = 3


class Rehearsal:
    """One rehearsal, which lasts as long as the context.

    blocks: by the name of each block that is there, how many of the whole network it stands for, 1 or more; clock: in
    seconds. unknown: why the time of what is done now does not tell that of the whole, empty while it does.
    """

    def __init__(
        self, blocks: Mapping[str, float] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.blocks = blocks or {}
        self.unknown = ""
        # Whether something was done for one of the blocks.
        self.reached = False
        self._clock = clock
        self._left_out = 0.0
        self._inside = False
        self._made: dict[str, tuple[Any, float]] = {}
        self._token: Token[Rehearsal | None] | None = None

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def now(self) -> float:
        """The clock, and the time of what was left out."""
        return self._clock() + self._left_out

    def leave_out(self, seconds: float) -> None:
        self._left_out += max(0.0, seconds)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        block = next((own for own in self.blocks if name == own or name.startswith(f"{own}.")), None)
        self.reached |= block is not None
        if block is None or self._inside or self.blocks[block] == 1:
            yield
            return
        begin, self._inside = self.now(), True
        try:
            yield
        finally:
            self._inside = False
        self.leave_out((self.now() - begin) * (self.blocks[block] - 1))

    def once(self, kind: str, make: Callable[[], Made]) -> Made:
        if kind in self._made:
            made, seconds = self._made[kind]
            self.leave_out(seconds)
        else:
            begin = self.now()
            made = make()
            self._made[kind] = made, self.now() - begin
        # Whoever gets it may change it, or write it to a file in which no two tensors share memory.
        found: Made = copy.deepcopy(made)
        return found


_CURRENT: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


def ongoing() -> Rehearsal | None:
    """The rehearsal that goes on, None outside of one."""
    return _CURRENT.get()


def now() -> float:
    """Seconds of a clock that goes on for what a rehearsal leaves out."""
    rehearsal = _CURRENT.get()
    return time.perf_counter() if rehearsal is None else rehearsal.now()


def few(items: Iterable[Item], count: int | None = None, *, lasting: float = 0.0) -> Iterator[Item]:
    """The items; in a rehearsal the first three, or with `lasting` at least two, until that many seconds have passed.

    The time of all but the first stands for the rest. What an item takes is the time until the next one is asked for.
    count: how many there are, if `items` does not know.
    """
    rehearsal = _CURRENT.get()
    if count is None:
        assert isinstance(items, Sequence)
        count = len(items)
    if rehearsal is None or count <= FEW:
        yield from items
        return
    fewest = 2 if lasting else FEW
    begin, done = rehearsal.now(), 0
    for item in items:
        if done == 1:
            begin = rehearsal.now()
        if done >= fewest and rehearsal.now() - begin >= lasting:
            break
        yield item
        done += 1
    if done < count:
        rehearsal.leave_out((rehearsal.now() - begin) / max(done - 1, 1) * (count - done))


@contextmanager
def counted(name: str) -> Iterator[None]:
    """What is done for a block, or for the layer or the parameter `name` in it."""
    rehearsal = _CURRENT.get()
    if rehearsal is None:
        yield
        return
    with rehearsal.counted(name):
        yield


def once(kind: Callable[[], str], make: Callable[[], Made]) -> Made:
    """What `make` returns; in a rehearsal a copy of what it returned before for the same `kind` of work."""
    rehearsal = _CURRENT.get()
    return make() if rehearsal is None else rehearsal.once(kind(), make)


def skip(seconds: float) -> None:
    """In a rehearsal, as if so many seconds had passed."""
    rehearsal = _CURRENT.get()
    if rehearsal is not None:
        rehearsal.leave_out(seconds)


def cannot_tell(why: str) -> None:
    """What is done now takes a time that does not tell that of the whole network."""
    rehearsal = _CURRENT.get()
    if rehearsal is not None:
        rehearsal.unknown = why


__all__ = ["FEW", "Rehearsal", "cannot_tell", "counted", "few", "now", "once", "ongoing", "skip"]
