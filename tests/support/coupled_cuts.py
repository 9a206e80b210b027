"""Channels set to zero: what a network must compute once they are cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from effcli.layers.coupling import Coupled, Cut


def zero(tensors: Mapping[str, Tensor], cuts: Iterable[Cut]) -> None:
    """Set to zero, in place, everything that goes with the channels that are cut; tensors: by state-dict key."""
    for cut in cuts:
        for member in cut.coupled.members:
            gone = (member.position >= 0) & ~cut.kept[member.position]
            with torch.no_grad():
                tensors[member.parameter].index_fill_(member.axis, gone.nonzero().flatten(), 0)


def random_cuts(groups: Sequence[Coupled], seed: int = 0, share: float = 0.6) -> list[Cut]:
    """Of every group of several channels that can be cut some at random, the first of them kept."""
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    for group in groups:
        if not group.reason and group.count > 1:
            kept = torch.rand(group.count, generator=generator) < share
            kept[0], kept[-1] = True, False
            cuts.append(Cut(group, kept))
    return cuts
