"""The `gptq` pass: against the paper's own loop in float64, and what it promises whatever the options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from related_inputs import matrix, related, seen
from torch import Tensor

from effcli.errors import NumericsError
from effcli.formats import Affine, AffineWeight
from effcli.layers.contract import Group, Layer, Needs, Outcome, ScalingPass
from effcli.layers.statistics import Statistics
from effcli.passes._feedback import Feedback, factorize, row_errors
from effcli.passes.quantize import awq, gptq
from effcli.passes.quantize._affine import encode, extremes, parameters
from effcli.passes.quantize._gptq import Grid, fed_back, quantize, refine, weighted_range

PLAIN: dict[str, Any] = {"act_order": False, "range": "minmax", "scales": False, "sweeps": 0, "damping": 0.01}


def factor_of(configs: Any, group: Group, seen: Statistics) -> Any:
    """The factor for a group whose layers have these options, and the notes."""
    return configs[0].scale(dataclasses.replace(group, options=tuple(configs)), seen)


def applied(weight: Tensor, gram: Statistics, dtype: torch.dtype = torch.float32, **options: Any) -> Outcome:
    return gptq.GPTQ(**options).apply(Layer("layer", "linear", weight, dtype), gram)


def packed(outcome: Outcome) -> AffineWeight:
    assert isinstance(outcome.weight, AffineWeight)
    return outcome.weight


def errors(weight: Tensor, restored: Tensor, gram: Statistics) -> Tensor:
    """d G dᵀ of every row in float64."""
    difference = restored.double() - weight.double()
    return ((difference @ gram.matrix.double()) * difference).sum(1)


def papers_codes(weight: Tensor, gram: Tensor, order: Tensor, damping: float, format: Affine) -> Tensor:
    """Algorithm 1 of the paper with B = 1, in float64, through the inverse and its Cholesky factor; codes (out, in)."""
    scale, zero = (t.double() for t in parameters(*extremes(weight, format), format, torch.float32))
    size = format.group_size or weight.shape[1]
    hessian = gram.double()[order][:, order]
    hessian.diagonal().add_(damping * gram.double().diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = weight.double()[:, order]
    codes = torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(weight.shape[1]):
        group = int(order[j]) // size
        code = ((left[:, j] / scale[:, group]).round() + zero[:, group]).clamp(0, format.levels)
        error = (left[:, j] - (code - zero[:, group]) * scale[:, group]) / inverse[j, j]
        left[:, j:] -= error.unsqueeze(1) * inverse[j, j:]
        codes[:, order[j]] = code
    return codes.to(torch.uint8)


def test_a_case_worked_by_hand() -> None:
    """One bit, levels 0 and 1. H = [[2, 1], [1, 2]] = R Rᵀ with R = [[√1.5, 1/√2], [0, √2]], so R₁₂ / R₂₂ = 1/2.

    0.4 becomes 0 and passes on half of its error: 0.2, 0.29 and 0.35 are rounded as 0.4, 0.49 and 0.55.
    """
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = factorize(gram, 0.0, False, "layer")
    assert float(found.factors[0, 1]) == pytest.approx(0.5)
    torch.testing.assert_close(found.remaining, torch.tensor([1.5, 2.0]))
    grid = Grid(torch.ones(1, 3), torch.zeros(1, 3), 2, 1, torch.float32)
    weight = torch.tensor([[0.4, 0.4, 0.4], [0.2, 0.29, 0.35]])
    assert fed_back(weight, found, grid).tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize(("rows", "columns", "bits"), [(41, 40, 3), (5, 264, 4), (7, 136, 2)])
def test_the_codes_are_the_papers(rows: int, columns: int, bits: int, group_size: int | None, act_order: bool) -> None:
    """Through H = R Rᵀ and in blocks, against the inverse's factor and no blocks: equal but for ties of float32."""
    weight, gram = matrix(rows, columns, 1), seen(related(600, columns, 2))
    diagonal = gram.matrix.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    options = {**PLAIN, "act_order": act_order, "bits": bits, "group_size": group_size}
    made = packed(applied(weight, gram, **options))
    expected = papers_codes(weight, gram.matrix, order, 0.01, made.format)
    # A row in which rounding to nearest happened to be better does not follow the paper.
    nearest = encode(weight, *extremes(weight, made.format), made.format, torch.float32)
    follows = errors(weight, nearest.dequantize(), gram) > errors(weight, made.dequantize(), gram)
    assert float(follows.float().mean()) > 0.5
    assert float((made.codes != expected)[follows].float().mean()) < 0.002


def test_the_error_is_the_weighted_sum_of_what_remains() -> None:
    """tr(D H Dᵀ) = Σ_j R_jj² e_j², e_j = ŵ_j - (w_j + what was fed forward), in float64's own arithmetic."""
    weight, gram = matrix(9, 24, 3), seen(related(100, 24, 4)).matrix
    found = factorize(gram, 0.01, True, "layer")
    scale, zero = parameters(*extremes(weight, Affine(3, "group", 8)), Affine(3, "group", 8), torch.float32)
    grid = Grid(scale.t().contiguous(), zero.t().contiguous(), 8, 7, torch.float32)
    difference = (grid.values(fed_back(weight.t().contiguous(), found, grid)).t() - weight).double()
    hessian = gram.double()
    hessian.diagonal().add_(0.01 * gram.diagonal().mean().double())
    ordered = difference[:, found.order]
    local = ordered @ (found.factors.double().triu(1) + torch.eye(24))
    expected = ((difference @ hessian) * difference).sum()
    torch.testing.assert_close(
        (local.square() * found.remaining.double()[found.order]).sum(), expected, rtol=1e-4, atol=0
    )


RANGES = ["minmax", "least_squares", "gram", "remaining"]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([None, 4, 8]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    range=st.sampled_from(RANGES),
    sweeps=st.integers(0, 2),
    columns=st.sampled_from([8, 24, 136]),
    tokens=st.integers(1, 60),
    loudness=st.sampled_from([0.0, 1.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_no_row_is_worse_than_rounded_to_nearest(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    act_order: bool,
    range: str,
    sweeps: int,
    columns: int,
    tokens: int,
    loudness: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """On the same ranges, with any inputs: fewer tokens than channels, loud channels, few bits."""
    weight, gram = matrix(7, columns, seed), seen(related(tokens, columns, seed, loudness))
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "range": range}
    config = gptq.GPTQ(act_order=act_order, sweeps=sweeps, **options)
    layer = Layer("layer", "linear", weight, dtype)
    outcome = config.apply(layer, gram)
    found = factorize(gram.matrix, config.damping, act_order, "layer")
    low, high = gptq._range(config, layer, gram, found)
    nearest = encode(weight, low, high, config.format, dtype).dequantize(torch.float32)
    made, bound = errors(weight, packed(outcome).dequantize(torch.float32), gram), errors(weight, nearest, gram)
    whole = errors(weight, torch.zeros_like(weight), gram)
    assert bool((made <= bound + 1e-5 * whole).all())
    assert 0 <= outcome.notes["error_over_nearest"] <= 1
    again = packed(config.apply(layer, seen(related(tokens, columns, seed, loudness))))
    assert torch.equal(again.codes, packed(outcome).codes) and torch.equal(again.scale, packed(outcome).scale)


@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 8]),
    share=st.floats(0.1, 0.95),
    range=st.sampled_from(RANGES),
)
def test_what_is_zero_stays_zero(
    seed: int, bits: int, symmetric: bool, group_size: int | None, share: float, range: str
) -> None:
    """Pruned weights, whole groups of them included, whatever the columns beside them pass on."""
    weight = matrix(9, 40, seed)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < share
    pruned[0], pruned[1, :8] = True, True
    weight[pruned] = 0
    gram = seen(related(80, 40, seed))
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "group_size": group_size, "range": range}
    restored = packed(applied(weight, gram, **options)).dequantize()
    assert bool((restored[pruned] == 0).all())


def test_the_others_make_up_for_pruned_ones() -> None:
    """Feedback still pays on a weight half of which is zero."""
    weight, gram = matrix(32, 64, 5), seen(related(500, 64, 6))
    weight[:, ::2] = 0
    outcome = applied(weight, gram, bits=3, group_size=16)
    assert outcome.notes["error_over_nearest"] < 0.7


@given(seed=st.integers(0, 2**32), bits=st.sampled_from([2, 3, 4]), group_size=st.sampled_from([8, 40]))
def test_every_sweep_lowers_every_row(seed: int, bits: int, group_size: int) -> None:
    weight, gram = matrix(9, 40, seed), seen(related(80, 40, seed)).matrix
    format = Affine(bits, "group", group_size)
    scale, zero = parameters(*extremes(weight, format), format, torch.bfloat16)
    grid = Grid(scale.t().contiguous(), zero.t().contiguous(), group_size, format.levels, torch.bfloat16)
    transposed = weight.t().contiguous()
    codes = grid.nearest(transposed)
    before = row_errors(grid.values(codes) - transposed, gram)
    whole = row_errors(transposed, gram)
    for _ in range(3):
        refine(transposed, gram, 0.0, codes, grid)
        after = row_errors(grid.values(codes) - transposed, gram)
        assert bool((after <= before + 1e-5 * whole).all())
        before = after
    assert bool((grid.scale > 0).all())
    torch.testing.assert_close(grid.scale, grid.scale.bfloat16().float(), rtol=0, atol=0)
    assert bool((codes == codes.round()).all()) and 0 <= float(codes.min()) <= float(codes.max()) <= format.levels


def test_a_sweep_finds_the_best_code_of_every_column() -> None:
    """After sweeps that change nothing more, no other code of any single weight lowers the error: tried one by one."""
    weight, gram = matrix(3, 12, 7), seen(related(50, 12, 8))
    scale, zero = parameters(*extremes(weight, Affine(2, "group", 6)), Affine(2, "group", 6), torch.float32)
    grid = Grid(scale.t().contiguous(), zero.t().contiguous(), 6, 3, torch.float32)
    transposed = weight.t().contiguous()
    codes = grid.nearest(transposed)
    for _ in range(30):
        refine(transposed, gram.matrix, 0.0, codes, grid)
    reached = errors(weight, grid.values(codes).t(), gram)
    for column in range(12):
        for code in range(4):
            other = codes.clone()
            other[column] = code
            assert bool((errors(weight, grid.values(other).t(), gram) >= reached * (1 - 1e-4)).all())


def test_the_best_scale_by_hand() -> None:
    """Codes 1 and 2 for the weights 1.2 and 2.4, uncorrelated inputs: the scale 1 becomes 1.2 and the error zero."""
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 2, 3, torch.float32)
    codes = torch.tensor([[1.0], [2.0]])
    refine(torch.tensor([[1.2], [2.4]]), torch.eye(2), 0.5, codes, grid)
    torch.testing.assert_close(grid.scale, torch.tensor([[1.2]]))
    assert codes.tolist() == [[1], [2]]


@pytest.mark.parametrize("bits", [3, 4])
def test_it_pays_on_related_inputs(bits: int) -> None:
    weight, inputs = matrix(48, 64, 9), related(500, 64, 10)
    plain = applied(weight, seen(inputs), bits=bits, group_size=32, **PLAIN).notes["error_over_nearest"]
    refined = applied(weight, seen(inputs), bits=bits, group_size=32, **{**PLAIN, "sweeps": 3})
    assert plain < 0.6
    assert refined.notes["error_over_nearest"] < plain


def test_the_range_of_what_remains_pays_with_few_levels() -> None:
    weight, gram = matrix(48, 64, 9), seen(related(500, 64, 10))
    full, shrunk = (
        float(errors(weight, packed(applied(weight, gram, bits=2, group_size=32, **options)).dequantize(), gram).sum())
        for options in ({**PLAIN}, {**PLAIN, "range": "remaining"})
    )
    assert shrunk < 0.9 * full


@given(seed=st.integers(0, 2**32), group_size=st.sampled_from([None, 8]), symmetric=st.booleans())
def test_a_weighted_range_is_the_best_of_those_tried(seed: int, group_size: int | None, symmetric: bool) -> None:
    """Against all factors one by one, in float64, each group on its own."""
    weight = matrix(5, 24, seed)
    importance = torch.rand(24, generator=torch.Generator().manual_seed(seed)) + 0.01
    format = Affine(3, "group" if group_size else "channel", group_size or 0, symmetric)
    shrinks = (1.0, 0.8, 0.6)

    def group_errors(low: Tensor, high: Tensor) -> Tensor:
        restored = encode(weight, low, high, format, torch.float32).dequantize().double()
        return format.grouped((restored - weight).square() * importance).sum(-1)

    found = group_errors(*weighted_range(weight, importance, format, torch.float32, shrinks))
    low, high = extremes(weight, format)
    tried = torch.stack([group_errors(low * shrink, high * shrink) for shrink in shrinks])
    torch.testing.assert_close(found, tried.amin(0), rtol=1e-5, atol=1e-9)


def test_layers_of_one_input_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Cholesky for as many layers as read the input, another for another damping."""
    calls: list[float] = []

    def counted(matrix: Tensor, damping: float, act_order: bool, name: str) -> Feedback:
        calls.append(damping)
        return factorize(matrix, damping, act_order, name)

    monkeypatch.setattr(gptq, "factorize", counted)
    gram = seen(related(60, 16, 11))
    for k in range(3):
        applied(matrix(4, 16, k), gram, group_size=8)
    assert calls == [0.1]
    applied(matrix(4, 16, 0), gram, group_size=8, damping=0.01)
    assert calls == [0.1, 0.01]


def test_damping_is_raised_and_told() -> None:
    """Two equal channels and no damping: the matrix is singular, and exactly so where the factor begins."""
    inputs = related(64, 16, 12)
    for first, second in ((0, 1), (15, 14)):
        # Of sum of squares 64: its root is exact, so that no rounding of a processor leaves a positive pivot.
        inputs[:, first] = inputs[:, first].sign()
        inputs[:, second] = inputs[:, first]
    told = applied(matrix(4, 16, 0), seen(inputs * 1e3), group_size=8, damping=0.0).notes
    assert told["damping_raised_from"] == 0
    assert 0 < told["damping"] <= 1e-3
    assert "damping_raised_from" not in applied(matrix(4, 16, 0), seen(inputs), group_size=8).notes


def test_a_matrix_without_a_factor_is_refused() -> None:
    """Not positive definite with any damping, which no sum of squares is: the error names the layer."""
    broken = Statistics.of(torch.full((8, 8), torch.nan), torch.ones(8), 5)
    with pytest.raises(NumericsError, match="layer"):
        applied(matrix(4, 8, 0), broken, group_size=8)
    negative = Statistics.of(torch.eye(8) - 3, torch.ones(8), 5)
    with pytest.raises(NumericsError):
        applied(matrix(4, 8, 0), negative, group_size=8)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_dead_channel_gets_its_nearest_codes(act_order: bool) -> None:
    """And moves no other column: those become what they would be without it."""
    inputs = related(60, 16, 13)
    inputs[:, 5] = 0
    weight = matrix(6, 16, 14)
    made = packed(applied(weight, seen(inputs), group_size=8, bits=3, **{**PLAIN, "act_order": act_order}))
    nearest = encode(weight, *extremes(weight, made.format), made.format, torch.float32)
    assert torch.equal(made.codes[:, 5], nearest.codes[:, 5])
    silent = applied(weight, seen(torch.zeros(4, 16)), group_size=8, bits=3, **PLAIN)
    assert torch.equal(packed(silent).codes, nearest.codes)
    assert silent.notes["error_over_nearest"] == 1


def test_without_tokens_it_rounds_and_says_so() -> None:
    weight = matrix(4, 16, 0)
    outcome = applied(weight, Statistics(16), bits=3, group_size=8)
    made = packed(outcome)
    assert torch.equal(made.codes, encode(weight, *extremes(weight, made.format), made.format, torch.float32).codes)
    assert "no calibration token" in outcome.notes["rounded"]


def test_a_tall_weight_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not depend on each other."""
    weight, gram = matrix(41, 16, 15), seen(related(60, 16, 16))
    whole = packed(applied(weight, gram, group_size=8))
    monkeypatch.setattr("effcli.passes.quantize._gptq._ROWS", 7)
    parts = packed(applied(weight, gram, group_size=8))
    assert float((parts.codes != whole.codes).float().mean()) < 0.01


def test_a_weight_without_rows() -> None:
    made = packed(applied(torch.empty(0, 16), seen(related(20, 16, 17)), group_size=8))
    assert made.shape == (0, 16)


def group(*weights: Tensor) -> Group:
    return Group(tuple(Layer(f"layer{k}", "linear", weight, torch.float32) for k, weight in enumerate(weights)), ())


def test_the_scale_is_that_of_awq() -> None:
    weights, gram = [matrix(8, 32, k) for k in range(2)], seen(related(200, 32, 18, 2.0))
    on, off = gptq.GPTQ(bits=3, group_size=16), gptq.GPTQ(bits=3, group_size=16, scales=False)
    expected, notes = factor_of((awq.AWQ(bits=3, group_size=16),) * 2, group(*weights), gram)
    found, told = factor_of((on, on), group(*weights), gram)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert told == notes and told["alpha"] > 0
    for configs, said in (((off, off), {}), ((on, off), {"unscaled": "a layer with the same input has scales off"})):
        found, told = factor_of(configs, group(*weights), gram)
        assert torch.equal(found, torch.ones(32))
        assert told == said


@given(seed=st.integers(0, 2**32), bits=st.sampled_from([3, 4]))
def test_in_one_step_or_in_two(seed: int, bits: int) -> None:
    """`awq` without rounding folds the scales in; `gptq` without scales then sees scaled weights and scaled inputs."""
    weight, inputs = matrix(16, 32, seed), related(200, 32, seed, 2.0)
    options: dict[str, Any] = {"bits": bits, "group_size": 16}
    factor, _ = factor_of((gptq.GPTQ(**options),), group(weight), seen(inputs))
    one = packed(applied(weight * factor, seen(inputs).rescaled(factor), **options))
    dense = awq.AWQ(round=False, **options).apply(group(weight * factor).layers[0], seen(inputs)).weight
    assert isinstance(dense, Tensor)
    two = packed(applied(dense, seen(inputs / factor), scales=False, **options))
    # A tie that falls the other way moves the rest of its row.
    same = (one.codes == two.codes).all(1)
    assert float(same.float().mean()) >= 0.75
    scaled = seen(inputs / factor)
    whole = [float(errors(dense, made.dequantize(), scaled).sum()) for made in (one, two)]
    assert whole[0] == pytest.approx(whole[1], rel=0.02)


@pytest.mark.parametrize(
    "options", [{"bits": 7}, {"group_size": 0}, {"damping": -0.1}, {"sweeps": -1}, {"order": True}]
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        gptq.GPTQ(**options)


def test_what_the_pass_asks_for() -> None:
    assert isinstance(gptq.GPTQ(), ScalingPass) and gptq.GPTQ().needs == Needs.GRAM
    assert gptq.GPTQ().format == Affine(4, "group", 64, False)
    assert gptq.GPTQ().for_graph().format == Affine(4, "channel")


def test_quantize_counts_rows_it_rounds_to_nearest() -> None:
    """Feedback that only misleads: the nearest codes are the better ones in every row, and are kept."""
    weight, gram = matrix(6, 16, 19), torch.eye(16)
    found = factorize(gram, 0.01, False, "layer")
    misled = Feedback(found.order, torch.full((16, 16), 0.9), found.remaining, found.damping)
    format = Affine(3, "channel")
    scale, zero = parameters(*extremes(weight, format), format, torch.float32)
    made = quantize(weight, gram, misled, scale, zero, format, torch.float32, 0)
    assert (made.kept, made.ratio) == (6, 1.0)
    assert torch.equal(made.codes, encode(weight, *extremes(weight, format), format, torch.float32).codes)
