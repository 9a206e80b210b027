"""What the layouts of GPTQ and AWQ have in common: layers of one kind, and scales in float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.exporters._packed import Sites, common_obstacle
from effcli.formats import Affine, AffineWeight
from effcli.language.weights import Weights
from effcli.reports.units import count

# Relative error of a layer's weights beyond which float16 does not hold its scales: that of bfloat16's own rounding.
TOLERANCE = 2**-8


def affine_obstacles(sites: Sites, weights: Weights, bits: Sequence[int]) -> dict[str, str]:
    """The layers that neither layout has a place for, or not beside the others, and why. bits: what the layout has."""
    prefix = f"{weights.skeleton.block_path}."
    found: dict[str, str] = {}
    for name, (site, stored) in sites.items():
        format = stored.format
        reason = common_obstacle(site, stored)
        if not isinstance(format, Affine):
            reason = f"{format} is no evenly spaced grid"
        elif site.kind == "conv1d":
            reason = "a Conv1D stores its weight transposed"
        elif format.rounds_inputs:
            reason = "its inputs are int8"
        elif format.bits not in bits:
            reason = f"{format.bits} bits, not {' or '.join(map(str, bits))}"
        elif not name.startswith(prefix):
            reason = "it stands outside the repeated blocks"
        if reason:
            found[name] = reason
    if found:
        return found
    kinds = {name: (stored.format.bits, stored.format.group_size) for name, (_, stored) in sites.items()}
    every = list(kinds.values())
    usual = max(every, key=every.count)
    return {
        name: f"{kind[0]} bits{f' in groups of {kind[1]}' if kind[1] else ''} where other layers have "
        f"{usual[0]}{f' in groups of {usual[1]}' if usual[1] else ''}"
        for name, kind in kinds.items()
        if kind != usual
    }


def expanded(weight: AffineWeight) -> tuple[Tensor, Tensor]:
    """Scale, floating, and zero, uint8, of each group of each row: (out, groups); a tensor's own serve all rows."""
    rows, columns = weight.shape[0], weight.scale.shape[1]
    scale = weight.scale.expand(rows, columns)
    if weight.zero is None:
        return scale, torch.full((rows, columns), weight.format.fixed_zero, dtype=torch.uint8)
    return scale, weight.zero.expand(rows, columns)


def kernel_remarks(sites: Sites, sizes: Sequence[int], backend: str) -> tuple[str, ...]:
    """What to know of the group size: gptqmodel 7.7 reads groups of `sizes`, and its `backend` whole channels."""
    format = next(stored.format for _, stored in sites.values())
    if format.group_size:
        known = format.group_size in sizes
        listed = ", ".join(map(str, sizes))
        return () if known else (f"gptqmodel reads groups of {listed} or whole channels, not of {format.group_size}",)
    if format.bits != 4:
        return ()
    return (
        "gptqmodel's usual kernel on the CPU takes 4 bits in groups of 32 to 256 only: there a checkpoint of whole "
        f'channels runs with "backend": "{backend}" in its quantization_config',
    )


@dataclass
class HalfScales:
    """Makes scales float16, and remembers by how much that changed the weights."""

    layers: int = 0
    worst: float = 0.0
    worst_layer: str = ""

    def convert(self, name: str, weight: AffineWeight, scale: Tensor) -> Tensor:
        """scale (out, groups) as float16; `UnsupportedError` when float16 cannot hold it."""
        half = scale.to(torch.float16)
        if not bool(half.isfinite().all()):
            raise UnsupportedError(
                f"the scales of {name} reach {float(scale.abs().max()):.3g}, more than float16 holds",
                "keep the checkpoint as it is, or `ignore` that layer",
            )
        if bool((half.to(scale.dtype) == scale).all()):
            return half
        # By how much the weights change: a group of zeros may have any scale.
        before = weight.dequantize(torch.float32)
        factor = (half.float() / scale.float()).unsqueeze(-1)
        change = before.view(*scale.shape, -1) * (factor - 1)
        relative = float(change.norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny))
        if not relative <= TOLERANCE:
            raise UnsupportedError(
                f"the scales of {name} are down to {float(scale.abs().min()):.3g}, too small for float16: its weights "
                f"would change by {relative:.2g} of their size",
                "keep the checkpoint as it is, or `ignore` that layer",
            )
        if relative > 0:
            self.layers += 1
        if relative > self.worst:
            self.worst, self.worst_layer = relative, name
        return half

    @property
    def remarks(self) -> tuple[str, ...]:
        if not self.layers:
            return ()
        return (
            f"scales became float16, which rounds them in {count(self.layers, 'layer')}: weights change by up to "
            f"{self.worst:.1e} of their size (‖Δ‖ / ‖W‖, {self.worst_layer})",
        )
