"""Weights in the order of the kernels, unpacked again by the formulas of the C."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcli.exporters.firmware import packing


def codes(out: int, count: int, bits: int, seed: int = 0) -> np.ndarray:
    bound = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-bound, bound, (out, count)).astype(np.int8)


def test_pairs_by_hand() -> None:
    weight = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]], np.int8)
    found = packing.pairs(weight, 1, 8)
    assert found.shape == (1, 2, 2, 2, 4)
    # The first pair: four of channel 0, four of channel 1, then what is left of both, filled up with zeros.
    assert found[0, 0].reshape(-1).tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 5, 0, 0, 0, 10, 0, 0, 0]
    # The third channel has no partner.
    assert found[0, 1, 0].tolist() == [[11, 12, 13, 14], [0, 0, 0, 0]]


def test_a_word_of_nibbles_by_hand() -> None:
    # Stored as w + 8: k0 k1 of the first channel, k0 k1 of the second, then k2 k3 of both.
    block = np.array([[-8, -7, -6, -5], [0, 1, 2, 7]])
    assert packing.words(block) == 0x_FA32_9810


@given(st.integers(1, 7), st.integers(1, 13), st.sampled_from([4, 8]))
def test_quads_unpack_to_the_weights(out: int, count: int, bits: int) -> None:
    weight = codes(out, count, bits)
    chunk = 8
    flat = packing.quads(weight, chunk, bits)
    rows = -(-out // 4) * 4
    rebuilt = []
    start = 0
    for first in range(0, count, chunk):
        blocks = -(-min(chunk, count - first) // 4)
        size = rows * blocks * 4 // (8 if bits == 4 else 1)
        part = flat[start : start + size]
        start += size
        if bits == 4:
            words = part.reshape(rows // 4, blocks, 2)
            nibbles = [(words >> shift) & 15 for shift in (0, 4, 16, 20, 8, 12, 24, 28)]
            part = np.stack(nibbles, -1).reshape(rows // 4, blocks, 4, 4).astype(np.int64) - 8
        else:
            part = part.reshape(rows // 4, blocks, 4, 4).astype(np.int64) - 128
        rebuilt.append(part.swapaxes(1, 2).reshape(rows, blocks * 4))
    assert start == len(flat)
    columns = np.concatenate([part[:, : min(chunk, count - 8 * k)] for k, part in enumerate(rebuilt)], 1)
    assert np.array_equal(columns[:out], weight)


@given(st.integers(1, 5), st.integers(1, 11))
def test_one_product_of_sums_is_two_products(out: int, count: int) -> None:
    """The identity that plain C multiplies a row with, in exact integers."""
    weight = codes(out, count, 8).astype(np.int64)
    inputs = np.random.default_rng(1).integers(-128, 128, count)
    padded = packing.padded(weight, 4, 1)
    x = np.pad(inputs, (0, padded.shape[1] - count))
    low, high = np.arange(padded.shape[1]).reshape(-1, 2, 2).transpose(1, 0, 2).reshape(2, -1)
    products = ((x[high] + 256 + padded[:, low]) * (x[low] + padded[:, high])).sum(1)
    common = ((x[high] + 256) * x[low]).sum()
    assert np.array_equal(products - common - packing.cross_terms(weight), weight @ inputs)


def test_filters_by_hand() -> None:
    weight = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]], np.int8)
    found = packing.filters(weight)
    assert found.tolist() == [[[1, 3, 5, 7], [2, 4, 6, 8]], [[9, 0, 0, 0], [10, 0, 0, 0]]]


@pytest.mark.parametrize("bits", [4, 8])
def test_extremes_are_stored(bits: int) -> None:
    bound = 2 ** (bits - 1)
    weight = np.array([[-bound, bound - 1, 0, -1]], np.int8)
    assert packing.quads(weight, 4, bits).size == (2 if bits == 4 else 16)
    assert packing.pairs(weight, 1, bits).size == (1 if bits == 4 else 8)
