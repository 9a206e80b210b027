"""A language model with new values of its parameters beside the old ones: read in float32, rounded nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effcli.adapters.adapter import Adapter
from effcli.files.layout import adapter_in
from effcli.language.editing import edited, takes_adapter, with_own_adapter
from effcli.language.weights import CPU, Weights, open_weights
from effcli.layers.editing import change
from effcli.layers.edits import Edit

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


class _Beside(Weights):
    """The parameters of a network with their new values, float32."""

    def __init__(self, plain: Weights, edits: Mapping[str, Edit]) -> None:
        super().__init__(plain.checkpoint, plain.skeleton, plain.device)
        self._edits = edits
        head, embedding = self.skeleton.head, self.skeleton.embedding
        if self.skeleton.tied and (head in edits or embedding in edits):
            # Each may have new values of its own.
            self._read_as(f"{head}.weight", embedding)
            self.skeleton.untie()

    def parameter(self, name: str, edit: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        value = super().parameter(name, self._part)
        value = value.float() if value.is_floating_point() else value
        for site in self.sites(name):
            if site.name in self._edits:
                change(site.name, self._edits[site.name], site.view(value))
        if name in self._edits:
            change(name, self._edits[name], value)
        return value

    def _part(self, place: str, value: Tensor) -> Tensor:
        value = value.float()
        if place in self._edits:
            change(place, self._edits[place], value)
        return value


def as_it_runs(path: Path, trust_remote_code: bool = False, device: torch.device = CPU) -> Weights:
    """The checkpoint `path` with the adapter that stands beside its weights, if one does, in float32 then."""
    folder = adapter_in(path)
    if folder is None:
        return open_weights(path, trust_remote_code, device=device)
    plain = open_weights(path, trust_remote_code, "float32", device, base=True)
    return _Beside(plain, Adapter.open(folder).edits(plain.places()))


def beside(source: Path, step: PassStep, trust_remote_code: bool = False, device: torch.device = CPU) -> Weights:
    """The checkpoint `source` with what `step`, a pass over parameters, makes of it, before anything is rounded.

    Zeros that earlier passes left are filled. Raises what the pass says of parameters that do not fit.
    """
    plain = open_weights(source, trust_remote_code, "float32", device, base=takes_adapter(step))
    step = with_own_adapter(step, source)
    return _Beside(plain, edited(plain, step).edits)


__all__ = ["as_it_runs", "beside"]
