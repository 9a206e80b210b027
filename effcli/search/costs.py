"""A pass that keeps account of itself: what changing each layer costs, beside what comes out.

With D = Ŵ - W, and the loss -log p(y) of outputs y drawn from the network's own prediction, the divergence from the
original grows by about ½ E⟨∇_W(-log p(y)), D⟩²: half the Fisher information along D, with no outputs or tokens taken
for independent. Errors of rounding lean together in many places (a clipped range shrinks all of a row), which sums of
the single outputs' errors do not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effcli.formats import Quantized
from effcli.layers.contract import Layer, LayerPass, Outcome, Statistics, carry_out
from effcli.layers.returned import Asked
from effcli.reports.report import LedgerRow

_ROWS = 1024


class Slopes:
    """Sum of the squared slopes of a loss along errors D of one layer's weight, one sample after the other.

    errors: float32 (out, in) each, with an error s of the bias (out,) or None; squares: Σ (⟨∇_W, D⟩ + ⟨∇_b, s⟩)² over
    the samples, one number for each error.
    """

    def __init__(self, errors: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self.squares = [0.0] * len(errors)
        self._errors = errors
        self._sample = [0.0] * len(errors)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Take in inputs (..., in) and gradients at the outputs (..., out) of the sample at hand."""
        rows = gradients.reshape(-1, gradients.shape[-1]).float()
        slope = rows.t() @ inputs.reshape(-1, inputs.shape[-1]).float()
        for at, (error, shift) in enumerate(self._errors):
            self._sample[at] += float(torch.dot(slope.flatten(), error.flatten()))
            if shift is not None:
                self._sample[at] += float(rows.sum(0) @ shift)

    def end_sample(self) -> None:
        """The next inputs are those of another sample."""
        for at, value in enumerate(self._sample):
            self.squares[at] += value * value
            self._sample[at] = 0.0


@dataclass(frozen=True)
class Trial:
    """What became of one layer.

    energy, whole: mean squared norm of each output's error and of the output itself, float32 (out,), None where no
    inputs were seen; weight: what the layer then multiplies its unscaled inputs with, float32 (out, in), None unless
    it was to be kept; shift: what is added to its bias, float32 (out,), None for nothing. nbytes, format: how it would
    be stored.
    """

    energy: Tensor | None
    whole: Tensor | None
    weight: Tensor | None
    shift: Tensor | None = None
    nbytes: int = 0
    format: str = ""

    @property
    def output_error(self) -> float:
        """Relative squared error of the outputs; 0 of an output that is always 0."""
        if self.energy is None or self.whole is None:
            return 0.0
        whole = float(self.whole.sum(dtype=torch.float64))
        return float(self.energy.sum(dtype=torch.float64)) / whole if whole > 0 else 0.0

    def costing(self, cost: float) -> Cost:
        """What it costs, which is `cost` in the unit of the measurement: 0 where rounding took that below.

        NaN stays NaN: what breaks the network is not free.
        """
        return Cost(self.output_error, cost if math.isnan(cost) else max(0.0, cost), self.nbytes, self.format)


@dataclass(frozen=True)
class Cost:
    """What changing one layer costs.

    output_error: relative and squared; cost: in the unit of the measurement; nbytes, format: how it would be stored.
    """

    output_error: float
    cost: float
    nbytes: int = 0
    format: str = ""


def steadied(costs: Sequence[Mapping[str, Cost]], noise: float) -> list[dict[str, Cost]]:
    """Costs of several variants, one mapping by name for each, less what their sampling adds to single ones.

    Per output error, a layer's costs differ little between variants, so that its factor is known from all of them:
    log(cost / output error) is a layer's term, a variant's term and a rest. The rests' variance tells, less that of the
    sampling, how much of them the layers themselves cause; that share of each is kept (empirical Bayes, James and
    Stein's estimate). Without it a choice among many layers picks those that were luckily sampled.

    noise: variance of log cost that sampling causes, 2 / n for n samples of a normally distributed slope. A variant
    that changes no layer says nothing of the others. Layers without a finite cost or an error in one of these are left
    as they are.
    """
    found = [dict(of) for of in costs]
    changing = [of for of in found if any(own.cost > 0 for own in of.values())]
    names = [name for name in costs[0] if all(_has_factor(of[name]) for of in changing)]
    if len(names) < 2 or len(changing) < 2:
        return found
    logs = torch.tensor(
        [[math.log(of[name].cost / of[name].output_error) for of in changing] for name in names], dtype=torch.float64
    )
    rest = logs - logs.mean(0) - logs.mean(1, keepdim=True) + logs.mean()
    variance = float(rest.square().sum()) / ((len(names) - 1) * (len(changing) - 1))
    kept = max(0.0, 1 - noise / variance) if variance > 0 else 1.0
    factors = (logs - (1 - kept) * rest).exp()
    for name, own in zip(names, factors.tolist(), strict=True):
        for of, factor in zip(changing, own, strict=True):
            of[name] = replace(of[name], cost=of[name].output_error * factor)
    return found


def _has_factor(cost: Cost) -> bool:
    return 0 < cost.cost < math.inf and 0 < cost.output_error < math.inf


class Probe:
    """Hands layers to their pass, and remembers what became of every one.

    factors: rows (out,) and columns (in,) by which a layer's weight stands multiplied when it reaches the pass, so
    that it can be told of as it was. keep_weights: remember the weights too, not only their errors.
    """

    def __init__(self, keep_weights: bool = False) -> None:
        self.factors: Callable[[str], tuple[Tensor | None, Tensor | None]] = lambda name: (None, None)
        self._keep_weights = keep_weights
        self._trials: dict[str, Trial] = {}

    @property
    def trials(self) -> dict[str, Trial]:
        """What became of every layer so far."""
        return {name: self._as_it_was(name, trial) for name, trial in self._trials.items()}

    def stored(self, row: Callable[[str], LedgerRow]) -> dict[str, Trial]:
        """What became of every layer so far, and how it would be stored; row: its line of the ledger."""
        rows = {name: row(name) for name in self._trials}
        return {
            name: replace(trial, nbytes=rows[name].nbytes, format=rows[name].format)
            for name, trial in self.trials.items()
        }

    def apply(self, options: LayerPass, layer: Layer, seen: Sequence[Statistics] = ()) -> Outcome:
        """As `carry_out`; inputs that the pass does not ask for are kept from it."""
        outcome = carry_out(options, layer, seen if options.needs else ())
        made, kept = outcome.weight, outcome.kept(layer)
        restored = made.dequantize(torch.float32) if isinstance(made, Quantized) else made.float()
        if kept is not None:
            restored = restored.masked_fill(~kept.kept, 0)
        Asked(options, "apply", layer.name).check_finite(restored)
        energy = energies(restored - layer.weight, seen, outcome.shift) if seen else None
        whole = energies(layer.weight, seen) if seen else None
        self._trials[layer.name] = Trial(energy, whole, restored if self._keep_weights else None, outcome.shift)
        return outcome

    def _as_it_was(self, name: str, trial: Trial) -> Trial:
        rows, columns = self.factors(name)
        energy, whole, weight, shift = trial.energy, trial.whole, trial.weight, trial.shift
        if rows is not None:
            shift = None if shift is None else shift * rows
            energy, whole = (None if of is None else of * rows.square() for of in (energy, whole))
            weight = None if weight is None else weight * rows.unsqueeze(1)
        if columns is not None:
            weight = None if weight is None else weight / columns
        return Trial(energy, whole, weight, shift)


def energies(weight: Tensor, seen: Sequence[Statistics], shift: Tensor | None = None) -> Tensor:
    """Mean squared output of each row of weight (out, in), float32 (out,); `seen`: of each group of rows in turn.

    shift: what is added to each output, (out,), for which `seen` must have means; None for zeros.
    """
    parts = []
    for gram, part in zip(seen, weight.chunk(len(seen)), strict=True):
        for start in range(0, part.shape[0], _ROWS):
            rows = part[start : start + _ROWS].float()
            parts.append((rows @ gram.matrix).mul_(rows).sum(1) / max(gram.tokens, 1))
    found = torch.cat(parts) if parts else weight.new_zeros(0)
    if shift is None:
        return found
    means = torch.cat([part.float() @ own.mean for own, part in zip(seen, weight.chunk(len(seen)), strict=True)])
    return (found + shift * (2 * means + shift)).clamp_(min=0)
