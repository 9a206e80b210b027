"""What the C program does: tensors in the arena, and tasks that write them, row by row where they can.

A task with `windows` computes any row of its output from a few rows of its inputs, so that tasks can run side by side
and keep only the rows that are still needed. Every other task takes its inputs whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effcli.exporters.firmware.layout import Places

if TYPE_CHECKING:
    from effcli.exporters.firmware.scope import Scope

Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor of int8 in memory: `rows` rows of `row_bytes` each. value: the network's value that it holds.

    places: where its numbers lie, see `layout`. data: the codes, as they lie, of a tensor that is constant, in flash.
    """

    name: str
    value: str
    shape: tuple[int, ...]
    zero: int
    places: Places = field(repr=False, compare=False)
    rows: int = 1
    data: Array | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return len(self.places)

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows

    def as_row(self) -> Tensor:
        """The same memory as one row."""
        return replace(self, rows=1)


@dataclass(frozen=True)
class Window:
    """Which rows of an input the output row y reads: y · stride - above + k · dilation for k below `count`."""

    count: int = 1
    stride: int = 1
    above: int = 0
    dilation: int = 1

    def first(self, row: int) -> int:
        """The first row that is read, at least 0."""
        return max(0, row * self.stride - self.above)

    def end(self, row: int, height: int) -> int:
        """One more than the last row that is read."""
        return min(height, row * self.stride - self.above + (self.count - 1) * self.dilation + 1)


class Constant(NamedTuple):
    """A constant of a task in flash. type: of C; halved: its values where products are halved, see `linear.c`."""

    type: str
    values: Array
    halved: Array | None = None


@dataclass(frozen=True)
class Task(ABC):
    """One layer. layer: the step of the network it comes from; scratch: bytes that it needs while it runs.

    arrays: its constants by suffix. windows: one for each input of a task that works by rows, else None.
    """

    layer: str
    source: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    arrays: Mapping[str, Constant] = field(repr=False)
    scratch: int = 0
    macs: int = 0
    windows: tuple[Window, ...] | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The C files of the folder `kernels` that it needs beside `common`, in their order."""
        return ()

    @property
    def features(self) -> tuple[str, ...]:
        """The parts of these files that it needs."""
        return ()

    @property
    def kind(self) -> str:
        """What a person calls it."""
        return type(self).__name__.lower()

    @abstractmethod
    def emit(self, scope: Scope) -> str:
        """C statements that compute row `y`, or the whole output of a task without windows."""

    @abstractmethod
    def instructions(self) -> tuple[float, float]:
        """Estimated instructions on a Cortex-M4 for the whole output: with DSP instructions, and in plain C."""

    def distance(self, index: int) -> int | None:
        """By how many bytes input `index` must start above the output so that it is read before it is overwritten.

        None when the two must not overlap.
        """
        return None

    def alone(self) -> Task:
        """The same task where it does not take turns with others: it may then take all rows as one."""
        return self

    @property
    def flash(self) -> int:
        return sum(constant.values.nbytes for constant in self.arrays.values())


@dataclass(frozen=True)
class Spatial:
    """How windows move over an image (height, width, channels) and what they write."""

    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int] = (1, 1)

    @property
    def window(self) -> Window:
        return Window(self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    @property
    def padded(self) -> bool:
        """Whether any window reaches beyond the image."""
        reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True)]
        below = (self.out_height - 1) * self.stride[0] - self.padding[0] + reach[0] >= self.height
        right = (self.out_width - 1) * self.stride[1] - self.padding[2] + reach[1] >= self.width
        return self.padding[0] > 0 or self.padding[2] > 0 or below or right

    def distance(self, pixels: int, read_first: bool) -> int:
        """`Task.distance` when `pixels` at a time are written, row by row.

        read_first: whether all that they need has been read when the first of them is written.
        """
        first_row = np.clip(np.arange(self.out_height) * self.stride[0] - self.padding[0], 0, self.height - 1)
        first_column = np.clip(np.arange(0, self.out_width, pixels) * self.stride[1] - self.padding[2], 0, None)
        first_column = np.minimum(first_column, self.width - 1)
        lowest = ((first_row[:, None] * self.width + first_column) * self.channels).reshape(-1)
        needed = np.minimum.accumulate(lowest[::-1])[::-1]
        ends = np.minimum(np.arange(pixels, self.out_width + pixels, pixels), self.out_width)
        written = ((np.arange(self.out_height)[:, None] * self.out_width + ends) * self.out_channels).reshape(-1)
        if read_first:
            written, needed = written[:-1], needed[1:]
        return max(0, int((written - needed).max(initial=0)))


@dataclass(frozen=True)
class Program:
    """The tasks in the order in which their layers stand in the network, and the tensors that come in and go out."""

    tasks: tuple[Task, ...]
    input: Tensor
    output: Tensor

    @property
    def fixed(self) -> tuple[Tensor, ...]:
        """The tensors in flash, in the order in which they are first read."""
        read = [tensor for task in self.tasks for tensor in task.inputs if tensor.data is not None]
        return tuple({tensor.name: tensor for tensor in read}.values())
