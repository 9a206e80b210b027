"""Export to a stock safetensors checkpoint: packed where the standard format has a place for every layer, else dense.

A checkpoint in the standard layout goes over byte for byte. With `dequantize` every compressed layer becomes a dense
one of the network's dtype, written block by block, under the names that the architecture's own checkpoints have.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from effcli.checkpoint import STOCK_STEM, Checkpoint, assemble, copy_companions, weight_files, write_shard, write_text
from effcli.errors import OutputError, UnsupportedError, writing
from effcli.skeleton import Skeleton
from effcli.storage import is_own, network_config, stored_layers
from effcli.weights import Weights, open_weights

SHARD_BYTES = 4 << 30
_SHOWN = 3


def export(source: Path, target: Path, *, dequantize: bool = False, overwrite: bool = False) -> None:
    """Write the finished checkpoint `source` to the directory `target`, whole or not at all.

    Raises `UnsupportedError` when a layer has no place in the standard format and `dequantize` is not asked for,
    `OutputError` when `target` exists (without `overwrite`) or cannot be written.
    """
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint.open(source)
    own = is_own(checkpoint.config)
    if own and not dequantize:
        raise _no_place(checkpoint)
    with _replacing(source, target, overwrite) as folder:
        copy_companions(source, folder)
        if dequantize and (own or "quantization_config" in checkpoint.config):
            _write_dense(checkpoint, folder)
        else:
            _copy(checkpoint, folder)


def _no_place(checkpoint: Checkpoint) -> UnsupportedError:
    """The error that names the layers without a place in the standard format, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, item in stored_layers(checkpoint.config, {}).items():
        if item.obstacle:
            reasons.setdefault(item.obstacle, []).append(name)
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{', '.join(names[:_SHOWN])}{more} ({reason})")
    return UnsupportedError(
        f"the standard format has no place for {'; '.join(parts) or 'this layout'}",
        "--dequantize writes dense weights that any loader reads; effcli.load reads the checkpoint as it is",
    )


def _copy(checkpoint: Checkpoint, folder: Path) -> None:
    files = [checkpoint.path / "config.json", *weight_files(checkpoint.path)]
    files += checkpoint.path.glob("*.safetensors.index.json")
    with writing(folder):
        for file in files:
            shutil.copyfile(file, folder / file.name)


def _write_dense(checkpoint: Checkpoint, folder: Path) -> None:
    weights = open_weights(checkpoint.path)
    skeleton = weights.skeleton
    names = [skeleton.outer_parameters()]
    names += [skeleton.block_parameters(k) for k in range(len(skeleton.blocks))]
    parts = []
    for number, group in enumerate(names):
        file = folder / f".part-{number:05d}"
        write_shard(file, _stock_names(skeleton, {name: _dense(weights, name) for name in group}))
        parts.append(file)
    assemble(parts, folder, STOCK_STEM, SHARD_BYTES)
    for file in parts:
        file.unlink()
    write_text(folder / "config.json", json.dumps(network_config(checkpoint.config), indent=2, sort_keys=True) + "\n")


def _dense(weights: Weights, name: str) -> Tensor:
    value = weights.parameter(name)
    return value.to(weights.dtype_of(name)) if value.is_floating_point() else value


def _stock_names(skeleton: Skeleton, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as checkpoints of this architecture hold them: e.g. stacked experts one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.inference_mode():
        reverted = revert_weight_conversion(skeleton.model, tensors)
        # safetensors refuses tensors that share memory, as the slices of a stack do.
        return {name: tensor.clone() for name, tensor in reverted.items()}


@contextmanager
def _replacing(source: Path, target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when all went well, and is removed when not."""
    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise OutputError(f"{target} holds the checkpoint that is exported", "choose another --output")
    if target.exists():
        if not overwrite:
            raise OutputError(f"{target} exists", "choose another --output, or replace it with --overwrite")
        if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
            raise OutputError(f"{target} is no checkpoint, so it is not overwritten", "choose another --output")
    with writing(target):
        there.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{there.name}-", dir=there.parent))
        # mkdtemp makes it private; an output has the permissions of any other directory.
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
    try:
        yield folder
        with writing(target):
            if there.exists():
                former = folder.with_name(folder.name + "-former")
                there.replace(former)
                folder.replace(there)
                shutil.rmtree(former)
            else:
                folder.replace(there)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
