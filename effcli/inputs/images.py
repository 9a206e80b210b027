"""Inputs of a network that reads no text: opened, checked at once, and given in batches as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effcli.errors import DataError
from effcli.inputs.preprocess import Preprocess
from effcli.inputs.sources import Rows, Source, open_source
from effcli.reports.units import count

_GOLDEN = (5**0.5 - 1) / 2
# Class names shown in a message.
_SHOWN = 6


@dataclass(frozen=True)
class Inputs:
    """Inputs for a network, in the order in which they are stored.

    shape: of one input; labels: int64 (inputs,), None without; names: of the classes, None where the data names none;
    remarks: what the user should know of the data.
    """

    shape: tuple[int, ...]
    labels: Rows | None
    names: tuple[str, ...] | None
    remarks: tuple[str, ...]
    _source: Source
    _rows: Rows
    _preprocess: Preprocess

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int, order: Rows | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs float32 (at most `size`, *shape) with labels int64 (at most `size`,) or None.

        order: which of them, int64 (k,), all as they are stored if None; those of one batch come as they are stored.
        Decoded as they are asked for; may be asked for again. `DataError` names an image that cannot serve.
        """
        wanted = np.arange(len(self), dtype=np.int64) if order is None else order
        stored = bool((np.diff(wanted) > 0).all())
        # A source reads on from row to row.
        parts = (np.sort(wanted[k : k + size]) for k in range(0, len(wanted), size))
        for part in (wanted,) if stored else parts:
            begin = 0
            for values in self._source.read(self._rows[part], size):
                end = begin + len(values)
                labels = None if self.labels is None else torch.from_numpy(self.labels[part[begin:end]])
                yield self._preprocess.normalize(values), labels
                begin = end


def open_inputs(
    source: str | Path,
    shape: tuple[int, ...],
    preprocess: Preprocess,
    *,
    classes: int | None = None,
    samples: int | None = None,
    labelled: bool = False,
) -> Inputs:
    """The inputs in `source` for a network whose input is `shape`, without the batch: (channels, height, width) or any.

    source: an .npz, a folder of images, with one subfolder per class or without labels, a .parquet of images, or a
    directory that `datasets` saved, with `#split` behind it where it has several. classes: what the network tells
    apart, against which labels and class names are checked. samples: at most so many, spread over the data.
    labelled: without labels the data cannot serve. Raises `DataError`.
    """
    preprocess.check_channels(shape)
    path, split = _locate(source)
    found = open_source(path, split, shape, preprocess)
    if labelled and found.labels is None:
        raise DataError(
            f"{found.name} has no labels",
            "give one folder per class, or an array or a column of class numbers (preprocess.labels is its name), or "
            "set towards=original where a pass has that",
        )
    if classes is not None:
        _check_classes(found, classes)
    rows = np.arange(found.count, dtype=np.int64)
    remarks = list(found.remarks)
    if samples is not None and samples < found.count:
        rows = spread(found.count, samples)
        remarks.append(f"{found.name}: {samples} of {count(found.count, 'input')} taken, spread over all of them")
    labels = None if found.labels is None else found.labels[rows]
    return Inputs(shape, labels, found.names, tuple(remarks), found, rows, preprocess)


def spread(count: int, samples: int) -> Rows:
    """`samples` of `count` rows, ascending int64 (samples,): one from each of as many equal stretches.

    Where in its stretch follows multiples of the golden ratio: at a fixed step, data whose classes alternate would give
    one class only.
    """
    borders = np.arange(samples + 1, dtype=np.int64) * count // samples
    place = np.arange(samples) * _GOLDEN % 1
    return borders[:-1] + (place * np.diff(borders)).astype(np.int64)


def _locate(source: str | Path) -> tuple[Path, str | None]:
    """The path and the split of `DIR#split`; a path that exists is taken as it stands."""
    path = Path(source).expanduser()
    folder, mark, split = str(path).rpartition("#")
    if not mark or path.exists():
        return path, None
    return Path(folder), split


def _check_classes(source: Source, classes: int) -> None:
    """Raise `DataError` unless the classes of the data are those of a network that tells `classes` apart."""
    names = source.names
    if names is not None and len(names) != classes:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise DataError(
            f"{source.name} has {len(names)} classes ({shown}), the network {classes}",
            "give data with the classes that the network was trained on, empty folders included",
        )
    labels = source.labels
    if labels is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{source.name} has a label {low if low < 0 else high}, the network's classes are 0 to {classes - 1}",
            "number the classes from 0, as the network was trained, and leave out what has no class",
        )
