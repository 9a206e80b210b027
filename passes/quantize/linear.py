"""Linear quantization: round each weight to the nearest of 2^b evenly spaced values (arXiv:1806.08342, section 2).

The range of a group is that of its weights (`minmax`), or the shrunk one with the least squared error
(`least_squares`), which gives up a few large weights for finer steps everywhere else.

With int8 activations the inputs of a layer become integers too, so that it multiplies integers with integers and
rescales each sum once (arXiv:1712.05877, section 2.3): with a scale per token taken as it comes, or with one scale and
zero point for all inputs, whose range is chosen on calibration inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from effcli.errors import DataError, UnsupportedError
from effcli.formats import Activations, Affine, Strategy
from effcli.layers.contract import UNSEEN, Layer, LayerPass, Needs, Outcome, Statistics
from effcli.layers.input_rounding import tensor_parameters
from effcli.layers.ranges import Method, Range
from effcli.passes.quantize._affine import clipped_range, encode, extremes

Bits = Literal[2, 3, 4, 5, 6, 8]

# Below half of the range the error of the clipped weights outweighs every gain, at any number of bits.
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.72, 0.68, 0.64, 0.6, 0.55, 0.5)
# What int8 activations ask of the weights.
_INTEGER: Mapping[str, Any] = {"granularity": "channel", "group_size": None, "symmetric": True}


class Linear(LayerPass):
    """A `linear` step."""

    rare: ClassVar[tuple[str, ...]] = ("range", "activation_range", "percentile")

    graph_defaults: ClassVar[Mapping[str, Any]] = {"granularity": "channel", "group_size": None}

    bits: Bits = Field(8, description="Bits per weight; 8 with int8 activations.")
    granularity: Strategy = Field(
        "group",
        description="What shares a scale: the tensor, an output channel, a group. With int8 activations `channel` "
        "unless `tensor` is set.",
    )
    group_size: int | None = Field(
        64, ge=1, description="Input channels that share a scale, with granularity `group`; must divide each layer's."
    )
    symmetric: bool = Field(
        False, description="A range around zero, with no zero point to store; always with int8 activations."
    )
    range: Literal["minmax", "least_squares"] = Field("minmax", description="How the range of the weights is chosen.")
    activations: Literal["none", "int8"] = Field(
        "none", description="Whether the inputs of the layers are rounded to int8, for products of integers."
    )
    activation_range: Literal["dynamic", Method] = Field(
        "dynamic",
        description="The range of int8 activations: each token's own as it comes, or one that is chosen on "
        "calibration inputs, in this way.",
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="Of the inputs below the upper end, for the activation range `percentile`."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.activations == "int8":
            self._take_integer_weights()
        elif self.activation_range != "dynamic":
            raise ValueError(
                f"activation_range {self.activation_range!r} is of int8 activations: set activations: int8"
            )
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity 'group' needs a group_size")
        return self

    def _take_integer_weights(self) -> None:
        """Let what was not set be as int8 activations need it; `ValueError` for what was set otherwise."""
        if self.group_size and "group_size" in self.model_fields_set and "granularity" not in self.model_fields_set:
            raise ValueError("int8 activations need a scale per channel or tensor: leave out group_size")
        for key, value in _INTEGER.items():
            if key not in self.model_fields_set:
                self.__dict__[key] = value
        if self.bits != 8:
            raise ValueError(f"int8 activations need bits: 8, not {self.bits}; or set activations: none")
        if self.granularity == "group":
            raise ValueError("int8 activations need granularity: channel or tensor, so that a sum is rescaled once")
        if not self.symmetric:
            raise ValueError("int8 activations need symmetric: true, so that weights are integers without a zero point")

    @property
    def needs(self) -> Needs:
        """Inputs where their range is chosen on them."""
        return Needs.GRAM | Needs.VALUES if self.static else Needs.NOTHING

    def for_graph(self) -> Self:
        """As for every pass; but who asks for groups, or for a group size of some layers, gets groups."""
        layers = {
            pattern: {"granularity": "group", **own} if own.get("group_size") else own
            for pattern, own in self.layers.items()
        }
        config = self.model_copy(update={"layers": layers})
        if self.granularity == "group" and {"granularity", "group_size"} & self.model_fields_set:
            return config
        return super(Linear, config).for_graph()

    @property
    def static(self) -> bool:
        """Whether the inputs get a range that is fixed beforehand."""
        return self.activations == "int8" and self.activation_range != "dynamic"

    @property
    def format(self) -> Affine:
        size = (self.group_size or 0) if self.granularity == "group" else 0
        inputs: Activations = "none" if self.activations == "none" else "tensor" if self.static else "token"
        return Affine(self.bits, self.granularity, size, self.symmetric, inputs)

    def apply(self, layer: Layer, seen: Statistics = UNSEEN) -> Outcome:
        """Quantize one weight (out, in); needs inputs only for a fixed range of theirs.

        Raises `UnsupportedError` where inputs cannot become int8, `DataError` where no calibration input was seen.
        """
        return self.apply_groups(layer, (seen,))

    def apply_groups(self, layer: Layer, seen: Sequence[Statistics]) -> Outcome:
        """Quantize the weight (out, in) of a convolution; one range serves the inputs of all its groups."""
        format = self.format
        if format.activations != "none":
            _check_inputs(self, layer)
        if self.range == "least_squares":
            low, high = clipped_range(layer.weight, None, format, layer.dtype, SHRINKS)
        else:
            low, high = extremes(layer.weight, format)
        made = encode(layer.weight, low, high, replace(format, activations="none"), layer.dtype)
        if not self.static:
            return Outcome(replace(made, format=format))
        chosen = chosen_range(self, layer, seen)
        scale, zero = tensor_parameters(*chosen, layer.dtype)
        weight = replace(made, format=format, activation_scale=scale, activation_zero=zero)
        # As many digits as a step of the range is worth.
        shown = [float(f"{end:.4g}") for end in chosen]
        return Outcome(weight, {"activation_range": shown, "observer": self.activation_range})


def chosen_range(config: Linear, layer: Layer, seen: Sequence[Statistics]) -> Range:
    """(low, high) of the inputs of `layer`, low ≤ 0 ≤ high. `DataError` when none was seen."""
    if not seen[0].tokens:
        raise DataError(
            f"no calibration input reached {layer.name}, so that its int8 activations have no range",
            "give more calibration data, or set activation_range: dynamic for this layer under `layers`",
        )
    method = config.activation_range
    assert method != "dynamic"
    return seen[0].values.range_of(method, config.percentile)


def _check_inputs(config: Linear, layer: Layer) -> None:
    """Raise `UnsupportedError` where the inputs of `layer` cannot become int8 as `config` says."""
    if layer.kind == "expert":
        raise UnsupportedError(
            f"{layer.name} is an expert in a 3-D parameter, whose inputs stay floating",
            "set activations: none for it under `layers`, together with the weights' options, or `ignore` it",
        )
    if layer.kind == "conv" and not config.static:
        raise UnsupportedError(
            f"{layer.name} is a convolution, whose inputs are no tokens with a scale each",
            "choose a range on calibration inputs, such as activation_range: minmax; `int8` makes a whole network of "
            "integers",
        )
