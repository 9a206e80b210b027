"""Where the weights with inputs stand in a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["linear", "conv1d", "expert", "conv"]


@dataclass(frozen=True)
class LayerSite:
    """Where a layer stands in the network.

    name: the module's path, with `.index` appended for one matrix of a stacked parameter; parameter: the state-dict
    key of its weight; rows, columns: its shape as (out, in), whatever the storage; index: which matrix of a stack it
    is; transposed: stored as (in, out); groups: independent parts of a grouped convolution, each with rows / groups
    outputs and inputs of its own; obstacle: why the layer must stay dense, empty when it may be compressed.
    """

    name: str
    kind: Kind
    parameter: str
    rows: int
    columns: int
    index: int | None = None
    transposed: bool = False
    groups: int = 1
    obstacle: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def row_axis(self) -> int:
        """The axis of the parameter along which the rows lie."""
        return (0 if self.index is None else 1) + int(self.transposed)

    @property
    def column_axis(self) -> int:
        """The axis of the parameter along which the columns lie; of a convolution its input channels."""
        return (1 if self.index is None else 2) - int(self.transposed)

    def view(self, parameter: Tensor) -> Tensor:
        """This layer's weight as (out, in), a view of its parameter; a convolution's inputs are its patches."""
        weight = parameter if self.index is None else parameter[self.index]
        if weight.ndim > 2:
            return weight.view(self.rows, self.columns)
        return weight.t() if self.transposed else weight
