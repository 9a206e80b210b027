"""What other values of an option cost each layer of a checkpoint, of either kind of network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import NumericsError
from effcli.formats import Packing
from effcli.layers.contract import CutPass
from effcli.layers.result import Progress
from effcli.reports.sensitivity import LayerCosts, Option, Sensitivity, Value, Varied, Way, valued
from effcli.search.cuts import group_costs
from effcli.search.journal import SearchJournal

if TYPE_CHECKING:
    from effcli.run.network import Priced, RunNetwork
    from effcli.run.recipe import PassStep

# Weights below which putting every layer into the network by itself is a matter of a minute.
SMALL = 20_000_000


def sensitivity(
    network: RunNetwork,
    steps: Sequence[PassStep],
    option: Varied,
    source: Path,
    work: Path,
    way: Way | None = None,
    progress: Progress = lambda done, total: None,
    journal: SearchJournal | None = None,
) -> Sensitivity:
    """What each layer of the checkpoint `source` alone costs with each of `steps`, which differ in `option` alone.

    network: of the run; its recipe names the calibration data. work: a folder for hidden states. way: None takes `loss`
    for small networks and `fisher` for others. journal: what an earlier try with the same folder has found already.
    """
    known = None if journal is None else journal.recall(Sensitivity, "sensitivity")
    if known is not None:
        return known
    started = time.perf_counter()
    priced = network.priced(source)
    way = way or ("loss" if priced.weights < SMALL else "fisher")
    price = group_costs if option == "ratio" else _layer_costs
    layers = price(priced, steps, option, way, work, progress, journal)
    _check(steps[0].name, option, layers)
    remarks = list(priced.remarks)
    if way != "gram" and priced.samples > 1 and any(map(_fits, steps)):
        remarks.append(f"{steps[0].name} was fitted to one half of the calibration data, and measured on the other")
    settings = steps[0].config.model_dump(mode="json", exclude={str(option)}, exclude_defaults=True)
    made = Sensitivity(
        model=network.recipe.model,
        step=steps[0].name,
        settings=settings,
        option=option,
        way=way,
        unit="relative output error" if way == "gram" else priced.unit,
        inputs=priced.inputs,
        layers=layers,
        seconds=time.perf_counter() - started,
        remarks=tuple(remarks),
    )
    if journal is not None:
        journal.record("sensitivity", made)
    return made


def _check(name: str, option: Varied, layers: Iterable[LayerCosts]) -> None:
    """Raise `NumericsError` for a layer that breaks the outputs where the pass `name` changes it alone."""
    for layer in layers:
        for own in layer.options:
            if not math.isfinite(own.cost):
                changed = f"{layer.name} alone changed by {name} to {valued(option, own.value)}"
                raise NumericsError(
                    f"{changed} makes outputs NaN or infinite",
                    f"`ignore` the layer, or offer other `{option}`",
                )


def _fits(step: PassStep) -> bool:
    """Whether a step fits weights to the inputs of any layer."""
    return any(own.restoring is not None if isinstance(own, CutPass) else bool(own.needs) for own in step.configs)


def _layer_costs(
    priced: Priced,
    steps: Sequence[PassStep],
    option: Varied,
    way: Way,
    work: Path,
    progress: Progress,
    journal: SearchJournal | None,
) -> tuple[LayerCosts, ...]:
    """What each layer alone costs with each of `steps`."""
    variants = [priced.choose(step) for step in steps]
    found = priced.costs(variants, way, work, progress, journal)
    layers = []
    for name, first in variants[0].items():
        if first.config is None:
            continue
        options: dict[Value, Option] = {}
        for choices, costs in zip(variants, found, strict=True):
            value, cost = getattr(choices[name].config, option), costs[name]
            format, nbytes = cost.format, cost.nbytes
            if option == "bits":
                # Known before a weight is: what a run stores takes so many at most.
                config: Any = choices[name].config
                packing: Packing = config.format
                format, nbytes = str(packing), packing.nbytes(first.site.shape, priced.itemsize(choices[name]))
            options[value] = Option(
                value=value, format=format, nbytes=nbytes, output_error=cost.output_error, cost=cost.cost
            )
        ordered = tuple(options[value] for value in sorted(options))
        layers.append(LayerCosts(name=name, kind=first.site.kind, shape=first.site.shape, options=ordered))
    return tuple(layers)


__all__ = ["SMALL", "sensitivity"]
