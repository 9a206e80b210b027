"""A pass that cuts, carried out: which groups it may cut, what it decides, and what the ledger says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effcli.errors import UserError
from effcli.layers.contract import CutPass, Members, Needs, Pass
from effcli.layers.coupling import Coupled, Cut
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.returned import Asked
from effcli.layers.selection import Choice
from effcli.layers.statistics import Gradients
from effcli.reports.report import LedgerRow


@dataclasses.dataclass(frozen=True)
class Decided:
    """What a pass cuts. remarks: which groups it could not cut, and why."""

    cuts: tuple[Cut, ...]
    remarks: tuple[str, ...]


def decide(
    name: str,
    options: CutPass,
    groups: Iterable[Coupled],
    choices: Mapping[str, Choice],
    read: Callable[[str], Tensor],
    gradients: Callable[[Sequence[LayerSite]], Mapping[str, Gradients]] = lambda sites: {},
) -> Decided:
    """Let the pass called `name` say what stays of the groups whose layers are all taken.

    read: a parameter by its state-dict key; gradients: of layers, by name, where the pass asks for them. Raises
    `UserError` where no group can be cut, and `PluginError` for a cut of a group that the pass was not given.
    """
    sites: dict[str, list[LayerSite]] = {}
    for choice in choices.values():
        sites.setdefault(choice.site.parameter, []).append(choice.site)
    offered: list[Coupled] = []
    chosen: dict[str, Pass] = {}
    obstacles: dict[str, list[str]] = {}
    for group in groups:
        layers = [site for member in group.members for site in sites.get(member.parameter, ())]
        config = choices[layers[0].name].config if layers else options
        reason = group.reason or _left_alone(layers, choices)
        if reason or config is None:
            obstacles.setdefault(reason, []).append(group.name)
            continue
        offered.append(group)
        chosen[group.name] = config
    remarks = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} cannot be cut: {reason}"
        for reason, names in obstacles.items()
    ]
    if not offered:
        raise UserError(f"{name} finds no channels that can be cut", "; ".join(remarks) or "the network has no layer")
    seen = Members(lambda parameter: read(parameter).detach().float(), chosen)
    if options.needs.gradients:
        wanted = dict.fromkeys(member.parameter for group in offered for member in group.members)
        made = gradients([site for parameter in wanted for site in sites.get(parameter, ())])
        first = next(iter(made.values()), None)
        samples = 0 if first is None else first.samples

        def placed(parameter: str) -> dict[Needs, Tensor]:
            return _placed(sites.get(parameter, ()), made, read(parameter))

        seen = dataclasses.replace(seen, gradients=placed, samples=samples)
    asked = Asked(options, "cut")
    made_cuts = asked.expect(options.cut(offered, seen), Sequence, "a list of `Cut`")
    cuts = tuple(one for one in made_cuts if asked.expect(one, Cut, "a list of `Cut`").changes)
    strange = next((one for one in cuts if not any(one.coupled is group for group in offered)), None)
    if strange is not None:
        asked.refuse(f"a cut of {strange.coupled.name}, which it was not given,", "cuts of the groups that it is given")
    if not cuts:
        remarks.append("nothing is cut: every channel stays")
    return Decided(cuts, tuple(remarks))


def _left_alone(layers: Sequence[LayerSite], choices: Mapping[str, Choice]) -> str:
    """Why a group with members in `layers` must stay; empty where all of them are taken."""
    kept = next((choices[site.name] for site in layers if choices[site.name].config is None), None)
    return "" if kept is None else f"{kept.site.name} is left alone ({kept.reason})"


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
) -> list[LedgerRow]:
    """The ledger of the layers of a network that was cut; held: how a layer is stored now."""
    found = {site.name: site for site in after}
    made: list[LedgerRow] = []
    for old in before:
        new = found.get(old.name)
        if new is None:
            empty: Any = dataclasses.replace(old, rows=0, columns=0)
            made.append(Held("none", 0).row(empty, "removed", notes={"shape_before": list(old.shape)}))
        elif new.shape != old.shape:
            made.append(held(new).row(new, "changed", notes={"shape_before": list(old.shape)}))
        else:
            made.append(held(new).row(new, "kept", reason=choices[old.name].reason or "none of its channels was cut"))
    return made


__all__ = ["Decided", "decide", "rows"]
