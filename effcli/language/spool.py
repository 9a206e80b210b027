"""Hidden states on disk between two blocks: one flat file, read and written batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from effcli.errors import MachineError, writing
from effcli.platform.rehearsal import ongoing


class Spool:
    """Batches of known shapes in a file; what is read is a copy, so nothing of it stays in memory.

    shapes: the shape of every batch, e.g. (windows, length, hidden); device: where they go when they are read.
    """

    def __init__(
        self,
        file: Path,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.file = file
        self.shapes = list(shapes)
        self.dtype = dtype
        self.device = device
        self._offsets = [0]
        for shape in self.shapes:
            self._offsets.append(self._offsets[-1] + torch.Size(shape).numel() * dtype.itemsize)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(k) for k in range(len(self)))

    def read(self, k: int) -> Tensor:
        tensor = torch.empty(self.shapes[k], dtype=self.dtype, device="cpu")
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self._offsets[k])
            view = _bytes(tensor)
            while view.nbytes:
                got = stream.readinto(view)
                if not got:
                    raise MachineError(f"{self.file} is shorter than what was written to it", "run it again")
                view = view[got:]
        return tensor.to(self.device)

    def write(self, k: int, tensor: Tensor) -> None:
        data = tensor.to("cpu", self.dtype).contiguous()
        with writing(self.file), self.file.open("r+b" if self.file.exists() else "w+b", buffering=0) as stream:
            stream.seek(self._offsets[k])
            view = _bytes(data)
            while view.nbytes:
                view = view[stream.write(view) :]

    def reserve(self) -> None:
        """In a rehearsal, which writes few batches, have the others read as zeros; they take no room on the disk."""
        if ongoing() is None:
            return
        with writing(self.file), self.file.open("ab") as stream:
            stream.truncate(self._offsets[-1])

    def whole(self) -> bool:
        """Whether the file has all that was to be written."""
        return self.file.is_file() and self.file.stat().st_size == self._offsets[-1]

    def sync(self) -> None:
        """Make the file last through a crash."""
        with writing(self.file), self.file.open("rb") as stream:
            os.fsync(stream.fileno())

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
