"""Linear quantization: round each weight to the nearest of 2^b evenly spaced values (arXiv:1806.08342, section 2).

The range of a group is that of its weights (`minmax`), or the shrunk one with the least squared error
(`least_squares`), which gives up a few large weights for finer steps everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from effcli.contract import Layer, Outcome, PassConfig
from effcli.formats import Affine, Strategy
from effcli.passes._affine import clipped_range, encode, extremes

Bits = Literal[2, 3, 4, 5, 6, 8]

# Below half of the range the error of the clipped weights outweighs every gain, at any number of bits.
SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.72, 0.68, 0.64, 0.6, 0.55, 0.5)


class Config(PassConfig):
    """Options of a `linear` step."""

    graph_defaults: ClassVar[Mapping[str, Any]] = {"granularity": "channel", "group_size": None}

    bits: Bits = Field(8, description="Bits per weight.")
    granularity: Strategy = Field("group", description="What shares a scale: the tensor, an output channel, a group.")
    group_size: int | None = Field(
        64, ge=1, description="Input channels that share a scale, with granularity `group`; must divide each layer's."
    )
    symmetric: bool = Field(False, description="A range around zero, with no zero point to store.")
    range: Literal["minmax", "least_squares"] = Field("minmax", description="How the range of the weights is chosen.")

    @model_validator(mode="after")
    def _group_size_where_it_belongs(self) -> Self:
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity 'group' needs a group_size")
        return self

    def for_graph(self) -> Self:
        """As for every pass; but who asks for groups, or for a group size of some layers, gets groups."""
        layers = {
            pattern: {"granularity": "group", **own} if own.get("group_size") else own
            for pattern, own in self.layers.items()
        }
        config = self.model_copy(update={"layers": layers})
        if self.granularity == "group" and {"granularity", "group_size"} & self.model_fields_set:
            return config
        return super(Config, config).for_graph()

    @property
    def format(self) -> Affine:
        size = self.group_size or 0
        return Affine(self.bits, self.granularity, size if self.granularity == "group" else 0, self.symmetric)


def apply(config: Config, layer: Layer, seen: None = None) -> Outcome:
    """Quantize one weight (out, in); needs no inputs."""
    format = config.format
    if config.range == "least_squares":
        low, high = clipped_range(layer.weight, None, format, layer.dtype, SHRINKS)
    else:
        low, high = extremes(layer.weight, format)
    return Outcome(encode(layer.weight, low, high, format, layer.dtype))
