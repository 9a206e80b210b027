"""A pass that cuts, carried out: which groups it may cut, what it decides, and what the ledger says of it."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effcli.errors import SelectionError, UserError
from effcli.layers.contract import UNSEEN, CutPass, Members, Needs, Pass, Reader, Statistics
from effcli.layers.coupling import Coupled, Cut, Depth, Member, staying
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.returned import Asked
from effcli.layers.selection import Choice, matches
from effcli.layers.statistics import Gradients
from effcli.reports.report import LedgerRow


@dataclasses.dataclass(frozen=True)
class Offered:
    """The groups that a pass may cut. chosen: the options of each, by its name; remarks: which it may not, and why.

    sites: the layers by the parameter that holds them.
    """

    groups: tuple[Coupled, ...]
    chosen: Mapping[str, CutPass]
    sites: Mapping[str, Sequence[LayerSite]]
    remarks: tuple[str, ...]

    @property
    def needs(self) -> Needs:
        """What the options of all groups together ask for."""
        return functools.reduce(operator.or_, (config.needs for config in self.chosen.values()), Needs.NOTHING)

    def layers(self, group: Coupled) -> list[tuple[Member, LayerSite]]:
        """The layers whose rows, columns or matrices go with the positions of a group."""
        return _layers(group, self.sites)

    def maker(self, group: Coupled) -> LayerSite:
        """The layer whose options are those of a group."""
        return _maker(self.layers(group))

    def readers(self, group: Coupled) -> list[tuple[Member, LayerSite]]:
        """The layers whose columns go with the positions of a group."""
        return [(member, site) for member, site in self.layers(group) if member.axis == site.column_axis]


@dataclasses.dataclass(frozen=True)
class Decided:
    """What a pass cuts. remarks: which groups it could not cut, and why, and what it says of its cuts."""

    cuts: tuple[Cut, ...]
    remarks: tuple[str, ...]


# What was gathered of layers, by name; given the layers.
GradientsOf = Callable[[Sequence[LayerSite]], Mapping[str, Gradients]]
SeenOf = Callable[[Sequence[LayerSite]], Mapping[str, Sequence[Statistics]]]


def offer(name: str, options: CutPass, groups: Iterable[Coupled], choices: Mapping[str, Choice]) -> Offered:
    """The groups that the pass called `name` takes and whose layers are all taken.

    A group has the options of the first layer that makes its channels. Raises `UserError` where there is none, for
    options that these groups cannot keep, and for options under `layers` that no group has.
    """
    sites: dict[str, list[LayerSite]] = {}
    for choice in choices.values():
        sites.setdefault(choice.site.parameter, []).append(choice.site)
    offered: list[Coupled] = []
    chosen: dict[str, CutPass] = {}
    obstacles: dict[str, list[str]] = {}
    makers: list[str] = []
    for group in groups:
        layers = _layers(group, sites)
        config: Pass | None = options
        if layers:
            makers.append(_maker(layers).name)
            config = choices[makers[-1]].config
        reason = group.reason or _left_alone((site for _, site in layers), choices)
        taking = config if isinstance(config, CutPass) else options
        if isinstance(group, Depth) != options.depth or not taking.takes(group):
            continue
        if reason or not isinstance(config, CutPass):
            obstacles.setdefault(reason, []).append(group.name)
            continue
        if group.name in chosen:
            raise ValueError(f"two groups are called {group.name}")
        offered.append(group)
        chosen[group.name] = config
    remarks = [f"{_first_of(names)} cannot be cut: {reason}" for reason, names in obstacles.items()]
    if not offered:
        what = "blocks" if options.depth else "channels"
        raise UserError(f"{name} finds no {what} that can be cut", "; ".join(remarks) or "this network has none")
    for pattern in options.layers:
        if not any(matches(maker, pattern) for maker in makers):
            raise SelectionError(
                f"{name}.layers: {pattern!r} matches no layer that is the first to make channels that can be cut",
                f"a group has the options of that layer, such as {_maker(_layers(offered[0], sites)).name}",
            )
    options.check(offered, chosen)
    return Offered(tuple(offered), chosen, sites, tuple(remarks))


def look(
    offered: Offered,
    read: Callable[[str], Tensor],
    gradients: GradientsOf = lambda sites: {},
    statistics: SeenOf = lambda sites: {},
    biased: Callable[[LayerSite], bool] = lambda site: False,
    influence: Callable[[], Tensor] | None = None,
) -> Members:
    """What the options of the groups that a pass is offered ask for.

    read: a parameter by its state-dict key; gradients: of layers, statistics: of the inputs of each of their groups,
    where they are asked for; biased: whether a layer has a bias or may be given one; influence: of blocks.
    """
    groups, needs = offered.groups, offered.needs
    found: Mapping[str, Sequence[Statistics]] = {}
    if needs.statistics:
        found = statistics(_distinct(site for group in groups for _, site in offered.readers(group)))

    def readers(group: Coupled) -> list[Reader]:
        return [
            reader
            for member, site in offered.readers(group)
            for reader in _readers(site, member, read, found.get(site.name, ()), biased(site))
        ]

    seen = Members(lambda parameter: read(parameter).detach().float(), offered.chosen, readers=readers)
    if Needs.INFLUENCE in needs and influence is not None:
        seen = dataclasses.replace(seen, influence=influence())
    if needs.gradients:
        made = gradients(_distinct(site for group in groups for _, site in offered.layers(group)))
        first = next(iter(made.values()), None)
        samples = 0 if first is None else first.samples

        def placed(parameter: str) -> dict[Needs, Tensor]:
            return _placed(offered.sites.get(parameter, ()), made, read(parameter))

        seen = dataclasses.replace(seen, gradients=placed, samples=samples)
    return seen


def decide(options: CutPass, offered: Offered, seen: Members) -> Decided:
    """Let a pass say what stays of the groups that it is offered.

    seen: of these groups, with any options of theirs. Raises `PluginError` for a cut of a group that the pass was not
    given.
    """
    groups, remarks = offered.groups, list(offered.remarks)
    asked = Asked(options, "cut")
    made = options.cut(groups, dataclasses.replace(seen, chosen=offered.chosen))
    made_cuts = asked.expect(made, Sequence, "a list of `Cut`")
    cuts = tuple(one for one in made_cuts if asked.expect(one, Cut, "a list of `Cut`").changes)
    strange = next((one for one in cuts if not any(one.coupled is group for group in groups)), None)
    if strange is not None:
        asked.refuse(f"a cut of {strange.coupled.name}, which it was not given,", "cuts of the groups that it is given")
    remarks += [one.remark for one in cuts if one.remark]
    if not cuts:
        remarks.append("nothing is cut: every channel stays")
    changed = {one.coupled.name for one in cuts}
    whole = [group.name for group in groups if group.name not in changed]
    if cuts and whole:
        remarks.append(f"nothing is cut of {_first_of(whole)}")
    return Decided(cuts, tuple(remarks))


def _distinct(sites: Iterable[LayerSite]) -> list[LayerSite]:
    return list({site.name: site for site in sites}.values())


def _first_of(names: Sequence[str]) -> str:
    """The first of some groups, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _layers(group: Coupled, sites: Mapping[str, Sequence[LayerSite]]) -> list[tuple[Member, LayerSite]]:
    """The layers that hold members of a group; sites: by parameter."""
    return [(member, site) for member in group.members for site in sites.get(member.parameter, ())]


def _maker(layers: Sequence[tuple[Member, LayerSite]]) -> LayerSite:
    """The first layer that makes the channels of a group; of experts, which no layer makes, the first of all."""
    return next((site for member, site in layers if member.axis == site.row_axis), layers[0][1])


def _left_alone(layers: Iterable[LayerSite], choices: Mapping[str, Choice]) -> str:
    """Why a group with members in `layers` must stay; empty where all of them are taken."""
    kept = next((choices[site.name] for site in layers if choices[site.name].config is None), None)
    return "" if kept is None else f"{kept.site.name} is left alone ({kept.reason})"


def _readers(
    site: LayerSite, member: Member, read: Callable[[str], Tensor], seen: Sequence[Statistics], biased: bool
) -> list[Reader]:
    """The parts of one layer whose columns go with a group."""
    weight = site.view(read(site.parameter).detach()).float()
    position = columns_of(site, member.position)
    seen = seen or (UNSEEN,) * site.groups
    parts = zip(weight.chunk(site.groups), seen, strict=True)
    return [Reader(site.name, part, position, own, biased) for part, own in parts]


def columns_of(site: LayerSite, entries: Tensor) -> Tensor:
    """What stands behind each column of a layer: (in,), for one value of each entry along its parameter's axis."""
    return entries.repeat_interleave(site.columns // len(entries))


def _placed(sites: Sequence[LayerSite], gradients: Mapping[str, Gradients], parameter: Tensor) -> dict[Needs, Tensor]:
    """The gradients of the layers of one parameter, in its shape; of layers without any they are 0."""
    found: dict[Needs, Tensor] = {}
    for site in sites:
        for need, total in gradients[site.name].sums.items() if site.name in gradients else ():
            whole = found.setdefault(need, torch.zeros_like(parameter, dtype=torch.float32).contiguous())
            site.view(whole).copy_(total)
    return found


def rows(
    before: Iterable[LayerSite],
    after: Iterable[LayerSite],
    choices: Mapping[str, Choice],
    held: Callable[[LayerSite], Held],
    cuts: Iterable[Cut],
    restored: Iterable[LedgerRow] = (),
) -> list[LedgerRow]:
    """The ledger of the layers of a network that was cut; held: how a layer is stored now; cuts: what was removed.

    restored: the lines of layers that were fitted to what is left of their inputs. Notes number the outputs and the
    input channels that a layer lost, as they were.
    """
    fitted = {row.name: row for row in restored if row.status != "kept"}
    stay = staying(cuts)
    found = {site.name: site for site in after}
    made: list[LedgerRow] = []
    for old in before:
        new = found.get(old.name)
        if new is None:
            empty: Any = dataclasses.replace(old, rows=0, columns=0)
            made.append(Held("none", 0).row(empty, "removed", notes={"shape_before": list(old.shape)}))
        elif new.shape != old.shape:
            named = {
                what: spans((~stay[old.parameter, axis]).nonzero().flatten().tolist())
                for what, axis in (("outputs_removed", old.row_axis), ("inputs_removed", old.column_axis))
                if (old.parameter, axis) in stay
            }
            notes = {"shape_before": list(old.shape), **named}
            error = None
            if old.name in fitted:
                notes |= fitted[old.name].notes
                error = fitted[old.name].output_error
            made.append(held(new).row(new, "changed", output_error=error, notes=notes))
        else:
            made.append(held(new).row(new, "kept", reason=choices[old.name].reason or "none of its channels was cut"))
    return made


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as a person writes them: 0, 4-7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


__all__ = ["Decided", "GradientsOf", "Offered", "SeenOf", "columns_of", "decide", "look", "offer", "rows", "spans"]
