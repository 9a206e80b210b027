"""The `int8` pass: a network of integers that computes what the floating one does, on small and on real networks."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import vision_architectures
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, fx, nn

from effcli.errors import DataError, NumericsError, UnsupportedError
from effcli.formats import Affine, AffineWeight
from effcli.graphs import executor
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.integer import IntegerNetwork, Pad, Weighted
from effcli.graphs.rewriting import count_padding
from effcli.graphs.sweep import graph_sweep
from effcli.importers import read
from effcli.layers.contract import Needs, NetworkPass, Observed, Transformed
from effcli.layers.ranges import Method
from effcli.passes.quantize import int8
from effcli.run.recipe import check


def residual(seed: int = 0, channels: int = 8) -> Graph:
    """Convolution and batch norm, a residual block, a depthwise convolution, average and a classifier."""
    torch.manual_seed(seed)
    b = Builder()

    def normed(name: str, module: nn.Conv2d, x: fx.Node) -> fx.Node:
        norm = nn.BatchNorm2d(module.out_channels)
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.3, 2)  # type: ignore[union-attr]
        return b.module(f"{name}.norm", norm, b.module(f"{name}.conv", module, x))

    x = b.call("aten.relu.default", normed("stem", nn.Conv2d(3, channels, 3, padding=1, bias=False), b.input()))
    y = normed("block", nn.Conv2d(channels, channels, 3, padding=1), x)
    x = b.call("aten.relu.default", b.call("aten.add.Tensor", x, y))
    x = b.call("aten.relu.default", normed("depth", nn.Conv2d(channels, channels, 3, 2, groups=channels), x))
    x = b.call("aten.mean.dim", x, [2, 3], False)
    return b.finish(b.module("fc", nn.Linear(channels, 5), x), Facts(origin="test", shape=(3, 11, 11)))


def inputs_of(graph: Graph, count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *graph.facts.shape, generator=torch.Generator().manual_seed(seed))


def transformed(graph: Graph, inputs: Tensor, **options: Any) -> Transformed:
    return int8.Int8(**options).transform(graph, Observed(batches=lambda: iter(inputs.split(16))))


def network_of(made: Transformed) -> IntegerNetwork:
    assert isinstance(made.network, IntegerNetwork)
    return made.network


def decibels(graph: Graph, network: IntegerNetwork, inputs: Tensor) -> float:
    expected = graph.run(inputs).double().numpy()
    found = executor.run_float(network, inputs.numpy())
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()))


def test_what_it_needs_and_what_has_no_meaning() -> None:
    assert isinstance(int8.Int8(), NetworkPass) and int8.Int8().needs == Needs.INPUTS
    for options in ({"ignore": ("fc",)}, {"layers": {"fc": {"observer": "kl"}}}):
        with pytest.raises(ValidationError, match="has no meaning here"):
            int8.Int8(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("observer", get_args(Method))
@pytest.mark.parametrize("weights", ["minmax", "least_squares"])
def test_every_observer_serves(observer: Method, weights: str) -> None:
    graph = residual()
    made = transformed(graph, inputs_of(graph, 64), observer=observer, range=weights)
    assert decibels(graph, network_of(made), inputs_of(graph, 64, 2)) > 20


def test_ledger_and_activations() -> None:
    graph = residual()
    inputs = inputs_of(graph, 40)
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    made = transformed(graph, inputs)
    assert made.notes.keys() == {"stem.conv", "block.conv", "depth.conv", "fc"}
    assert all(notes["weight_bits"] == 8 and notes["bias_shift"] >= 0 for notes in made.notes.values())
    assert made.remarks == ()
    rows = {row.name: row for row in made.activations}
    # One for the input, each of the four layers, the addition and the mean.
    assert len(rows) == 7 and rows[graph.input.name].observer == "minmax" and rows["fc"].observer == "least_squares"
    assert sum(rows["fc"].counts) == 40 * 5
    assert rows[graph.input.name].low == float(inputs.min()) and rows[graph.input.name].high == float(inputs.max())
    # The graph is as it was, batch norms and all.
    after = graph.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_quality_of_random_networks(seed: int) -> None:
    graph = residual(seed)
    made = transformed(graph, inputs_of(graph, 48), observer="minmax")
    assert decibels(graph, network_of(made), inputs_of(graph, 48)) > 24


def test_bias_correction_restores_the_means() -> None:
    """Of every layer's sums, on the inputs that corrected them, to the unit of a bias."""
    graph, _ = int8.prepare(residual())
    inputs = inputs_of(graph, 50)
    statistics = int8.observe(graph, iter(inputs.split(7)))
    torch.testing.assert_close(statistics.inputs, inputs)
    errors = {}
    for corrected in (False, True):
        network = network_of(int8.quantize(int8.Int8(bias_correction=corrected), graph, statistics))
        values = executor.run(network, network.quantize(inputs.numpy()), keep=True)
        errors[corrected] = []
        for step in network.program.steps:
            if isinstance(step, Weighted):
                unit = network.array(step, "multiplier") * 2.0 ** -network.array(step, "shift").astype(float)
                found = executor.mean_accumulator(network, step, values[step.inputs[0]])
                wanted = statistics.means[step.name] / network.program.values[step.output].scale / unit
                errors[corrected].append(float(np.abs(found - wanted).max()))
    assert max(errors[True]) <= 0.51
    assert max(errors[False]) > 10


def test_means_are_those_of_the_layers() -> None:
    graph, _ = int8.prepare(residual())
    inputs = inputs_of(graph, 20)
    statistics = int8.observe(graph, iter([inputs[:3], inputs[3:3], inputs[3:]]))
    torch.testing.assert_close(torch.from_numpy(statistics.means["fc"]).float(), graph.run(inputs).mean(0))
    stem = graph.layer("stem.conv")(inputs).mean((0, 2, 3))
    torch.testing.assert_close(torch.from_numpy(statistics.means["stem_conv"]).float(), stem)


def test_only_the_first_inputs_correct_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_CORRECTING", 10)
    graph, _ = int8.prepare(residual())
    inputs = inputs_of(graph, 24)
    statistics = int8.observe(graph, iter(inputs.split(7)))
    torch.testing.assert_close(statistics.inputs, inputs[:10])
    torch.testing.assert_close(torch.from_numpy(statistics.means["fc"]).float(), graph.run(inputs[:10]).mean(0))
    observer = next(each for each in statistics.observers.values() if each.name == "fc")
    assert int(observer.counts.sum()) == 24 * 5


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (15, 15), (16, 16), (40, 16)])
def test_the_first_inputs_go_along_as_codes(count: int, kept: int) -> None:
    graph = residual()
    inputs = inputs_of(graph, count)
    made = int8.Int8().transform(graph, Observed(batches=lambda: iter(inputs.split(7))))
    network = network_of(made)
    assert network.probe is not None and network.probe.dtype == np.int8
    np.testing.assert_array_equal(network.probe, network.quantize(inputs[:kept].numpy()))


def test_a_batch_norm_that_stays() -> None:
    """Behind a ReLU, before a padded convolution: an operation of its own, and a remark."""
    torch.manual_seed(0)
    b = Builder()
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    x = b.call("aten.relu.default", b.module("first", nn.Conv2d(3, 4, 3), b.input()))
    x = b.module("second", nn.Conv2d(4, 4, 3, padding=1), b.module("norm", norm, x))
    graph = b.finish(x, Facts(origin="test", shape=(3, 6, 6)))
    made = transformed(graph, inputs_of(graph, 64))
    assert len(made.remarks) == 1 and made.remarks[0].startswith("norm stays: ")
    assert [step.op for step in network_of(made).program.steps] == ["convolution"] * 3
    assert decibels(graph, network_of(made), inputs_of(graph, 64)) > 30


def test_inputs_that_cannot_serve() -> None:
    graph = residual()
    with pytest.raises(DataError, match="no calibration inputs"):
        transformed(graph, inputs_of(graph, 0))
    inputs = inputs_of(graph, 3)
    inputs[1, 2, 3, 4] = float("nan")
    with pytest.raises(NumericsError, match="input_1 is NaN or infinite"):
        transformed(graph, inputs)


def test_what_is_unsupported_is_said_before_calibration() -> None:
    b = Builder()
    x = b.module("norm", nn.GroupNorm(2, 6), b.input(), source="net.py:3 in forward")
    graph = b.finish(x, Facts(origin="test", shape=(6, 4)))

    def batches() -> Iterator[Tensor]:
        raise AssertionError("read too early")

    with pytest.raises(UnsupportedError, match=r"norm \(GroupNorm, net\.py:3 in forward\)"):
        int8.Int8().transform(graph, Observed(batches=batches))


def built(shape: tuple[int, ...], build: Callable[[Builder, fx.Node], fx.Node]) -> Graph:
    torch.manual_seed(0)
    b = Builder()
    return b.finish(build(b, b.input()), Facts(origin="test", shape=shape))


@pytest.mark.parametrize(("fill", "told"), [(0.7, False), (127.0, True), (-1000.0, True)])
def test_padding_with_any_number_is_covered(fill: float, told: bool) -> None:
    """What is filled in has a code; only where it dwarfs all else, a remark says what that costs."""
    graph = built((3, 6, 7), lambda b, x: b.call("aten.constant_pad_nd.default", x, [1, 2, 0, 1], fill))
    inputs = inputs_of(graph, 64)
    made = transformed(graph, inputs)
    network = network_of(made)
    (row,) = made.activations
    assert row.low <= fill <= row.high
    found = executor.run_float(network, inputs.numpy())
    np.testing.assert_allclose(found[:, :, -1], fill, atol=0.51 * network.output.scale)
    assert decibels(graph, network, inputs) > 25
    assert [remark for remark in made.remarks if "far outside" in remark] == list(made.remarks)
    assert len(made.remarks) == told


def maximum(b: Builder, x: fx.Node, first: bool, behind: bool, count: int = 1, fill: float = -torch.inf) -> fx.Node:
    """A convolution, uneven padding with -inf and poolings that read it, with a ReLU before or behind."""
    x = b.module("conv", nn.Conv2d(3, 6, 3, padding=1), x)
    x = b.call("aten.relu.default", x) if first else x
    x = b.call("aten.constant_pad_nd.default", x, [0, 1, 0, 1], fill)
    pools = [b.call("aten.max_pool2d.default", x, [3, 3], [2, 2]) for _ in range(count)]
    x = pools[0] if count == 1 else b.call("aten.cat.default", pools, 1)
    return b.call("aten.relu.default", x) if behind else x


@pytest.mark.parametrize("fill", [-torch.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize(("first", "behind"), [(True, False), (False, True), (False, False)])
def test_padding_that_never_wins_belongs_to_the_pooling(first: bool, behind: bool, fill: float) -> None:
    graph = built((3, 8, 8), lambda b, x: maximum(b, x, first, behind, fill=fill))
    inputs = inputs_of(graph, 64)
    network = network_of(transformed(graph, inputs))
    assert [step.op for step in network.program.steps] == ["convolution", "max_pool"]
    assert decibels(graph, network, inputs) > 30


def test_the_lowest_code_stands_for_minus_infinity() -> None:
    """Where several poolings read the padding, or one that is padded further than it may be itself."""
    graph = built((3, 8, 8), lambda b, x: maximum(b, x, False, False, count=2))
    inputs = inputs_of(graph, 64)
    network = network_of(transformed(graph, inputs))
    assert [step.value for step in network.program.steps if isinstance(step, Pad)] == [-128]
    assert decibels(graph, network, inputs) > 30

    def wide(b: Builder, x: fx.Node) -> fx.Node:
        x = b.call("aten.constant_pad_nd.default", x, [3, 0], -torch.inf)
        return b.call("aten.max_pool1d.default", x, [3], [5])

    graph = built((3, 20), wide)
    network = network_of(transformed(graph, inputs_of(graph, 64)))
    assert [step.op for step in network.program.steps if step.op != "reshape"] == ["pad", "max_pool"]


@pytest.mark.parametrize(("padding", "stride"), [([1, 1], [2, 2]), ([1, 0], [])])
def test_averages_that_leave_their_padding_out(padding: list[int], stride: list[int]) -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        x = b.module("conv", nn.Conv2d(3, 6, 3, padding=1), x)
        x = b.call("aten.avg_pool2d.default", x, [3, 3], stride, padding, False, False)
        return b.call("aten.relu.default", x)

    graph = built((3, 9, 9), build)
    assert decibels(graph, network_of(transformed(graph, inputs_of(graph, 64))), inputs_of(graph, 64, 2)) > 28
    line = built((3, 12), lambda b, x: b.call("aten.avg_pool1d.default", x, [4], [4], [2], False, False))
    assert decibels(line, network_of(transformed(line, inputs_of(line, 64))), inputs_of(line, 64)) > 28


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [([3, 3], [2, 2], [1, 1]), ([3, 2], [2, 2], [1, 0]), ([2, 2], [], [0, 0])]
)
def test_averages_whose_last_windows_reach_beyond_the_padding(
    kernel: list[int], stride: list[int], padding: list[int], counted: bool
) -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        x = b.module("conv", nn.Conv2d(3, 6, 3, padding=1), x)
        return b.call("aten.avg_pool2d.default", x, kernel, stride, padding, True, counted)

    graph = built((3, 7, 10), build)
    prepared = Graph(copy.deepcopy(graph.module), graph.facts)
    count_padding(prepared)
    inputs = inputs_of(graph, 64)
    torch.testing.assert_close(prepared.run(inputs), graph.run(inputs), rtol=1e-5, atol=1e-5)
    assert decibels(graph, network_of(transformed(graph, inputs)), inputs_of(graph, 64, 2)) > 28


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [([320, 320], [0, 0]), ([9, 3], [1, 0]), ([320, 3], [150, 0])])
def test_a_single_window_ends_with_what_it_pools(kernel: list[int], padding: list[int], counted: bool) -> None:
    """As in EfficientNet, whose last pooling has windows as large as it has channels."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.call("aten.avg_pool2d.default", x, kernel, kernel, padding, True, counted)

    graph = built((3, 7, 10), build)
    prepared = Graph(copy.deepcopy(graph.module), graph.facts)
    count_padding(prepared)
    inputs = inputs_of(graph, 64)
    torch.testing.assert_close(prepared.run(inputs), graph.run(inputs), rtol=1e-5, atol=1e-5)
    network = network_of(transformed(graph, inputs))
    assert decibels(graph, network, inputs) > 28
    assert max(math.prod(value.shape) for value in network.program.values.values()) <= 3 * 7 * 12


def test_averages_over_windows_of_a_given_count() -> None:
    def build(b: Builder, x: fx.Node) -> fx.Node:
        return b.call("aten.avg_pool2d.default", x, [3, 3], [2, 2], [0, 0], True, True, 5)

    graph = built((3, 6, 6), build)
    inputs = inputs_of(graph, 64)
    assert decibels(graph, network_of(transformed(graph, inputs)), inputs) > 28


def test_weights_of_any_scale_are_judged_by_calibration() -> None:
    """A layer of 1e6 and one of 1e-6 behind it, which a range of one on both sides could not express."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        first, second = nn.Linear(8, 8), nn.Linear(8, 4)
        for module, factor in ((first, 1e7), (second, 1e-7)):
            module.weight.data *= factor
        return b.module("second", second, b.module("first", first, x))

    graph = built((8,), build)
    inputs = inputs_of(graph, 64)
    assert decibels(graph, network_of(transformed(graph, inputs)), inputs) > 30


@pytest.mark.parametrize("bits", [0, 2, 4])
def test_dead_channels_are_raised_however_they_were_stored(bits: int) -> None:
    """Weights of 1e-30 beside an ordinary bias: as int8 makes them, and compressed to fewer bits before."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        module = nn.Conv2d(3, 6, 3)
        module.weight.data[2] *= 1e-30
        return b.module("conv", module, x)

    graph = built((3, 8, 8), build)
    if bits:
        weight = graph.layer("conv").weight.detach().reshape(6, -1)
        format = Affine(bits, "channel", symmetric=True)
        scale = weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
        codes = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
        graph.set_weight("conv", AffineWeight(format, codes.to(torch.uint8), scale, None))
    inputs = inputs_of(graph, 64)
    made = transformed(graph, inputs)
    assert made.notes["conv"]["raised_scales"] == 1 and made.notes["conv"]["weight_bits"] == (bits or 8)
    assert decibels(graph, network_of(made), inputs) > 30


def test_dead_channels_after_learned_rounding(tmp_path: Path) -> None:
    """Channels of 1e-30 in every layer, rounded to 4 bits by `adaround`: integers lose next to nothing more."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        first, second, head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        for module in (first, second, head):
            module.weight.data[2] = 1e-30
        x = b.call("aten.relu.default", b.module("first", first, x))
        x = b.call("aten.relu.default", b.module("second", second, x))
        return b.module("head", head, b.call("aten.mean.dim", x, [2, 3]))

    graph = built((3, 8, 8), build)
    inputs = inputs_of(graph, 64)
    (tmp_path / "input").mkdir()
    graph.save(tmp_path / "input")
    source = tmp_path / "input"
    steps = [{"adaround": {"bits": 4, "iterations": 50}}, {"int8": {}}]
    for step in check({"model": "net.pt2", "passes": steps}).for_graph().passes:
        target = tmp_path / step.name
        target.mkdir()
        result = graph_sweep(source, target, step, lambda: iter([inputs]))
        source = target
    assert {row.format for row in result.ledger} == {"int4 channel sym"}
    rounded, network = Graph.read(tmp_path / "adaround"), IntegerNetwork.read(tmp_path / "int8")
    assert decibels(rounded, network, inputs) > 30 and decibels(graph, network, inputs) > 15


@pytest.mark.parametrize("classes", [10, 1000])
def test_probabilities_of_many_classes_keep_their_values(classes: int) -> None:
    """Near-uniform ones: the steps are as fine as what calibration saw asks for, with a factor of two to spare."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        module = nn.Linear(16, classes)
        module.weight.data *= 0.5
        return b.call("aten.softmax.int", b.module("fc", module, x), 1)

    graph = built((16,), build)
    inputs = inputs_of(graph, 64)
    made = transformed(graph, inputs)
    network = network_of(made)
    largest = float(graph.run(inputs).max())
    assert 2 * largest <= 255 * network.output.scale < 4.1 * largest
    assert network.output.scale == 2.0 ** -network.program.steps[-1].bits  # type: ignore[union-attr]
    assert decibels(graph, network, inputs) > 25


def test_a_step_that_loses_its_signal_is_named() -> None:
    """A difference of two large and almost equal tensors; what follows lost nothing by itself."""

    def build(b: Builder, x: fx.Node) -> fx.Node:
        shifted = b.call("aten.add.Tensor", x, b.tensor("far", torch.full((1, 6), 4000.0)))
        near = b.call("aten.sub.Tensor", shifted, b.tensor("near", torch.full((1, 6), 4000.0)), source="net.py:7")
        return b.module("fc", nn.Linear(6, 3), b.call("aten.relu.default", near))

    graph = built((6,), build)
    made = transformed(graph, inputs_of(graph, 64))
    told = [remark for remark in made.remarks if "loses its signal" in remark]
    assert len(told) == 1 and told[0].startswith("sub (aten.sub.Tensor, net.py:7) loses its signal in 8 bits: ")
    assert not transformed(residual(), inputs_of(residual(), 64)).remarks


class Transformer(nn.Module):
    """Tokens and their positions, attention of two heads, a perceptron, the mean, a classifier."""

    def __init__(self, rows: int = 20, tokens: int = 10, width: int = 16) -> None:
        super().__init__()
        self.rows, self.places = nn.Embedding(rows, width), nn.Parameter(torch.randn(1, tokens, width) / 2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.classes = nn.Linear(width, 4)

    def attend(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        return self.mix((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rows(tokens.long()) + self.places
        x = x + self.attend(self.norms[0](x))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))
        return self.classes(self.norms[2](x).mean(1))  # type: ignore[no-any-return]


def transformer(folder: Path) -> Graph:
    torch.manual_seed(0)
    batch = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, 10),)
    torch.export.save(torch.export.export(Transformer().eval(), example, dynamic_shapes=batch), folder / "net.pt2")
    return read(folder / "net.pt2")


def tokens_of(count: int, seed: int) -> Tensor:
    return torch.randint(0, 20, (count, 10), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("observer", ["minmax", "least_squares"])
def test_a_transformer(observer: str, tmp_path: Path) -> None:
    graph = transformer(tmp_path)
    made = transformed(graph, tokens_of(128, 1), observer=observer)
    network, inputs = network_of(made), tokens_of(256, 2)
    assert (network.input.scale, network.input.zero) == (1.0, -128)
    kinds = {step.op for step in network.program.steps}
    assert {"embedding", "constant", "matrix_product", "softmax", "layer_norm"} <= kinds
    assert decibels(graph, network, inputs) > 25
    rows = {row.name: row for row in made.activations}
    # What an operation demands is what is reported.
    assert (rows["softmax"].low, rows["softmax"].high, rows["softmax"].observer) == (0, 255 / 256, "demanded")
    assert (rows[graph.input.name].low, rows[graph.input.name].high) == (0, 255)
    network.save(tmp_path)
    again = executor.run_float(IntegerNetwork.read(tmp_path), inputs.numpy())
    np.testing.assert_array_equal(again, executor.run_float(network, inputs.numpy()))


@pytest.mark.parametrize(("name", "least"), [("vit", 18), ("convnext", 25)])
def test_image_classifiers_with_layer_norms(name: str, least: float, tmp_path: Path) -> None:
    graph = read(vision_architectures.make(name, tmp_path / "source"))
    network = network_of(transformed(graph, inputs_of(graph, 64)))
    assert decibels(graph, network, inputs_of(graph, 64, 2)) > least


def top1(outputs: Any, labels: Any) -> float:
    return float((np.asarray(outputs).argmax(1) == labels).mean())


@pytest.mark.slow
def test_images_lose_at_most_half_a_point(asset: Callable[[str], Path]) -> None:
    """MLPerf Tiny's image network on 3,000 JPEG images, calibrated on 256 training images."""
    folder = asset("cifar10_jpeg")
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    tests, labels = (array[:3000] for array in loader.load_test(str(folder)))
    seen, _ = loader.load_train(str(folder), 256)
    inputs, calibration = (torch.from_numpy(array).permute(0, 3, 1, 2).float() for array in (tests, seen))
    graph = read(asset("tiny_resnet8_cifar10") / "model.pt2")
    expected = torch.cat([graph.run(part) for part in inputs.split(250)]).numpy()
    network = network_of(transformed(graph, calibration))
    found = executor.run_float(network, inputs.numpy())
    assert network.input.scale == 1 and network.input.zero == -128
    assert top1(found, labels) >= top1(expected, labels) - 0.005
    assert float((found.argmax(1) == expected.argmax(1)).mean()) > 0.97


@pytest.mark.slow
def test_keywords_lose_at_most_half_a_point(asset: Callable[[str], Path]) -> None:
    """MLPerf Tiny's keyword network, calibrated on a quarter of its 1,000 inputs, on all and on the rest."""
    data = np.load(asset("tiny_dscnn_kws") / "data.npz")
    features = (torch.from_numpy(data["features_int8"]).float() - float(data["zero_point"])) * float(data["scale"])
    features, labels = features.unsqueeze(1), data["labels"]
    graph = read(asset("tiny_dscnn_kws") / "model.pt2")
    expected = graph.run(features).numpy()
    found = executor.run_float(network_of(transformed(graph, features[:250])), features.numpy())
    for part in (slice(None), slice(250, None)):
        assert top1(found[part], labels[part]) >= top1(expected[part], labels[part]) - 0.005
