"""SmoothQuant: move the difficulty of rounding from activations to weights, channel by channel (arXiv:2211.10438).

Inputs become X / s and weights W · s with s_j = max|X_j|^α / max|W_j|^(1 - α) (eq. 4), the maxima over all calibration
tokens and over all layers that read the input. 1 / s is folded into the module that produces X: the network computes
what it computed, and loud channels no longer decide the step of all others when activations are rounded to 8 bits.

`alpha: search` tries a grid of α for each shared input and none at all, on a small sample of real inputs: the error is
that of the outputs, ‖Q(X / s) Q(W · s)ᵀ - X Wᵀ‖², with inputs and weights rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from effcli.errors import SelectionError
from effcli.formats import Affine
from effcli.layers.contract import Group, Layer, Needs, Outcome, ScalingPass, Statistics
from effcli.layers.input_rounding import round_tensor, round_tokens, tensor_parameters
from effcli.passes.quantize._affine import nearest

# Rows of each layer's weight, evenly spaced, whose outputs are compared.
_SAMPLED_ROWS = 256
# Candidates for α, evenly spaced over [0, 1].
_STEPS = 20
_WEIGHTS = Affine(8, "channel", symmetric=True)


class SmoothQuant(ScalingPass):
    """A `smoothquant` step. It leaves the weights floating: a step that rounds them follows.

    A scale that stayed on the input would cancel against the floating weight: without a module that takes it in there
    is none.
    """

    alpha: float | Literal["search"] = Field(
        0.5,
        description="How much moves to the weights, from 0 to 1; `search` finds it for each shared input.",
    )
    activations: Literal["token", "tensor"] = Field(
        "token",
        description="How the search supposes the inputs to be rounded: one scale per token, or one for all.",
    )

    @property
    def needs(self) -> Needs:
        return Needs.GRAM | Needs.EXTREMES | Needs.SAMPLE

    @field_validator("alpha")
    @classmethod
    def _within(cls, alpha: float | str) -> float | str:
        if isinstance(alpha, float) and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1, or search, not {alpha:g}")
        return alpha

    def scale(self, group: Group, seen: Statistics) -> tuple[Tensor, dict[str, float]]:
        """Factor per input channel, float32 (in,), for the layers of `group`, and notes.

        With a search it is never worse than no scale, nor than another α of the grid, on the rows that were kept.
        `SelectionError` when the layers of a group are to have different factors.
        """
        for other, layer in zip(group.options, group.layers, strict=True):
            if (other.alpha, other.activations) != (self.alpha, self.activations):
                raise SelectionError(
                    f"{group.layers[0].name} and {layer.name} read one input, which has one scale",
                    "give them the same alpha and activations under `layers`",
                )
        inputs = _shared(seen.peak, group.channel)
        weights = _shared(torch.stack([layer.weight.abs().amax(0) for layer in group.layers]).amax(0), group.channel)
        if self.alpha != "search":
            return factors(inputs, weights, self.alpha), {"alpha": self.alpha}
        objective = Objective(self.activations, group.layers, seen)
        none = objective(torch.ones_like(inputs))
        errors = {k / _STEPS: objective(factors(inputs, weights, k / _STEPS)) for k in range(_STEPS + 1)}
        alpha = min(errors, key=errors.__getitem__)
        if not errors[alpha] < none:
            return torch.ones_like(inputs), {"scale_gain": 0.0}
        return factors(inputs, weights, alpha), {"alpha": alpha, "scale_gain": round(1 - errors[alpha] / none, 4)}

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        """The weight (out, in) as the engine has scaled it."""
        return Outcome(layer.weight)


def factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """inputs^α / weights^(1 - α), eq. 4, of the largest magnitudes (in,); 1 for a channel that is silent or unread."""
    found = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0) & found.isfinite() & (found > 0), found, 1.0)


class Objective:
    """The error of the outputs of layers that share an input, over its kept rows: a function of the factor (in,)."""

    def __init__(self, activations: Literal["token", "tensor"], layers: Sequence[Layer], seen: Statistics) -> None:
        self.activations = activations
        self.seen = seen
        self.inputs = seen.sample
        self.weights = [_sampled(layer.weight) for layer in layers]
        self.dtypes = [layer.dtype for layer in layers]
        # A layer counts with all of its rows.
        self.shares = [
            len(layer.weight) / max(len(weight), 1) for layer, weight in zip(layers, self.weights, strict=True)
        ]

    def __call__(self, factor: Tensor) -> float:
        """Σ ‖Q(X / s) Q(W · s)ᵀ - X Wᵀ‖²."""
        inputs = self._rounded(factor)
        total = 0.0
        for weight, dtype, share in zip(self.weights, self.dtypes, self.shares, strict=True):
            difference = inputs @ nearest(weight * factor, _WEIGHTS, dtype).t() - self.inputs @ weight.t()
            total += share * float(difference.square().sum(dtype=torch.float64))
        return total

    def _rounded(self, factor: Tensor) -> Tensor:
        inputs = self.inputs / factor
        if self.activations == "token":
            return round_tokens(inputs)
        low, high = float((self.seen.low / factor).min()), float((self.seen.high / factor).max())
        scale, zero = tensor_parameters(low, high)
        return round_tensor(inputs, float(scale), int(zero))


def _shared(peaks: Tensor, channel: Tensor | None) -> Tensor:
    """The largest of the peaks (in,) behind each of the producer's channels, at every input that reads it."""
    if channel is None:
        return peaks
    largest = peaks.new_zeros(int(channel.max()) + 1).scatter_reduce_(0, channel, peaks, "amax")
    return largest[channel]


def _sampled(weight: Tensor) -> Tensor:
    """Some rows of weight (out, in), evenly spaced."""
    return weight[:: max(1, len(weight) // _SAMPLED_ROWS)].contiguous()
