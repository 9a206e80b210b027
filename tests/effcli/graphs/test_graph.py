"""Graphs: what they say of their layers, and that a checkpoint gives the same network or one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effcli.errors import CheckpointError, DataError, UnsupportedError
from effcli.files.checkpoint import read_entry, read_header, write_shard
from effcli.formats import Affine, AffineWeight
from effcli.graphs.graph import (
    FILE_NAME,
    WEIGHTS_NAME,
    Builder,
    Facts,
    Graph,
    calls,
    function,
    is_graph,
    operation,
    where,
)
from effcli.inputs.preprocess import Preprocess
from effcli.passes.quantize._affine import encode, extremes

SHAPE = 4, 6, 5


def network() -> Graph:
    """A grouped convolution twice over, a batch norm, a constant, and a linear layer."""
    torch.manual_seed(0)
    builder = Builder()
    inputs = builder.input()
    conv = nn.Conv2d(4, 4, (3, 2), padding=(1, 0), groups=2)
    norm = nn.BatchNorm2d(4, eps=1e-3)
    norm.running_mean = torch.randn(4)
    norm.running_var = torch.rand(4) + 0.5
    once = builder.module("stem.conv", conv, inputs, source="net.py:3 in forward")
    padded = builder.call("aten.constant_pad_nd.default", once, [0, 1], -float("inf"))
    finite = builder.call("aten.clamp.default", padded, min=-1.0)
    twice = builder.module("stem.conv", conv, finite)
    normed = builder.module("stem.norm", norm, twice)
    shift = builder.tensor("shift", torch.randn(4, 1, 1))
    added = builder.call("aten.add.Tensor", normed, shift)
    flat = builder.call("aten.reshape.default", added, [-1, 96])
    output = builder.module("head", nn.Linear(96, 3, bias=False), flat)
    return builder.finish(output, Facts(origin="test", shape=SHAPE, classes=("a", "b", "c"), remarks=("hello",)))


def affine(weight: torch.Tensor, bits: int = 4) -> AffineWeight:
    format = Affine(bits, "channel")
    low, high = extremes(weight, format)
    return encode(weight, low, high, format, torch.float32)


def saved(tmp_path: Path, graph: Graph | None = None) -> Path:
    (graph or network()).save(tmp_path)
    return tmp_path


def test_sites_in_the_order_in_which_they_run() -> None:
    conv, head = network().sites()
    assert (conv.name, conv.kind, conv.shape, conv.groups) == ("stem.conv", "conv", (4, 12), 2)
    assert (head.name, head.kind, head.shape, head.groups) == ("head", "linear", (3, 96), 1)
    assert conv.parameter == "stem.conv.weight"
    assert conv.view(network().module.get_parameter(conv.parameter)).shape == (4, 12)
    assert [node.name for node in calls(network(), "stem.conv")] == ["stem_conv", "stem_conv_1"]


def test_where_names_a_node() -> None:
    graph = network()
    nodes = {node.name: node for node in graph.nodes}
    assert where(nodes["stem_conv"]) == "stem_conv (Conv2d, net.py:3 in forward)"
    assert where(nodes["add"]) == "add (aten.add.Tensor)"
    assert operation(graph.input) == "placeholder" and graph.output.name == "head"
    assert all("source" in node.meta for node in graph.nodes)


def test_weights_and_shapes() -> None:
    graph = network()
    assert graph.weights() == 4 * 2 * 6 + 4 + 8 + 4 + 288
    shapes = graph.shapes()
    assert (shapes["stem_conv"], shapes["stem_conv_1"], shapes["head"]) == ((4, 6, 4), (4, 6, 4), (3,))
    assert shapes["shift"] == (4, 1, 1)


def test_examples_are_inputs_that_the_network_takes() -> None:
    """Numbers of rows for embeddings, of the smallest of them; the same for the same seed."""
    random = network().examples(50, torch.Generator().manual_seed(0))
    assert random.shape == (50, *SHAPE) and float(random.min()) < 0
    builder = Builder()
    numbers = builder.call("aten.to.dtype", builder.input(), torch.int64)
    tables = [builder.module(f"rows{count}", nn.Embedding(count, 2), numbers) for count in (3, 7)]
    graph = builder.finish(builder.call("aten.add.Tensor", *tables), Facts(origin="test", shape=(4,)))
    rows, again = (graph.examples(50, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(rows, again) and rows.dtype == torch.float32
    assert set(rows.flatten().tolist()) == {0, 1, 2}
    assert graph.run(rows).shape == (50, 4, 2)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, batch: int) -> None:
    graph = network()
    again = Graph.read(saved(tmp_path, graph))
    inputs = torch.randn(batch, *SHAPE)
    torch.testing.assert_close(again.run(inputs), graph.run(inputs), rtol=0, atol=0)
    assert again.facts == graph.facts and again.sites() == graph.sites()
    assert [(n.name, n.op, n.meta["source"]) for n in again.nodes] == [
        (n.name, n.op, n.meta["source"]) for n in graph.nodes
    ]
    assert is_graph(tmp_path) and not is_graph(tmp_path.parent)


def test_a_digest_tells_networks_apart_that_share_their_weights() -> None:
    digest = network().digest()
    assert network().digest() == digest
    other = network()
    (clamp,) = [node for node in other.nodes if operation(node) == "aten.clamp.default"]
    clamp.kwargs = {"min": -2.0}
    assert other.digest() != digest
    other = network()
    other.module.get_parameter("head.weight").data[0, 0] += 1
    assert other.digest() != digest


def test_compressed_layers_are_stored_packed(tmp_path: Path) -> None:
    graph = network()
    before = graph.run(torch.ones(2, *SHAPE))
    for site in graph.sites():
        graph.set_weight(site.name, affine(site.view(graph.layer(site.name).weight.detach())))  # type: ignore[arg-type]
    after = graph.run(torch.ones(2, *SHAPE))
    assert not torch.equal(before, after)
    again = Graph.read(saved(tmp_path, graph))
    torch.testing.assert_close(again.run(torch.ones(2, *SHAPE)), after, rtol=0, atol=0)
    assert again.stored.keys() == {"stem.conv", "head"} and again.stored["head"].format == Affine(4, "channel")
    names = read_header(tmp_path / WEIGHTS_NAME).keys()
    assert "head.weight" not in names and "head.weight_packed" in names
    again.set_weight("head", torch.zeros(3, 96))
    assert "head" not in again.stored and not again.layer("head").weight.any()  # type: ignore[operator]


def test_a_bias_where_there_was_none(tmp_path: Path) -> None:
    graph = network()
    bias = torch.tensor([1.0, 2, 3])
    before = graph.run(torch.ones(1, *SHAPE))
    graph.set_bias("head", bias)
    bias.zero_()
    torch.testing.assert_close(graph.run(torch.ones(1, *SHAPE)) - before, torch.tensor([[1.0, 2, 3]]))
    again = Graph.read(saved(tmp_path, graph))
    torch.testing.assert_close(again.run(torch.ones(1, *SHAPE)), graph.run(torch.ones(1, *SHAPE)))


def test_facts_survive(tmp_path: Path) -> None:
    graph = network()
    graph.facts = graph.facts.model_copy(update={"preprocess": Preprocess(scale=1 / 255, mean=(0.5, 0.4, 0.3, 0.2))})
    assert Graph.read(saved(tmp_path, graph)).facts == graph.facts


def test_nothing_unused_is_kept() -> None:
    builder = Builder()
    inputs = builder.input()
    builder.module("left", nn.Linear(3, 3), inputs)
    builder.tensor("over", torch.ones(3))
    graph = builder.finish(builder.call("aten.relu.default", inputs), Facts(origin="test", shape=(3,)))
    assert not graph.module.state_dict() and graph.weights() == 0


def test_inputs_of_another_shape() -> None:
    with pytest.raises(DataError, match=r"inputs of shape \(4, 6\) for a network that takes \(4, 6, 5\)"):
        network().run(torch.zeros(1, 4, 6))


def test_what_a_builder_refuses() -> None:
    builder = Builder()
    with pytest.raises(UnsupportedError, match="pool is a MaxPool2d, which a graph does not hold"):
        builder.module("pool", nn.MaxPool2d(2), builder.input())
    with pytest.raises(UnsupportedError, match=r"this torch has no operator aten\.relux\.default"):
        function("aten.relux.default")
    for name in ("os.system", "aten.relu", "operator.call"):
        with pytest.raises(UnsupportedError, match="has no operator"):
            function(name)


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / FILE_NAME).read_text())
        change(data)
        (folder / FILE_NAME).write_text(json.dumps(data))

    return edit


def _cut(folder: Path) -> None:
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-10])


def _shrink(folder: Path) -> None:
    write_shard(folder / WEIGHTS_NAME, {"shift": torch.zeros(4, 1, 1), "stem.conv.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / FILE_NAME).write_text("{"), "graph.json is damaged"),
        (lambda folder: (folder / FILE_NAME).unlink(), "holds no graph"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), r"holds no \*.safetensors file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (_cut, "is truncated"),
        (_shrink, r"stem.conv.weight has the shape \(2,\), the graph needs \(4, 2, 3, 2\)|lacks the tensor"),
        (_edit(lambda data: data["modules"].pop("head")), "graph.json is damaged"),
        (_edit(lambda data: data["nodes"].pop(2)), "graph.json is damaged"),
        (_edit(lambda data: data.pop("nodes")), "graph.json is damaged"),
        (_edit(lambda data: data["modules"]["head"].update(type="Dropout")), "graph.json is damaged"),
        (_edit(lambda data: data["nodes"][-2].update(op="call_method")), "graph.json is damaged"),
    ],
)
def test_damage_has_one_line(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved(tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        Graph.read(tmp_path)
    assert "\n" not in caught.value.cause and caught.value.remedy


@pytest.mark.parametrize("name", ["head.weight_packed", "head.weight_scale", "stem.conv.bias"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    graph = network()
    graph.set_weight("head", affine(graph.layer("head").weight.detach()))  # type: ignore[arg-type]
    entries = read_header(saved(tmp_path, graph) / WEIGHTS_NAME)
    write_shard(tmp_path / WEIGHTS_NAME, {key: read_entry(entry) for key, entry in entries.items() if key != name})
    with pytest.raises(CheckpointError, match=r"does not hold head as|lacks the tensor stem\.conv\.bias") as caught:
        Graph.read(tmp_path)
    assert "\n" not in caught.value.cause


def test_an_unknown_operator(tmp_path: Path) -> None:
    _edit(lambda data: data["nodes"][-4].update(target="aten.of_the_future.default"))(saved(tmp_path))
    with pytest.raises(UnsupportedError, match=r"this torch has no operator aten\.of_the_future\.default"):
        Graph.read(tmp_path)


_CODE = 'x"), open("{}", "w'


@pytest.mark.parametrize(
    "change",
    [
        lambda data, code: data["modules"].update({code: data["modules"]["head"]}),
        lambda data, code: data["tensors"].update({code: data["tensors"]["shift"]}),
        lambda data, code: data["nodes"][0].update(target=code),
        lambda data, code: data["nodes"][-2].update(target=code),
        lambda data, code: data["nodes"][2]["kwargs"].update({code: 1}),
    ],
)
def test_nothing_in_a_checkpoint_is_code(tmp_path: Path, change: Callable[[dict[str, Any], str], object]) -> None:
    """torch.fx runs the Python that it writes of a graph: no name in a file may get into it as more than a name."""
    victim = tmp_path / "ran"
    _edit(lambda data: change(data, _CODE.format(victim)))(saved(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        Graph.read(tmp_path).run(torch.zeros(1, *SHAPE))
    assert "\n" not in caught.value.cause and not victim.exists()
