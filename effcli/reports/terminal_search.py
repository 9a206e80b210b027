"""What each layer alone costs, and what a search found, as tables in a terminal."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from effcli.reports import units
from effcli.reports.sensitivity import Search, Sensitivity, valued
from effcli.reports.text import Name, Text

# Points of a front that a terminal shows, and shares that are tried.
_SHOWN = 12
_SHARES = 4


def sensitivity_table(found: Sensitivity, most: int | None = 40) -> RenderableType:
    """Every layer with its cost at each value of the option, the dearest first (at most `most`; None: all)."""
    values = sorted({option.value for layer in found.layers for option in layer.options})
    titles = {value: valued(found.option, value) for value in values}
    by_layer = {layer.name: {option.value: option.cost for option in layer.options} for layer in found.layers}
    worst = {name: max(costs.values()) for name, costs in by_layer.items()}
    ranked = sorted(found.layers, key=lambda layer: -worst[layer.name])
    shown = ranked if most is None else ranked[:most]
    narrowest = max((Name(layer.name).narrowest for layer in shown), default=None)
    # Many columns leave no room for the names of layers, nor does the name of the option in each.
    telling = [value for value in values if any(costs.get(value) for costs in by_layer.values())] or values
    few = telling[:: -max(1, -(-len(telling) // _SHARES))][::-1]
    drawn = values if found.option == "bits" else few
    heads = (titles[value] if found.option == "bits" else f"{value:g}" for value in drawn)
    result = _table(found.item, "shape", *heads, "", narrowest=narrowest)
    top = max(worst.values(), default=0.0)
    for layer in shown:
        costs = {value: units.significant(cost) for value, cost in by_layer[layer.name].items()}
        bar = "\N{FULL BLOCK}" * round(12 * worst[layer.name] / top) if top > 0 else ""
        cells = (costs.get(value, "") for value in drawn)
        result.add_row(Name(layer.name), units.shape(layer.shape), *cells, Text(bar, style="cyan"))
    which = f"{len(shown)} of {units.count(len(ranked), found.item)}, dearest first" if len(shown) < len(ranked) else ""
    lines = [found.explained, *([which] if which else [])]
    sums = {value: sum(costs.get(value, 0.0) for costs in by_layer.values()) for value in telling}
    total = ", ".join(f"{titles[value]}: {units.significant(cost)}" for value, cost in sums.items())
    lines += [f"sum over the {found.item}s: {total}"]
    by = "" if found.option == "bits" else f", cost by {found.option}"
    return Group(
        Text(f"{found.model}: each {found.item} alone with {found.step}{by}", style="bold"),
        result,
        *(Text(line, style="dim") for line in lines),
        *(Text(remark, style="yellow") for remark in found.remarks),
    )


def search_table(found: Search) -> RenderableType:
    """The front of a search, with the uniform choices beside it, and what was chosen."""
    step = max(1, -(-len(found.front) // _SHOWN))
    some = [
        point
        for at, point in enumerate(found.front)
        if at % step == 0 or point.measured is not None or point.limited is not None
    ]
    more = (found.limited,) if found.limited else ()
    fixed = found.fixed_bytes
    files = ("files,\nsize",) if fixed is not None else ()
    option, item = found.sensitivity.option, found.sensitivity.item
    average = "bits/\nweight" if option == "bits" else option
    result = _table(
        "choice", f"{item}s,\nsize", *files, average, f"cost, {found.sensitivity.unit}", found.measure, *more
    )
    for point in found.choices(some):
        figures = (point.measured, *((point.limited,) if found.limited else ()))
        measured = ("" if value is None else units.figure(value) for value in figures)
        style = "bold" if (point.nbytes, point.cost) == (found.chosen.nbytes, found.chosen.cost) else ""
        sizes = (point.nbytes, *((point.nbytes + fixed,) if fixed is not None else ()))
        cells = (*map(units.size, sizes), f"{point.average:.2f}", units.significant(point.cost), *measured)
        result.add_row(point.name or "front", *cells, style=style)
    counts = sorted(Counter(found.values.values()).items())
    taken = ", ".join(f"{units.count(count, item)} of {valued(option, value)}" for value, count in counts)
    beside = "groups: weights between two of them count in both" if item == "group" else ""
    if fixed is not None:
        beside = f"files: these layers and at most {units.size(fixed)} for all else"
    title = f"{option} per {item} for {found.sensitivity.step}: {found.budget}"
    return Group(
        Text(f"{found.name}: {title}" if found.name else title, style="bold"),
        result,
        Text(f"chosen: {taken}", style="dim"),
        *([Text(beside, style="dim")] if beside else []),
        Text(found.sensitivity.explained, style="dim"),
        *(Text(remark, style="yellow") for remark in found.sensitivity.remarks),
    )


def _table(*titles: str, narrowest: int | None = None) -> Table:
    """narrowest: width of the first column in which no word is cut, None for any."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        result.add_column(title, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number > 0)
    result.columns[0].min_width = narrowest
    return result


__all__ = ["search_table", "sensitivity_table"]
