"""What limits a search, each in its unit: bytes, multiplications, time, a microcontroller's memory, lost quality."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from effcli.options import Options, Share
from effcli.reports.units import size

Quantity = Literal[
    "average_bits",
    "average_sparsity",
    "average_ratio",
    "size",
    "perplexity_increase",
    "accuracy_drop",
    "macs",
    "latency",
    "ram",
    "flash",
]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
# What carried-out choices are measured for.
Figure = Literal["perplexity", "accuracy", "size", "macs", "latency", "ram", "flash"]

_FIGURES: Mapping[Quantity, Figure] = {
    "perplexity_increase": "perplexity",
    "accuracy_drop": "accuracy",
    "macs": "macs",
    "latency": "latency",
    "ram": "ram",
    "flash": "flash",
}
_FIGURE_UNITS: Mapping[Figure, str] = {"size": "bytes", "latency": "ms", "ram": "bytes", "flash": "bytes"}
_BYTES = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


class Budget(Options):
    """One limit, in the unit of its quantity: bytes, multiplications, milliseconds, bits, or a share of 1."""

    quantity: Quantity
    limit: float = Field(gt=0, allow_inf_nan=False)

    @property
    def figure(self) -> Figure | None:
        """The figure that must be measured of a carried-out choice; None where the costs of layers may tell it."""
        return _FIGURES.get(self.quantity)

    @property
    def of_quality(self) -> bool:
        """Whether quality is limited, and bytes are to be saved; else quality is to be saved."""
        return self.quantity in ("perplexity_increase", "accuracy_drop")

    def keeps(self, found: float, original: float) -> bool:
        """Whether a figure is within the limit; original: that of the network that came in."""
        if self.quantity == "perplexity_increase":
            return found <= original * (1 + self.limit)
        if self.quantity == "accuracy_drop":
            # 0.8 - 0.1 is more than 0.7 in floating point.
            return found >= original - self.limit - 1e-9
        return found <= self.limit

    def __str__(self) -> str:
        match self.quantity:
            case "average_bits":
                return f"{self.limit:g} bits on average"
            case "average_sparsity" | "average_ratio":
                return f"{self.quantity.removeprefix('average_')} {self.limit:g} on average"
            case "size":
                return f"{size(int(self.limit))} of weight files"
            case "perplexity_increase":
                return f"perplexity up by at most {100 * self.limit:g}%"
            case "accuracy_drop":
                points = 100 * self.limit
                return f"accuracy down by at most {points:g} point{'' if points == 1 else 's'}"
            case "macs":
                return f"{self.limit:,.0f} multiplications"
            case "latency":
                return f"{self.limit:g} ms"
            case "ram" | "flash":
                return f"{size(int(self.limit))} of {'RAM' if self.quantity == 'ram' else 'flash'}"


def figure_title(figure: Figure) -> str:
    """A figure with its unit, as the head of a column."""
    unit = _FIGURE_UNITS.get(figure)
    return figure if unit is None else f"{figure}, {unit}"


class Budgeted(Options):
    """Options of which one is a budget."""

    average_bits: float | None = Field(
        None, gt=0, le=8, description="Budget: the size that so many bits for every layer would take, interpolated."
    )
    average_sparsity: Share | None = Field(
        None, gt=0, lt=1, description="Budget: the share of all weights of the layers that is removed, 0.5 or 50%."
    )
    average_ratio: Share | None = Field(
        None,
        gt=0,
        lt=1,
        description="Budget: the ratio as a mean over the groups by their weights, 0.5 or 50%; more than that share of "
        "the weights goes where groups meet.",
    )
    size: int | None = Field(None, gt=0, description="Budget: bytes of the weight files, or 40MB.")
    perplexity_increase: Share | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Budget: how much the measured perplexity may rise, 0.05 or 5%; the smallest that does.",
    )
    accuracy_drop: Share | None = Field(
        None, gt=0, lt=1, description="Budget of a classifier: how far its accuracy may fall, 0.01 or 1%."
    )
    macs: int | None = Field(
        None, gt=0, description="Budget: multiplications for one input; neither bits nor sparsity changes them."
    )
    latency: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Budget: measured milliseconds for one decoded token, or for one input of a graph, of which only "
        "`channels` changes them, 20 or 20ms.",
    )
    ram: int | None = Field(
        None, gt=0, description="Budget of a network that a later pass makes integer: bytes of RAM in C, or 64KiB."
    )
    flash: int | None = Field(
        None, gt=0, description="Budget of a network that a later pass makes integer: bytes of flash in C, or 256KiB."
    )

    @field_validator("size", "ram", "flash", mode="before", json_schema_input_type=int | str | None)
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgKMG]?i?[bB])\s*", value)
        if match is None or match[1].count(".") > 1 or match[2].lower() not in _BYTES:
            raise ValueError(f"{value!r} is no size; write it like 40MB or 1.5GB")
        found = float(match[1]) * _BYTES[match[2].lower()]
        if not math.isfinite(found):
            raise ValueError("is more bytes than any file has")
        return round(found)

    @field_validator("latency", mode="before", json_schema_input_type=float | str | None)
    @classmethod
    def _milliseconds(cls, value: Any) -> Any:
        match = re.fullmatch(r"\s*([\d.]+)\s*ms\s*", value) if isinstance(value, str) else None
        return float(match[1]) if match is not None and match[1].count(".") <= 1 else value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in QUANTITIES if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give one budget of {', '.join(QUANTITIES)}, not {found}")
        return self

    @property
    def budget(self) -> Budget:
        """The budget that was given."""
        return next(
            Budget(quantity=name, limit=getattr(self, name)) for name in QUANTITIES if getattr(self, name) is not None
        )


__all__ = ["QUANTITIES", "Budget", "Budgeted", "Figure", "Quantity", "figure_title"]
