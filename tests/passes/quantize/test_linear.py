"""The `linear` pass: by hand, its options, what least squares promises, and int8 activations in whole networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

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

import effcli
from effcli.errors import DataError, NumericsError, UnsupportedError
from effcli.formats import Affine, AffineWeight, unpack
from effcli.graphs.graph import Graph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.text import Windows
from effcli.language.sweep import sweep
from effcli.language.verify import verify
from effcli.language.weights import open_weights
from effcli.layers.contract import UNSEEN, Layer, LayerPass, Needs, Statistics
from effcli.layers.ranges import Method, Observer
from effcli.layers.result import PassResult
from effcli.passes.quantize import linear
from effcli.passes.quantize._affine import nearest
from effcli.run.recipe import PassStep

METHODS: tuple[Method, ...] = get_args(Method)


def quantized(weight: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> AffineWeight:
    outcome = linear.Linear(**options).apply(Layer("layer", "linear", weight, dtype))
    assert isinstance(outcome.weight, AffineWeight)
    return outcome.weight


def test_by_hand() -> None:
    """Two groups of two: [-1, 2] has the levels -1, 0, 1, 2; [0, 6] has 0, 2, 4, 6."""
    made = quantized(torch.tensor([[-1.0, 2.0, 0.0, 6.0], [1.2, -0.3, 5.0, 2.9]]), bits=2, group_size=2)
    assert made.dequantize()[0].tolist() == [-1, 2, 0, 6]
    assert made.scale[0].tolist() == [1, 2]
    assert made.zero is not None
    assert made.zero[0].tolist() == [1, 0]
    # [-0.3, 1.2] has the step 0.5 and the zero round(0.6) = 1; 2.9 lies next to 2 · 5 / 3.
    torch.testing.assert_close(made.dequantize()[1], torch.tensor([1.0, -0.5, 5.0, 10 / 3]))


def test_the_options_say_the_format() -> None:
    assert linear.Linear().format == Affine(8, "group", 64, False)
    assert linear.Linear(granularity="channel").format == Affine(8, "channel")
    assert linear.Linear(granularity="tensor", group_size=None, bits=2, symmetric=True).format == Affine(
        2, "tensor", 0, True
    )
    assert isinstance(linear.Linear(), LayerPass) and linear.Linear().needs == Needs.NOTHING


@pytest.mark.parametrize("options", [{"bits": 7}, {"bits": 1}, {"group_size": 0}, {"group_size": None}, {"bit": 4}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        linear.Linear(**options)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", get_args(linear.Bits))
def test_every_width_in_every_granularity(bits: int, granularity: str) -> None:
    """A weird shape; more bits never lose more, and the file holds what the pass chose."""
    weight = torch.randn(41, 72, generator=torch.Generator().manual_seed(bits))
    for symmetric in (False, True):
        made = quantized(weight, torch.bfloat16, bits=bits, granularity=granularity, group_size=24, symmetric=symmetric)
        again = unpack(made.format, made.pack())
        torch.testing.assert_close(again.dequantize(), made.dequantize(), rtol=0, atol=0)
        error = float((made.dequantize(torch.float32) - weight).norm() / weight.norm())
        assert error < 1.6 / 2**bits * (3 if granularity == "tensor" else 2)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    tail=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 2**32),
)
def test_least_squares_is_never_worse_than_the_full_range(
    bits: int, granularity: str, symmetric: bool, tail: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 16, generator=generator) * torch.randn(7, 16, generator=generator).abs() ** tail
    options = {"bits": bits, "granularity": granularity, "group_size": 8, "symmetric": symmetric}

    def error(range: str) -> float:
        made = quantized(weight, range=range, **options)
        return float((made.dequantize().double() - weight).square().sum())

    assert error("least_squares") <= error("minmax") * (1 + 1e-5) + 1e-12


def test_least_squares_pays_at_few_bits() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = {
        range: float((quantized(weight, bits=2, group_size=64, range=range).dequantize() - weight).square().sum())
        for range in ("minmax", "least_squares")
    }
    assert errors["least_squares"] < 0.8 * errors["minmax"]


def layer_of(weight: Tensor, kind: Any = "linear", dtype: torch.dtype = torch.float32) -> Layer:
    return Layer("layer", kind, weight, dtype)


def watched(config: linear.Linear, *batches: Tensor) -> Statistics:
    seen = Statistics(batches[0].shape[-1], config.needs)
    for batch in batches:
        seen.add(batch)
    return seen


def test_a_fixed_range_by_hand() -> None:
    """Inputs from -1 to 50 have the step 0.2 and the zero point -123; weights up to 127.5 the step 1."""
    config = linear.Linear(activations="int8", activation_range="minmax")
    weight = torch.tensor([[127.5, -3.0], [2.0, 127.5]])
    outcome = config.apply(layer_of(weight), watched(config, torch.tensor([[50.0, 3.0], [-1.0, 0.0]])))
    made = outcome.weight
    assert isinstance(made, AffineWeight)
    assert made.format == Affine(8, "channel", 0, True, "tensor")
    assert made.signed.tolist() == [[127, -3], [2, 127]]
    assert made.scale.tolist() == [[1], [1]]
    assert made.activation_scale is not None and made.activation_zero is not None
    torch.testing.assert_close(made.activation_scale, torch.tensor([0.2]))
    assert made.activation_zero.tolist() == [-123]
    assert outcome.notes == {"activation_range": [-1.0, 50.0], "observer": "minmax"}


def test_int8_activations_say_the_format() -> None:
    """What was not set is as integers need it; a scale per token needs no calibration."""
    dynamic = linear.Linear(activations="int8")
    assert dynamic.format == Affine(8, "channel", 0, True, "token")
    assert dynamic.for_graph().format == dynamic.format
    assert dynamic.needs is Needs.NOTHING
    static = linear.Linear(activations="int8", activation_range="kl", granularity="tensor")
    assert static.format == Affine(8, "tensor", 0, True, "tensor")
    assert static.needs == Needs.GRAM | Needs.VALUES
    # The resolved options, written out, mean the same.
    assert linear.Linear.model_validate(dynamic.model_dump()).format == dynamic.format
    assert linear.Linear().model_dump()["granularity"] == "group"


def test_ranges_of_some_layers_need_calibration() -> None:
    own = {"activations": "int8", "activation_range": "minmax", "granularity": "channel", "symmetric": True}

    def needs(options: dict[str, Any]) -> Needs:
        return PassStep.model_validate({"linear": options}).needs

    assert needs({"layers": {"*.down_proj": own}}) == Needs.GRAM | Needs.VALUES
    assert needs({"activations": "int8", "layers": {"*.up_proj": {"activation_range": "kl"}}}) == (
        Needs.GRAM | Needs.VALUES
    )
    assert needs({"activations": "int8", "layers": {"*.up_proj": {"granularity": "tensor"}}}) is Needs.NOTHING
    step = PassStep.model_validate({"linear": {"activations": "int8"}})
    assert step.for_layer({"activations": "none", "bits": 4}).format == Affine(4, "channel", 0, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int8", "bits": 4}, "need bits: 8, not 4"),
        ({"activations": "int8", "granularity": "group"}, "granularity: channel or tensor"),
        ({"activations": "int8", "symmetric": False}, "symmetric: true"),
        ({"activations": "int8", "group_size": 32}, "group_size"),
        ({"activation_range": "minmax"}, "set activations: int8"),
        ({"activations": "int8", "activation_range": "median"}, "activation_range"),
        ({"activations": "int8", "activation_range": "percentile", "percentile": 50}, "percentile"),
        ({"activations": "int4"}, "activations"),
    ],
)
def test_what_int8_activations_cannot_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        linear.Linear(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_every_range_is_the_observers(method: Method, dtype: torch.dtype) -> None:
    """Over batches and a weird shape; the file holds what the pass chose."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 7, 41, generator=generator) + 0.3).exp().to(dtype) for _ in range(4)]
    config = linear.Linear(activations="int8", activation_range=method, percentile=99)
    reference = Observer("inputs")
    for batch in batches:
        reference.add(batch)
    low, high = reference.range_of(method, 99)
    weight = torch.randn(5, 41, generator=generator)
    made = config.apply(layer_of(weight, dtype=dtype), watched(config, *batches)).weight
    assert isinstance(made, AffineWeight) and made.activation_scale is not None and made.activation_zero is not None
    assert made.activation_scale.dtype == dtype
    torch.testing.assert_close(made.activation_scale.float(), torch.tensor([(high - low) / 255]), rtol=1e-2, atol=0)
    expected = round(-128 - low / float(made.activation_scale))
    assert made.activation_zero.item() == max(-128, min(127, expected))
    torch.testing.assert_close(
        made.dequantize(torch.float32), nearest(weight, Affine(8, "channel", symmetric=True), dtype), rtol=0, atol=0
    )
    again = unpack(made.format, made.pack())
    for name in ("codes", "scale", "activation_scale", "activation_zero"):
        torch.testing.assert_close(getattr(again, name), getattr(made, name), rtol=0, atol=0)


def test_without_an_input_there_is_no_range() -> None:
    config = linear.Linear(activations="int8", activation_range="minmax")
    for seen in (UNSEEN, Statistics(3, config.needs), watched(config, torch.zeros(0, 3))):
        with pytest.raises(DataError, match="no calibration input reached layer"):
            config.apply(layer_of(torch.ones(2, 3)), seen)


def test_inputs_that_are_always_zero() -> None:
    config = linear.Linear(activations="int8", activation_range="least_squares")
    made = config.apply(layer_of(torch.zeros(2, 3)), watched(config, torch.zeros(5, 3))).weight
    assert isinstance(made, AffineWeight) and made.activation_scale is not None
    assert made.activation_scale.tolist() == [1]
    assert made.dequantize().tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("kind", ["expert", "conv"])
def test_layers_whose_inputs_are_no_tokens(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="layer is a"):
        linear.Linear(activations="int8").apply(layer_of(torch.ones(2, 3), kind))


def of_graph(graph: Graph, folder: Path, **options: Any) -> tuple[Graph, PassResult]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    target.mkdir()
    graph.save(source)
    inputs = options.pop("inputs", "original")
    checked = PassStep.model_validate({"linear": {"activations": "int8", **options}})
    prepared = checked.model_copy(update={"config": checked.config.for_graph()})
    result = graph_sweep(source, target, prepared, small_graphs.batches(graph), inputs=inputs)
    return Graph.read(target), result


def rounded(x: Tensor, weight: AffineWeight) -> Tensor:
    """By the definition, in float64."""
    assert weight.activation_scale is not None and weight.activation_zero is not None
    scale, zero = weight.activation_scale.double(), weight.activation_zero.double()
    return ((x / weight.activation_scale).double().round() + zero).clamp(-128, 127).sub(zero) * scale


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_convolutions_rounds_its_inputs(method: Method, inputs: str, tmp_path: Path) -> None:
    """A depthwise one among them; read back from the file it computes what the definition says, layer by layer."""
    graph = small_graphs.separable()
    made, result = of_graph(graph, tmp_path, activation_range=method, inputs=inputs)
    x = small_graphs.inputs(graph)
    value = x.double()
    for name in ("layer0", "layer2", "layer4", "layer7"):
        layer: Any = made.layer(name)
        weight = made.stored[name]
        assert isinstance(weight, AffineWeight) and weight.format.activations == "tensor"
        taken = rounded(value.float() if value.ndim == 4 else value.float().reshape(len(x), -1), weight)
        bias, dense = layer.bias.double(), weight.dequantize(torch.float32).double()
        if isinstance(layer, nn.Linear):
            value = taken @ dense.t() + bias
        else:
            kernel = dense.view(layer.weight.shape)
            value = nn.functional.conv2d(taken, kernel, bias, layer.stride, layer.padding, groups=layer.groups)
            value = value.relu()
        if name == "layer4":
            value = value.flatten(1)
    torch.testing.assert_close(made.run(x), value.float(), rtol=1e-3, atol=1e-2)
    rows = {row.name: row for row in result.ledger}
    for name in ("layer0", "layer2", "layer4", "layer7"):
        low, high = rows[name].notes["activation_range"]
        assert low <= 0 <= high and rows[name].notes["observer"] == method
        assert rows[name].format == "int8 channel sym, int8 inputs per tensor"
    if method == "minmax":
        low, high = rows["layer0"].notes["activation_range"]
        assert (low, high) == (pytest.approx(float(x.min()), rel=1e-3), pytest.approx(float(x.max()), rel=1e-3))
        # The output is close to the original's.
        assert float((made.run(x) - graph.run(x)).norm() / graph.run(x).norm()) < 0.05


def test_one_range_serves_all_groups_of_a_convolution(tmp_path: Path) -> None:
    """The channels of a depthwise convolution differ; padding does not count as an input."""
    graph = chain((3, 4, 4), nn.Conv2d(3, 3, 3, padding=1, groups=3))
    made, result = of_graph(graph, tmp_path, activation_range="minmax")
    x = small_graphs.inputs(graph)
    (row,) = [row for row in result.ledger if row.name == "layer0"]
    assert row.notes["activation_range"] == [pytest.approx(float(x.min()), 1e-3), pytest.approx(float(x.max()), 1e-3)]
    weight = made.stored["layer0"]
    assert isinstance(weight, AffineWeight) and weight.activation_scale is not None
    assert weight.activation_scale.shape == (1,)
    assert row.output_error is not None


def test_tokens_of_a_graph(tmp_path: Path) -> None:
    """Linear layers over (n, tokens, in) round every token by itself and need no calibration."""
    graph = chain((5, 12), nn.Linear(12, 8), "relu.default", nn.Linear(8, 3))
    made, _ = of_graph(graph, tmp_path)
    x = small_graphs.inputs(graph)
    one = made.run(x)
    louder = x.clone()
    louder[:, 1:] *= 1000
    torch.testing.assert_close(made.run(louder)[:, 0], one[:, 0])
    assert not torch.equal(one, graph.run(x))


def test_layers_of_a_graph_with_options_of_their_own(tmp_path: Path) -> None:
    """Two layers of one input, of which one has a fixed range: each has its own observer."""
    from effcli.graphs.graph import Builder, Facts

    builder = Builder()
    node = builder.input()
    one = builder.module("one", small_graphs.seeded(nn.Linear(6, 4), 0), node)
    two = builder.module("two", small_graphs.seeded(nn.Linear(6, 4), 1), node)
    graph = builder.finish(builder.call("aten.add.Tensor", one, two), Facts(origin="test", shape=(6,)))
    made, _ = of_graph(graph, tmp_path, layers={"two": {"activation_range": "kl"}})
    formats = {name: str(weight.format) for name, weight in made.stored.items()}
    assert formats == {
        "one": "int8 channel sym, int8 inputs per token",
        "two": "int8 channel sym, int8 inputs per tensor",
    }


def test_a_dense_weight_takes_the_rounding_away(tmp_path: Path) -> None:
    graph = chain((12,), nn.Linear(12, 8))
    made, _ = of_graph(graph, tmp_path)
    weight: Any = graph.layer("layer0").weight
    made.set_weight("layer0", weight)
    x = small_graphs.inputs(graph)
    torch.testing.assert_close(made.run(x), graph.run(x), rtol=0, atol=0)


def windows() -> Windows:
    generator = torch.Generator().manual_seed(0)
    return Windows([torch.randint(architectures.VOCABULARY, (3, 16), generator=generator)] * 2, "original")


def compressed(source: Path, target: Path, **options: Any) -> Path:
    target.mkdir()
    step = PassStep.model_validate({"linear": {"activations": "int8", **options}})
    sweep(source, target, step, windows(), target.with_name(f"{target.name}-work"))
    return target


@pytest.mark.parametrize("range", ["dynamic", "minmax"])
@pytest.mark.parametrize("name", architectures.NAMES)
def test_every_architecture_loads_with_stock_transformers(name: str, range: str, tmp_path: Path) -> None:
    """The stock loader rounds the same inputs to the same integers, so that its logits are the reference's."""
    pytest.importorskip("compressed_tensors")
    source = architectures.make(name, tmp_path / "model")
    ignored = {"ignore": ["*experts*"]} if name == "mixtral" else {}
    found = verify(compressed(source, tmp_path / "out", activation_range=range, **ignored))
    assert found.passed, found.line
    assert found.packed is not None and found.packed.relative < 1e-2
    if name == "gpt2":
        assert found.layout == "effcli" and found.refused
    else:
        assert found.layout == "compressed-tensors" and found.stock is not None
        # OPT hands its layers two axes, of which compressed-tensors takes one scale for all tokens.
        assert found.stock.largest == 0 or (name, range) == ("opt", "dynamic")


def test_experts_are_refused_and_named(tmp_path: Path) -> None:
    source = architectures.make("mixtral", tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"experts.*3-D parameter"):
        compressed(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("range", ["dynamic", "percentile"])
def test_a_loaded_network_computes_what_the_files_say(range: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against transformers with plain weights and hooks that know of nothing but the tensors in the file."""
    source = architectures.make("llama", tmp_path / "model", dtype)
    path = compressed(source, tmp_path / "out", activation_range=range)
    weights = open_weights(path)
    network = AutoModelForCausalLM.from_pretrained(source).eval()
    for name in weights.stored:
        weight = weights.packed(name)
        assert isinstance(weight, AffineWeight)
        module: Any = network.get_submodule(name)
        module.weight.data = (weight.signed.float() * weight.scale.float()).to(dtype)
        module.register_forward_pre_hook(lambda _, args, weight=weight: (simulated(args[0], weight),))
    ids = torch.randint(architectures.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(ids).logits.float()
        found = effcli.load(path)(ids).logits.float()
        dense = effcli.load(path, packed=False)(ids).logits.float()
    torch.testing.assert_close(dense, expected, rtol=0, atol=0)
    # A last digit may decide where an input falls, and in bfloat16 it is a coarse one.
    assert float((found - expected).norm() / expected.norm()) < (2e-3 if dtype is torch.float32 else 4e-2)


def simulated(x: Tensor, weight: AffineWeight) -> Tensor:
    """x rounded to int8 and back in its own dtype."""
    if weight.activation_scale is None or weight.activation_zero is None:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / scale).round().clamp(-128, 127) * scale
    scale, zero = weight.activation_scale.to(x.dtype), weight.activation_zero
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


def test_a_fixed_range_reaches_the_ledger_and_the_file(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model")
    target = tmp_path / "out"
    target.mkdir()
    options = {"activations": "int8", "activation_range": "minmax", "layers": {"*.o_proj": {"percentile": 90}}}
    step = PassStep.model_validate({"linear": options})
    result = sweep(source, target, step, windows(), tmp_path / "work")
    rows = {row.name: row for row in result.ledger}
    row = rows["model.layers.1.mlp.down_proj"]
    assert row.format == "int8 channel sym, int8 inputs per tensor"
    low, high = row.notes["activation_range"]
    assert low < 0 < high
    assert row.output_error is not None and 0 < row.output_error < 1e-3
    weight = open_weights(target).packed("model.layers.1.mlp.down_proj")
    assert isinstance(weight, AffineWeight) and weight.activation_scale is not None
    assert float(weight.activation_scale) == pytest.approx((high - low) / 255, rel=1e-3)
    # Layers of one input have one range.
    ranges = {name: rows[f"model.layers.0.self_attn.{name}_proj"].notes["activation_range"] for name in "qkv"}
    assert len({tuple(found) for found in ranges.values()}) == 1


def test_twice_the_same(tmp_path: Path) -> None:
    source = architectures.make("qwen3", tmp_path / "model")
    for name in ("once", "again"):
        compressed(source, tmp_path / name, activation_range="least_squares")
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float16)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"].fill_(6e4)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"inputs of model\.layers\.\d"):
        compressed(source, tmp_path / "out", activation_range="kl")
