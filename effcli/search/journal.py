"""What a search has found so far, so that after a crash it measures nothing twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from effcli.errors import UnfinishedError, writing
from effcli.files.checkpoint import write_text
from effcli.files.documents import read_model
from effcli.options import Record
from effcli.search.costs import Cost

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)


class LayerCosts(Record):
    """What some layers cost, one mapping by name for each variant of their options."""

    variants: tuple[dict[str, Cost], ...]


class SearchJournal:
    """A folder with one JSON file for each finding, which is there whole or not at all.

    The folder belongs to one search on one network with the same data: whoever makes it sees to that.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Throw away what is there."""
        with writing(self.folder):
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def recall(self, kind: type[Model], name: str) -> Model | None:
        """What was found under `name`, None when nothing was; `UnfinishedError` when it is damaged."""
        file = self.folder / f"{name}.json"
        return read_model(kind, file, error=UnfinishedError) if file.exists() else None

    def record(self, name: str, found: BaseModel) -> None:
        """Write down what was found; what it needs besides must be on the disk before."""
        write_text(self.folder / f"{name}.json", found.model_dump_json())

    def costs(self, name: str, variants: int) -> tuple[dict[str, Cost], ...] | None:
        """The costs of layers that were recorded under `name`, one mapping for each of the variants."""
        found = self.recall(LayerCosts, name)
        if found is not None and len(found.variants) != variants:
            raise UnfinishedError(f"{self.folder / name}.json is of {len(found.variants)} variants, not {variants}")
        return None if found is None else found.variants

    def record_costs(self, name: str, variants: Sequence[Mapping[str, Cost]]) -> None:
        """Write down what some layers cost under each variant."""
        self.record(name, LayerCosts(variants=tuple(dict(costs) for costs in variants)))


__all__ = ["LayerCosts", "SearchJournal"]
