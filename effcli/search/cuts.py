"""What it costs to cut groups of channels, which the layers tell that read them.

What goes is decided as a run decides it. A layer that reads a group loses columns and is fitted to those that stay, by
itself and with all other layers as they are. A group costs what its readers cost together.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effcli.errors import UnsupportedError, writing
from effcli.layers.coupling import Coupled, Cut, Member, staying
from effcli.layers.cutting import Offered, decide, offer
from effcli.layers.restoring import removing
from effcli.layers.result import Progress
from effcli.platform.rehearsal import cannot_tell
from effcli.reports.sensitivity import LayerCosts, Option, Value, Varied, Way
from effcli.search.costs import Cost
from effcli.search.journal import SearchJournal

if TYPE_CHECKING:
    from effcli.run.network import Priced
    from effcli.run.recipe import PassStep


def group_costs(
    priced: Priced,
    steps: Sequence[PassStep],
    option: Varied,
    way: Way,
    work: Path,
    progress: Progress = lambda done, total: None,
    journal: SearchJournal | None = None,
) -> tuple[LayerCosts, ...]:
    """What it costs to cut each group alone with each of `steps`, one pass that cuts with other values of `option`.

    Groups are named after the layer whose options are theirs. work: a folder for hidden states. Raises
    `UnsupportedError` for a group that no layer reads.
    """
    alternatives = _alternatives(priced, steps, work)
    sites = [choice.site for choice in priced.choose(steps[0]).values()]
    variants = [
        priced.choose(removing(step, sites, own.offered, own.cuts, own.offered.groups))
        for step, own in zip(steps, alternatives, strict=True)
        if own.cuts
    ]
    found = iter(priced.costs(variants, way, work, progress, journal) if variants else ())
    costs = [next(found) if own.cuts else {} for own in alternatives]
    layers = []
    for group in alternatives[0].offered.groups:
        options: dict[Value, Option] = {}
        for own, of_layers in zip(alternatives, costs, strict=True):
            value: Value = getattr(own.offered.chosen[group.name], option)
            options[value] = own.option(priced, group, value, of_layers)
        entries = sum(_of(member, priced.extent(member.parameter)[0]) for member in group.members)
        layers.append(
            LayerCosts(
                name=alternatives[0].offered.maker(group).name,
                kind=group.kind,
                shape=(group.count, entries // group.count),
                options=tuple(options[value] for value in sorted(options)),
            )
        )
    return tuple(layers)


@dataclass(frozen=True)
class _Alternative:
    """What one of the steps cuts."""

    offered: Offered
    cuts: Sequence[Cut]

    def option(self, priced: Priced, group: Coupled, value: Value, costs: Mapping[str, Cost]) -> Option:
        """What is left of a group, and what that costs; costs: of each layer that reads any group."""
        kept = next((one.kept for one in self.cuts if one.coupled is group), torch.ones(group.count, dtype=torch.bool))
        gone = {key: ~stay for key, stay in staying(self.cuts).items()}
        found = []
        for member, site in self.offered.readers(group):
            if (member.parameter, member.axis) in gone:
                # A layer that reads several groups costs each as much as that has in what it loses.
                lost = gone[member.parameter, member.axis]
                mine = lost & ~kept[member.position] & (member.position >= 0)
                # What reads a part of a group may lose nothing where others do.
                share = int(mine.sum()) / max(int(lost.sum()), 1)
                found.append((share, costs[site.name]))
        return Option(
            value=value,
            format=f"{int(kept.sum())} of {group.count}",
            nbytes=sum(_of(member, priced.extent(member.parameter)[1], kept) for member in group.members),
            macs=sum(_of(member, priced.macs[site.name], kept) for member, site in self.offered.layers(group)),
            output_error=max((cost.output_error for share, cost in found if share), default=0.0),
            cost=sum(share * cost.cost for share, cost in found),
        )


def _of(member: Member, whole: int, kept: Tensor | None = None) -> int:
    """What the positions of a group have of something that the entries of a member share equally.

    kept: which positions count, bool (count,), None for all.
    """
    own = member.position[member.position >= 0]
    return whole * (len(own) if kept is None else int(kept[own].sum())) // len(member.position)


def _alternatives(priced: Priced, steps: Sequence[PassStep], work: Path) -> list[_Alternative]:
    """What each of `steps` cuts."""
    cannot_tell("what is cut is decided over all groups at once")
    groups, folder = priced.coupled(), work / "cuts"
    configs: list[Any] = [step.config for step in steps]
    offers = [
        offer(step.name, config, groups, priced.choose(step)) for step, config in zip(steps, configs, strict=True)
    ]
    unread = next((group for group in offers[0].groups if not offers[0].readers(group)), None)
    if unread is not None:
        raise UnsupportedError(
            f"no layer reads the {unread.kind} of {unread.name} one by one, which would tell what cutting them costs",
            f"let {steps[0].name} cut something else, such as what=feed_forward, or `ignore` the layers of these",
        )
    with writing(folder):
        folder.mkdir(exist_ok=True)
    # One look serves all: they differ in how much goes.
    seen = priced.look_at(offers[0], folder)
    made = [_Alternative(own, decide(config, own, seen).cuts) for config, own in zip(configs, offers, strict=True)]
    shutil.rmtree(folder)
    return made


__all__ = ["group_costs"]
