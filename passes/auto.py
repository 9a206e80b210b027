"""Bits per layer under a budget: the options that another pass is then carried out with.

What quantizing each layer alone costs is measured first, and the bits are chosen so that the sum of these costs is
least among all choices that keep the budget. A run resolves this step before it begins: what is carried out and written
into recipe.yaml is the other pass with the bits of every layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from effcli.layers.contract import Needs, SearchPass

_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
# What every pass can be told belongs to the pass whose bits are chosen.
_PASSED_ON = ("ignore", "layers", "lm_head")


class Auto(SearchPass):
    """An `auto` step; any other option is one of the pass that it chooses the bits for."""

    using: str = Field("awq", description="The pass that quantizes.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of that pass; they may also stand beside these."
    )
    bits: tuple[Literal[2, 3, 4, 5, 6, 8], ...] = Field(
        (2, 3, 4, 8),
        min_length=1,
        description="Bits to choose from; with bits of its own under `layers`, a layer keeps those. Around 4 bits, "
        "3, 4, 5 and 6 leave more to gain than the default.",
    )
    average_bits: float | None = Field(
        None, gt=0, le=8, description="Budget: the size that so many bits for every layer would take, interpolated."
    )
    size: int | None = Field(None, gt=0, description="Budget: bytes of the weight files, or 40MB.")
    perplexity_increase: float | None = Field(
        None, gt=0, description="Budget: how much the measured perplexity may rise, 0.05 or 5%; the smallest that does."
    )
    accuracy_drop: float | None = Field(
        None, gt=0, lt=1, description="Budget of a classifier: how far its accuracy may fall, 0.01 or 1%."
    )
    by: Literal["gram", "fisher", "loss"] | None = Field(
        None, description="How a layer's cost is found; null: loss for small networks, fisher for others."
    )
    measured: int = Field(0, ge=0, le=32, description="So many points along the front are also measured.")

    @model_validator(mode="before")
    @classmethod
    def _options_beside(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = {key: value for key, value in data.items() if key in cls.model_fields and key not in _PASSED_ON}
        # The defaults of what was passed on stand in every recipe that was written with all of them.
        others = {key: value for key, value in data.items() if key not in own and (value or key not in _PASSED_ON)}
        inner = own.get("options", {})
        if not isinstance(inner, Mapping):
            return own
        twice = sorted(others.keys() & inner.keys())
        if twice:
            raise ValueError(f"{twice[0]} stands beside `options` and in it")
        return {**own, "options": {**inner, **others}}

    @field_validator("bits")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @field_validator("size", mode="before", json_schema_input_type=int | str | None)
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgKMG]?i?[bB])\s*", value)
        if match is None or match[1].count(".") > 1 or match[2].lower() not in _UNITS:
            raise ValueError(f"{value!r} is no size; write it like 40MB or 1.5GB")
        return int(float(match[1]) * _UNITS[match[2].lower()])

    @field_validator("perplexity_increase", "accuracy_drop", mode="before", json_schema_input_type=float | str | None)
    @classmethod
    def _percent(cls, value: Any) -> Any:
        match = re.fullmatch(r"\s*([\d.]+)\s*%\s*", value) if isinstance(value, str) else None
        return float(match[1]) / 100 if match is not None and match[1].count(".") <= 1 else value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give one budget of {', '.join(BUDGETS)}, not {found}")
        return self

    @property
    def budget(self) -> str:
        """The name of the budget that was given."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        return self.using, self.options

    @property
    def space(self) -> Sequence[Mapping[str, Any]]:
        return [{"bits": bits} for bits in self.bits]


BUDGETS = ("average_bits", "size", "perplexity_increase", "accuracy_drop")
