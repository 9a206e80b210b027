"""Merge an adapter: what LoRA and its kin learned beside a network's weights is added to them (arXiv:2106.09685).

LoRA learns B and A of W + s B A, with W as it is. Merged, the network costs what it did before and computes the same:
the sum is taken in float32 and rounded once. Each kind of adapter is a formula of `effcli.adapters.formulas`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from effcli.adapters.adapter import Adapter
from effcli.layers.contract import ParameterPass
from effcli.layers.edits import Edit, Place


class Merge(ParameterPass):
    """A `merge` step."""

    untouched: ClassVar[str] = "the adapter has nothing for it"

    adapter: str = Field(description="A PEFT adapter directory.")

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.adapter).expanduser(),)

    def edits(self, places: Mapping[str, Place]) -> Mapping[str, Edit]:
        """What the adapter makes of the parameters; raises what `Adapter.edits` raises for one that does not fit."""
        (folder,) = self.files
        return Adapter.open(folder).edits(places)
