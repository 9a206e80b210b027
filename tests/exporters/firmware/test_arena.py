"""Bands and addresses: worked by hand, and held against a simulation of every read and write."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from integer_networks import Network, random_network

from effcli.exporters.firmware import arena, bands, lowering
from effcli.exporters.firmware.arena import Plan
from effcli.exporters.firmware.bands import Pace
from effcli.exporters.firmware.program import Program, Spatial, Window


def planned(net: Network) -> tuple[Program, Plan]:
    return arena.plan(lowering.lower(net.finish()))


def residual_block() -> Network:
    """x -> conv -> conv -> + x at 16 x 16 x 8: 2048 bytes for each tensor, 128 for a row."""
    net = Network((8, 16, 16))
    start = net.convolution(8, (3, 3), padding=(1, 1, 1, 1))
    net.convolution(8, (3, 3), padding=(1, 1, 1, 1))
    net.add(net.convolution(8, (3, 3), padding=(1, 1, 1, 1)), start)
    return net


def test_a_window_by_hand() -> None:
    window = Window(count=3, stride=2, above=1)
    assert [window.first(y) for y in range(3)] == [0, 1, 3]
    assert [window.end(y, 6) for y in range(3)] == [2, 4, 6]


def test_distance_of_a_pointwise_convolution() -> None:
    # 4 channels become 4: two pixels are written when both are read, so an output may take its input's place.
    same = Spatial(1, 6, 4, 1, 6, 4, (1, 1), (1, 1), (0, 0, 0, 0))
    assert same.distance(2, read_first=True) == 0
    # 4 become 8: after pixels 0 and 1, 16 bytes are written, and pixel 2 is read from 8 on; at the end 32 and 16.
    wider = Spatial(1, 6, 4, 1, 6, 8, (1, 1), (1, 1), (0, 0, 0, 0))
    assert wider.distance(2, read_first=True) == 32 - 16


def test_distance_of_a_padded_window() -> None:
    # 3 x 3 at stride 1 on 4 x 5 with one channel: pixel (y, x) reads from (y - 1, x - 1) on.
    spatial = Spatial(4, 5, 1, 4, 5, 1, (3, 3), (1, 1), (1, 1, 1, 1))
    # Pixel (3, 4) is written to 19 when the window of (3, 4) has been read: all of them are needed until then.
    # Before it, (3, 3) ends at 19 while (2, 3) = 13 is still read.
    assert spatial.distance(1, read_first=True) == max(
        (y * 5 + x + 1)
        - min(max(0, v - 1) * 5 + max(0, u - 1) for v, u in itertools.product(range(4), range(5)) if (v, u) > (y, x))
        for y, x in itertools.product(range(4), range(5))
        if (y, x) < (3, 4)
    )


def test_a_residual_block_keeps_rows_of_what_passes_inside() -> None:
    program, plan = planned(residual_block())
    assert len(plan.bands) < 4
    whole = 3 * 2048
    assert plan.nbytes < whole
    inner = [band for band in plan.bands if band.size > 1]
    assert inner and all(rows < 16 for band in inner for rows in band.rings.values())
    assert len(program.tasks) == 4


def test_paces_are_those_of_the_windows() -> None:
    program = lowering.lower(residual_block().finish())
    last = {task.output.name: index for index, task in enumerate(program.tasks)}
    uses = {tensor.name: index for index, task in enumerate(program.tasks) for tensor in task.inputs}
    band = bands.join(program, 1, 4, {**last, **uses})
    assert band is not None
    # Row y of the sum needs row y of the second convolution, and that rows up to y + 1 of the first.
    assert band.paces == (Pace(1, 2, 16), Pace(1, 1, 16))
    # A window of three rows, and one row that is added at once.
    assert sorted(band.rings.values()) == [1, 3]


def test_a_chain_runs_down_the_diagonal() -> None:
    net = Network((16, 8, 8))
    for _ in range(4):
        net.convolution(16, (1, 1))
    _, plan = planned(net)
    # Two whole tensors would be 2048: each output moves below its input by less than two pixels.
    assert plan.nbytes < 1024 + 256


def test_the_same_network_gets_the_same_addresses() -> None:
    assert planned(residual_block())[1].pieces == planned(residual_block())[1].pieces


def test_addresses_do_not_depend_on_the_hashes_of_names() -> None:
    program = (
        "from test_arena import planned, residual_block\n"
        "print([(piece.name, offset) for piece, offset in planned(residual_block())[1].pieces])"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "support")]
    printed = {
        subprocess.run(
            [sys.executable, "-c", f"import sys\nsys.path += {folders}\n{program}"],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(printed) == 1


@pytest.mark.parametrize("seed", range(30))
def test_pieces_meet_only_where_they_may(seed: int) -> None:
    _, plan = arena.plan(lowering.lower(random_network(seed)))
    allowed = {pair for band in plan.bands for pair in band.distances}
    for (first, at), (second, there) in itertools.combinations(plan.pieces, 2):
        if first.end < second.start or second.end < first.start:
            continue
        if at + first.nbytes <= there or there + second.nbytes <= at:
            continue
        names = {(first.name, second.name), (second.name, first.name)} & allowed
        assert names and first.kind == second.kind == "tensor", (first, at, second, there)
    assert plan.nbytes >= max(offset + piece.nbytes for piece, offset in plan.pieces)
    assert all(offset % arena.ALIGNMENT == 0 for _, offset in plan.pieces)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_overwritten_that_is_still_read(seed: int) -> None:
    """Every row that is read holds what its task wrote, simulated byte by byte in the order of the schedule."""
    program, plan = arena.plan(lowering.lower(random_network(seed)))
    memory: dict[int, tuple[str, int]] = {}

    def place(name: str, row: int, rows: int, row_bytes: int) -> int:
        ring = next((band.rings[name] for band in plan.bands if name in band.rings), None)
        offset = plan.offset("ring" if ring is not None else "tensor", name)
        return offset + (row % (ring or rows)) * row_bytes

    def write(name: str, row: int, rows: int, row_bytes: int) -> None:
        start = place(name, row, rows, row_bytes)
        for byte in range(row_bytes):
            memory[start + byte] = (name, row * row_bytes + byte)

    def check(name: str, row: int, rows: int, row_bytes: int) -> None:
        start = place(name, row, rows, row_bytes)
        for byte in range(row_bytes):
            assert memory.get(start + byte) == (name, row * row_bytes + byte), (name, row)

    for row in range(program.input.rows):
        write(program.input.name, row, program.input.rows, program.input.row_bytes)
    for band in plan.bands:
        tasks = program.tasks[band.start : band.end]
        done = [0] * len(tasks)
        for y in range(tasks[-1].output.rows if tasks[-1].windows is not None else 1):
            for number, task in enumerate(tasks):
                if task.windows is None:
                    for tensor in task.inputs:
                        for row in range(tensor.rows):
                            check(tensor.name, row, tensor.rows, tensor.row_bytes)
                    for row in range(task.output.rows):
                        write(task.output.name, row, task.output.rows, task.output.row_bytes)
                    continue
                last = number == len(tasks) - 1
                pace = None if last else band.paces[number]
                height = task.output.rows
                limit = y + 1 if pace is None else height if y == tasks[-1].output.rows - 1 else pace.a * y + pace.b
                while done[number] < min(limit, height):
                    row = done[number]
                    for tensor, window in zip(task.inputs, task.windows, strict=True):
                        for k in range(window.count):
                            at = row * window.stride - window.above + k * window.dilation
                            if 0 <= at < tensor.rows:
                                check(tensor.name, at, tensor.rows, tensor.row_bytes)
                    write(task.output.name, row, height, task.output.row_bytes)
                    done[number] += 1
        assert all(
            count == task.output.rows for count, task in zip(done, tasks, strict=True) if task.windows is not None
        )
