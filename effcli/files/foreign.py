"""Layers that other tools quantized, read into formats of effcli without rounding: bitsandbytes, GPTQ and AWQ.

A layer's tensors stand beside one another under its name and an ending. What a format of effcli cannot say without
rounding, such as groups that follow the order of activations, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.files.checkpoint import Entry, read_entry
from effcli.files.documents import check_model, parse_json
from effcli.formats import Affine, AffineWeight, Codebook, CodebookWeight, DoubleQuantized, Packing, Quantized
from effcli.formats.base import FLOATING, Tensors, expect
from effcli.formats.bits import unpack_bits
from effcli.formats.codebook import DOUBLE_BLOCK, dynamic_map, fixed_table

_ORIGINAL = "start from the original checkpoint"
# The JSON that bitsandbytes keeps of an NF4 weight.
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = 4
# Outputs in a word of AWQ, from the low bits up.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class ForeignLayout:
    """How a tool stores a layer.

    endings: of the names of its tensors, the first of which every layer has and nothing else; describe: the format of a
    layer from its tensors by ending, unread, and its shape (out, in); read: its weight.
    `ValueError` for tensors that are not those of such a layer.
    """

    name: str
    endings: tuple[str, ...]
    describe: Callable[[Entries, tuple[int, int]], Packing]
    read: Callable[[Tensors, tuple[int, int]], Quantized]

    def split(self, key: str, entries: Mapping[str, Any]) -> tuple[str, str] | None:
        """The layer and the ending of a tensor; None of one that belongs to no quantized layer."""
        for ending in self.endings:
            layer = key.removesuffix(f".{ending}")
            if layer != key and f"{layer}.{self.endings[0]}" in entries:
                return layer, ending
        return None


def foreign_layout(config: Mapping[str, Any]) -> ForeignLayout | None:
    """The layout of another tool that a checkpoint's config names; None where it names none of them.

    Raises `UnsupportedError` for a variant that cannot be read without rounding, or not at all.
    """
    found = config.get("quantization_config") or {}
    method = found.get("quant_method")
    if method == "gptq":
        return _gptq(found)
    if method == "awq":
        if str(found.get("version", "gemm")).lower() != "gemm" or found.get("bits", AWQ_BITS) != AWQ_BITS:
            raise _unread(f"AWQ {found.get('version')} of {found.get('bits')} bits")
        return ForeignLayout("AWQ", ("qweight", "qzeros", "scales"), _awq_format, read_awq)
    if method == "bitsandbytes" or (method is None and (found.get("load_in_4bit") or found.get("load_in_8bit"))):
        return _bitsandbytes(found)
    return None


def _unread(what: str) -> UnsupportedError:
    return UnsupportedError(f"the checkpoint is already quantized as {what}, which effcli does not read", _ORIGINAL)


def _gptq(found: Mapping[str, Any]) -> ForeignLayout:
    layout = str(found.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _unread(f"GPTQ/{layout}")
    offset = layout == "gptq"

    def read(tensors: Tensors, shape: tuple[int, int]) -> AffineWeight:
        return read_gptq(tensors, shape, offset)

    return ForeignLayout("GPTQ", ("qweight", "qzeros", "scales", "g_idx"), _gptq_format, read)


def _grouped(bits: int, groups: int, columns: int) -> Affine:
    if groups < 1 or columns % groups:
        raise ValueError(f"{groups} groups of {columns} inputs")
    return Affine(bits, "channel", 0, False) if groups == 1 else Affine(bits, "group", columns // groups, False)


def _shape(tensors: Mapping[str, Entry | Tensor], name: str) -> tuple[int, ...]:
    """Of one of a layer's tensors, in the file or read; empty where it is missing."""
    return tuple(tensors[name].shape) if name in tensors else ()


def _gptq_format(tensors: Mapping[str, Entry | Tensor], shape: tuple[int, int]) -> Affine:
    words, scales = _shape(tensors, "qweight"), _shape(tensors, "scales")
    bits = words[0] * 32 // max(1, shape[1]) if len(words) == 2 else 0
    if bits not in GPTQ_BITS or len(scales) != 2:
        raise ValueError(f"qweight {words} and scales {scales} for a layer {shape}")
    return _grouped(bits, scales[0], shape[1])


def read_gptq(tensors: Tensors, shape: tuple[int, int], offset: bool) -> AffineWeight:
    """A weight of GPTQ; offset: whether zero points stand less one in the file."""
    rows, columns = shape
    format = _gptq_format(tensors, shape)
    groups, bits = tensors["scales"].shape[0], format.bits
    expect(tensors, "qweight", (torch.int32,), (math.ceil(columns * bits / 32), rows))
    expect(tensors, "qzeros", (torch.int32,), (groups, math.ceil(rows * bits / 32)))
    expect(tensors, "scales", FLOATING, (groups, rows))
    order = tensors.get("g_idx")
    if order is not None and not torch.equal(order.long(), torch.arange(columns) // (columns // groups)):
        raise UnsupportedError(
            "the groups of a GPTQ layer follow the order of activations (desc_act), which effcli does not read",
            _ORIGINAL,
        )
    codes = unpack_bits(tensors["qweight"].t().contiguous(), bits, columns)
    zeros = unpack_bits(tensors["qzeros"].contiguous(), bits, rows).t().contiguous()
    zeros = zeros.to(torch.int16) + offset
    if zeros.numel() and int(zeros.max()) > format.levels:
        # A zero point of 0 less one has wrapped round, and each loader reads something else.
        raise UnsupportedError("a GPTQ layer stores a zero point of 0 less one, which no loader agrees on", _ORIGINAL)
    return AffineWeight(format, codes, tensors["scales"].t().contiguous(), zeros.to(torch.uint8))


def _awq_format(tensors: Mapping[str, Entry | Tensor], shape: tuple[int, int]) -> Affine:
    scales = _shape(tensors, "scales")
    if len(scales) != 2:
        raise ValueError(f"scales {scales}")
    return _grouped(AWQ_BITS, scales[0], shape[1])


def read_awq(tensors: Tensors, shape: tuple[int, int]) -> AffineWeight:
    """A weight of AWQ's GEMM layout."""
    rows, columns = shape
    format = _awq_format(tensors, shape)
    groups = tensors["scales"].shape[0]
    expect(tensors, "qweight", (torch.int32,), (columns, math.ceil(rows / len(AWQ_ORDER))))
    expect(tensors, "qzeros", (torch.int32,), (groups, math.ceil(rows / len(AWQ_ORDER))))
    expect(tensors, "scales", FLOATING, (groups, rows))
    codes, zeros = (_interleaved(tensors[name], rows).t().contiguous() for name in ("qweight", "qzeros"))
    return AffineWeight(format, codes, tensors["scales"].t().contiguous(), zeros)


def _interleaved(words: Tensor, count: int) -> Tensor:
    """Codes uint8 (n, count) of words int32 (n, count / 8) in AWQ's order."""
    codes = unpack_bits(words, AWQ_BITS, count).view(len(words), -1, len(AWQ_ORDER))
    return codes[..., torch.tensor(AWQ_ORDER).argsort()].reshape(len(words), count)


def _bitsandbytes(found: Mapping[str, Any]) -> ForeignLayout:
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return ForeignLayout("bitsandbytes", ("SCB", "weight", "weight_format"), _describe_int8, read_int8)
    kind = found.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise _unread(f"bitsandbytes {kind}")
    endings = (
        "weight.absmax",
        "weight",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        NF4_STATE,
    )
    return ForeignLayout("bitsandbytes", endings, _describe_nf4, read_nf4)


class _State(BaseModel):
    """What bitsandbytes keeps of a weight as JSON."""

    quant_type: str = "nf4"
    blocksize: int = Field(ge=1, strict=True)
    shape: tuple[int, int]
    dtype: str = "float32"
    nested_offset: float | None = None
    nested_blocksize: int = DOUBLE_BLOCK


def _nf4_state(data: Tensor) -> _State:
    return check_model(_State, parse_json(bytes(data.tolist()), NF4_STATE), NF4_STATE)


def _nf4_format(state: _State) -> Codebook:
    if state.quant_type != "nf4" or state.nested_blocksize != DOUBLE_BLOCK:
        raise ValueError(f"{state.quant_type} with scales in blocks of {state.nested_blocksize}")
    dtype = getattr(torch, state.dtype, None)
    if dtype not in FLOATING:
        raise ValueError(f"the dtype {state.dtype}")
    return Codebook("nf4", 4, "group", state.blocksize, state.nested_offset is not None, dtype=dtype)


def _describe_nf4(entries: Entries, shape: tuple[int, int]) -> Codebook:
    if NF4_STATE not in entries:
        raise ValueError(f"{NF4_STATE} is missing")
    # A few bytes of JSON, without which nothing is known of the layer.
    return _nf4_format(_nf4_state(read_entry(entries[NF4_STATE])))


def read_nf4(tensors: Tensors, shape: tuple[int, int] | None = None) -> CodebookWeight:
    """A weight of bitsandbytes' NF4; the first of two codes stands in the high bits of a byte.

    shape: (out, in), that which the tensors say unless given.
    """
    state = _nf4_state(tensors[NF4_STATE])
    format, table = _nf4_format(state), fixed_table("nf4")
    shape = shape or state.shape
    if state.shape != shape:
        raise ValueError(f"a weight {state.shape}")
    count, blocks = math.prod(shape), format.blocks(shape)
    expect(tensors, "weight", (torch.uint8,), (math.ceil(count / 2), 1))
    expect(tensors, "weight.quant_map", FLOATING, (16,))
    if not torch.equal(tensors["weight.quant_map"].float(), table[0]):
        raise ValueError("its levels are not those of NF4")
    packed = tensors["weight"].reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)[:count].view(shape)
    if state.nested_offset is None:
        expect(tensors, "weight.absmax", (torch.float32,), (blocks,))
        return CodebookWeight(format, codes, table, tensors["weight.absmax"])
    expect(tensors, "weight.absmax", (torch.uint8,), (blocks,))
    expect(tensors, "weight.nested_absmax", (torch.float32,), (math.ceil(blocks / DOUBLE_BLOCK),))
    expect(tensors, "weight.nested_quant_map", FLOATING, (256,))
    if not torch.equal(tensors["weight.nested_quant_map"].float(), dynamic_map()):
        raise ValueError("its scales have levels of their own")
    mean = torch.tensor(state.nested_offset, dtype=torch.float32)
    scale = DoubleQuantized(tensors["weight.absmax"], tensors["weight.nested_absmax"], mean)
    return CodebookWeight(format, codes, table, scale)


def _describe_int8(entries: Entries, shape: tuple[int, int]) -> Affine:
    return Affine(8, "channel", 0, True)


def read_int8(tensors: Tensors, shape: tuple[int, int]) -> AffineWeight:
    """A weight of LLM.int8() (arXiv:2208.07339): codes int8 times the largest magnitude of their row over 127."""
    format = Affine(8, "channel", 0, True)
    expect(tensors, "weight", (torch.int8,), shape)
    expect(tensors, "SCB", (torch.float32,), (shape[0],))
    codes = (tensors["weight"].to(torch.int16) + format.fixed_zero).to(torch.uint8)
    return AffineWeight(format, codes, (tensors["SCB"] / 127).unsqueeze(1))


__all__ = [
    "AWQ_BITS",
    "AWQ_ORDER",
    "GPTQ_BITS",
    "NF4_STATE",
    "ForeignLayout",
    "foreign_layout",
    "read_awq",
    "read_gptq",
    "read_int8",
    "read_nf4",
]
