"""The `smoothquant` pass: eq. 4 by hand, a search that never loses on its sample, networks that compute the same."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_graphs import chain
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from effcli.errors import NumericsError, SelectionError
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.layers.contract import Group, Layer, Needs, ScalingPass, Statistics
from effcli.layers.result import PassResult
from effcli.passes.quantize.smoothquant import Objective, SmoothQuant, factors
from effcli.run.recipe import PassStep

SMOOTH: dict[str, Any] = {"smoothquant": {}}


def factor_of(configs: Any, group: Group, seen: Statistics) -> Any:
    """The factor for a group whose layers have these options, and the notes."""
    return configs[0].scale(dataclasses.replace(group, options=tuple(configs)), seen)


def seen(*batches: Tensor) -> Statistics:
    peaks = Statistics(batches[0].shape[-1], SmoothQuant().needs)
    for batch in batches:
        peaks.add(batch)
    return peaks


def loud_inputs(tokens: int, columns: int, seed: int, loudness: float = 1.5) -> Tensor:
    """Channels of very different magnitude, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    spread = (torch.randn(columns, generator=generator) * loudness).exp()
    return torch.randn(tokens, columns, generator=generator) * spread


def group(*weights: Tensor, channel: Tensor | None = None) -> Group:
    return Group(tuple(Layer(f"layer{k}", "linear", w, torch.float32) for k, w in enumerate(weights)), (), channel)


def test_a_case_worked_by_hand() -> None:
    """Statistics (16, 1, 4) of inputs and (1, 4, 0.25) of weights; with α = ½ the factors are √16, √¼ and √16.

    Divided by them the peaks of the inputs are (4, 2, 1), those of the weights (4, 2, 1) too.
    """
    inputs = torch.tensor([[-16.0, 0.5, 4.0], [3.0, -1.0, 0.0]])
    weights = torch.tensor([[1.0, -4.0, 0.125]]), torch.tensor([[0.5, 1.0, -0.25]])
    factor, notes = factor_of((SmoothQuant(), SmoothQuant()), group(*weights), seen(inputs))
    assert factor.tolist() == [4, 0.5, 4]
    assert notes == {"alpha": 0.5}
    assert (inputs / factor).abs().amax(0).tolist() == [4, 2, 1]
    assert (torch.cat(weights) * factor).abs().amax(0).tolist() == [4, 2, 1]


def test_the_ends_of_alpha() -> None:
    """α = 1 gives every channel of the inputs the peak 1, α = 0 every channel of the weights."""
    inputs, weights = torch.tensor([8.0, 0.5]), torch.tensor([2.0, 0.25])
    assert factors(inputs, weights, 1.0).tolist() == [8, 0.5]
    assert factors(inputs, weights, 0.0).tolist() == [0.5, 4]


@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**32), columns=st.sampled_from([1, 7, 40]))
def test_against_float64(alpha: float, seed: int, columns: int) -> None:
    inputs = loud_inputs(11, columns, seed)
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    expected = inputs.double().abs().amax(0) ** alpha / weight.double().abs().amax(0) ** (1 - alpha)
    factor, _ = factor_of((SmoothQuant(alpha=alpha),), group(weight), seen(inputs))
    torch.testing.assert_close(factor, expected.float())


def test_channels_of_one_producer_share_their_scale() -> None:
    """The repeated heads of grouped attention: the peaks are those over all inputs behind a channel."""
    channel = torch.tensor([0, 1, 0, 1])
    inputs, weight = torch.tensor([[4.0, 1.0, 9.0, 16.0]]), torch.tensor([[1.0, 0.5, 0.25, 4.0]])
    factor, _ = factor_of((SmoothQuant(),), group(weight, channel=channel), seen(inputs))
    assert factor.tolist() == [3, 2, 3, 2]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
def test_silent_and_unread_channels_keep_their_scale(alpha: Any) -> None:
    inputs, weight = loud_inputs(20, 6, 0), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    inputs[:, 1] = 0
    weight[:, 2] = 0
    inputs[:, 3] *= 1e-30
    weight[:, 4] *= 1e30
    factor, _ = factor_of((SmoothQuant(alpha=alpha),), group(weight), seen(inputs))
    assert factor[1] == factor[2] == 1
    assert bool(factor.isfinite().all()) and bool((factor > 0).all())


@given(
    activations=st.sampled_from(["token", "tensor"]),
    members=st.integers(1, 3),
    columns=st.sampled_from([3, 16, 40]),
    tokens=st.integers(1, 300),
    loudness=st.sampled_from([0.0, 1.5, 4.0]),
    seed=st.integers(0, 2**32),
)
def test_the_search_never_loses_on_its_sample(
    activations: Any, members: int, columns: int, tokens: int, loudness: float, seed: int
) -> None:
    """Not to any α of the grid and not to no scale, by levels of its own and products in float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(5 + k, columns, generator=generator) for k in range(members)]
    peaks = seen(*loud_inputs(tokens, columns, seed, loudness).split(64))
    config = SmoothQuant(alpha="search", activations=activations)
    factor, notes = factor_of((config,) * members, group(*weights), peaks)
    low, high = peaks.low, peaks.high

    def levels(values: Tensor) -> Tensor:
        """Rows in 255 steps around zero. Extremes lie between two levels, so that float32 decides where they fall."""
        step = values.abs().amax(1, keepdim=True) / 127.5
        step = step.where(step > 0, 1.0)
        return (values / step).round().clamp(-128, 127).double() * step.double()

    def error(factor: Tensor) -> float:
        rounded = levels(peaks.sample / factor)
        if activations == "tensor":
            bottom, top = float((low / factor).min()), float((high / factor).max())
            step = torch.tensor((top - bottom) / 255)
            zero = round(-128 - bottom / float(step))
            rounded = (((peaks.sample / factor) / step).round() + zero).clamp(-128, 127).sub(zero).double() * step
        products = zip([levels(weight * factor) for weight in weights], weights, strict=True)
        return sum(
            float((rounded @ restored.t() - peaks.sample.double() @ weight.double().t()).square().sum())
            for restored, weight in products
        )

    rivals = [torch.ones(columns)]
    rivals += [factor_of((SmoothQuant(alpha=k / 20),) * members, group(*weights), peaks)[0] for k in range(21)]
    least = min(map(error, rivals))
    assert error(factor) <= least * (1 + 1e-3)
    assert 0 <= notes["scale_gain"] <= 1
    assert ("alpha" in notes) == (not bool((factor == 1).all()) or notes["scale_gain"] > 0)


def test_the_objective_counts_a_layer_with_all_its_rows() -> None:
    """A layer of 1024 rows that are alike is sampled and weighs as much as all of them."""
    inputs = loud_inputs(50, 8, 3)
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(4))
    once = Objective("token", group(weight).layers, seen(inputs))(torch.ones(8))
    often = Objective("token", group(weight.expand(1024, 8)).layers, seen(inputs))(torch.ones(8))
    assert often == pytest.approx(1024 * once, rel=1e-5)


@given(cuts=st.lists(st.integers(0, 1000), max_size=8), tokens=st.sampled_from([0, 1, 128, 129, 256, 1000]))
def test_the_sample_does_not_depend_on_the_batches(cuts: list[int], tokens: int) -> None:
    rows = torch.arange(tokens, dtype=torch.float32).unsqueeze(1).expand(tokens, 3)
    ends = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    peaks = Statistics(3, SmoothQuant().needs)
    for first, last in itertools.pairwise(ends):
        peaks.add(rows[first:last])
    stride = next(2**k for k in range(20) if tokens <= 128 * 2**k)
    assert peaks.sample[:, 0].tolist() == list(range(0, tokens, stride))
    assert len(peaks.sample) <= 128
    assert peaks.peak.tolist() == [max(tokens - 1, 0)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sample_is_a_copy_in_float32(dtype: torch.dtype) -> None:
    inputs = loud_inputs(7, 4, 0, 0.5).to(dtype)
    expected = inputs.float()
    peaks = seen(inputs)
    inputs.zero_()
    torch.testing.assert_close(peaks.sample, expected, rtol=0, atol=0)
    assert peaks.sample.dtype == peaks.peak.dtype == torch.float32


def test_options_of_one_input_must_agree() -> None:
    with pytest.raises(SelectionError, match="layer0 and layer1 read one input"):
        factor_of((SmoothQuant(), SmoothQuant(alpha=0.6)), group(torch.ones(2, 3), torch.ones(2, 3)), Statistics(3))


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"alpha": "best"}, {"activations": "none"}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SmoothQuant(**options)


def test_what_the_pass_asks_for() -> None:
    assert isinstance(SmoothQuant(), ScalingPass)
    assert SmoothQuant().needs == Needs.GRAM | Needs.EXTREMES | Needs.SAMPLE
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    outcome = SmoothQuant().apply(Layer("layer", "linear", weight, torch.float32), Statistics(4))
    assert isinstance(outcome.weight, Tensor)
    torch.testing.assert_close(outcome.weight, weight, rtol=0, atol=0)


def windows() -> Windows:
    generator = torch.Generator().manual_seed(0)
    return Windows([torch.randint(architectures.VOCABULARY, (3, 16), generator=generator)] * 2, "original")


def carry_out(source: Path, target: Path, step: dict[str, Any]) -> PassResult:
    target.mkdir()
    return sweep(source, target, PassStep.model_validate(step), windows(), target.with_name(f"{target.name}-work"))


def logits(path: Path) -> Tensor:
    ids = torch.randint(architectures.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(ids).logits.double()


@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture_computes_the_same(name: str, tmp_path: Path) -> None:
    """To float32 rounding; every layer is scaled or says why not, and at least one group of a block is scaled."""
    source = architectures.make(name, tmp_path / "model")
    result = carry_out(source, tmp_path / "smooth", SMOOTH)
    before, after = logits(source), logits(tmp_path / "smooth")
    assert float((after - before).norm() / before.norm()) < 1e-5
    rows = [row for row in result.ledger if row.kind in ("linear", "conv1d", "expert")]
    inner = [row for row in rows if "repeated blocks" not in row.reason and "output head" not in row.reason]
    assert inner
    for row in inner:
        assert ("folded_into" in row.notes) != row.reason.startswith("unscaled:"), row
        assert row.format == "float32"
    assert any("folded_into" in row.notes for row in inner)


def test_a_search_in_a_whole_network(tmp_path: Path) -> None:
    """Every shared input has its own α, and the network computes what it computed."""
    source = architectures.make("llama", tmp_path / "model")
    result = carry_out(source, tmp_path / "searched", {"smoothquant": {"alpha": "search"}})
    before, after = logits(source), logits(tmp_path / "searched")
    assert float((after - before).norm() / before.norm()) < 1e-5
    gains = [row.notes["scale_gain"] for row in result.ledger if "scale_gain" in row.notes]
    assert gains and all(0 <= gain < 1 for gain in gains)


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_twice_the_same(alpha: Any, tmp_path: Path) -> None:
    source = architectures.make("qwen3", tmp_path / "model")
    for name in ("once", "again"):
        carry_out(source, tmp_path / name, {"smoothquant": {"alpha": alpha}})
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(6e4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"inputs of model\.layers\.\d"):
        carry_out(source, tmp_path / "smooth", SMOOTH)


def of_graph(graph: Graph, folder: Path, step: dict[str, Any]) -> tuple[Graph, PassResult]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    checked = PassStep.model_validate(step)
    prepared = checked.model_copy(update={"config": checked.config.for_graph()})
    result = graph_sweep(source, target, prepared, small_graphs.batches(graph))
    return Graph.read(target), result


@pytest.mark.parametrize("alpha", [0.5, "search"])
@pytest.mark.parametrize("make", ["convolutions", "separable", "residual"])
def test_networks_of_convolutions_compute_the_same(make: str, alpha: Any, tmp_path: Path) -> None:
    if make == "convolutions":
        graph = chain((3, 9, 7), nn.Conv2d(3, 8, 3), "relu.default", nn.Conv2d(8, 5, 3, padding=1))
    else:
        graph = getattr(small_graphs, make)()
    inputs = small_graphs.inputs(graph)
    before = graph.run(inputs)
    made, result = of_graph(graph, tmp_path, {"smoothquant": {"alpha": alpha}})
    torch.testing.assert_close(made.run(inputs), before, rtol=1e-4, atol=1e-4)
    for row in result.ledger:
        assert row.notes or row.reason.startswith("unscaled:"), row
    if make == "convolutions" and alpha == 0.5:
        (scaled,) = [row for row in result.ledger if "folded_into" in row.notes]
        assert (scaled.name, scaled.notes["folded_into"]) == ("layer2", "layer0")
        # Eq. 4 by channel: afterwards the peaks of inputs and of weights are alike.
        weight: Any = made.layer("layer2").weight
        hidden = torch.relu(made.layer("layer0")(inputs))
        torch.testing.assert_close(hidden.amax((0, 2, 3)), weight.abs().amax((0, 2, 3)), rtol=1e-4, atol=1e-5)
