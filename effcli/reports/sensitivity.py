"""What each layer alone costs with one option of a pass, and the choices that follow, as records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from effcli.options import Record

# The option of a pass that is chosen for every layer.
Varied = Literal["bits", "sparsity", "ratio"]
# Bits stay whole numbers, in JSON too.
Value = int | float
Way = Literal["gram", "fisher", "loss"]
Unit = Literal["relative output error", "nats", "relative squared error"]


class Option(Record):
    """One layer with one value of the option, all others as they were."""

    value: Value
    format: str
    nbytes: int = Field(
        description="of the layer's weight on disk, scales and zero points included; of all that is left of a group"
    )
    macs: int | None = Field(default=None, description="multiplications, where the option decides how many are left")
    output_error: float = Field(description="mean ‖(W - Ŵ) x‖² / mean ‖W x‖² on the calibration inputs")
    cost: float = Field(description="in the unit of the whole, 0 or more")


class LayerCosts(Record):
    """One layer with every value of the option, the least first."""

    name: str
    kind: str
    shape: tuple[int, int]
    options: tuple[Option, ...]


class Sensitivity(Record):
    """What each layer alone costs with one pass."""

    model: str
    step: str = Field(description="the pass")
    settings: dict[str, Any] = Field(default_factory=dict, description="its options, but for the one that varies")
    option: Varied = Field(description="the one that varies")
    way: Way = Field(description="gram and fisher predict, loss measures")
    unit: Unit
    inputs: int = Field(description="calibration tokens, or inputs of a network that reads no text")
    layers: tuple[LayerCosts, ...]
    seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def item(self) -> str:
        """What a value is chosen for: `layer`, or `group` of channels."""
        return "group" if self.option == "ratio" else "layer"

    @property
    def explained(self) -> str:
        """How the figures came about, in one line."""
        return _WAYS[self.way].format(unit=self.unit, done=_DONE[self.option])


_WAYS: dict[Way, str] = {
    "gram": "gram: {unit} of each layer, tr(D G Dᵀ) / tr(W G Wᵀ), from one calibration forward",
    "fisher": "fisher: predicted divergence from the original in {unit}, half the squared slope along a layer's error",
    "loss": "loss: divergence from the original in {unit}, measured with one layer {done} at a time",
}


_DONE: dict[Varied, str] = {"bits": "quantized", "sparsity": "pruned", "ratio": "cut"}


class Point(Record):
    """One choice of the option for all layers."""

    name: str = Field(description="'3 bits' where all layers have the same, else how it was chosen")
    nbytes: int = Field(description="of the layers' weights; what two groups share counts in both")
    average: float = Field(description="mean of the option over the layers or groups by their weights as they were")
    cost: float = Field(description="sum of the layers' costs")
    measured: float | None = Field(default=None, description="perplexity, or accuracy, where it was measured")
    limited: float | None = Field(default=None, description="the figure that the budget limits, where it was measured")


class Search(Record):
    """What a search under a budget found."""

    name: str = Field(default="", description="the pass that searched, as the recipe names it")
    fixed_bytes: int | None = Field(
        default=None, description="of the weight files besides the layers' weights, headers included, at most"
    )
    sensitivity: Sensitivity
    budget: str = Field(description="as it was asked for")
    front: tuple[Point, ...] = Field(description="the choices along a line, fewest bytes first")
    along: str = Field(default="cheapest choices", description="what the front consists of, in words")
    uniform: tuple[Point, ...] = Field(description="every layer with the same value")
    chosen: Point
    values: dict[str, Value] = Field(description="of the option, for every layer")
    measure: str = Field(default="", description="what was measured of the points, empty when nothing was")
    limited: str = Field(
        default="", description="the measured figure that the budget limits besides quality, with its unit"
    )

    def choices(self, front: Iterable[Point]) -> list[Point]:
        """Points of the front, the uniform choices and the chosen one, the fewest bytes first.

        Those of the same bytes and the same cost are one, with all of their names.
        """
        alike: dict[tuple[int, float], list[Point]] = {}
        for point in (*front, *self.uniform, self.chosen.model_copy(update={"name": "chosen"})):
            alike.setdefault((point.nbytes, point.cost), []).append(point)
        return [
            same[-1].model_copy(update={"name": ", ".join(point.name for point in same if point.name)})
            for _, same in sorted(alike.items())
        ]


def valued(option: Varied, text: float | str) -> str:
    """A value of an option in words: `3 bits`, `sparsity 0.5`."""
    shown = text if isinstance(text, str) else f"{text:g}"
    return f"{shown} bits" if option == "bits" else f"{option} {shown}"


__all__ = ["LayerCosts", "Option", "Point", "Search", "Sensitivity", "Unit", "Value", "Varied", "Way", "valued"]
