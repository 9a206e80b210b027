"""Where everything lies in the arena: the bands of least memory, and an address for each tensor, ring and scratch.

An input that is read for the last time may overlap the output that is written meanwhile, as long as it starts far
enough above it: memory then runs along a diagonal of time and address.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from effcli.exporters.firmware.bands import Band, join, single
from effcli.exporters.firmware.program import Program, Tensor

# Addresses are multiples of this: kernels read words of weights and scratch.
ALIGNMENT = 4
# What the address of the whole arena, and its size, is a multiple of.
WHOLE = 8
# Tasks of one band at the most; longer ones were never of use, and planning stays quick.
_LONGEST = 24
# Orders of placement that are tried.
_TRIES = 400


class Piece(NamedTuple):
    """A piece of the arena. kind: tensor, ring or scratch; start, end: the first and last band that needs it."""

    name: str
    kind: str
    nbytes: int
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """bands in order; pieces with their offsets in bytes; nbytes: of the whole arena."""

    bands: tuple[Band, ...]
    pieces: tuple[tuple[Piece, int], ...]
    nbytes: int

    def offset(self, kind: str, name: str) -> int:
        return next(offset for piece, offset in self.pieces if (piece.kind, piece.name) == (kind, name))

    def live(self, band: int) -> int:
        """The highest address that is in use during a band."""
        return max((o + p.nbytes for p, o in self.pieces if p.start <= band <= p.end), default=0)


def plan(program: Program) -> tuple[Program, Plan]:
    """The bands that need the least memory, and among those the shortest ones, with addresses.

    Returned with the program whose tasks are those of the bands, see `Task.alone`.
    """
    last_use = _last_use(program)
    bands = _split(program, last_use)
    pieces, distances = _pieces(program, bands, last_use)
    offsets = _place(pieces, distances)
    nbytes = max((offset + piece.nbytes for piece, offset in zip(pieces, offsets, strict=True)), default=0)
    alone = {band.start for band in bands if band.size == 1}
    tasks = tuple(task.alone() if index in alone else task for index, task in enumerate(program.tasks))
    placed = tuple(zip(pieces, offsets, strict=True))
    return replace(program, tasks=tasks), Plan(tuple(bands), placed, -(-nbytes // WHOLE) * WHOLE)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _last_use(program: Program) -> dict[str, int]:
    """The last task that reads each tensor; the output is read after all of them."""
    found = {program.input.name: -1, **{task.output.name: -1 for task in program.tasks}}
    for index, task in enumerate(program.tasks):
        for tensor in task.inputs:
            found[tensor.name] = index
    found[program.output.name] = len(program.tasks)
    return found


def _split(program: Program, last_use: dict[str, int]) -> list[Band]:
    """Cut the tasks into bands: least peak of memory first, then the fewest tasks in bands of several."""
    count = len(program.tasks)
    best: list[tuple[int, int]] = [(0, 0)] + [(1 << 62, 0)] * count
    chosen: list[Band | None] = [None] * (count + 1)
    for start in range(count):
        for end in range(start + 1, min(count, start + _LONGEST) + 1):
            band = single(program, start) if end == start + 1 else join(program, start, end, last_use)
            if band is None:
                if end > start + 1 and program.tasks[end - 1].windows is None:
                    break
                continue
            peak = max(best[start][0], _need(program, band, last_use))
            key = peak, best[start][1] + (band.size if band.size > 1 else 0)
            if key < best[end]:
                best[end], chosen[end] = key, band
    bands: list[Band] = []
    end = count
    while end:
        band = chosen[end]
        assert band is not None
        bands.append(band)
        end = band.start
    return bands[::-1]


def _need(program: Program, band: Band, last_use: dict[str, int]) -> int:
    """The least memory that a band can do with, beside whatever fragments the arena."""
    made = {program.input.name: program.input}
    made |= {task.output.name: task.output for task in program.tasks[: band.start]}
    live = [tensor for name, tensor in made.items() if last_use[name] >= band.start]
    total = sum(_aligned(tensor.nbytes) for tensor in (*live, *band.outputs)) + _aligned(band.scratch)
    tensors = {task.output.name: task.output for task in program.tasks[band.start : band.end]}
    total += sum(_aligned(rows * tensors[name].row_bytes) for name, rows in band.rings.items())
    dying = [tensor for tensor in live if last_use[tensor.name] < band.end]
    savings = [_saving(output, tensor, band) for output in band.outputs for tensor in dying]
    return total - max(savings, default=0)


def _saving(output: Tensor, tensor: Tensor, band: Band) -> int:
    """Bytes that an input and an output can share."""
    distance = band.distances.get((output.name, tensor.name))
    if distance is None:
        return 0
    together = max(_aligned(distance) + tensor.nbytes, output.nbytes)
    return max(0, tensor.nbytes + output.nbytes - together)


def _pieces(
    program: Program, bands: list[Band], last_use: dict[str, int]
) -> tuple[list[Piece], dict[tuple[str, str], int]]:
    """All pieces with their lifetimes in bands, and the distances of those pairs that may overlap."""
    number = {index: which for which, band in enumerate(bands) for index in range(band.start, band.end)}
    number |= {-1: 0, len(program.tasks): len(bands) - 1}
    tensors = {task.output.name: task.output for task in program.tasks}
    pieces = [Piece(program.input.name, "tensor", program.input.nbytes, 0, number[last_use[program.input.name]])]
    distances: dict[tuple[str, str], int] = {}
    for which, band in enumerate(bands):
        for tensor in band.outputs:
            pieces.append(Piece(tensor.name, "tensor", tensor.nbytes, which, max(which, number[last_use[tensor.name]])))
        for name, rows in band.rings.items():
            pieces.append(Piece(name, "ring", rows * tensors[name].row_bytes, which, which))
        if band.scratch:
            pieces.append(Piece(str(which), "scratch", band.scratch, which, which))
        for (output, name), distance in band.distances.items():
            if number[last_use[name]] == which:
                distances[output, name] = _aligned(distance)
    return pieces, distances


def _place(pieces: list[Piece], distances: dict[tuple[str, str], int]) -> list[int]:
    """An offset for each piece: first fit in the best of many orders, each a small change of the best so far."""
    count = len(pieces)
    conflicts = [
        [
            (other, *_forbidden(pieces[index], pieces[other], distances))
            for other in range(count)
            if other != index and pieces[index].start <= pieces[other].end and pieces[other].start <= pieces[index].end
        ]
        for index in range(count)
    ]
    # Large pieces first suits a network with branches; from its end to its start, a chain along the diagonal.
    starts = (
        sorted(range(count), key=lambda index: (-pieces[index].nbytes, index)),
        sorted(range(count), key=lambda index: (-pieces[index].end, -pieces[index].nbytes, index)),
    )
    (best, offsets), order = min(
        ((_first_fit(pieces, conflicts, start), start) for start in starts), key=lambda tried: tried[0][0]
    )
    state = 1
    for _ in range(_TRIES if count > 2 else 0):
        # A fixed sequence of exchanges: the same network always gets the same addresses.
        state = (1103515245 * state + 12345) % 2**31
        first = state // 65536 % count
        state = (1103515245 * state + 12345) % 2**31
        second = state // 65536 % count
        tried = list(order)
        tried.insert(second, tried.pop(first))
        total, found = _first_fit(pieces, conflicts, tried)
        if total <= best:
            best, offsets, order = total, found, tried
    return offsets


def _forbidden(piece: Piece, other: Piece, distances: dict[tuple[str, str], int]) -> tuple[int, int]:
    """(below, above): an offset x of `piece` collides with `other` at y when y - below < x < y + above."""
    if piece.kind == other.kind == "tensor":
        written = distances.get((piece.name, other.name))
        if written is not None:
            return min(written, piece.nbytes), other.nbytes
        read = distances.get((other.name, piece.name))
        if read is not None:
            return piece.nbytes, min(read, other.nbytes)
    return piece.nbytes, other.nbytes


def _first_fit(
    pieces: list[Piece], conflicts: list[list[tuple[int, int, int]]], order: list[int]
) -> tuple[int, list[int]]:
    """The lowest free offset for each piece in turn; the whole size, and the offsets."""
    offsets = [-1] * len(pieces)
    total = 0
    for index in order:
        taken = sorted(
            (offsets[other] - below, offsets[other] + above)
            for other, below, above in conflicts[index]
            if offsets[other] >= 0
        )
        offset = 0
        for low, high in taken:
            if low < offset < high:
                offset = _aligned(high)
        offsets[index] = offset
        total = max(total, offset + pieces[index].nbytes)
    return total, offsets
