"""Where a training stands, on disk: written now and then, so that the same command goes on from there after a crash.

The tensors lie in one safetensors file, named by the step; a record beside it, written last and atomically, says which
file counts. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from effcli.errors import UnfinishedError, UnsupportedError, foreign, writing
from effcli.files.checkpoint import write_shard, write_text
from effcli.files.documents import read_model
from effcli.options import Options

FILE_NAME = "snapshot.json"
_TENSORS = ".safetensors"

Scalar = float | int | bool | None
# A step and a figure of it.
Point = tuple[Annotated[int, Field(ge=0)], float]


class Snapshot(Options):
    """What is to be known of a training besides its tensors.

    key: what tells this training from others; step: how many are done; scale: see `Batch`; least: the error of the best
    weights, None before any counted; pending, since: the losses that the curve has not taken in yet, summed, and how
    many; scalars: the optimizer's numbers, by parameter.
    """

    key: str
    step: int = Field(ge=0)
    scale: float
    least: float | None
    kept: int = Field(ge=0)
    pending: float
    since: int = Field(ge=0)
    curve: tuple[Point, ...]
    errors: tuple[Point, ...]
    searched: tuple[tuple[int, int], ...] = ()
    scalars: dict[int, dict[str, Scalar]]
    scaler: dict[str, Scalar]


def save(folder: Path, snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> None:
    """Write a snapshot into `folder`, which is made if need be; the former one counts until this one is whole."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = _file(folder, snapshot.step)
    write_shard(file, {name: tensor.detach() for name, tensor in tensors.items()})
    write_text(folder / FILE_NAME, snapshot.model_dump_json())
    for other in folder.glob(f"*{_TENSORS}"):
        if other != file:
            other.unlink()


def load(folder: Path, key: str) -> tuple[Snapshot, dict[str, Tensor]] | None:
    """The snapshot in `folder`, None where there is none of this key; `UnfinishedError` when it is damaged."""
    if not (folder / FILE_NAME).exists():
        return None
    snapshot = read_model(Snapshot, folder / FILE_NAME, error=UnfinishedError)
    if snapshot.key != key:
        return None
    file = _file(folder, snapshot.step)
    with foreign(lambda cause: UnfinishedError(f"{file} is damaged: {cause}")):
        return snapshot, load_file(file)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[int, dict[str, Scalar]]]:
    """The tensors of an optimizer by 'parameter.name', and its numbers by parameter.

    A tensor that stands in a mapping of its own, as bitsandbytes keeps them, has the name 'parameter.mapping.name'.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[int, dict[str, Scalar]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif isinstance(value, dict) and all(isinstance(own, Tensor) for own in value.values()):
                # Parameters may share them there, and a file has each for itself.
                tensors |= {f"{index}.{name}.{own}": tensor.clone() for own, tensor in value.items()}
            elif value is None or isinstance(value, bool | int | float):
                scalars.setdefault(index, {})[name] = value
            else:
                raise UnsupportedError(
                    f"{type(optimizer).__name__} keeps {name}, a {type(value).__name__}, which cannot be stored",
                    "take an optimizer whose state is tensors and numbers",
                )
    return tensors, scalars


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[int, Mapping[str, Scalar]]
) -> None:
    """Give a new optimizer of the same parameters the state that `optimizer_state` told."""
    state: dict[int, dict[str, Any]] = {index: dict(values) for index, values in scalars.items()}
    for key, tensor in tensors.items():
        index, *outer, name = key.split(".")
        place = state.setdefault(int(index), {})
        for each in outer:
            place = place.setdefault(each, {})
        place[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}{_TENSORS}"


__all__ = ["Snapshot", "load", "optimizer_state", "restore_optimizer", "save"]
