"""What quantizing each layer alone costs, and the choices of bits that follow, as records."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from effcli.options import Record

Way = Literal["gram", "fisher", "loss"]
Unit = Literal["relative output error", "nats", "relative squared error"]


class Option(Record):
    """One layer with one number of bits, all others as they were."""

    bits: int
    format: str
    nbytes: int = Field(description="of the layer's weight on disk, scales and zero points included")
    output_error: float = Field(description="mean ‖(W - Ŵ) x‖² / mean ‖W x‖² on the calibration inputs")
    cost: float = Field(description="in the unit of the whole, 0 or more")


class LayerCosts(Record):
    """One layer with every number of bits, fewest first."""

    name: str
    kind: str
    shape: tuple[int, int]
    options: tuple[Option, ...]


class Sensitivity(Record):
    """What quantizing each layer alone costs with one pass."""

    model: str
    step: str = Field(description="the pass")
    settings: dict[str, Any] = Field(default_factory=dict, description="its options, but for the bits")
    way: Way = Field(description="gram and fisher predict, loss measures")
    unit: Unit
    inputs: int = Field(description="calibration tokens, or inputs of a network that reads no text")
    layers: tuple[LayerCosts, ...]
    seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def explained(self) -> str:
        """How the figures came about, in one line."""
        return _WAYS[self.way].format(unit=self.unit)


_WAYS: dict[Way, str] = {
    "gram": "gram: {unit} of each layer, tr(D G Dᵀ) / tr(W G Wᵀ), from one calibration forward",
    "fisher": "fisher: predicted divergence from the original in {unit}, half the squared slope along a layer's error",
    "loss": "loss: divergence from the original in {unit}, measured with one layer quantized at a time",
}


class Point(Record):
    """One choice of bits for all layers."""

    name: str = Field(description="'3 bits' where all layers have the same, else how it was chosen")
    nbytes: int = Field(description="of the layers' weights")
    average_bits: float = Field(description="over the weights of the layers, scales and zero points left out")
    cost: float = Field(description="sum of the layers' costs")
    measured: float | None = Field(default=None, description="perplexity, or accuracy, where it was measured")
    limited: float | None = Field(default=None, description="the figure that the budget limits, where it was measured")


class Search(Record):
    """What a search for bits under a budget found."""

    name: str = Field(default="", description="the pass that searched, as the recipe names it")
    fixed_bytes: int | None = Field(
        default=None, description="of the weight files besides the layers' weights, headers included, at most"
    )
    sensitivity: Sensitivity
    budget: str = Field(description="as it was asked for")
    front: tuple[Point, ...] = Field(description="the cheapest choices, fewest bytes first")
    uniform: tuple[Point, ...] = Field(description="every layer with the same bits")
    chosen: Point
    bits: dict[str, int] = Field(description="of every layer")
    measure: str = Field(default="", description="what was measured of the points, empty when nothing was")
    limited: str = Field(
        default="", description="the measured figure that the budget limits besides quality, with its unit"
    )


__all__ = ["LayerCosts", "Option", "Point", "Search", "Sensitivity", "Unit", "Way"]
