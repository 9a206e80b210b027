"""Export to the layout of GPTQ, which transformers (with optimum and gptqmodel), vLLM and gptqmodel load.

A weight (out, in) of b bits becomes, for g groups of each row,

    qweight  int32 (in·b/32, out)   the codes of a column, packed from the low bits up
    qzeros   int32 (g, out·b/32)    zero - 1 of each group, packed likewise; zero itself in `gptq_v2`
    scales   float16 (g, out)
    g_idx    int32 (in,)            the group of each input channel

for 2, 3, 4 and 8 bits; 3-bit codes run on over the ends of words, 32 of them in three. A weight is
(code - zero) · scale. The format is described in https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.exporters._affine_layers import TOLERANCE, HalfScales, affine_obstacles, expanded, kernel_remarks
from effcli.exporters._packed import Sites, dense_layers, export_packed, open_compressed, packed_sites, refuse
from effcli.files.exporter import Exporter
from effcli.files.foreign import GPTQ_BITS, read_gptq
from effcli.formats import AffineWeight, pack_bits
from effcli.language.weights import Weights
from effcli.reports.report import Exported
from effcli.reports.units import count

# What the kernels of gptqmodel 7.7 are written for, beside whole channels.
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


class GPTQ(Exporter):
    """A GPTQ export."""

    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(
        "gptq", description="How zero points stand in the file: less one, as all loaders know it, or as they are."
    )

    def export(self, source: Path, target: Path, overwrite: bool = False) -> Exported:
        """Write the finished checkpoint `source` to the directory `target`, whole or not at all.

        Raises `UnsupportedError` when a quantized layer has no place in the layout, `OutputError` when `target` exists
        (without `overwrite`) or cannot be written.
        """
        weights = open_compressed(source, "gptq")
        sites = packed_sites(weights)
        obstacles = affine_obstacles(sites, weights, GPTQ_BITS) or _unpackable(sites)
        refuse(
            obstacles,
            "gptq",
            "compress with `gptq`, `awq` or `linear`: all layers with the same 2, 3, 4 or 8 bits and group size; "
            "`ignore` what has no place, or export to safetensors",
        )
        half = HalfScales()
        done = export_packed(
            weights,
            target,
            overwrite,
            _quantization(weights, sites, self),
            lambda name, weight: pack(name, weight, half, self),
            lambda tensors: unpack(tensors, self),
            TOLERANCE,
        )
        return done.model_copy(
            update={"remarks": done.remarks + half.remarks + kernel_remarks(sites, _GROUP_SIZES, "gptq_torch")}
        )


def _unpackable(sites: Sites) -> dict[str, str]:
    """Layers whose rows or columns do not fill whole words."""
    found = {}
    for name, (site, stored) in sites.items():
        for extent, what in ((site.columns, "input"), (site.rows, "output")):
            if extent * stored.format.bits % 32:
                found[name] = f"{extent} {what} channels of {stored.format.bits} bits do not fill whole 32-bit words"
    return found


def _quantization(weights: Weights, sites: Sites, config: GPTQ) -> dict[str, Any]:
    formats = [stored.format for _, stored in sites.values()]
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": formats[0].bits,
        "group_size": formats[0].group_size or -1,
        "sym": all(format.standard is not None and format.standard.symmetric for format in formats),
        "desc_act": False,
        "checkpoint_format": config.checkpoint_format,
        "block_name_to_quantize": weights.skeleton.block_path,
    }
    inside = f"{weights.skeleton.block_path}."
    dense = [name for name in dense_layers(weights) if name.startswith(inside)]
    if dense:
        # Loaders take every linear of a block for a quantized one: one key is transformers', the other gptqmodel's
        # and vLLM's.
        found["modules_in_block_to_quantize"] = [sorted(sites)]
        found["dynamic"] = {f"-:^{name.replace('.', '[.]')}$": {} for name in dense}
    return found


def pack(name: str, weight: AffineWeight, half: HalfScales, config: GPTQ) -> dict[str, Tensor]:
    """The tensors of one layer by suffix; `UnsupportedError` when a zero point or scale has no place."""
    bits, codes = weight.format.bits, weight.codes
    scale, zero = expanded(weight)
    offset = config.checkpoint_format == "gptq"
    if offset:
        codes, zero = _above_zero(name, codes, zero, weight.format.levels)
    groups = torch.arange(codes.shape[1], dtype=torch.int32) // max(1, codes.shape[1] // max(1, zero.shape[1]))
    return {
        "qweight": pack_bits(codes, bits).t(),
        "qzeros": pack_bits((zero - 1 if offset else zero).t(), bits),
        "scales": half.convert(name, weight, scale).t(),
        "g_idx": groups,
    }


def _above_zero(name: str, codes: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The same weights with no zero point of 0, which less one would be -1 and read differently by each loader."""
    grouped = codes.view(*zero.shape, -1)
    # One up both, and the difference stays.
    raised = (zero == 0) & (grouped.amax(-1) < levels)
    zero = zero + raised.to(torch.uint8)
    stuck = int((zero == 0).sum())
    if stuck:
        raise UnsupportedError(
            f"{name}: the format stores zero points less one, and so no 0, which it needs in {count(stuck, 'group')}",
            "--checkpoint-format gptq_v2 stores zero points as they are, which gptqmodel reads; or compress with "
            "symmetric: true",
        )
    return (grouped + raised.unsqueeze(-1).to(torch.uint8)).view(codes.shape), zero


def unpack(tensors: dict[str, Tensor], config: GPTQ) -> Tensor:
    """The weight float32 (out, in) that the tensors of one layer, by suffix, stand for."""
    shape = tensors["scales"].shape[1], len(tensors["g_idx"])
    return read_gptq(tensors, shape, config.checkpoint_format == "gptq").dequantize(torch.float32)
