"""A compressed language model in the layout of another tool: written block by block, then read back layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcli.errors import MachineError, UnsupportedError
from effcli.exporters._obstacles import by_reason
from effcli.exporters._target import replacing
from effcli.files.checkpoint import (
    STOCK_STEM,
    Checkpoint,
    assemble,
    copy_companions,
    weight_files,
    write_shard,
    write_text,
)
from effcli.files.layout import Stored, check_uniform
from effcli.formats import Quantized, Sparse
from effcli.graphs.graph import is_graph
from effcli.graphs.integer import is_integer
from effcli.language.skeleton import Skeleton, find_layers
from effcli.language.weights import Weights, open_weights
from effcli.layers.layer import LayerSite
from effcli.platform.steps import each, expect
from effcli.reports.report import Exported
from effcli.reports.units import count

SHARD_BYTES = 4 << 30

Sites = Mapping[str, tuple[LayerSite, Stored]]


def open_compressed(source: Path, target: str) -> Weights:
    """The language model in `source`; `UnsupportedError` when it is none, or has no quantized layer."""
    if is_integer(source) or is_graph(source):
        raise UnsupportedError(
            f"{source} is no language model, which the layout of {target} is for", "export it to onnx"
        )
    weights = open_weights(source)
    if not quantized(weights):
        raise UnsupportedError(f"{source} has no quantized layers", "export it to safetensors")
    return weights


def quantized(weights: Weights) -> dict[str, Stored]:
    """The quantized layers by name, with the format of their numbers: no other layout has a place for a mask.

    Layers that are pruned and otherwise dense are left out.
    """
    filled = {
        name: dataclasses.replace(stored, format=stored.format.filled)
        for name, stored in sorted(weights.stored.items())
    }
    return {name: stored for name, stored in filled.items() if not stored.format.floating}


def packed_sites(weights: Weights) -> dict[str, tuple[LayerSite, Stored]]:
    """The quantized layers by name, and the format of their numbers."""
    sites = {site.name: site for site in find_layers(weights.skeleton.model, "")}
    return {name: (sites[name], stored) for name, stored in quantized(weights).items()}


def dense_layers(weights: Weights) -> list[str]:
    """Names of the linears and Conv1Ds that are not quantized."""
    known, sites = quantized(weights), find_layers(weights.skeleton.model, "")
    return sorted(site.name for site in sites if site.index is None and site.name not in known)


def numbers(weights: Weights, layer: str) -> Quantized:
    """The weight of a quantized layer as numbers, those that a mask leaves out among them."""
    packed = weights.packed(layer)
    found = None if packed is None else packed.filled()
    if found is None:
        raise UnsupportedError(
            f"{layer} is pruned, and its table has no entry that is 0", "safetensors with --dequantize holds it"
        )
    return found


def pruned(weights: Weights) -> int:
    """How many layers are pruned."""
    return sum(isinstance(stored.format, Sparse) for stored in weights.stored.values())


def pruned_remarks(layers: int) -> tuple[str, ...]:
    """What to know of so many pruned layers in a layout that has no masks."""
    return (f"{count(layers, 'pruned layer')} stored with the zeros, which saves no bytes here",) if layers else ()


def refuse(obstacles: Mapping[str, str], target: str, remedy: str) -> None:
    """Raise `UnsupportedError` that names the layers without a place, by reason, when there are any."""
    if obstacles:
        raise UnsupportedError(f"the layout of {target} has no place for {by_reason(obstacles)}", remedy)


def common_obstacle(site: LayerSite, stored: Stored) -> str:
    """Why no layout of another tool has a place for a layer; empty when one may have."""
    if site.kind == "expert":
        return "an expert is a slice of a 3-D parameter"
    return "its input scale is explicit" if stored.input_scale else ""


def export_packed(
    weights: Weights,
    target: Path,
    overwrite: bool,
    quantization: Mapping[str, Any],
    pack: Callable[[str, Any], dict[str, Tensor]],
    unpack: Callable[[dict[str, Tensor]], Tensor],
    tolerance: float,
) -> Exported:
    """Write `weights` to the directory `target`, whole or not at all, and hold what was written against them.

    quantization: the `quantization_config`; pack: name and weight of a quantized layer to its tensors by suffix;
    unpack: those tensors to the weight (out, in) that a loader makes of them; tolerance: largest ‖a - b‖ / ‖b‖ of a
    layer's two weights. Raises `MachineError` beyond it.
    """
    source = weights.checkpoint.path
    check_uniform(weights.checkpoint.config)
    with replacing(source, target, overwrite) as folder:
        copy_companions(source, folder)
        write_tensors(weights, folder, pack)
        config = {**weights.network_config(), "quantization_config": dict(quantization)}
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        checked = _read_back(weights, folder, unpack, tolerance)
    nbytes = sum(file.stat().st_size for file in weight_files(target))
    return Exported(
        target=str(quantization["quant_method"]),
        nbytes=nbytes,
        checked=checked,
        remarks=pruned_remarks(pruned(weights)),
    )


def write_tensors(weights: Weights, folder: Path, pack: Callable[[str, Any], dict[str, Tensor]] | None) -> None:
    """Write the shards of a checkpoint into `folder`, block by block, quantized layers as `pack` says or dense."""
    skeleton, parts, carried = weights.skeleton, [], weights.carried()
    packed_layers = {} if pack is None else quantized(weights)
    if weights.foreign:
        raise UnsupportedError(
            f"{count(len(weights.foreign), 'packed layer')} that the network has no layer for, such as "
            f"{next(iter(weights.foreign))}: they can only be copied",
            "export it to safetensors without --dequantize",
        )
    names = [skeleton.outer_parameters()]
    names += [skeleton.block_parameters(k) for k in range(len(skeleton.blocks))]
    expect(sum(map(len, names)))
    for number, group in enumerate(names):
        dense: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        for parameter in each(group):
            layer = parameter.removesuffix(".weight")
            if pack is None or layer not in packed_layers:
                value = weights.parameter(parameter)
                dense[parameter] = value.to(weights.dtype_of(parameter)) if value.is_floating_point() else value
            else:
                packed |= {
                    f"{layer}.{suffix}": tensor for suffix, tensor in pack(layer, numbers(weights, layer)).items()
                }
        file = folder / f".part-{number:05d}"
        write_shard(file, {**_stock_names(skeleton, dense), **packed})
        parts.append(file)
    assemble(parts, folder, STOCK_STEM, SHARD_BYTES, carried)
    for file in parts:
        file.unlink()


def _stock_names(skeleton: Skeleton, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors as checkpoints of this architecture hold them: e.g. stacked experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.inference_mode():
        reverted = revert_weight_conversion(skeleton.model, tensors)
        # safetensors refuses tensors that share memory, as the slices of a stack do.
        return {name: tensor.clone() for name, tensor in reverted.items()}


def _read_back(weights: Weights, folder: Path, unpack: Callable[[dict[str, Tensor]], Tensor], tolerance: float) -> str:
    written = Checkpoint.open(folder)
    largest, scale, names = 0.0, 0.0, sorted(quantized(weights))
    expect(len(names))
    for name in each(names):
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): written.read(key) for key in written.entries if key.startswith(prefix)}
        expected = numbers(weights, name).dequantize(torch.float32)
        difference = unpack(tensors) - expected
        # Not finite is not below either.
        if not float(difference.norm()) <= tolerance * float(expected.norm()):
            raise MachineError(
                f"{name} reads back as something else: {float(difference.abs().max()):.2g} off",
                "do not use this export, and report it with the network",
            )
        if expected.numel():
            largest = max(largest, float(difference.abs().max()))
            scale = max(scale, float(expected.abs().max()))
    return f"{count(len(names), 'layer')} read back: largest difference {largest:.2g} of {scale:.2g}"
