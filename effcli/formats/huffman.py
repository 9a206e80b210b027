"""Huffman coding of streams of small numbers: codes of weights, or gaps between them (arXiv:1510.00149, section 4).

A stream is any uint8 sequence. What is stored is the bits, most significant first, and the length of each symbol's
code: the canonical code, which orders symbols by length and then by number, follows from the lengths. bitarray finds
the lengths, encodes and decodes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from bitarray import bitarray
from bitarray.util import canonical_decode, huffman_code, int2ba
from torch import Tensor

from effcli.errors import CheckpointError

_DAMAGED = "download or make the checkpoint again"
# The longest code that bitarray decodes.
_LONGEST = 31


def encode(symbols: Tensor) -> tuple[Tensor, Tensor]:
    """Code symbols uint8 (n,): the bits, uint8 (bytes,), and the code length of each symbol, uint8 (largest + 1,).

    A stream of one symbol alone takes no bits.
    """
    lengths = code_lengths(_counts(symbols))
    present = _present(lengths)
    if len(present) < 2:
        return torch.zeros(0, dtype=torch.uint8), lengths
    stream = bitarray(endian="big")
    stream.encode(_canonical(present), symbols.cpu().numpy().tobytes())
    return torch.from_numpy(np.frombuffer(stream.tobytes(), dtype=np.uint8).copy()), lengths


def decode(stream: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The inverse of `encode`: uint8 (count,). `CheckpointError` when the stream holds another number of symbols."""
    present = _present(lengths)
    if len(present) < 2:
        if stream.numel() or bool(count) != bool(present):
            raise CheckpointError(f"a Huffman-coded stream does not hold {count} symbols", _DAMAGED)
        return torch.full((count,), present[0][1] if present else 0, dtype=torch.uint8)
    longest = present[-1][0]
    # A whole code, in which every sequence of bits means something, fills the unit interval (Kraft).
    if longest > _LONGEST or sum(1 << (longest - length) for length, _ in present) != 1 << longest:
        raise CheckpointError("the code lengths of a Huffman-coded stream are those of no code", _DAMAGED)
    numbers = [0] * (longest + 1)
    for length, _ in present:
        numbers[length] += 1
    bits = bitarray(endian="big")
    bits.frombytes(stream.cpu().numpy().tobytes())
    decoded = canonical_decode(bits, numbers, [symbol for _, symbol in present])
    try:
        # The last byte may be filled up with bits that are no symbol.
        symbols = torch.from_numpy(np.fromiter(decoded, dtype=np.uint8, count=count))
    except ValueError as error:
        raise CheckpointError(f"a Huffman-coded stream is shorter than {count} symbols", _DAMAGED) from error
    if math.ceil(coded_bits(_counts(symbols), lengths) / 8) != stream.numel():
        raise CheckpointError(f"a Huffman-coded stream is longer than {count} symbols", _DAMAGED)
    return symbols


def code_lengths(counts: Tensor) -> Tensor:
    """Bits of the Huffman code of each symbol, uint8 (symbols,), for how often each occurs, int64 (symbols,).

    0 for a symbol that does not occur, 1 for one that alone does. Codes have at most 31 bits.
    """
    frequencies = {symbol: count for symbol, count in enumerate(counts.tolist()) if count}
    lengths = torch.zeros(len(counts), dtype=torch.uint8)
    if len(frequencies) < 2:
        for symbol in frequencies:
            lengths[symbol] = 1
        return lengths
    code = huffman_code(frequencies)
    while max(len(bits) for bits in code.values()) > _LONGEST:
        # Only counts that grow like Fibonacci's numbers lead here; flatter ones make a shallower tree.
        frequencies = {symbol: (count + 1) // 2 for symbol, count in frequencies.items()}
        code = huffman_code(frequencies)
    for symbol, bits in code.items():
        lengths[symbol] = len(bits)
    return lengths


def coded_bits(counts: Tensor, lengths: Tensor) -> int:
    """Bits of a coded stream, for how often each symbol occurs, int64 (symbols,), and `lengths` of at least as many."""
    if int((counts > 0).sum()) < 2:
        return 0
    return int((counts * lengths[: len(counts)].long()).sum())


def entropy(symbols: Tensor) -> float:
    """Bits per symbol that no code of single symbols can go below, of uint8 (n,); 0 for an empty stream."""
    if not symbols.numel():
        return 0.0
    share = _counts(symbols).double() / symbols.numel()
    return max(0.0, float(-torch.special.xlogy(share, share).sum()) / math.log(2))


def bits_per_symbol(symbols: Tensor) -> float:
    """Bits per symbol of uint8 (n,) in a Huffman-coded stream, without the code's own table; 0 for an empty one."""
    counts = _counts(symbols)
    return coded_bits(counts, code_lengths(counts)) / max(symbols.numel(), 1)


def nbytes(symbols: Tensor) -> int:
    """Bytes of both tensors that `encode` makes of uint8 (n,)."""
    counts = _counts(symbols)
    lengths = code_lengths(counts)
    return math.ceil(coded_bits(counts, lengths) / 8) + lengths.nbytes


def _counts(symbols: Tensor) -> Tensor:
    """How often each symbol occurs, int64 (largest + 1,)."""
    if not symbols.numel():
        return torch.zeros(0, dtype=torch.int64)
    return torch.bincount(symbols.reshape(-1).cpu())


def _present(lengths: Tensor) -> list[tuple[int, int]]:
    """(length, symbol) of every symbol that occurs, in canonical order."""
    return sorted((length, symbol) for symbol, length in enumerate(lengths.tolist()) if length)


def _canonical(present: list[tuple[int, int]]) -> dict[int, bitarray]:
    """The code of each symbol: each is the one before plus one, with zeros behind it where it is longer."""
    code, before, found = 0, present[0][0], {}
    for length, symbol in present:
        code <<= length - before
        found[symbol] = int2ba(code, length, endian="big")
        code, before = code + 1, length
    return found
