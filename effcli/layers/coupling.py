"""What must be cut together: the channels of a network and every entry of every parameter that goes with each of them.

A channel that leaves a network takes the rows of the layers that make it, their biases, the norms on its way and the
columns of the layers that read it. A group is described as in DepGraph (Fang et al. 2023, section 3) by pairs of a
dependency and indices; here a dependency is one axis of one parameter, and the indices say which position of the group
stands behind each of its entries. Concatenations, flattened channels, repeated heads and channel groups are then all
the same: one position may stand behind many entries of an axis, and several groups may share an axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from effcli.errors import UserError

# What a position of a group is.
GroupKind = Literal["channels", "heads", "feed_forward", "experts", "blocks"]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a parameter or buffer that follows a group.

    parameter: its state-dict key; position: int64 (size of the axis,), the position of the group behind each entry, -1
    for entries that the group leaves alone.
    """

    parameter: str
    axis: int
    position: Tensor

    def per_position(self, values: Tensor, count: int) -> Tensor:
        """Sums of values (the parameter's shape) over all that goes with each position: float32 (count,)."""
        along = values.float().movedim(self.axis, 0).reshape(len(self.position), -1).sum(1)
        position = self.position.to(values.device)
        taken = position >= 0
        return torch.zeros(count, device=values.device).index_add_(0, position[taken], along[taken])


@dataclass(frozen=True, eq=False)
class Coupled:
    """Channels of which each may be cut by itself: `count` positions, and what follows when one of them goes.

    name: the first layer that makes these channels; reason: why none can be cut, empty when they can be; kind: what a
    position is, in a network read as a graph a channel always.
    """

    name: str
    count: int
    members: tuple[Member, ...]
    reason: str = ""
    kind: GroupKind = field(default="channels", kw_only=True)

    @property
    def norms(self) -> list[Member]:
        """The scales of the batch norms that the channels pass."""
        names = {member.parameter for member in self.members}
        owners = ((member, member.parameter.rpartition(".")) for member in self.members)
        return [member for member, (owner, _, own) in owners if own == "weight" and f"{owner}.running_var" in names]


@dataclass(frozen=True, eq=False)
class Depth(Coupled):
    """The blocks of a language model, each of which may go as a whole.

    name: the path of the list that holds them; fixed: the blocks that must stay, and why.
    """

    fixed: Mapping[int, str] = field(default_factory=dict)
    kind: GroupKind = field(default="blocks", kw_only=True)


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of a group. kept: bool (coupled.count,).

    scores: what each position counted, (coupled.count,), for the report; None where nothing is told. remark: what the
    user should know of how it was decided.
    """

    coupled: Coupled
    kept: Tensor
    scores: Tensor | None = None
    remark: str = ""

    def __post_init__(self) -> None:
        """Raises `UserError` for channels that cannot be cut, and where nothing would be left."""
        name, count = self.coupled.name, self.coupled.count
        if self.coupled.reason:
            raise UserError(f"the channels of {name} cannot be cut: {self.coupled.reason}", "cut other layers")
        if self.kept.dtype != torch.bool or self.kept.shape != (count,):
            raise ValueError(f"{name} has {count} positions, and what to keep of them is {tuple(self.kept.shape)}")
        if not bool(self.kept.any()):
            raise UserError(f"nothing would be left of {name}", "keep one of its channels at least")

    @property
    def changes(self) -> bool:
        """Whether anything goes."""
        return not bool(self.kept.all())


# The entries that stay, int64, by the axis of a parameter.
Kept = Mapping[int, Tensor]


def staying(cuts: Iterable[Cut]) -> dict[tuple[str, int], Tensor]:
    """Whether each entry of an axis stays, bool (size of the axis,), by parameter and axis of the members of `cuts`."""
    stay: dict[tuple[str, int], Tensor] = {}
    for cut in cuts:
        if not cut.changes:
            continue
        for member in cut.coupled.members:
            mine = (member.position < 0) | cut.kept[member.position]
            key = member.parameter, member.axis
            stay[key] = stay[key] & mine if key in stay else mine
    return stay


def entries_kept(cuts: Iterable[Cut]) -> dict[str, dict[int, Tensor]]:
    """The entries that stay of every axis that the cuts shorten, by parameter and axis.

    Raises `UserError` where several cuts together leave nothing of an axis.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for (parameter, axis), mask in staying(cuts).items():
        if not bool(mask.any()):
            raise UserError(f"nothing would be left of {parameter}", "keep one of its channels at least")
        if not bool(mask.all()):
            found.setdefault(parameter, {})[axis] = mask.nonzero().flatten()
    return found


def shortened(value: Tensor, kept: Kept) -> Tensor:
    """The entries of `value` that stay along every axis in `kept`."""
    for axis, entries in kept.items():
        value = value.index_select(axis, entries.to(value.device))
    return value


class Classes:
    """Numbers that are found to be one and the same, and classes of them that are fixed for a reason (union-find).

    Number 0 is fixed from the start.
    """

    def __init__(self) -> None:
        self._root = torch.zeros(1, dtype=torch.int64)
        self._fixed: dict[int, str] = {0: ""}
        self._is_fixed: Tensor | None = None

    def fresh(self, count: int) -> Tensor:
        """New numbers, int64 (count,), each a class of its own."""
        made = torch.arange(count) + len(self._root)
        self._root = torch.cat([self._root, made])
        self._is_fixed = None
        return made

    def join(self, first: Tensor, second: Tensor) -> None:
        """Make first and second, int64 of shapes that broadcast, one and the same, number by number."""
        shape = (first + second).shape
        left, right = first.expand(shape).flatten(), second.expand(shape).flatten()
        while True:
            pairs = torch.stack([self._root[left], self._root[right]])
            pairs = torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1)
            if not pairs.numel():
                return
            left, right = pairs
            self._root.scatter_reduce_(0, pairs.amax(0), pairs.amin(0), "amin")
            while not torch.equal(self._root[self._root], self._root):
                self._root = self._root[self._root]
            self._is_fixed = None

    def fix(self, numbers: Tensor, reason: str) -> None:
        """Fix the classes of `numbers`, int64 of any shape, that are not fixed yet."""
        loose = numbers[self.roots(numbers) != 0]
        if loose.numel():
            mark = self.fresh(1)
            self._fixed[int(mark)] = reason
            self.join(loose, mark)
            self._is_fixed = None

    def roots(self, numbers: Tensor) -> Tensor:
        """One number for each class, 0 for all that are fixed."""
        if self._is_fixed is None:
            self._is_fixed = torch.zeros(len(self._root), dtype=torch.bool)
            self._is_fixed[self._root[list(self._fixed)]] = True
        found = self._root[numbers]
        return found.masked_fill(self._is_fixed[found], 0)

    def reason(self, numbers: Tensor) -> str:
        """Why the first of `numbers` that is fixed is so; empty when none is."""
        fixed = numbers[self.roots(numbers) == 0].flatten()
        root = self._root[fixed[:1]]
        return next((why for mark, why in self._fixed.items() if root.numel() and self._root[mark] == root), "")

    def copy(self) -> Classes:
        made = Classes()
        made._root, made._fixed = self._root.clone(), dict(self._fixed)
        return made


__all__ = ["Classes", "Coupled", "Cut", "Depth", "GroupKind", "Kept", "Member", "entries_kept", "shortened", "staying"]
