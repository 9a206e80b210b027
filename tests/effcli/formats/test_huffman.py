"""Huffman coding: a case by hand, the optimum, streams that come back, and damage that is noticed."""

from __future__ import annotations

import heapq
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effcli.errors import CheckpointError
from effcli.formats import huffman


def stream(seed: int, count: int, symbols: int, skew: float) -> Tensor:
    """Random symbols uint8 (count,), number k in proportion to exp(-skew · k), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.exp(-skew * torch.arange(symbols, dtype=torch.float64))[torch.randperm(symbols, generator=generator)]
    return torch.multinomial(share, count, replacement=True, generator=generator).to(torch.uint8)


def best_bits(counts: list[int]) -> int:
    """Bits of the best code of single symbols: the sum of all inner nodes of Huffman's tree."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def test_by_hand() -> None:
    """Symbol 3 occurs four times, 0 twice, 1 and 5 once: codes 0, 10, 110 and 111."""
    symbols = torch.tensor([3, 0, 3, 1, 3, 5, 0, 3], dtype=torch.uint8)
    bits, lengths = huffman.encode(symbols)
    assert lengths.tolist() == [2, 3, 0, 1, 0, 3]
    # 0 10 0 110 0 111 10 0, filled up with zeros.
    assert bits.tolist() == [0b01001100, 0b11110000]
    assert huffman.decode(bits, lengths, 8).tolist() == symbols.tolist()
    assert huffman.entropy(symbols) == huffman.bits_per_symbol(symbols) == 1.75


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 600),
    symbols=st.integers(1, 256),
    skew=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
)
def test_every_stream_comes_back_in_the_fewest_bits(seed: int, count: int, symbols: int, skew: float) -> None:
    given_symbols = stream(seed, count, symbols, skew)
    bits, lengths = huffman.encode(given_symbols)
    assert bits.dtype == lengths.dtype == torch.uint8
    assert torch.equal(huffman.decode(bits, lengths, count), given_symbols)
    counts = torch.bincount(given_symbols.long())
    least = best_bits(counts.tolist())
    assert bits.numel() == math.ceil(least / 8)
    assert huffman.bits_per_symbol(given_symbols) == least / count
    assert huffman.coded_bits(counts, lengths) == least
    # Shannon's bounds; a stream of one symbol alone takes nothing.
    entropy = huffman.entropy(given_symbols)
    assert entropy - 1e-9 <= least / count < entropy + 1
    again = huffman.encode(given_symbols)
    assert torch.equal(again[0], bits) and torch.equal(again[1], lengths)


def test_streams_of_one_symbol_and_of_none() -> None:
    for symbol in (0, 7, 255):
        bits, lengths = huffman.encode(torch.full((9,), symbol, dtype=torch.uint8))
        assert bits.numel() == 0 and len(lengths) == symbol + 1
        assert huffman.decode(bits, lengths, 9).tolist() == [symbol] * 9
    bits, lengths = huffman.encode(torch.zeros(0, dtype=torch.uint8))
    assert bits.numel() == lengths.numel() == huffman.decode(bits, lengths, 0).numel() == 0
    assert huffman.entropy(torch.zeros(0, dtype=torch.uint8)) == huffman.entropy(torch.ones(5, dtype=torch.uint8)) == 0


def test_entropy_by_hand() -> None:
    symbols = torch.tensor([0] * 9 + [4], dtype=torch.uint8)
    assert huffman.entropy(symbols) == pytest.approx(-(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)))
    assert huffman.bits_per_symbol(symbols) == 1
    assert huffman.entropy(torch.arange(256).to(torch.uint8)) == 8


def test_codes_stay_within_what_can_be_decoded() -> None:
    """Counts that grow like Fibonacci's numbers ask for one more bit with each symbol."""
    counts = [1, 1]
    while len(counts) < 45:
        counts.append(counts[-1] + counts[-2])
    lengths = huffman.code_lengths(torch.tensor(counts))
    assert int(lengths.max()) <= 31
    assert sum(2.0 ** -int(length) for length in lengths) == 1
    symbols = torch.arange(45).to(torch.uint8).repeat(3)
    coded = huffman.encode(symbols)
    assert torch.equal(huffman.decode(*coded, len(symbols)), symbols)
    assert torch.equal(huffman.code_lengths(torch.tensor(counts[:20])).sort().values[-3:], torch.tensor([18, 19, 19]))


def test_a_code_of_31_bits_is_decoded() -> None:
    """The longest one: symbol k has k + 1 bits, and the last two have 31."""
    lengths = torch.tensor([*range(1, 32), 31], dtype=torch.uint8)
    # 31 ones are the last symbol, 30 ones and a zero the one before, a zero the first.
    bits = [1] * 31 + [1] * 30 + [0] + [0]
    bits += [0] * (-len(bits) % 8)
    packed = [int("".join(map(str, bits[k : k + 8])), 2) for k in range(0, len(bits), 8)]
    decoded = huffman.decode(torch.tensor(packed, dtype=torch.uint8), lengths, 3)
    assert decoded.tolist() == [31, 30, 0]


def test_damage_is_noticed() -> None:
    symbols = stream(0, 1000, 9, 0.3)
    bits, lengths = huffman.encode(symbols)
    with pytest.raises(CheckpointError, match="shorter than 1000"):
        huffman.decode(bits[:-1], lengths, 1000)
    with pytest.raises(CheckpointError, match="shorter than 1010"):
        huffman.decode(bits, lengths, 1010)
    for count in (0, 900):
        with pytest.raises(CheckpointError, match=f"longer than {count}"):
            huffman.decode(bits, lengths, count)
    longer = lengths.clone()
    longer[0] += 1
    for wrong in (longer, longer - 2, torch.tensor([1, 1, 1]), torch.tensor([200, 200])):
        with pytest.raises(CheckpointError, match="those of no code"):
            huffman.decode(bits, wrong.to(torch.uint8), 1000)
    for empty in (torch.zeros(0), torch.zeros(4)):
        with pytest.raises(CheckpointError, match="does not hold 5 symbols"):
            huffman.decode(torch.zeros(0, dtype=torch.uint8), empty.to(torch.uint8), 5)
    with pytest.raises(CheckpointError, match="does not hold 5 symbols"):
        huffman.decode(bits, torch.tensor([0, 1], dtype=torch.uint8), 5)
