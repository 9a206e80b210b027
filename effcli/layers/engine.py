"""The engine of passes over layers: find a factor for each shared input, or say why not; hand over each layer; record.

It works on whatever is a `Network`, and never asks which pass it carries out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effcli.formats import Quantized
from effcli.layers.contract import Apply, Change, Group, LayerPass, Needs, Pass, ScalingPass, Statistics, carry_out
from effcli.layers.layer import LayerSite
from effcli.layers.network import Network, Readers
from effcli.layers.result import histogram, ratio
from effcli.layers.returned import Asked
from effcli.layers.selection import Choice
from effcli.layers.statistics import Gradients
from effcli.platform.rehearsal import once
from effcli.reports.report import Histogram, LedgerRow

# The statistics of a layer's inputs, one for each group of a convolution.
Seen = tuple[Statistics, ...]


class LayerEngine:
    """Carries out passes over layers on the layers of an open network. histograms: of the layers done, in their order.

    A factor of an input is multiplied into the columns of the layers that read it while the module that produces it
    divides its output channels. Where no module can, and the pass asks for it, the factor stays on the input: the
    layer's weight is stored multiplied, beside the factor that its inputs are divided by.
    """

    def __init__(self, network: Network, choices: Mapping[str, Choice], apply: Apply = carry_out) -> None:
        """choices: of every layer of the network; apply: hands a layer to its pass."""
        self.network = network
        self.choices = choices
        self.apply = apply
        self.histograms: list[Histogram] = []
        self._rows: dict[str, LedgerRow] = {}
        # Factors (in,) that stay on the inputs of layers.
        self._explicit: dict[str, Tensor] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._reasons: dict[str, list[str]] = {}

    def options(self, name: str) -> Pass | None:
        """The pass of layer `name` with its options; None where it is left alone."""
        choice = self.choices.get(name)
        return None if choice is None else choice.config

    @property
    def taken(self) -> list[str]:
        """The layers that are not left alone."""
        return [name for name, choice in self.choices.items() if choice.config is not None]

    def explain(self, names: Iterable[str], reason: str) -> None:
        """Add what is to be known of layers to the ledger."""
        for name in names:
            self._reasons.setdefault(name, []).append(reason)

    def folded(self, name: str) -> Tensor | None:
        """The factor (in,) by which a module before layer `name` divides its inputs; None without one."""
        return None if name in self._explicit else self.network.factors.columns.get(name)

    def scale(self, seen: Mapping[str, Seen]) -> dict[str, Seen]:
        """Find a factor for every shared input and fold it, or say why not; returns what the layers see afterwards.

        seen: of the inputs of the layers, those without any left out.
        """
        found = dict(seen)
        if any(isinstance(self.options(name), ScalingPass) for name in seen):
            for readers in self.network.readers():
                self._scale(readers, found)
        return found

    def _scale(self, readers: Readers, seen: dict[str, Seen]) -> None:
        each = {name: self.options(name) for name in readers.layers if name in seen}
        passes = {name: options for name, options in each.items() if isinstance(options, ScalingPass)}
        chosen, options = tuple(passes), tuple(passes.values())
        if not chosen or not seen[chosen[0]][0].tokens:
            return
        first = chosen[0]
        reason = self._obstacle(readers, chosen)
        explicit = bool(reason) and any(own.without_scale == "explicit" for own in options)
        # Each group of a convolution reads channels of its own, under one weight for the ledger.
        grouped = any(self._site(name).groups > 1 for name in chosen)
        if reason and (grouped or not explicit):
            self.explain(chosen, f"unscaled: {reason}")
            return
        layers = tuple(self.network.read(self._site(name)) for name in chosen)
        group = Group(layers, options, readers.columns if explicit else readers.channel)
        found = once(
            lambda: f"scale {options!r} {[tuple(layer.weight.shape) for layer in layers]}",
            lambda: passes[first].scale(group, seen[first][0]),
        )
        asked = Asked(passes[first], "scale", ", ".join(chosen))
        factor, notes = asked.check_factor(found, layers[0].weight.shape[1])
        if bool((factor == 1).all()):
            self._note(chosen, notes)
            return
        if explicit:
            factor = factor.to(layers[0].dtype).float()
            self._explicit.update(dict.fromkeys(chosen, factor))
            self.explain(chosen, f"its scale stays explicit on its input: {reason}")
        else:
            factor = self.network.divide(readers, factor)
            notes = {**notes, "folded_into": readers.producer}
            # One for all: what a pass remembers of shared inputs is worked out once.
            rescaled = tuple(own.rescaled(factor) for own in seen[first])
            if seen[first][0].needs.gradients:
                # Gradients are of one layer each.
                seen.update({name: tuple(own.rescaled(factor) for own in seen[name]) for name in chosen})
            else:
                seen.update(dict.fromkeys(chosen, rescaled))
        for name in chosen:
            self.network.multiply(self._site(name), factor)
        self._note(chosen, notes)

    def _obstacle(self, readers: Readers, chosen: Sequence[str]) -> str:
        """Why no module may take in a factor of the inputs of `chosen`; empty when one may."""
        if any(self._site(name).groups > 1 for name in chosen):
            return "it is a grouped convolution"
        left_out = next((name for name in readers.layers if name not in chosen), None)
        if left_out is not None:
            return f"{left_out} reads the same input and is left alone"
        if readers.producer is None:
            return readers.reason
        if readers.produces and self.options(readers.produces) is None:
            return f"{readers.produces}, which produces its input, is left alone"
        return ""

    def _site(self, name: str) -> LayerSite:
        return self.choices[name].site

    def _note(self, names: Iterable[str], notes: Mapping[str, Any]) -> None:
        for name in names:
            self._notes.setdefault(name, {}).update(notes)

    def compress(self, name: str, seen: Seen = ()) -> None:
        """Hand layer `name` to its pass, and give the network and the ledger what came out.

        seen: of the inputs that reach the layer as the network now is; empty where nothing was gathered.
        """
        site, options = self._site(name), self.options(name)
        assert isinstance(options, LayerPass)
        layer, explicit = self.network.read(site), self._explicit.get(name)
        rows, _ = self.network.factors.of(name)
        if rows is not None and seen:
            parts = rows.chunk(len(seen))
            seen = tuple(own.with_rows_divided(part) for own, part in zip(seen, parts, strict=True))
        if explicit is not None:
            seen = tuple(_divided(own, explicit) for own in seen)
        if seen and not seen[0].tokens:
            done = "pruned" if Change.MASK in options.changes else "rounded"
            self.explain([name], f"no calibration token reached it: {done} without activations")
        outcome = self.apply(options, layer, seen)
        weight, mask = outcome.weight, outcome.kept(layer)
        if mask is not None:
            weight = mask.over(weight) if isinstance(weight, Quantized) else weight.masked_fill(~mask.kept, 0)
        restored = weight.dequantize(torch.float32) if isinstance(weight, Quantized) else weight.float()
        effective = restored if explicit is None else restored / explicit
        if not isinstance(weight, Quantized):
            # A dense weight takes a factor on its input into itself.
            weight = effective if mask is None else mask.over(effective.to(layer.dtype))
        elif explicit is not None:
            # A copy of its own: tensors of one file share no memory.
            weight = weight.with_input_scale(explicit.to(layer.dtype, copy=True))
        # Before the weight is written, for `layer` may be a view of it. Errors of outputs are told with undivided rows,
        # and columns as the inputs stand; errors of weights as the layer was.
        factors = self.network.factors
        difference, original = (
            factors.with_rows_undone(name, matrix) for matrix in (restored - layer.weight, layer.weight)
        )
        error = None
        if seen and seen[0].tokens and Needs.GRAM in seen[0].needs:
            error = ratio(_energy(seen, difference, outcome.shift), _energy(seen, original, quick=True))
        difference, original = (factors.with_columns_undone(name, matrix) for matrix in (difference, original))
        moved = float(difference.square().sum())
        Asked(options, "apply", name).check_finite(restored, moved)
        weight_error = ratio(moved, float(original.square().sum()))
        self.histograms.append(histogram(name, original, original + difference))
        held = self.network.write(site, weight, effective)
        if outcome.shift is not None:
            self.network.shift(site, outcome.shift)
        self._rows[name] = held.row(
            site,
            "compressed" if isinstance(weight, Quantized) and not weight.format.floating else "changed",
            reason="; ".join(self._reasons.get(name, ())),
            weight_error=weight_error,
            output_error=error,
            notes={**self._notes.get(name, {}), **outcome.notes},
        )

    def row(self, name: str) -> LedgerRow:
        """The ledger's line for layer `name`: of what became of it, or of how it was left."""
        if name in self._rows:
            return self._rows[name]
        choice = self.choices[name]
        return self.network.held(choice.site).row(choice.site, "kept", reason=choice.reason)


def with_gradients(seen: Seen, gradients: Gradients | None) -> Seen:
    """What was gathered of the inputs of a layer's groups, with the gradients of its weight where there are any."""
    if gradients is None:
        return seen
    return tuple(own.with_gradients(part) for own, part in zip(seen, gradients.chunk(len(seen)), strict=True))


def _divided(seen: Statistics, factor: Tensor) -> Statistics:
    """The statistics of the inputs divided by factor (in,), one object for all layers that share both."""
    made = seen.remember("divided", lambda: (factor, seen.rescaled(factor)))
    return made[1] if made[0] is factor else seen.rescaled(factor)


def _energy(seen: Seen, matrix: Tensor, shift: Tensor | None = None, quick: bool = False) -> float:
    """Mean squared norm of D x + s over the calibration tokens, D (out, in) with one group of rows for each of `seen`.

    shift: s (out,), None for zeros.
    """
    parts = matrix.chunk(len(seen))
    energy = sum(own.output_energy(part, quick) for own, part in zip(seen, parts, strict=True))
    if shift is None:
        return energy
    means = torch.cat([part @ own.mean for own, part in zip(seen, parts, strict=True)])
    return max(energy + float((shift * (2 * means + shift)).sum()), 0.0)


__all__ = ["LayerEngine", "Seen", "with_gradients"]
