"""What quantizing each layer alone costs, and the choices of bits that follow: the records, and their tables."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from effcli.reports import human
from effcli.reports.report import Record
from effcli.reports.shown import Text

# Points of a front that a terminal shows.
_SHOWN = 12

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


class Search(Record):
    """What a search for bits under a budget found."""

    sensitivity: Sensitivity
    budget: str = Field(description="as it was asked for")
    front: tuple[Point, ...] = Field(description="the cheapest choices, fewest bytes first")
    uniform: tuple[Point, ...] = Field(description="every layer with the same bits")
    chosen: Point
    bits: dict[str, int] = Field(description="of every layer")
    measure: str = Field(default="", description="what was measured of the points, empty when nothing was")


def table(found: Sensitivity, most: int | None = 40) -> RenderableType:
    """Every layer with its cost at each number of bits, the dearest first (at most `most`; None: all)."""
    widths = sorted({option.bits for layer in found.layers for option in layer.options})
    ranked = sorted(found.layers, key=lambda layer: -layer.options[0].cost)
    shown = ranked if most is None else ranked[:most]
    result = _table("layer", "shape", *(f"{bits} bits" for bits in widths), "")
    top = max((layer.options[0].cost for layer in ranked), default=0.0)
    for layer in shown:
        costs = {option.bits: human.significant(option.cost) for option in layer.options}
        bar = "\N{FULL BLOCK}" * round(12 * layer.options[0].cost / top) if top > 0 else ""
        cells = (costs.get(bits, "") for bits in widths)
        result.add_row(Text(layer.name, overflow="fold"), human.shape(layer.shape), *cells, Text(bar, style="cyan"))
    which = f"{len(shown)} of {human.count(len(ranked), 'layer')}, dearest first" if len(shown) < len(ranked) else ""
    lines = [found.explained, *([which] if which else [])]
    sums = {bits: sum(o.cost for layer in ranked for o in layer.options if o.bits == bits) for bits in widths}
    total = ", ".join(f"{bits} bits {human.significant(value)}" for bits, value in sums.items())
    lines += [f"sum over the layers: {total}"]
    return Group(
        Text(f"{found.model}: each layer alone with {found.step}", style="bold"),
        result,
        *(Text(line, style="dim") for line in lines),
        *(Text(remark, style="yellow") for remark in found.remarks),
    )


def search_table(found: Search) -> RenderableType:
    """The front of a search, with the uniform choices beside it, and what was chosen."""
    step = max(1, -(-len(found.front) // _SHOWN))
    some = [point for at, point in enumerate(found.front) if at % step == 0 or point.measured is not None]
    rows = [*some, *found.uniform, *([found.chosen] if found.chosen not in some else [])]
    result = _table("choice", "layers", "bits", f"cost, {found.sensitivity.unit}", found.measure)
    for point in sorted(rows, key=lambda point: (point.nbytes, point.cost)):
        measured = "" if point.measured is None else human.significant(point.measured, 4)
        style = "bold" if point.name == "chosen" else ""
        cells = (human.size(point.nbytes), f"{point.average_bits:.2f}", human.significant(point.cost), measured)
        result.add_row(point.name or "front", *cells, style=style)
    counts = {bits: list(found.bits.values()).count(bits) for bits in sorted(set(found.bits.values()))}
    taken = ", ".join(f"{human.count(count, 'layer')} of {bits} bits" for bits, count in counts.items())
    return Group(
        Text(f"bits per layer for {found.sensitivity.step}: {found.budget}", style="bold"),
        result,
        Text(f"chosen: {taken}", style="dim"),
        Text(found.sensitivity.explained, style="dim"),
        *(Text(remark, style="yellow") for remark in found.sensitivity.remarks),
    )


def _table(*titles: str) -> Table:
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        result.add_column(title, justify="left" if number == 0 else "right", overflow="fold")
    return result


__all__ = ["LayerCosts", "Option", "Point", "Search", "Sensitivity", "Unit", "Way", "search_table", "table"]
