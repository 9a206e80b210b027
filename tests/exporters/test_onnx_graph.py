from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_architectures
from small_graphs import chain, inputs, residual, separable
from torch import Tensor, nn

pytest.importorskip("onnx", exc_type=ImportError)
pytest.importorskip("onnxruntime", exc_type=ImportError)
pytest.importorskip("onnxscript", exc_type=ImportError)

import onnx

from effcli.errors import MachineError, NumericsError, UnsupportedError, UserError
from effcli.exporters import _onnx_graph as exporter
from effcli.formats import Affine, AffineWeight
from effcli.graphs import timing
from effcli.graphs.graph import Graph
from effcli.importers import read
from effcli.layers.contract import Layer, Statistics
from effcli.passes.quantize import linear
from effcli.platform import onnx_session

MACHINE = re.compile(rb"/(work|home|root|tmp|usr|opt|mnt|var)/|site-packages")
FORMATS = [
    *(Affine(bits, "channel", 0, bits % 2 == 0) for bits in (2, 3, 4, 5, 6, 8)),
    Affine(4, "tensor", 0, False),
    Affine(8, "tensor", 0, True),
    Affine(3, "group", 2, True),
    Affine(4, "group", 2, False),
    Affine(8, "group", 2, False),
]


def quantized(weight: Tensor, format: Affine, scaled: bool = False) -> AffineWeight:
    """weight (out, in) rounded to the nearest; scaled: with an explicit input scale, made up."""
    options = {"granularity": format.strategy, "group_size": format.group_size or None}
    config = linear.Linear.model_validate({"bits": format.bits, "symmetric": format.symmetric, **options})
    found = config.apply(linear.Layer("layer", "linear", weight, torch.float32)).weight
    assert isinstance(found, AffineWeight)
    factor = torch.linspace(0.5, 2, weight.shape[1]) if scaled else None
    return AffineWeight(found.format, found.codes, found.scale, found.zero, factor)


def pack(graph: Graph, format: Affine, *, only: str = "", scaled: bool = False) -> Graph:
    """The graph with the layers of kind `only`, or all, in a format."""
    for site in graph.sites():
        if only in ("", site.kind):
            weight: Any = graph.layer(site.name).weight
            graph.set_weight(site.name, quantized(weight.reshape(site.shape), format, scaled))
    return graph


def saved(graph: Graph, folder: Path) -> Path:
    source = folder / "graph"
    source.mkdir(parents=True)
    graph.save(source)
    return source


def exported(graph: Graph, folder: Path, **options: Any) -> str:
    (folder / "onnx").mkdir(parents=True)
    return exporter.export_graph(saved(graph, folder), folder / "onnx", **options)


def run(folder: Path, values: Tensor) -> Tensor:
    session = onnx_session.open_session(folder / "onnx", threads=1, entries=onnx_session.EXACT)
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    (found,) = onnx_session.run(session, {"input": values.numpy().astype(kind)}).values()
    return torch.from_numpy(found.astype(np.float32))


def restored(folder: Path) -> dict[str, Tensor]:
    """What stands behind every `DequantizeLinear` of a file, by its codes' name, in the shape that it has there."""
    model = onnx.load(folder / "onnx" / "model.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in nodes)
    path = folder / "restored.onnx"
    onnx.save(model, path)
    session = onnx_session.open_session(path, threads=1)
    (port,) = session.get_inputs()
    values = onnx_session.run(session, {"input": np.zeros((1, *port.shape[1:]), np.float32)})
    return {node.input[0]: torch.from_numpy(values[node.output[0]]) for node in nodes}


def small() -> Graph:
    return chain(
        (2, 5, 4),
        nn.Conv2d(2, 6, 3),
        "relu.default",
        nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=3, bias=False),
        ("reshape.default", [-1, 6, 6]),
        nn.Linear(6, 7),
        ("reshape.default", [-1, 42]),
        nn.Linear(42, 3, bias=False),
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_weights_are_restored_exactly(format: Affine, tmp_path: Path) -> None:
    graph = pack(small(), format)
    line = exported(graph, tmp_path)
    found = restored(tmp_path)
    assert len(found) == len(graph.stored) == 4
    for name, weight in graph.stored.items():
        expected = weight.dequantize()
        assert torch.equal(found[f"{name}.weight_codes"].reshape(expected.shape), expected)
    assert "4 of 4 layers packed" in line
    for count in (1, 3):
        values = inputs(graph, count, seed=count)
        torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "kind"), [(2, "UINT4"), (3, "UINT4"), (4, "UINT4"), (5, "UINT8"), (8, "UINT8")])
def test_codes_by_hand(bits: int, kind: str, tmp_path: Path) -> None:
    codes = torch.tensor([[0, 1, 3], [2, 3, 0]], dtype=torch.uint8)
    zero = torch.tensor([[1], [2]], dtype=torch.uint8)
    weight = AffineWeight(Affine(bits, "channel"), codes, torch.tensor([[0.5], [2.0]]), zero)
    graph = chain((3,), nn.Linear(3, 2, bias=False))
    graph.set_weight("layer0", weight)
    exported(graph, tmp_path)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    stored = {item.name: item for item in model.graph.initializer}
    tensor = stored["layer0.weight_codes"]
    assert onnx.TensorProto.DataType.Name(tensor.data_type) == kind
    assert tensor.raw_data == (bytes([0x10, 0x23, 0x03]) if kind == "UINT4" else bytes([0, 1, 3, 2, 3, 0]))
    assert run(tmp_path, torch.tensor([[1.0, 10.0, 100.0]])).tolist() == [[-0.5 + 0 + 100, 0 + 20 - 400]]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_explicit_input_scales(precision: str, tmp_path: Path) -> None:
    graph = pack(small(), Affine(8, "channel"), scaled=True)
    exported(graph, tmp_path, precision=precision)
    values = inputs(graph, 3)
    tolerance = 1e-5 if precision == "float32" else 2e-2
    torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=tolerance, atol=tolerance)


def test_float16_rounds_restored_weights_once(tmp_path: Path) -> None:
    graph = pack(chain((6,), nn.Linear(6, 5, bias=False)), Affine(4, "group", 3))
    assert "1 of 1 layer packed" in exported(graph, tmp_path, precision="float16")
    # The rows of the identity read the weight column by column, without a sum that could round.
    weight: Any = graph.layer("layer0").weight
    assert torch.equal(run(tmp_path, torch.eye(6)), weight.t().half().float())


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet"])
def test_architectures_stay_packed(name: str, tmp_path: Path) -> None:
    graph = pack(read(vision_architectures.make(name, tmp_path / "source")), Affine(8, "channel"))
    line = exported(graph, tmp_path)
    layers = len(graph.sites())
    assert f"{layers} of {layers} layers packed" in line and "top-1 agreement 100.0%" in line
    # A batch norm merged into a weight would leave no place for its codes.
    assert ("`fold` first" in line) == (name == "resnet")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == layers
    for count in (1, 3):
        values = inputs(graph, count)
        torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=1e-4, atol=1e-4)


def test_restored_once_at_load(tmp_path: Path) -> None:
    graph = pack(separable(), Affine(4, "channel"))
    exported(graph, tmp_path)
    values = inputs(graph, 2)
    entries = {exporter.RESTORE_AT_LOAD: "1"}
    session = onnx_session.open_session(tmp_path / "onnx", threads=1, entries=entries)
    (found,) = onnx_session.run(session, {"input": values.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(found), graph.run(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_file_is_about_as_small_as_the_checkpoint(bits: int, tmp_path: Path) -> None:
    graph = pack(chain((256,), nn.Linear(256, 512), "relu.default", nn.Linear(512, 10)), Affine(bits, "channel"))
    exported(graph, tmp_path)
    size = (tmp_path / "onnx" / "model.onnx").stat().st_size
    assert size < 1.05 * (tmp_path / "graph" / "effcli.safetensors").stat().st_size + 2000


def test_dense_where_asked_for(tmp_path: Path) -> None:
    graph = pack(residual(), Affine(4, "channel"))
    line = exported(graph, tmp_path, dequantize=True)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert "packed" not in line
    assert not any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    values = inputs(graph, 3)
    torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=1e-4, atol=1e-4)


def test_some_layers_packed(tmp_path: Path) -> None:
    line = exported(pack(separable(), Affine(8, "channel"), only="linear"), tmp_path)
    assert "1 of 4 layers packed, 3 dense" in line


def test_the_file_says_what_it_is_and_not_where_it_was_made(tmp_path: Path) -> None:
    graph = pack(residual(), Affine(4, "channel"))
    exported(graph, tmp_path)
    path = tmp_path / "onnx" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    assert MACHINE.search(path.read_bytes()) is None
    model = onnx.load(path)
    assert model.producer_name == "effcli"
    properties = {item.key: item.value for item in model.metadata_props}
    assert properties == {"effcli.origin": "test", "effcli.opset": "21"}
    assert [item.version for item in model.opset_import if item.domain == ""] == [21]
    ports = [*model.graph.input, *model.graph.output]
    assert [port.name for port in ports] == ["input", "output"]
    assert all(port.type.tensor_type.shape.dim[0].dim_param for port in ports)
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]] == [3, 9, 7]


def test_weights_beside_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_EXTERNAL", 1000)
    graph = pack(chain((64,), nn.Linear(64, 64), nn.Linear(64, 3)), Affine(4, "channel"))
    exported(graph, tmp_path)
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size >= 64 * 64 / 2
    values = inputs(graph, 3)
    torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=1e-5, atol=1e-5)


def test_only_a_classifier_has_a_top_1(tmp_path: Path) -> None:
    autoencoder = chain((6,), nn.Linear(6, 3), "relu.default", nn.Linear(3, 6))
    assert "top-1" not in exported(autoencoder, tmp_path / "a")
    assert "top-1" in exported(chain((6,), nn.Linear(6, 3)), tmp_path / "b")


def reference(values: Tensor, weight: AffineWeight, bias: Tensor) -> Tensor:
    """(n, in) -> (n, out) in int64: inputs to 8 bits between their extremes, zero among them, halves to even."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    zero = int(np.clip(np.round(-np.float32(low) / scale), 0, 255))
    codes = (torch.from_numpy(np.round(values.numpy() / scale)) + zero).clamp(0, 255).long() - zero
    total = codes @ (weight.codes.long() - weight.format.fixed_zero).t()
    return (total.double() * float(scale) * weight.scale.double().reshape(1, -1) + bias).float()


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_integer_product(strategy: Any, tmp_path: Path) -> None:
    graph = pack(chain((9,), nn.Linear(9, 5)), Affine(8, strategy, 0, True))
    line = exported(graph, tmp_path, activations="int8")
    values = inputs(graph, 4)
    bias: Any = graph.layer("layer0").bias
    expected = reference(values, graph.stored["layer0"], bias)
    torch.testing.assert_close(run(tmp_path, values), expected, rtol=1e-5, atol=1e-5)
    assert "1 linear layer in integers" in line and "0 layers in float" in line


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_integer_transformer(precision: str, tmp_path: Path) -> None:
    graph = pack(read(vision_architectures.make("vit", tmp_path / "source")), Affine(8, "channel", 0, True))
    line = exported(graph, tmp_path, activations="int8", precision=precision)
    assert "13 linear layers in integers" in line and "1 layer in float" in line
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) == 13
    values = inputs(graph, 3)
    torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=0.1, atol=0.1)
    assert timing.of_onnx(tmp_path / "onnx", 1).runtime == "onnxruntime int8"


def test_layers_that_integers_cannot_take_are_named(tmp_path: Path) -> None:
    graph = pack(chain((6,), *(nn.Linear(6, 6) for _ in range(5))), Affine(8, "channel", 0, False))
    with pytest.raises(UnsupportedError) as caught:
        exported(graph, tmp_path, activations="int8")
    assert "layer0, layer1, layer2 and 2 more (int8 channel asym)" in caught.value.cause
    assert "symmetric: true" in caught.value.remedy and "\n" not in caught.value.cause
    assert list((tmp_path / "onnx").iterdir()) == []


def test_integers_need_packed_linear_layers(tmp_path: Path) -> None:
    convolutions = pack(separable(), Affine(8, "channel", 0, True), only="conv")
    with pytest.raises(UnsupportedError, match="this network has none"):
        exported(convolutions, tmp_path / "a", activations="int8")
    with pytest.raises(UserError, match="dequantize removes"):
        exported(convolutions, tmp_path / "b", activations="int8", dequantize=True)


def test_float16_that_overflows(tmp_path: Path) -> None:
    graph = chain((4,), nn.Linear(4, 4, bias=False))
    graph.set_weight("layer0", torch.full((4, 4), 6e4) * torch.eye(4))
    with pytest.raises(NumericsError, match="overflows"):
        exported(graph, tmp_path, precision="float16")


@pytest.mark.parametrize("value", [3e38, float("nan")])
def test_a_network_whose_outputs_are_no_numbers(value: float, tmp_path: Path) -> None:
    """Not the fault of a precision."""
    graph = chain((4,), nn.Linear(4, 4, bias=False))
    graph.set_weight("layer0", torch.full((4, 4), value))
    with pytest.raises(NumericsError, match="own outputs are NaN or infinite"):
        exported(graph, tmp_path)


def test_a_file_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> None:
        for value in model.graph.initializers.values():
            value.const_value = exporter.onnx_ir.tensor(value.const_value.numpy() * 2, name=value.name)

    monkeypatch.setattr(exporter, "_narrow", wrong)
    with pytest.raises(MachineError, match="something else"):
        exported(chain((4,), nn.Linear(4, 4)), tmp_path)


def rounding(graph: Graph, **options: Any) -> Graph:
    """The graph with int8 weights whose inputs are int8 too, their ranges those of random inputs."""
    config = linear.Linear(activations="int8", **options).for_graph()
    watched = {str(node.target): [] for node in graph.nodes if node.op == "call_module"}
    for name, seen in watched.items():
        graph.layer(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    graph.run(inputs(graph))
    for site in graph.sites():
        weight: Any = graph.layer(site.name).weight
        graph.layer(site.name)._forward_pre_hooks.clear()
        seen = Statistics(site.columns, config.needs)
        if config.needs:
            # A run is tried beforehand on tensors without numbers.
            seen.see(next(x for x in watched[site.name] if type(x) is torch.Tensor))
            seen.tokens = 1
        layer = Layer(site.name, site.kind, weight.reshape(site.shape), torch.float32)
        graph.set_weight(site.name, config.apply_groups(layer, (seen,)).weight)
    return graph


@pytest.mark.parametrize("method", ["minmax", "percentile", "least_squares"])
def test_inputs_of_a_fixed_range(method: str, tmp_path: Path) -> None:
    """Convolutions round them and back, linear layers multiply integers; both as the checkpoint does."""
    graph = rounding(separable(), activation_range=method)
    line = exported(graph, tmp_path)
    assert "1 linear layer in integers, the inputs with a fixed scale; 3 layers in float" in line
    assert "the inputs of 3 convolutions rounded to int8 and back" in line
    values = inputs(graph, 40, seed=7)
    expected = graph.run(values)
    found = run(tmp_path, values)
    # Sums in another order move a number across the border between two levels here and there.
    close = (found - expected).abs() < 1e-4 * expected.abs().max()
    assert float(close.float().mean()) > 0.5
    assert float((found - expected).norm()) < 0.1 * float((separable().run(values) - expected).norm())
    operators = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node]
    assert operators.count("QuantizeLinear") == 4


def test_inputs_with_a_scale_per_token(tmp_path: Path) -> None:
    graph = rounding(chain((5, 12), nn.Linear(12, 8), "relu.default", nn.Linear(8, 3)))
    assert "2 linear layers in integers, the inputs with a scale per token" in exported(graph, tmp_path)
    values = inputs(graph, 9, seed=3) * torch.logspace(-3, 3, 5).unsqueeze(1)
    values[0, 0] = 0
    torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"activation_range": "minmax"}, {}])
def test_dense_weights_keep_rounded_inputs(options: dict[str, Any], tmp_path: Path) -> None:
    graph = rounding(chain((12,), nn.Linear(12, 8), "relu.default", nn.Linear(8, 3)), **options)
    exported(graph, tmp_path, dequantize=True)
    values = inputs(graph, 9, seed=3)
    torch.testing.assert_close(run(tmp_path, values), graph.run(values), rtol=1e-4, atol=1e-5)
