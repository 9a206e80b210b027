"""Bits per layer under a budget: the options that another pass is then carried out with.

What quantizing each layer alone costs is measured first, and the bits are chosen so that the sum of these costs is
least among all choices that keep the budget. What is carried out and written into recipe.yaml is the other pass with
the bits of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from effcli.layers.contract import Evaluator, Needs, SearchPass
from effcli.reports.sensitivity import Search, Sensitivity, Way
from effcli.search.budget import Budgeted
from effcli.search.values import choose_values

# What every pass can be told belongs to the pass whose bits are chosen.
_PASSED_ON = ("ignore", "layers", "lm_head")


class Auto(Budgeted, SearchPass):
    """An `auto` step; any other option is one of the pass that it chooses the bits for."""

    rare: ClassVar[tuple[str, ...]] = ("options", "by", "measured")

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
    by: Literal["gram", "fisher", "loss"] | None = Field(
        None, description="How a layer's cost is found; null: loss for small networks, fisher for others."
    )
    measured: int = Field(0, ge=0, le=32, description="The quality of so many points along the front is also measured.")

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

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        return self.using, self.options

    @property
    def space(self) -> Sequence[Mapping[str, Any]]:
        return [{"bits": bits} for bits in self.bits]

    @property
    def way(self) -> Way | None:
        return self.by

    @property
    def measures_quality(self) -> bool:
        return self.measured > 0 or self.budget.of_quality

    def choose(self, costs: Sensitivity, evaluator: Evaluator) -> Search:
        return choose_values(costs, self.budget, evaluator, self.measured)
