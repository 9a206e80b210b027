"""Export to the layout of AWQ's GEMM kernel, which transformers (with gptqmodel installed) and vLLM load.

A weight (out, in) of 4 bits becomes, for g groups of each row,

    qweight  int32 (in, out/8)   eight neighbouring outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the low
                                 bits up
    qzeros   int32 (g, out/8)    the zero points, in the same order
    scales   float16 (g, out)

A weight is (code - zero) · scale. The layout is that of https://github.com/casper-hansen/AutoAWQ, version `gemm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcli.exporters._affine_layers import TOLERANCE, HalfScales, affine_obstacles, expanded, kernel_remarks
from effcli.exporters._packed import Sites, dense_layers, export_packed, open_compressed, packed_sites, refuse
from effcli.files.exporter import Exporter
from effcli.files.foreign import AWQ_BITS, AWQ_ORDER, read_awq
from effcli.formats import AffineWeight, pack_bits
from effcli.language.weights import Weights
from effcli.reports.report import Exported

# What the kernels of gptqmodel 7.7 are written for, beside whole channels.
_GROUP_SIZES = (16, 32, 64, 128)


class AWQ(Exporter):
    """An AWQ export."""

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the finished checkpoint `source` to the directory `target`, whole or not at all.

        Raises `UnsupportedError` when a quantized layer has no place in the layout, `OutputError` when `target` exists
        (without `overwrite`) or cannot be written.
        """
        weights = open_compressed(source, "awq")
        sites = packed_sites(weights)
        refuse(
            affine_obstacles(sites, weights, (AWQ_BITS,)) or _unpackable(sites),
            "awq",
            "compress with `awq`, `gptq` or `linear`: all layers with 4 bits and the same group size; `ignore` what "
            "has no place, or export to gptq or safetensors",
        )
        half = HalfScales()
        done = export_packed(
            weights,
            target,
            overwrite,
            _quantization(weights, sites),
            lambda name, weight: pack(name, weight, half),
            unpack,
            TOLERANCE,
        )
        return done.model_copy(
            update={"remarks": done.remarks + half.remarks + kernel_remarks(sites, _GROUP_SIZES, "torch_awq")}
        )


def _unpackable(sites: Sites) -> dict[str, str]:
    return {
        name: f"{site.rows} output channels are no multiple of {len(AWQ_ORDER)}"
        for name, (site, _) in sites.items()
        if site.rows % len(AWQ_ORDER)
    }


def _quantization(weights: Weights, sites: Sites) -> dict[str, Any]:
    size = next(stored.format.group_size for _, stored in sites.values())
    inside = f"{weights.skeleton.block_path}."
    dense = [name for name in dense_layers(weights) if name.startswith(inside)]
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": AWQ_BITS,
        "group_size": size or -1,
        "zero_point": True,
        "modules_to_not_convert": dense or None,
    }


def pack(name: str, weight: AffineWeight, half: HalfScales) -> dict[str, Tensor]:
    """The tensors of one layer by suffix; `UnsupportedError` when float16 does not hold its scales."""
    scale, zero = expanded(weight)
    return {
        "qweight": _interleaved(weight.codes.t()),
        "qzeros": _interleaved(zero.t()),
        "scales": half.convert(name, weight, scale).t(),
    }


def _interleaved(codes: Tensor) -> Tensor:
    """Words int32 (n, out/8) of codes uint8 (n, out)."""
    rows, columns = codes.shape
    return pack_bits(codes.reshape(rows, -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)].reshape(rows, columns), AWQ_BITS)


def unpack(tensors: dict[str, Tensor]) -> Tensor:
    """The weight float32 (out, in) that the tensors of one layer, by suffix, stand for."""
    return read_awq(tensors, (tensors["scales"].shape[1], len(tensors["qweight"]))).dequantize(torch.float32)
