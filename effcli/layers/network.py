"""What the engine asks of a network that is open: its layers, the inputs that they share, what is stored of each.

A language model shows one block at a time, a network read as a graph shows itself as a whole. Each says how a factor is
folded into it; what the factor is, which layers get one and what becomes of them is the engine's affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from effcli.formats import Dense, Quantized
from effcli.layers.contract import Layer
from effcli.layers.layer import LayerSite
from effcli.layers.result import Status, layer_row
from effcli.reports.report import LedgerRow


@dataclass(frozen=True)
class Readers:
    """Layers that read one input, and the module whose output channels that input is.

    number: which of the network's shared inputs it is; layers: names, in the order in which they run; producer: the
    module that can divide its output channels, as notes name it, None where there is none, for `reason`; produces: the
    name of the producer where it is a layer itself, else empty. channel: int64 (in,), the producer's output channel
    behind each column of the layers' weights; columns: int64 (in,), the input channel behind each column, None where
    each column is a channel of its own.
    """

    number: int
    layers: tuple[str, ...]
    producer: str | None
    reason: str = ""
    produces: str = ""
    channel: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class Factors:
    """By what the weights that the engine reads stand scaled, as float32.

    rows: divisor of each row of a layer (out,); columns: multiplier of each of its columns (in,).
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def divide(self, name: str, factor: Tensor) -> None:
        """Note that the rows of layer `name` are divided by factor (out,), besides what they were divided by before."""
        self.rows[name] = self.rows[name] * factor if name in self.rows else factor

    def of(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """The factors of the rows and of the columns of layer `name`; None where there are none."""
        return self.rows.get(name), self.columns.get(name)

    def scaled(self, name: str, weight: Tensor) -> Tensor:
        """weight (out, in) of layer `name` with its factors."""
        rows, columns = self.of(name)
        weight = weight if columns is None else weight * columns
        return weight if rows is None else weight / rows.unsqueeze(1)

    def with_rows_undone(self, name: str, matrix: Tensor) -> Tensor:
        """matrix (out, in) beside the weight of layer `name`, as it would be had its rows not been divided."""
        rows = self.rows.get(name)
        return matrix if rows is None else matrix * rows.unsqueeze(1)

    def with_columns_undone(self, name: str, matrix: Tensor) -> Tensor:
        """matrix (out, in) beside the weight of layer `name`, as it would be had its columns not been multiplied."""
        columns = self.columns.get(name)
        return matrix if columns is None else matrix / columns


@dataclass(frozen=True)
class Held:
    """How a layer is stored. macs: multiplications per input; parameters: weights and biases; None where unknown."""

    format: str
    nbytes: int
    macs: int | None = None
    parameters: int | None = None

    @staticmethod
    def of(weight: Quantized | Tensor, macs: int | None = None, parameters: int | None = None) -> Held:
        """A weight as it is stored by itself."""
        format = weight.format if isinstance(weight, Quantized) else Dense(weight.dtype)
        return Held(str(format), weight.nbytes, macs, parameters)

    def row(self, site: LayerSite, status: Status, **more: Any) -> LedgerRow:
        """The ledger's line for a layer; more: its other fields."""
        costs = {"macs": self.macs, "parameters": self.parameters}
        return layer_row(site, self.format, self.nbytes, status, **costs, **more)


class Network(Protocol):
    """A network, or the part of one that is in memory. factors: what the folded factors left behind."""

    factors: Factors

    def readers(self) -> list[Readers]:
        """The inputs that layers read, in the order in which they are read."""

    def read(self, site: LayerSite) -> Layer:
        """A layer with its weight float32 (out, in) scaled by `factors`, maybe a view of what the network holds."""

    def divide(self, readers: Readers, factor: Tensor) -> Tensor:
        """Divide the output channels behind an input by factor (in,) of its readers' columns.

        Returns the factor float32 (in,) that was really taken, which a producer of low precision may round. What else
        reads the input and is no layer is multiplied by it.
        """

    def multiply(self, site: LayerSite, factor: Tensor) -> None:
        """Multiply the columns of a layer by factor (in,)."""

    def write(self, site: LayerSite, weight: Quantized | Tensor, effective: Tensor) -> Held:
        """Give a layer the weight (out, in): compressed, to be stored as it is, or float32, to be stored dense.

        effective: float32 (out, in), what the layer multiplies its inputs with from now on.
        """

    def shift(self, site: LayerSite, shift: Tensor) -> None:
        """Add shift (out,) to the bias of a layer that is `biased`."""

    def held(self, site: LayerSite) -> Held:
        """How a layer is stored that is left as it is."""


def among(columns: Tensor, factor: Tensor) -> Tensor:
    """factor (in,) of columns, equal where int64 columns (in,) is, by input channel."""
    return factor.new_ones(int(columns.max()) + 1).index_copy_(0, columns, factor)


__all__ = ["Factors", "Held", "Network", "Readers", "among"]
