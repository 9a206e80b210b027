"""What tells how much channels matter, by hand and against what removing them does."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from effcli.errors import UnsupportedError
from effcli.layers.contract import Members, Needs, Reader, Statistics
from effcli.layers.coupling import Coupled, Member
from effcli.passes.prune import _importance
from effcli.passes.prune._importance import Elimination
from effcli.passes.prune.channels import Channels

NEEDS = Needs.GRAM | Needs.MEANS | Needs.NONZERO


def reader(weight: Tensor, inputs: Tensor, each: int = 1, biased: bool = False) -> Reader:
    """inputs: (in, tokens); each: columns behind a position."""
    seen = Statistics(len(inputs), NEEDS)
    seen.add(inputs.T.float())
    position = torch.arange(len(inputs) // each).repeat_interleave(each)
    return Reader("layer", weight.float(), position, seen, biased)


def members(readers: list[Reader], count: int, **options: Any) -> tuple[Coupled, Members]:
    group = Coupled("first", count, (Member("first.weight", 0, torch.arange(count)),))
    return group, Members(lambda name: torch.zeros(1), {"first": Channels(**options)}, readers=lambda group: readers)


def mixed(seed: int, columns: int = 6, rows: int = 4, tokens: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return weight, mix @ torch.randn(columns, tokens, generator=generator, dtype=torch.float64)


def test_zeros_by_hand() -> None:
    inputs = torch.tensor([[0.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    group, seen = members([reader(torch.ones(2, 3), inputs)], 3)
    assert _importance.apoz(group, seen).tolist() == [0.5, 0.75, 0.25]


def test_zeros_count_where_a_channel_is_read() -> None:
    """The second reader has no column for the last position."""
    inputs = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    part = reader(torch.ones(2, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    group, seen = members([reader(torch.ones(2, 3), inputs), part], 3)
    assert _importance.apoz(group, seen).tolist() == [0.25, 1.0, 0.5]


def test_statistics_of_batch_norms_are_no_weights() -> None:
    keys = ("first.weight", "norm.weight", "norm.running_mean", "norm.running_var")
    group = Coupled("first", 2, tuple(Member(key, 0, torch.arange(2)) for key in keys))
    values = dict(zip(keys, ([3.0, 1.0], [1.0, 1.0], [0.0, 50.0], [0.0, 90.0]), strict=True))
    seen = Members(lambda name: torch.tensor(values[name]))
    assert seen.sums(group).tolist() == [10.0, 2.0]


def test_batch_norms_are_averaged() -> None:
    """A group that passes more of them matters no more."""
    keys = ("a.weight", "a.running_var", "b.weight", "b.running_var")
    group = Coupled("first", 2, tuple(Member(key, 0, torch.arange(2)) for key in keys))
    assert _importance.batchnorm(group, Members(lambda name: torch.tensor([1.0, -3.0]))).tolist() == [1.0, 3.0]


def test_positions_that_are_read_unequally_often_are_refused() -> None:
    own = reader(torch.randn(3, 4), torch.randn(4, 20))
    for position in ([0, 0, 0, 0], [0, 0, 1, -1], [1, 1, 1, 1]):
        with pytest.raises(UnsupportedError, match="unequally often"):
            Elimination(dataclasses.replace(own, position=torch.tensor(position)), 2, False)


def test_zeros_of_several_columns_are_averaged() -> None:
    inputs = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    group, seen = members([reader(torch.ones(2, 4), inputs, each=2)], 2)
    assert _importance.apoz(group, seen).tolist() == [0.75, 0.25]


def test_activations_without_zeros_tell_nothing() -> None:
    group, seen = members([reader(torch.ones(2, 3), torch.ones(3, 4))], 3)
    with pytest.raises(UnsupportedError, match="all channels of first are 0 equally often"):
        _importance.apoz(group, seen)
    group, seen = members([Reader("layer", torch.ones(2, 3), torch.arange(3), Statistics(3, NEEDS))], 3)
    with pytest.raises(UnsupportedError, match="saw a calibration input"):
        _importance.apoz(group, seen)


def test_taylor_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    group = Coupled("first", 2, (Member("first.weight", 0, torch.arange(2)),))
    slopes = {Needs.GRADIENTS: torch.tensor([[2.0, -1.0], [0.5, -0.5]]), Needs.SQUARED_GRADIENTS: torch.ones(2, 2)}
    seen = Members(lambda name: weight, gradients=lambda name: slopes, samples=2)
    assert _importance.taylor(group, seen).tolist() == [0.0, 0.25]
    assert _importance.taylor_squared(group, seen).tolist() == [2.5, 12.5]


def test_lasso_drops_what_the_outputs_do_not_need() -> None:
    """Columns 1 and 3 are repeated by others and weigh little; 0 and 4 are what the outputs are made of."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 100, generator=generator, dtype=torch.float64)
    weight = torch.tensor([[3.0, 0.1, 0.5, 0.1, 0.0], [0.0, 0.1, 0.5, 0.1, 3.0]]).double()
    group, seen = members([reader(weight, inputs)], 5)
    scores = _importance.lasso(group, seen, 2)
    assert sorted(scores.topk(2).indices.tolist()) == [0, 4]
    assert sorted(_importance.lasso(group, seen, 3).topk(3).indices.tolist()) == [0, 2, 4]


def test_the_path_of_the_lasso_solves_the_lasso() -> None:
    """With orthogonal contributions β_p = max(0, 1 - λ / A_pp), so that positions fall out by their energy."""
    energies = torch.diag(torch.tensor([4.0, 1.0, 9.0, 0.25])).double()
    for width in (1, 2, 3):
        expected = energies.diagonal().topk(width).indices
        assert sorted(_importance.path(energies, width).topk(width).indices.tolist()) == sorted(expected.tolist())


def restored_error(weight: Tensor, inputs: Tensor, gone: list[int], centred: bool = False) -> float:
    """The least ‖W X - W' X_K‖² / n + λ‖W' - W_K‖² as `lstsq` finds it, with the damping of `Elimination`."""
    kept = [k for k in range(len(inputs)) if k not in gone]
    inputs = inputs - inputs.mean(1, keepdim=True) if centred else inputs
    tokens = inputs.shape[1]
    ridge = (_importance._DAMPING * inputs.square().sum(1).mean() / tokens) ** 0.5
    rows = torch.cat([inputs[kept].T / tokens**0.5, ridge * torch.eye(len(kept)).double()])
    wanted = torch.cat([(weight[:, gone] @ inputs[gone]).T / tokens**0.5, torch.zeros(len(kept), len(weight)).double()])
    change = torch.linalg.lstsq(rows, wanted).solution
    # What the columns that go would have been drawn to themselves counts as well.
    return float((rows @ change - wanted).square().sum() + ridge**2 * weight[:, gone].square().sum())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("each", [1, 2])
def test_what_removal_costs_is_what_least_squares_leave(each: int, centred: bool) -> None:
    weight, inputs = mixed(1)
    inputs = inputs + 2
    made = Elimination(reader(weight, inputs, each), 6 // each, centred)
    costs = made.costs() * made.energy
    for position in range(6 // each):
        gone = list(range(position * each, (position + 1) * each))
        assert float(costs[position]) == pytest.approx(restored_error(weight, inputs, gone, centred), rel=1e-3)
    made.remove(torch.tensor([1]))
    again = made.costs() * made.energy
    first = list(range(each, 2 * each))
    both = restored_error(weight, inputs, [*range(each), *first], centred)
    assert float(again[0]) == pytest.approx(both - restored_error(weight, inputs, first, centred), rel=1e-3, abs=1e-6)
    assert float(again[1]) == 0


def test_what_is_selected_is_close_to_the_best_of_all_subsets() -> None:
    for seed in range(5):
        weight, inputs = mixed(seed, columns=7)
        group, seen = members([reader(weight, inputs)], 7, restore=True)
        kept = _importance.reconstruction(group, seen, 4).topk(4).indices.tolist()
        found = restored_error(weight, inputs, [k for k in range(7) if k not in kept])
        every = sorted(restored_error(weight, inputs, list(gone)) for gone in combinations(range(7), 3))
        assert found <= every[len(every) // 4]


def test_the_order_of_removal_by_hand() -> None:
    """Column 2 repeats column 0 and goes first; of the others the quieter goes next."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    inputs[2] = inputs[0]
    weight = torch.tensor([[2.0, 0.3, 2.0]]).double()
    group, seen = members([reader(weight, inputs)], 3)
    first, second, _ = _importance.reconstruction(group, seen, 1).argsort().tolist()
    assert first in (0, 2) and second == 1


def plain_error(weight: Tensor, inputs: Tensor, gone: list[int]) -> float:
    """‖W_R X_R‖² as a share of ‖W X‖²: what removing columns costs where nothing makes up for them."""
    lost = weight[:, gone] @ inputs[gone]
    return float(lost.square().sum() / (weight @ inputs).square().sum())


def test_without_restoring_the_order_is_that_of_what_is_left() -> None:
    """Columns 0 and 2 repeat each other and are loud: restored, one of them goes first; left alone, 1 and 3 do."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 400, generator=generator, dtype=torch.float64)
    inputs[2] = inputs[0]
    weight = torch.tensor([[2.0, 0.3, 2.0, 0.5]]).double()
    group, restored = members([reader(weight, inputs)], 4)
    _, left = members([reader(weight, inputs)], 4, restore=False, criterion="reconstruction")
    assert _importance.reconstruction(group, restored, 3).argmin() in (0, 2)
    assert _importance.reconstruction(group, left, 1).argsort().tolist()[:2] == [1, 3]


@pytest.mark.parametrize("seed", range(5))
def test_without_restoring_each_removal_costs_what_the_outputs_then_miss(seed: int) -> None:
    weight, inputs = mixed(seed, columns=7)
    made = _importance.Omission(_importance._energies(reader(weight, inputs), 7))
    gone: list[int] = []
    for _ in range(6):
        wanted = [plain_error(weight, inputs, [*gone, k]) - plain_error(weight, inputs, gone) for k in range(7)]
        wanted = [0.0 if k in gone else cost for k, cost in enumerate(wanted)]
        assert_close(made.costs(), torch.tensor(wanted).double(), rtol=1e-3, atol=1e-5)
        gone.append(int(torch.tensor(wanted).masked_fill(made.gone, torch.inf).argmin()))
        made.remove(torch.tensor(gone[-1:]))
    group, seen = members([reader(weight, inputs)], 7, restore=False, criterion="reconstruction")
    scores = _importance.reconstruction(group, seen, 3)
    assert scores.argsort().tolist()[:4] == gone[:4] and sorted(scores.topk(3).indices.tolist()) == sorted(
        {*range(7)} - {*gone[:4]}
    )


def test_several_readers_are_weighed_by_their_outputs() -> None:
    """The second reader speaks a hundred times louder and needs column 1; both count alike."""
    inputs = torch.eye(3).repeat(1, 50).double()
    readers = [
        reader(torch.tensor([[5.0, 1.0, 0.0]]), inputs),
        reader(torch.tensor([[0.0, 100.0, 0.0]]), inputs),
    ]
    group, seen = members(readers, 3)
    assert _importance.reconstruction(group, seen, 2).argmin() == 2
    assert_close(sum(_importance._energies(own, 3).sum() for own in readers), torch.tensor(2.0).double())


def test_inputs_that_never_change_tell_nothing_and_break_nothing() -> None:
    made = Elimination(reader(torch.randn(5, 6), torch.full((6, 40), 0.3)), 6, True)
    assert bool(made.costs().isfinite().all())
    made.remove(torch.tensor([0, 3]))
    assert bool(made.costs().isfinite().all()) and bool(made.weight.isfinite().all())


def test_one_loud_channel_leaves_rounding_in_the_others() -> None:
    """Its float32 sums are off by more than the others' whole energy: more damping is taken."""
    inputs = torch.full((6, 40), 1e-3)
    inputs[0] = torch.linspace(-3e4, 3e4, 40)
    loud = reader(torch.randn(5, 6), inputs)
    loud.seen.matrix[1, 2] = loud.seen.matrix[2, 1] = 40 * 1e6
    made = Elimination(loud, 6, True)
    assert bool(made.costs().isfinite().all())
