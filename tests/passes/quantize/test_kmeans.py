"""The `kmeans` pass: by hand, against exact clustering by dynamic programming, and what it promises of its error."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import small_graphs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from effcli.errors import NumericsError, SelectionError
from effcli.formats import Codebook, CodebookWeight, Strategy, unpack
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.layers.contract import UNSEEN, Layer, LayerPass, Needs, Statistics
from effcli.passes.quantize import kmeans, linear
from effcli.passes.quantize._kmeans import Start, assign, cluster
from effcli.run.recipe import PassStep

STARTS = get_args(Start)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(
    weight: Tensor, dtype: torch.dtype = torch.float32, seen: Statistics = UNSEEN, **options: Any
) -> CodebookWeight:
    outcome = kmeans.KMeans(**options).apply(Layer("layer", "linear", weight, dtype), seen)
    assert isinstance(outcome.weight, CodebookWeight)
    return outcome.weight


def group_of(shape: tuple[int, int], granularity: Strategy) -> int | None:
    """A group size that divides the rows, where one is to be given."""
    return (1 if shape[1] % 4 else 4) if granularity == "group" else None


def random(rows: int, columns: int, seed: int = 0, tail: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).abs() ** tail
    )


def observed(columns: int, seed: int = 0) -> Statistics:
    """Correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    gram = Statistics(columns)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) * 2
    gram.add(torch.randn(4 * columns, columns, generator=generator) @ mixing)
    return gram


def best_error(values: Tensor, entries: int) -> float:
    """The least squared error of so many entries: dynamic programming over the sorted numbers, in float64."""
    numbers = sorted(values.double().flatten().tolist())
    count = len(numbers)

    def cost(start: int, end: int) -> float:
        part = numbers[start:end]
        mean = math.fsum(part) / len(part)
        return math.fsum((number - mean) ** 2 for number in part)

    costs = {(start, end): cost(start, end) for start in range(count) for end in range(start + 1, count + 1)}
    least = [0.0] + [math.inf] * count
    for _ in range(entries):
        least = [
            min([least[end], *(least[start] + costs[start, end] for start in range(end))]) for end in range(count + 1)
        ]
    return least[count]


@pytest.mark.parametrize("init", STARTS)
def test_by_hand(init: Start) -> None:
    """Three clusters and one number alone: the entries are the means."""
    weight = torch.tensor([[-3.0, -2.0, 0.5, 10.0], [-2.5, 0.75, 4.0, 10.0]])
    made = quantized(weight, bits=2, granularity="tensor", init=init, keep_zeros=False)
    assert made.table.tolist() == [[-2.5, 0.625, 4.0, 10.0]]
    assert made.codes.tolist() == [[0, 0, 1, 3], [0, 1, 2, 3]]
    assert made.format == Codebook("kmeans", 2, "tensor", huffman=True, dtype=torch.float32)


def test_weights_of_large_inputs_count_more() -> None:
    """One entry for 0 and 1, whose inputs have the mean squares 3 and 1: 0.25 in place of 0.5."""
    gram = Statistics(4)
    gram.add(torch.tensor([[3.0, 1.0, 2.0, 2.0]]).sqrt())
    weight = torch.tensor([[-1.0, 0.0, 50.0, 50.0]]) + 1
    made = quantized(weight, seen=gram, bits=1, weighted=True, keep_zeros=False)
    torch.testing.assert_close(made.table, torch.tensor([[0.25, 51.0]]))
    plain = quantized(weight, seen=gram, bits=1, keep_zeros=False)
    assert plain.table.tolist() == [[0.5, 51.0]]


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 2), init=st.sampled_from(STARTS), tail=st.integers(0, 2))
def test_every_entry_is_the_mean_of_the_weights_nearest_to_it(seed: int, bits: int, init: Start, tail: int) -> None:
    """Where Lloyd's ends; never below the optimum."""
    values = random(1, 14, seed, tail)
    table = cluster(values, None, bits, torch.float32, start=init, draws=draws(1, bits), zeros=False)
    codes = assign(values, table)[0].long()
    assert error_of(values, table) >= best_error(values, 1 << bits) * (1 - 1e-6)
    torch.testing.assert_close((values[0].unsqueeze(1) - table[0]).abs().argmin(1), codes)
    for code in codes.unique():
        torch.testing.assert_close(
            table[0, code], values[0][codes == code].double().mean().float(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("tail", [0, 1])
def test_the_default_start_ends_close_to_the_best_clusters(tail: int) -> None:
    values = [random(1, 14, seed, tail) for seed in range(40)]
    tables = [cluster(numbers, None, 2, torch.float32) for numbers in values]
    best = [best_error(numbers, 4) for numbers in values]
    found = [error_of(numbers, table) for numbers, table in zip(values, tables, strict=True)]
    assert sum(found) < 1.35 * sum(best)


def error_of(values: Tensor, table: Tensor) -> float:
    return float((table.double().gather(1, assign(values, table).long()) - values.double()).square().sum())


def draws(tables: int, bits: int) -> Tensor:
    return torch.rand(tables, 1 << bits, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("init", STARTS)
def test_many_weights_lead_to_the_best_table_for_a_normal_distribution(init: Start) -> None:
    """Lloyd-Max at 2 and 3 bits: 0.1175 and 0.03454 (Max, Quantizing for minimum distortion, 1960, table I)."""
    values = random(1, 1 << 17)
    for bits, known in ((2, 0.1175), (3, 0.03454)):
        made = quantized(values, bits=bits, granularity="tensor", init=init)
        assert float((made.dequantize() - values).square().mean()) == pytest.approx(known, rel=0.02)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    init=st.sampled_from(STARTS),
    symmetric=st.booleans(),
    tail=st.sampled_from([0, 1, 3]),
    pruned=st.booleans(),
    shift=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**32),
)
def test_error_is_never_above_that_of_linear(
    bits: Any, granularity: Strategy, init: Start, symmetric: bool, tail: int, pruned: bool, shift: float, seed: int
) -> None:
    weight = random(6, 24, seed, tail) + shift
    if pruned:
        weight = weight * (weight.abs() > weight.abs().median())
    size = 8 if granularity == "group" else None
    made = quantized(weight, bits=bits, granularity=granularity, group_size=size, init=init)
    options = linear.Linear(bits=bits, granularity=granularity, group_size=size, symmetric=symmetric)
    other = options.apply(Layer("layer", "linear", weight, torch.float32)).weight
    assert not isinstance(other, Tensor)
    errors = [float((found.dequantize().double() - weight).square().sum()) for found in (made, other)]
    assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-12 * float(weight.square().sum())


@given(
    seed=st.integers(0, 2**32),
    bits=st.integers(1, 8),
    init=st.sampled_from(STARTS),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    sparsity=st.sampled_from([0.05, 0.5, 0.95]),
    dtype=st.sampled_from(DTYPES),
    refit=st.integers(0, 2),
)
def test_pruned_weights_stay_pruned(
    seed: int, bits: int, init: Start, granularity: Strategy, sparsity: float, dtype: torch.dtype, refit: int
) -> None:
    weight = random(6, 24, seed)
    weight = (weight * (weight.abs() > weight.abs().flatten().quantile(sparsity))).to(dtype).float()
    size = 12 if granularity == "group" else None
    gram = observed(24)
    made = quantized(weight, dtype, gram, bits=bits, granularity=granularity, group_size=size, init=init, refit=refit)
    assert bool((made.dequantize()[weight == 0] == 0).all())
    assert bool((made.table.diff(dim=1) >= 0).all())


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    init=st.sampled_from(STARTS),
    granularity=st.sampled_from(["tensor", "channel"]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**32),
)
def test_no_more_different_weights_than_entries_is_exact(
    bits: int, rows: int, columns: int, init: Start, granularity: Strategy, dtype: torch.dtype, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.randn(1 << bits, generator=generator) * scale).to(dtype).float()
    weight = levels[torch.randint(1 << bits, (rows, columns), generator=generator)]
    made = quantized(weight, dtype, bits=bits, granularity=granularity, init=init)
    assert torch.equal(made.dequantize(torch.float32), weight)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (1, 4), (41, 72), (3, 4)])
def test_odd_shapes_come_back_from_a_file(shape: tuple[int, int], granularity: Strategy, init: Start) -> None:
    weight = random(*shape)
    for huffman in (False, True):
        made = quantized(
            weight,
            torch.bfloat16,
            bits=3,
            granularity=granularity,
            group_size=group_of(shape, granularity),
            init=init,
            huffman=huffman,
        )
        again = unpack(made.format, made.pack())
        assert made.codes.shape == shape and made.table.isfinite().all()
        torch.testing.assert_close(again.dequantize(), made.dequantize(), rtol=0, atol=0)
        assert again.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("value", [0.0, -0.25, 3.0])
@pytest.mark.parametrize("init", STARTS)
def test_equal_weights(value: float, init: Start) -> None:
    made = quantized(torch.full((3, 5), value), bits=4, init=init)
    assert bool((made.dequantize() == value).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_weights(dtype: torch.dtype) -> None:
    """The largest and the smallest numbers of a dtype beside each other."""
    info = torch.finfo(dtype)
    weight = torch.tensor([[info.max, -info.max, info.tiny, 0.0, 1.0, -1.0, info.max / 2, 7.0]])
    assert torch.equal(quantized(weight, dtype, bits=3).dequantize(torch.float32), weight)
    assert quantized(weight, dtype, bits=2).dequantize(torch.float32).isfinite().all()


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), init=st.sampled_from(STARTS), granularity=st.sampled_from(["tensor", "channel"]))
def test_the_same_weights_give_the_same_file(seed: int, init: Start, granularity: Strategy) -> None:
    weight, gram = random(8, 32, seed), observed(32)
    options: dict[str, Any] = {"bits": 3, "init": init, "granularity": granularity, "weighted": True, "refit": 1}
    packed = [quantized(weight, seen=gram, **options).pack() for _ in range(2)]
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(packed[0][key], packed[1][key]) for key in packed[0])


def test_tables_do_not_depend_on_each_other() -> None:
    """What a channel becomes is what it becomes alone, however fast the others settle."""
    weight = random(30, 100)
    weight[::3] = weight[::3].round()
    together = quantized(weight, bits=4)
    for row in range(len(weight)):
        alone = quantized(weight[row : row + 1], bits=4)
        torch.testing.assert_close(together.dequantize()[row], alone.dequantize()[0], rtol=0, atol=0)


def test_more_bits_err_less() -> None:
    weight = random(41, 72)
    errors = [float((quantized(weight, bits=bits).dequantize() - weight).square().sum()) for bits in range(1, 9)]
    assert all(after <= before / 1.5 for before, after in pairwise(errors))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(1, 4),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    rounds=st.integers(1, 3),
)
def test_refitting_never_raises_the_error_of_the_outputs(
    seed: int, bits: int, granularity: Strategy, rounds: int
) -> None:
    weight, gram = random(10, 24, seed), observed(24, seed)
    options: dict[str, Any] = {"bits": bits, "granularity": granularity}
    options["group_size"] = 8 if granularity == "group" else None
    plain, refitted = quantized(weight, seen=gram, **options), quantized(weight, seen=gram, refit=rounds, **options)
    energies = [output_error(found, weight, gram) for found in (plain, refitted)]
    assert energies[1].sum() <= energies[0].sum() * (1 + 1e-6)
    if granularity != "tensor":
        assert bool((energies[1] <= energies[0] * (1 + 1e-6)).all())


def output_error(made: CodebookWeight, weight: Tensor, gram: Statistics) -> Tensor:
    """(ŵ - w) G (ŵ - w)ᵀ of each row, float64 (out,)."""
    difference = made.dequantize(torch.float64) - weight.double()
    return (difference @ gram.matrix.double() * difference).sum(1)


def test_a_refitted_table_is_the_least_squares_solution() -> None:
    """With codes in place the entries solve the normal equations MᵀGM t = MᵀG w of each row, M one-hot."""
    weight, gram = random(5, 32), observed(32)
    made = quantized(weight, seen=gram, bits=1, refit=20)
    matrix = gram.matrix.double()
    for row in range(5):
        chosen = torch.nn.functional.one_hot(made.codes[row].long(), 2).double()
        solved = torch.linalg.solve(chosen.T @ matrix @ chosen, chosen.T @ matrix @ weight[row].double())
        torch.testing.assert_close(made.table[row].double(), solved, rtol=1e-3, atol=1e-4)


def test_refitting_pays() -> None:
    weight, gram = random(32, 96), observed(96)
    plain, refitted = quantized(weight, seen=gram, bits=3), quantized(weight, seen=gram, bits=3, refit=3)
    assert output_error(refitted, weight, gram).sum() < 0.5 * output_error(plain, weight, gram).sum()


def test_weighted_clusters_err_less_where_inputs_are_large() -> None:
    weight, gram = random(32, 96), observed(96)
    squares = gram.matrix.diagonal()
    plain, weighted = quantized(weight, seen=gram, bits=3), quantized(weight, seen=gram, bits=3, weighted=True)
    errors = [float(((found.dequantize() - weight).square() * squares).sum()) for found in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


def test_inputs_that_are_never_there() -> None:
    """Channels without inputs and layers without tokens lead to tables of finite numbers."""
    gram = Statistics(8)
    weight = random(4, 8)
    unseen = quantized(weight, seen=gram, bits=2, weighted=True, refit=1)
    assert torch.equal(unseen.dequantize(), quantized(weight, bits=2).dequantize())
    gram.add(torch.eye(8)[:4])
    assert quantized(weight, seen=gram, bits=2, weighted=True, refit=2).dequantize().isfinite().all()


def test_groups_of_a_convolution_share_one_table() -> None:
    weight = random(6, 9)
    grams = [observed(9, seed) for seed in range(3)]
    layer = Layer("layer", "conv", weight, torch.float32)
    options = kmeans.KMeans(bits=2, granularity="tensor", weighted=True, refit=2)
    made = options.apply_groups(layer, grams).weight
    plain = kmeans.KMeans(bits=2, granularity="tensor").apply(layer).weight
    assert isinstance(made, CodebookWeight) and made.table.shape == (1, 4)
    assert isinstance(plain, CodebookWeight)

    def error(found: CodebookWeight) -> float:
        rows = zip(found.dequantize().chunk(3), weight.chunk(3), grams, strict=True)
        return sum(gram.output_energy(part - whole) for part, whole, gram in rows)

    assert error(made) < error(plain)


def test_the_notes_are_what_the_file_holds() -> None:
    """A quarter of the weights in each of four clusters takes 2 bits; half, a quarter and two eighths 1.75."""
    even = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(100).view(20, 20)
    layer = Layer("layer", "linear", even, torch.float32)
    notes = kmeans.KMeans(bits=2, granularity="tensor").apply(layer).notes
    assert notes["entropy"] == 2 and notes["coded_bits"] == 2
    skewed = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0]).repeat(50).view(20, 20)
    layer = Layer("layer", "linear", skewed, torch.float32)
    outcome = kmeans.KMeans(bits=2, granularity="tensor").apply(layer)
    assert outcome.notes["entropy"] == 1.75 and outcome.notes["coded_bits"] == 1.75
    assert isinstance(outcome.weight, CodebookWeight)
    packed = outcome.weight.pack()
    assert packed["weight_packed"].nbytes == math.ceil(400 * 1.75 / 8)
    held = sum(tensor.nbytes for tensor in packed.values())
    assert outcome.notes["ratio"] == round(1600 / held, 2)
    plain = kmeans.KMeans(bits=2, granularity="tensor", huffman=False).apply(layer)
    assert "coded_bits" not in plain.notes
    assert isinstance(plain.weight, CodebookWeight)
    assert plain.notes["ratio"] == round(1600 / sum(tensor.nbytes for tensor in plain.weight.pack().values()), 2)


def test_what_the_pass_asks_for() -> None:
    assert kmeans.KMeans().format == Codebook("kmeans", 4, "channel", huffman=True)
    assert kmeans.KMeans().for_graph().format == Codebook("kmeans", 4, "tensor", huffman=True)
    assert kmeans.KMeans(granularity="group", group_size=8, huffman=False).for_graph().format == Codebook(
        "kmeans", 4, "group", 8
    )
    assert isinstance(kmeans.KMeans(), LayerPass) and kmeans.KMeans().needs == Needs.NOTHING
    assert kmeans.KMeans(weighted=True).needs is kmeans.KMeans(refit=1).needs is Needs.GRAM


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 9},
        {"granularity": "group"},
        {"group_size": 8},
        {"granularity": "group", "group_size": 0},
        {"init": "random"},
        {"iterations": 0},
        {"refit": -1},
        {"seed": -1},
        {"entries": 16},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kmeans.KMeans(**options)


def result(graph: Graph, folder: Path, options: dict[str, Any], count: int = 12) -> Graph:
    """`graph` after a kmeans step, read back from its file."""
    (folder / "before").mkdir()
    (folder / "after").mkdir()
    graph.save(folder / "before")
    step = PassStep.model_validate({"kmeans": options}).for_graph()
    graph_sweep(folder / "before", folder / "after", step, small_graphs.batches(graph, count))
    return Graph.read(folder / "after")


@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"refit": 1}, {"granularity": "channel", "refit": 1}])
def test_convolutions(tmp_path: Path, options: dict[str, Any]) -> None:
    """Grouped and ungrouped ones; the file computes what the graph does."""
    graph = small_graphs.separable()
    made = result(graph, tmp_path, {"bits": 5, **options})
    assert set(made.stored) == {site.name for site in graph.sites()}
    inputs = small_graphs.inputs(graph)
    wanted, found = graph.run(inputs), made.run(inputs)
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    for name, weight in made.stored.items():
        assert isinstance(weight, CodebookWeight)
        if "granularity" not in options:
            assert weight.table.shape == (1, 32)
        parameter: Any = made.layer(name).weight
        torch.testing.assert_close(weight.dequantize(), parameter.flatten(1), rtol=0, atol=0)


def test_groups_must_divide_the_rows_of_a_graph(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="does not divide"):
        result(small_graphs.separable(), tmp_path, {"granularity": "group", "group_size": 8})


def test_nan_is_refused(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    weight: Any = graph.layer("layer0").weight
    weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layer0\.weight holds NaN"):
        result(graph, tmp_path, {})


def test_a_single_layer_may_ask_for_inputs() -> None:
    """Options under `layers` are gathered for as those of the step are."""
    assert PassStep.model_validate({"kmeans": {"layers": {"fc": {"weighted": True}}}}).needs == Needs.GRAM
    assert PassStep.model_validate({"kmeans": {"layers": {"fc": {"bits": 2}}}}).needs is Needs.NOTHING
