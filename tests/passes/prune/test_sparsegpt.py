"""The `sparsegpt` pass: by hand, against the paper's loop in float64, and never worse than magnitude."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from related_inputs import matrix, related, seen
from torch import Tensor

from effcli.formats import Mask
from effcli.layers.contract import Layer, Needs
from effcli.layers.statistics import Statistics
from effcli.passes._feedback import factorize
from effcli.passes.prune import _sparsegpt
from effcli.passes.prune._sparsegpt import compensated
from effcli.passes.prune.magnitude import Magnitude
from effcli.passes.prune.sparsegpt import SparseGPT


def layer(weight: Tensor, mask: Mask | None = None) -> Layer:
    return Layer("layer", "linear", weight, torch.float32, mask=mask)


def left(config: Any, weight: Tensor, gram: Statistics) -> Tensor:
    outcome = config.apply(layer(weight), gram)
    found: Tensor = outcome.weight.masked_fill(~outcome.mask.kept, 0)
    return found


def error(weight: Tensor, made: Tensor, gram: Statistics) -> float:
    difference = made.double() - weight.double()
    return float(((difference @ gram.matrix.double()) * difference).sum())


def test_by_hand() -> None:
    """H = [[2, 1], [1, 2]] on each pair of channels: R_00² = 1.5 and R_11² = 2, and an error passes on its half.

    In the first row 1 goes at a cost of 1.5, not 2 at one of 8; 2 becomes 2.5. In the second 3 costs 13.5 and 1 costs
    2. The other pairs hold 4 and 5 of each row, which stay.
    """
    gram = torch.block_diag(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    weight = torch.tensor([[1.0, 2.0, 4.0, 5.0], [3.0, 1.0, 4.0, 5.0]])
    feedback = factorize(gram, 0.0, False, "layer")
    made, mask = compensated(SparseGPT(sparsity=0.25), layer(weight), feedback)
    assert mask.kept.tolist() == [[False, True, True, True], [True, False, True, True]]
    torch.testing.assert_close(made, torch.tensor([[0.0, 2.5, 4.0, 5.0], [3.0, 0.0, 4.0, 5.0]]))
    # Of each pair one stays: 4 goes, and 5 becomes 7.
    made, mask = compensated(SparseGPT(pattern="1:2"), layer(weight), feedback)
    torch.testing.assert_close(made, torch.tensor([[0.0, 2.5, 0.0, 7.0], [3.0, 0.0, 0.0, 7.0]]))


def papers(weight: Tensor, gram: Tensor, damping: float, share: float, pattern: tuple[int, int] | None) -> Tensor:
    """Algorithm 1 of the paper in float64: the inverse's Cholesky factor, errors through its rows."""
    hessian = gram.double().clone()
    hessian.diagonal().add_(damping * gram.double().diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    found, columns = weight.double().clone(), weight.shape[1]
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(columns):
        stretch = pattern[1] if pattern else 128
        if j % stretch == 0:
            part = slice(j, min(j + stretch, columns))
            costs = found[:, part].square() / inverse.diagonal()[part].square()
            if pattern:
                places = costs.topk(pattern[1] - pattern[0], dim=1, largest=False).indices
                gone[:, part] = torch.zeros_like(gone[:, part]).scatter(1, places, True)
            else:
                ends = [round(share * weight.shape[0] * end) for end in (part.start, part.stop)]
                places = costs.t().reshape(-1).topk(ends[1] - ends[0], largest=False).indices
                flat = torch.zeros(costs.numel(), dtype=torch.bool)
                flat[places] = True
                gone[:, part] = flat.view(costs.t().shape).t()
        pull = torch.where(gone[:, j], found[:, j], 0) / inverse[j, j]
        found[:, j:] -= pull.unsqueeze(1) * inverse[j, j:]
        found[:, j].masked_fill_(gone[:, j], 0)
    return found


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 8)])
@pytest.mark.parametrize(("rows", "columns", "share"), [(17, 40, 0.5), (5, 264, 0.7), (9, 136, 0.25)])
def test_is_the_papers(rows: int, columns: int, share: float, pattern: tuple[int, int] | None) -> None:
    """In natural order; of near ties of float32 a weight may be another, which moves the rest of its row."""
    weight, gram = matrix(rows, columns, 1), seen(related(600, columns, 2))
    options: dict[str, Any] = {"pattern": "{}:{}".format(*pattern)} if pattern else {"sparsity": share}
    made, mask = compensated(SparseGPT(**options), layer(weight), factorize(gram.matrix, 0.01, False, "layer"))
    expected = papers(weight, gram.matrix, 0.01, share, pattern)
    assert not made[~mask.kept].any()
    same = ((made.double() - expected).abs() < 1e-3 * (1 + expected.abs())).all(1)
    assert float(same.float().mean()) >= 0.8
    assert error(weight, made, gram) == pytest.approx(error(weight, expected, gram), rel=0.02)


@given(
    options=st.sampled_from([{"sparsity": 0.3}, {"sparsity": 0.5}, {"sparsity": 0.9}, {"pattern": "2:4"}]),
    rows=st.integers(1, 9),
    columns=st.sampled_from([4, 24, 136]),
    tokens=st.integers(1, 60),
    loudness=st.sampled_from([0.0, 1.0, 3.0]),
    damping=st.sampled_from([0.0, 0.01, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_never_worse_than_magnitude(
    options: dict[str, Any], rows: int, columns: int, tokens: int, loudness: float, damping: float, seed: int
) -> None:
    weight, gram = matrix(rows, columns, seed), seen(related(tokens, columns, seed, loudness))
    bound = error(weight, left(Magnitude(**options), weight, gram), gram)
    whole = error(weight, torch.zeros_like(weight), gram)
    assert error(weight, left(SparseGPT(**options, damping=damping), weight, gram), gram) <= bound + 1e-5 * whole


def test_it_pays_on_related_inputs() -> None:
    outcome = SparseGPT(sparsity=0.5).apply(layer(matrix(48, 64, 9)), seen(related(500, 64, 10)))
    assert outcome.notes["error_over_magnitude"] < 0.4 and outcome.notes["sparsity"] == 0.5


def test_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = matrix(6, 16, 1), seen(related(60, 16, 2))

    def misled(config: Any, own: Layer, feedback: Any) -> tuple[Tensor, Mask]:
        made, mask = compensated(config, own, feedback)
        return made * 9, mask

    monkeypatch.setattr(_sparsegpt, "compensated", misled)
    outcome = SparseGPT().apply(layer(weight), gram)
    assert outcome.weight is weight and outcome.notes["error_over_magnitude"] == 1
    assert outcome.mask is not None
    assert torch.equal(outcome.mask.kept, weight.abs() > weight.abs().flatten().kthvalue(48).values)


def test_layers_of_one_input_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counted(matrix: Tensor, damping: float, act_order: bool, name: str) -> Any:
        calls.append(damping)
        return factorize(matrix, damping, act_order, name)

    monkeypatch.setattr(_sparsegpt, "factorize", counted)
    gram = seen(related(60, 16, 11))
    for k in range(3):
        SparseGPT().apply(layer(matrix(4, 16, k)), gram)
    SparseGPT(damping=0.1).apply(layer(matrix(4, 16, 0)), gram)
    assert calls == [0.01, 0.1]


def test_what_was_removed_before_counts_in_every_stretch() -> None:
    """Of 4 x 256, 300 are gone in the first half; 212 more go, in the share that is free."""
    kept = torch.ones(4, 256, dtype=torch.bool)
    kept[:, :75] = False
    weight, gram = matrix(4, 256, 3) * kept, seen(related(400, 256, 4))
    outcome = SparseGPT(sparsity=0.5).apply(layer(weight, Mask(kept)), gram)
    assert outcome.mask is not None
    stays = outcome.mask.kept & kept
    assert int((~stays).sum()) == 512 and not stays[:, :75].any()
    assert int((~stays[:, 75:128]).sum()) == round(212 * 53 / 181)


def test_what_it_asks_for() -> None:
    assert SparseGPT().needs == Needs.GRAM
    with pytest.raises(ValueError, match="damping"):
        SparseGPT(damping=-1)


def test_channels_that_no_token_used_go_first() -> None:
    inputs = related(400, 64, 5)
    inputs[:, ::4] = 0
    weight, gram = matrix(16, 64, 6), seen(inputs)
    outcome = SparseGPT(sparsity=0.5).apply(layer(weight), gram)
    assert outcome.mask is not None and not bool(outcome.mask.kept[:, ::4].any())
