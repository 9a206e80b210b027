"""Groups of entries that go together, and numbers that are found to be one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcli.errors import UserError
from effcli.layers.coupling import Classes, Coupled, Cut, Member, entries_kept, shortened

GROUP = Coupled(
    "a",
    3,
    (
        Member("a.weight", 0, torch.tensor([0, 1, 2])),
        # Two entries behind each position, and two that belong to another group.
        Member("b.weight", 1, torch.tensor([-1, 0, 0, 1, 1, 2, 2, -1])),
    ),
)


def test_by_hand() -> None:
    kept = entries_kept([Cut(GROUP, torch.tensor([True, False, True]))])
    found = {key: {axis: entries.tolist() for axis, entries in axes.items()} for key, axes in kept.items()}
    assert found == {"a.weight": {0: [0, 2]}, "b.weight": {1: [0, 1, 2, 5, 6, 7]}}
    value = torch.arange(16).view(2, 8)
    assert shortened(value, kept["b.weight"]).tolist() == [[0, 1, 2, 5, 6, 7], [8, 9, 10, 13, 14, 15]]


def test_several_groups_shorten_one_axis() -> None:
    other = Coupled("c", 1, (Member("b.weight", 1, torch.tensor([0, -1, -1, -1, -1, -1, -1, -1])),))
    two = Coupled("d", 2, (Member("b.weight", 1, torch.tensor([0, -1, -1, -1, -1, -1, -1, 1])),))
    cuts = [Cut(GROUP, torch.tensor([False, True, True])), Cut(two, torch.tensor([True, False]))]
    assert entries_kept(cuts)["b.weight"][1].tolist() == [0, 3, 4, 5, 6]
    assert entries_kept([Cut(other, torch.tensor([True]))]) == {}


def test_sums_by_position() -> None:
    values = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6, 9], [9, 1, 1, 1, 1, 1, 1, 9]])
    assert GROUP.members[1].per_position(values, 3).tolist() == [5, 9, 13]


def test_refused() -> None:
    with pytest.raises(UserError, match="nothing would be left of a"):
        Cut(GROUP, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(UserError, match="cannot be cut: for this reason"):
        Cut(Coupled("b", 0, (), "for this reason"), torch.ones(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 positions"):
        Cut(GROUP, torch.ones(2, dtype=torch.bool))
    first, second = (Coupled(n, 2, (Member("x", 0, torch.tensor(at)),)) for n, at in (("p", [0, -1]), ("q", [-1, 0])))
    kept = torch.tensor([False, True])
    with pytest.raises(UserError, match="nothing would be left of x"):
        entries_kept([Cut(first, kept), Cut(second, kept)])


def test_fixed_classes_say_why() -> None:
    classes = Classes()
    numbers = classes.fresh(5)
    classes.join(numbers[:2], numbers[1:3])
    classes.fix(numbers[2:3], "the first")
    classes.fix(numbers[:1], "too late")
    classes.fix(numbers[4:], "the second")
    assert (classes.roots(numbers) == 0).tolist() == [True, True, True, False, True]
    assert [classes.reason(number.view(1)) for number in numbers] == ["the first"] * 3 + ["", "the second"]


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12))
def test_classes_are_those_of_a_plain_search(pairs: list[tuple[int, int]]) -> None:
    classes = Classes()
    numbers = classes.fresh(12)
    plain = [{k} for k in range(12)]
    for first, second in pairs:
        joined = plain[first] | plain[second]
        for k in joined:
            plain[k] = joined
    if pairs:
        left, right = torch.tensor(pairs).T
        classes.join(numbers[left], numbers[right])
    roots = classes.roots(numbers)
    assert all((roots[a] == roots[b]) == (b in plain[a]) for a in range(12) for b in range(12))
