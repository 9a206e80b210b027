"""Export to the layout of bitsandbytes, from which stock transformers and PEFT load NF4 layers, for QLoRA among others.

A weight (out, in) becomes `weight`, uint8 (ceil(out·in/2), 1) with the first of two codes in the high four bits, and
beside it `weight.absmax`, `weight.quant_map` and the JSON bytes `weight.quant_state.bitsandbytes__nf4`; with double
quantization `weight.nested_absmax` and `weight.nested_quant_map` too. Nothing is rounded: the constants of an `nf4`
step are those that bitsandbytes itself would have chosen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcli.exporters._packed import (
    common_obstacle,
    dense_layers,
    export_packed,
    open_compressed,
    packed_sites,
    refuse,
)
from effcli.files.exporter import Exporter
from effcli.files.foreign import NF4_STATE, read_nf4
from effcli.files.layout import Stored
from effcli.formats import Codebook, CodebookWeight, DoubleQuantized
from effcli.formats.codebook import DOUBLE_BLOCK, dynamic_map
from effcli.reports.report import Exported

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The code of zero, which fills up the last byte of an odd number of weights.
_ZERO = 7


class BitsAndBytes(Exporter):
    """A bitsandbytes export."""

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the finished checkpoint `source` to the directory `target`, whole or not at all.

        Raises `UnsupportedError` when a quantized layer is not NF4, or not as bitsandbytes has it; `OutputError` when
        `target` exists (without `overwrite`) or cannot be written.
        """
        weights = open_compressed(source, "bitsandbytes")
        sites = packed_sites(weights)
        obstacles = {name: common_obstacle(*found) or _obstacle(found[1]) for name, found in sites.items()}
        refuse(
            {name: reason for name, reason in obstacles.items() if reason},
            "bitsandbytes",
            "compress with `nf4` and a block_size of 32, 64 ... 4096, `ignore` what has no place; safetensors with "
            "--dequantize holds every layer, dense",
        )
        formats = [stored.format for _, stored in sites.values()]
        dtype = str(weights.skeleton.dtype).removeprefix("torch.")
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": dtype,
            # Each layer says for itself; this one is for layers that are yet to be quantized.
            "bnb_4bit_use_double_quant": any(isinstance(format, Codebook) and format.double for format in formats),
            "llm_int8_skip_modules": dense_layers(weights),
        }
        return export_packed(weights, target, overwrite, quantization, lambda _, weight: pack(weight), unpack, 0.0)


def _obstacle(stored: Stored) -> str:
    """Why bitsandbytes has no place for a layer; empty when it has one."""
    format = stored.format
    if not isinstance(format, Codebook) or format.kind != "nf4":
        return f"{format} is not NF4"
    if format.huffman:
        return "its codes are Huffman-coded"
    return "" if format.group_size in BLOCK_SIZES else f"blocks of {format.group_size}"


def pack(weight: CodebookWeight) -> dict[str, Tensor]:
    """The tensors of one NF4 layer by suffix."""
    codes = torch.nn.functional.pad(weight.codes.reshape(-1), (0, weight.codes.numel() % 2), value=_ZERO)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.format.group_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    packed = {"weight": ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), "weight.quant_map": weight.table[0]}
    scale = weight.scale
    if isinstance(scale, DoubleQuantized):
        state |= {
            "nested_blocksize": DOUBLE_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(scale.mean),
        }
        packed |= {
            "weight.absmax": scale.codes,
            "weight.nested_absmax": scale.absmax,
            # safetensors refuses tensors that share memory.
            "weight.nested_quant_map": dynamic_map().clone(),
        }
    elif scale is not None:
        packed["weight.absmax"] = scale
    packed[NF4_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return packed


def unpack(tensors: dict[str, Tensor]) -> Tensor:
    """The weight float32 (out, in) that the tensors of one layer, by suffix, stand for."""
    return read_nf4(tensors).dequantize(torch.float32)
