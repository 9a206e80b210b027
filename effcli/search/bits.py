"""Choices of bits per layer by what they cost, and the step that carries one out."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Mapping
from typing import Any

from effcli.layers.selection import matches
from effcli.reports.sensitivity import Sensitivity
from effcli.run.recipe import PassStep
from effcli.search.knapsack import Choice, Frontier


class Widths:
    """The choices of bits that layers leave, by what they cost. frontier: the cheapest ones for every budget."""

    def __init__(self, found: Sensitivity) -> None:
        self._layers = found.layers
        self.frontier = Frontier(
            [[option.nbytes for option in layer.options] for layer in found.layers],
            [[option.cost for option in layer.options] for layer in found.layers],
        )

    @property
    def uniform(self) -> dict[int, Choice]:
        """Every layer with the same bits; a layer that has bits of its own keeps them."""
        found = {}
        places = [[option.bits for option in layer.options] for layer in self._layers]
        for bits in sorted({width for own in places for width in own}):
            if all(bits in own or len(own) == 1 for own in places):
                found[bits] = self.frontier.choice([own.index(bits) if bits in own else 0 for own in places])
        return found

    def nbytes(self, bits: float) -> int | None:
        """The bytes of `bits` for every layer, between two whole numbers interpolated; None outside of them."""
        uniform = self.uniform
        below = max((each for each in uniform if each <= bits), default=None)
        above = min((each for each in uniform if each >= bits), default=None)
        if below is None or above is None:
            return None
        share = (bits - below) / (above - below) if above > below else 0.0
        return int(uniform[below].nbytes + share * (uniform[above].nbytes - uniform[below].nbytes))

    def bits(self, choice: Choice) -> dict[str, int]:
        """The bits of every layer by name."""
        return {layer.name: layer.options[at].bits for layer, at in zip(self._layers, choice.options, strict=True)}


def with_bits(step: PassStep, bits: Mapping[str, int]) -> PassStep:
    """The step with these bits for these layers: the most frequent for all, the others under `layers` by name."""
    config: Any = step.config
    (usual, _), *_ = Counter(bits.values()).most_common()
    layers = dict(config.layers)
    for name, own in bits.items():
        matching = [options for pattern, options in config.layers.items() if matches(name, pattern)]
        told = matching[-1] if matching else {}
        if told.get("bits", usual) != own:
            layers[glob.escape(name)] = {**told, "bits": own}
    return PassStep(name=step.name, config=config.model_copy(update={"bits": usual, "layers": layers}))


__all__ = ["Widths", "with_bits"]
