"""Bits or sparsity per layer, or the ratio of every group of channels, under a budget.

What changing each layer alone costs is measured first, and the values are chosen so that the sum of these costs is
least among all choices that keep the budget. What is carried out and written into recipe.yaml is another pass, `using`,
with the value of every layer. Which option is chosen follows that pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from effcli import passes
from effcli.layers.contract import Evaluator, Needs, SearchPass
from effcli.reports.sensitivity import Search, Sensitivity, Way
from effcli.search.budget import Budgeted
from effcli.search.netadapt import adapt, lowers
from effcli.search.space import SPACES, VARIED, option_of
from effcli.search.values import choose_values, outside

# What every pass can be told belongs to the pass whose option is chosen.
_PASSED_ON = ("ignore", "layers", "lm_head")

_Bits = Annotated[tuple[Literal[2, 3, 4, 5, 6, 8], ...], Field(min_length=1)]
_Shares = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)]


class Auto(Budgeted, SearchPass):
    """An `auto` step; any other option is one of the pass that it chooses for."""

    rare: ClassVar[tuple[str, ...]] = ("options", "by", "measured", "rounds")

    using: str = Field(
        "awq",
        description="The pass that is carried out: one that quantizes, of which bits are chosen; that removes single "
        "weights, of which the sparsity is; or `channels`, of which the ratio is.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of that pass; they may also stand beside these."
    )
    bits: _Bits | None = Field(
        None,
        description="Bits to choose from, 2, 3, 4 and 8 unless given. Around 4 bits, 3, 4, 5 and 6 leave more to gain. "
        "With a value of its own under `layers`, a layer keeps that.",
    )
    sparsity: _Shares | None = Field(
        None, description="Sparsities to choose from; 0 and 0.2 to 0.8 in steps of 0.1 unless given."
    )
    ratio: _Shares | None = Field(None, description="Ratios to choose from; 0 to 0.75 in steps of 0.125 unless given.")
    by: Literal["gram", "fisher", "loss"] | None = Field(
        None, description="How a layer's cost is found; null: loss for small networks, fisher for others."
    )
    measured: int = Field(
        0, ge=0, le=32, description="The quality of so many points along the front of `knapsack` is also measured."
    )
    strategy: Literal["knapsack", "netadapt"] = Field(
        "knapsack",
        description="knapsack: the least sum of what single layers cost; netadapt, for small networks: whichever layer "
        "loses least is shrunk a little, again and again (arXiv:1804.03230).",
    )
    rounds: int = Field(
        10, ge=1, le=100, description="In how many steps `netadapt` brings size, MACs or latency down to the budget."
    )

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
        option = option_of(str(own.get("using", cls.model_fields["using"].default)), passes.REGISTRY)
        if own.get(option) is None:
            own[option] = SPACES[option].defaults
        return {**own, "options": {**inner, **others}}

    @field_validator(*VARIED)
    @classmethod
    def _in_order(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if value is None else tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _of_the_pass(self) -> Self:
        for other in VARIED:
            if other == self.option:
                continue
            if getattr(self, other) is not None:
                raise ValueError(f"{self.using} is searched for its {self.option}; leave `{other}` out")
            if self.budget.quantity == f"average_{other}":
                raise ValueError(
                    f"{self.using} is searched for its {self.option}; give average_{self.option}, not average_{other}"
                )
        if self.budget.quantity == f"average_{self.option}" and not self._has_own_values():
            values: tuple[float, ...] = getattr(self, self.option)
            cause = outside(self.option, self.budget.limit, values)
            if cause:
                raise ValueError(
                    f"{self.budget.quantity}: {cause}; choose a number between them, or offer other `{self.option}`"
                )
        if self.strategy == "netadapt" and not lowers(self.budget):
            raise ValueError(
                f"netadapt lowers what is measured down to its budget, and {self.budget.quantity} is none that falls; "
                "give size, macs or latency, or set strategy=knapsack"
            )
        if self.strategy == "netadapt" and self.measured:
            raise ValueError("netadapt measures the quality after every round; leave `measured` out")
        if self.strategy != "netadapt" and self.rounds != type(self).model_fields["rounds"].default:
            raise ValueError("`rounds` are those of netadapt; leave them out, or set strategy=netadapt")
        return self

    def _has_own_values(self) -> bool:
        """Whether layers keep a value of their own, with which more or less can be reached than without."""
        layers = self.options.get("layers")
        given = layers.values() if isinstance(layers, Mapping) else ()
        return any(isinstance(own, Mapping) and self.option in own for own in given)

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        return self.using, self.options

    @property
    def space(self) -> Sequence[Mapping[str, Any]]:
        option = option_of(self.using, passes.REGISTRY)
        return [{option: value} for value in getattr(self, option)]

    @property
    def way(self) -> Way | None:
        # Of costs the other strategy makes no use: the cheapest serve the report.
        return self.by or ("gram" if self.strategy == "netadapt" else None)

    @property
    def measures_quality(self) -> bool:
        return self.measured > 0 or self.budget.of_quality or self.exhaustive

    @property
    def exhaustive(self) -> bool:
        return self.strategy == "netadapt"

    def choose(self, costs: Sensitivity, evaluator: Evaluator) -> Search:
        if self.strategy == "netadapt":
            return adapt(costs, self.budget, evaluator, self.rounds)
        return choose_values(costs, self.budget, evaluator, self.measured)
