"""A C program while it is put together: the tasks so far, and the tensors that hold the network's values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from effcli.errors import UnsupportedError
from effcli.exporters.firmware import layout as layouts
from effcli.exporters.firmware import moves
from effcli.exporters.firmware.layout import Copy, Places
from effcli.exporters.firmware.program import Constant, Spatial, Task, Tensor
from effcli.graphs.integer import IntegerNetwork, Operation, Value


class Building:
    """The tasks so far, and what holds each value, by the value's name. layer, source: those of the step at hand."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.tasks: list[Task] = []
        self.tensors: dict[str, Tensor] = {}
        self.source = ""
        self.layer = ""

    @property
    def where(self) -> str:
        return f"{self.layer} ({self.source})" if self.source else self.layer

    def value(self, name: str) -> Value:
        return self.network.program.values[name]

    def tensor(self, name: str, places: Places) -> Tensor:
        """A new tensor for a value; an image with channels last has its rows."""
        value = self.value(name)
        image = len(value.shape) == 3 and np.array_equal(places, layouts.channels_last(value.shape))
        rows = value.shape[1] if image else 1
        taken = {tensor.name for tensor in (*self.tensors.values(), *(task.output for task in self.tasks))}
        unique = name if name not in taken else f"{name}.{len(self.tasks)}"
        return Tensor(unique, name, value.shape, value.zero, places, rows)

    def placed(self, name: str, places: Places) -> Tensor:
        """The tensor of a value in the layout `places`, copied there if it lies otherwise."""
        tensor = self.tensors[name]
        if np.array_equal(tensor.places, places):
            return tensor
        return self.fixed(name, tensor, places) if tensor.data is not None else self.moved(name, tensor, places)

    def fixed(self, name: str, tensor: Tensor, places: Places) -> Tensor:
        """A constant tensor in another layout."""
        assert tensor.data is not None
        codes = tensor.data[layouts.inverse(tensor.places)[places]]
        return replace(self.tensor(name, places), data=codes)

    def moved(self, name: str, tensor: Tensor, places: Places) -> Tensor:
        copied = self.copy(layouts.natural(places.shape), layouts.inverse(tensor.places)[places])
        output = self.tensor(name, places)
        self.tasks.append(
            moves.Move(f"{self.layer}.order", self.source, (tensor,), output, {}, copies=(copied,), called="reorder")
        )
        return output

    def copy(self, outputs: Places, inputs: Places) -> Copy:
        try:
            return layouts.copy(outputs, inputs)
        except ValueError:
            raise UnsupportedError(
                f"{self.where} moves numbers in an order that is no nest of loops", "change the network's reshapes"
            ) from None

    def image(self, name: str) -> Tensor:
        """The tensor of an image with channels last."""
        return self.placed(name, layouts.channels_last(self.value(name).shape))

    def add(
        self,
        make: Callable[..., Task],
        step: Operation,
        inputs: tuple[Tensor, ...],
        places: Places,
        arrays: dict[str, Constant] | None = None,
        **options: Any,
    ) -> None:
        """Append the task of `step`, whose output lies as `places`."""
        output = self.tensor(step.output, places)
        self.tasks.append(make(step.name, step.source, inputs, output, arrays or {}, **options))
        self.tensors[step.output] = output

    def spatial(self, step: Any, tensor: Tensor, dilation: tuple[int, int], kernel: tuple[int, int]) -> Spatial:
        (channels, height, width), (outputs, *extent) = tensor.shape, self.value(step.output).shape
        return Spatial(
            height, width, channels, extent[0], extent[1], outputs, kernel, step.stride, step.padding, dilation
        )

    def in_rows(self, name: str) -> tuple[Tensor, Places, Places]:
        """A tensor whose last axis lies in rows, and the order of the rows and of the numbers within each."""
        shape = self.value(name).shape
        count = math.prod(shape[:-1])
        tensor = self.tensors[name]
        found = layouts.rows(tensor.places, count)
        if found is None:
            tensor = self.placed(name, layouts.natural(tensor.places.shape))
            found = layouts.rows(tensor.places, count)
        assert found is not None
        return tensor, *found
