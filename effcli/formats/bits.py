"""Codes of a few bits, packed into 32-bit words and back.

The layout is the one of compressed-tensors' `pack-quantized` (https://github.com/vllm-project/compressed-tensors):
element j of a row stands in bits [j·b, (j+1)·b) of the row's stream of 32-bit little-endian words, for every b from 1
to 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# 32 elements of b bits fill exactly b words, so a row is packed in runs of 32.
_RUN = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (rows, n) below 2**bits into int32 words (rows, ceil(n·bits/32)).

    Every code lies in at most two neighbouring words; both parts are or-ed in, since no two codes share a bit.
    """
    rows, count = codes.shape
    runs = math.ceil(count / _RUN)
    padded = torch.zeros(rows, runs * _RUN, dtype=torch.int64, device=codes.device)
    padded[:, :count] = codes
    padded = padded.view(rows, runs, _RUN)
    words = torch.zeros(rows, runs, bits, dtype=torch.int64, device=codes.device)
    for j in range(_RUN):
        word, shift = divmod(j * bits, 32)
        spread = padded[:, :, j] << shift
        words[:, :, word] |= spread & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, :, word + 1] |= spread >> 32
    packed = words.view(rows, runs * bits)[:, : math.ceil(count * bits / 32)]
    # Words above 2**31 wrap to negative int32: the same bits.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Restore uint8 codes (rows, count) from int32 words (rows, ceil(count·bits/32))."""
    rows = words.shape[0]
    if bits in (2, 4, 8):
        # Codes that never straddle a byte: split bytes, 8 times less memory than going through words.
        # One word may have any stride and still count as contiguous; bytes can be viewed of stride 1 only.
        ready = words.is_contiguous() and words.stride(1) == 1
        whole = words if ready else words.clone(memory_format=torch.contiguous_format)
        octets = whole.view(torch.uint8).view(rows, 4 * words.shape[1], 1)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes: Tensor = (octets >> shifts) & (2**bits - 1)
        return codes.view(rows, words.shape[1] * 32 // bits)[:, :count]
    runs = math.ceil(count / _RUN)
    padded = torch.zeros(rows, runs * bits, dtype=torch.int32, device=words.device)
    padded[:, : words.shape[1]] = words
    padded = padded.view(rows, runs, bits)
    codes = torch.empty(rows, runs, _RUN, dtype=torch.uint8, device=words.device)
    for j in range(_RUN):
        word, shift = divmod(j * bits, 32)
        # Arithmetic shifts smear the sign upwards; the mask keeps only the bits that belong to this word.
        low = min(bits, 32 - shift)
        code = (padded[:, :, word] >> shift) & (2**low - 1)
        if low < bits:
            code |= (padded[:, :, word + 1] & (2 ** (bits - low) - 1)) << low
        codes[:, :, j] = code.to(torch.uint8)
    return codes.view(rows, runs * _RUN)[:, :count]
