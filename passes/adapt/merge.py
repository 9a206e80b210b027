"""Merge adapters: what LoRA and its kin learned beside a network's weights is added to them (arXiv:2106.09685).

LoRA learns B and A of W + s B A, with W as it is. Merged, the network costs what it did before and computes the same:
the sum is taken in float32 and rounded once. Each kind of adapter is a formula of `effcli.adapters.formulas`.

What was trained beside a compressed network stands on the weights that its codes stand for. An adapter is added to
these, and the sum is stored dense, or rounded again to the format that the layer had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from effcli.adapters.adapter import Adapter
from effcli.adapters.combine import Combination, combined
from effcli.formats import Quantized
from effcli.layers.contract import ParameterPass
from effcli.layers.edits import Edit, Place
from effcli.options import Options
from effcli.passes.quantize._again import again


class Weighted(Options):
    """One of several adapters: a directory, or `{path: directory, weight: number}`."""

    path: str
    weight: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class Merge(ParameterPass):
    """A `merge` step."""

    untouched: ClassVar[str] = "the adapter has nothing for it"
    rare: ClassVar[tuple[str, ...]] = ("combination", "density", "seed")

    adapter: str | None = Field(
        None,
        description="A PEFT adapter directory; without one, the adapter that a step before has trained, or that stands "
        "beside the weights.",
    )
    adapters: tuple[Weighted, ...] = Field(
        (), description="Several, as directories or `{path: DIR, weight: number}`; the weight is 1 unless given."
    )
    combination: Combination = Field(
        "linear",
        description="How several become one: weighted sum, TIES (largest changes, majority of signs), DARE (changes "
        "drawn by chance), or DARE with the majority of signs.",
    )
    density: float = Field(
        0.2, gt=0, le=1, description="Share of the changes of each adapter that count, in TIES and DARE."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the draws of DARE.")
    keep_zeros: bool = Field(
        False, description="Leave removed weights at 0; the report says what share of the changes is lost with them."
    )
    requantize: Literal["none", "same"] = Field(
        "none", description="Of a compressed layer: store the sum dense, or in the format that the layer had."
    )

    check: bool = Field(
        False,
        description="Of a language model: also run the base with the adapter beside it, in float32, and tell how far "
        "the result is from that.",
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.adapter is not None and self.adapters:
            raise ValueError("name one adapter, or several under `adapters`")
        # A recipe that was written with all defaults has these, too.
        fields, several = type(self).model_fields, ("combination", "density", "seed")
        if len(self.adapters) < 2 and any(getattr(self, name) != fields[name].default for name in several):
            raise ValueError("combination, density and seed are of several adapters: name them under `adapters`")
        return self

    @property
    def _weighted(self) -> tuple[Weighted, ...]:
        return self.adapters if self.adapter is None else (Weighted(path=self.adapter),)

    @property
    def takes_adapter(self) -> bool:
        return not self._weighted

    def with_adapter(self, folder: Path) -> Self:
        return self.model_copy(update={"adapter": str(folder)})

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(one.path).expanduser() for one in self._weighted)

    @property
    def keeps_zeros(self) -> bool:
        return self.keep_zeros

    @property
    def keeps_format(self) -> bool:
        return self.requantize == "same"

    @property
    def checks(self) -> bool:
        return self.check

    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        """What the adapters make of the parameters; raises what `Adapter.edits` raises for one that does not fit."""
        each = [Adapter.open(folder).edits(places) for folder in self.files]
        weights = [one.weight for one in self._weighted]
        return {
            name: combined(
                [(own[name], weight) for own, weight in zip(each, weights, strict=True) if name in own],
                self.combination,
                self.density,
                self.seed,
                name,
            )
            for name in dict.fromkeys(name for own in each for name in own)
        }

    def store(self, weight: Tensor, before: Quantized) -> Quantized | Tensor:
        return again(weight, before) if self.keeps_format else weight
