"""The tensors of an adapter, found by header and read one by one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effcli.errors import CheckpointError, first_line
from effcli.files.checkpoint import read_entry, read_header

_STEM = "adapter_model"
# What to do about an adapter that is not whole.
DAMAGED = "copy the adapter again, or save it again with PEFT's `save_pretrained`"


@dataclass(frozen=True)
class Tensors:
    """shapes: by the tensors' names; read: one of them, as it stands in the file."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @staticmethod
    def open(folder: Path) -> Tensors:
        """`adapter_model.safetensors`, or `adapter_model.bin` without executing what it holds.

        Raises `CheckpointError` where there is none, or one that is damaged or holds more than tensors.
        """
        file = folder / f"{_STEM}.safetensors"
        if file.is_file():
            entries = read_header(file)
            shapes = {name: entry.shape for name, entry in entries.items()}
            return Tensors(shapes, lambda name: read_entry(entries[name]))
        file = folder / f"{_STEM}.bin"
        if not file.is_file():
            raise CheckpointError(f"the adapter {folder} holds no {_STEM}.safetensors and no {_STEM}.bin", DAMAGED)
        held = _unpickled(file)
        return Tensors({name: tuple(tensor.shape) for name, tensor in held.items()}, held.__getitem__)


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped into memory; nothing but tensors is made of it."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors: {first_line(error)}", DAMAGED) from error
    except (EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {first_line(error)}", DAMAGED) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise CheckpointError(f"{file} holds no tensors by their names", DAMAGED)
    return found


__all__ = ["DAMAGED", "Tensors"]
