"""Layouts: permutations of flat indices, and copies between them as loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcli.exporters.firmware import layout
from effcli.exporters.firmware.layout import Copy, Level

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def carried_out(copy: Copy, size: int) -> dict[int, int]:
    """Output position -> input position of every round of the loops."""
    rounds = itertools.product(*(range(level.extent) for level in copy.levels))
    return {
        copy.first_output
        + sum(n * level.output for n, level in zip(indices, copy.levels, strict=True)): copy.first_input
        + sum(n * level.input for n, level in zip(indices, copy.levels, strict=True))
        for indices in rounds
    }


def test_channels_last_by_hand() -> None:
    # Two channels of a 2 x 2 image: 0 1 / 2 3 and 4 5 / 6 7.
    assert layout.channels_last((2, 2, 2)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert layout.channels_last((3, 2)).tolist() == [0, 1, 2, 3, 4, 5]


@given(SHAPES, st.permutations(range(4)))
def test_a_transposed_layout_reads_the_same_memory(shape: tuple[int, ...], order: list[int]) -> None:
    axes = [axis for axis in order if axis < len(shape)]
    values = np.arange(np.prod(shape)) * 7 % 101
    places = layout.channels_last(shape)
    memory = values[places]
    moved = layout.transposed(shape, places, tuple(axes))
    expected = values.reshape(shape).transpose(axes).reshape(-1)
    assert np.array_equal(expected[moved], memory)


@given(SHAPES, st.permutations(range(4)))
def test_copies_between_orders_become_loops(shape: tuple[int, ...], order: list[int]) -> None:
    axes = tuple(axis for axis in order if axis < len(shape))
    places = layout.ordered(shape, axes)
    outputs, inputs = layout.natural(shape), layout.inverse(places)
    found = carried_out(layout.copy(outputs, inputs), len(places))
    assert found == dict(zip(outputs.tolist(), inputs.tolist(), strict=True))


def test_a_copy_by_hand() -> None:
    # The transpose of a 2 x 3 matrix reads 0 3 1 4 2 5.
    found = layout.copy(np.arange(6), np.array([0, 3, 1, 4, 2, 5]))
    assert found == Copy(0, 0, (Level(3, 2, 1), Level(2, 1, 3)))


def test_a_copy_without_strides_is_refused() -> None:
    with pytest.raises(ValueError, match="no nest"):
        layout.copy(np.arange(5), np.array([0, 3, 1, 4, 2]))


def test_order_of_finds_the_axes() -> None:
    shape = (2, 3, 4)
    for order in itertools.permutations(range(3)):
        assert layout.order_of(shape, layout.ordered(shape, order)) == order
    assert layout.order_of(shape, layout.natural(shape)[::-1]) is None


def test_rows_of_a_matrix() -> None:
    natural = layout.natural((3, 4))
    order, columns = layout.rows(natural, 3) or pytest.fail("no rows")
    assert order.tolist() == [0, 1, 2] and columns.tolist() == [0, 1, 2, 3]
    shuffled = natural.reshape(3, 4)[[2, 0, 1]][:, [1, 3, 0, 2]].reshape(-1)
    order, columns = layout.rows(shuffled, 3) or pytest.fail("no rows")
    assert order.tolist() == [2, 0, 1] and columns.tolist() == [1, 3, 0, 2]
    # Columns outermost: the rows are interleaved.
    assert layout.rows(layout.ordered((3, 4), (1, 0)), 3) is None
