"""Plans and inspections of graphs and integer networks: figures by hand, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from plain_passes import HALVE, PRUNE, Trim, Tune, asking
from safetensors.numpy import load_file
from small_graphs import Held, chain, residual
from torch import nn

from effcli.errors import RecipeError, SelectionError
from effcli.files.checkpoint import Checkpoint
from effcli.graphs import plan
from effcli.graphs.graph import Builder, Facts, Graph
from effcli.graphs.integer import IntegerNetwork, Linear, Program, Value
from effcli.graphs.plan import PlannedGraph
from effcli.graphs.sweep import graph_sweep
from effcli.graphs.training import train_graph
from effcli.layers.contract import Change, Needs, NetworkPass, Transformed
from effcli.reports.units import size
from effcli.run.plan import Plan, make
from effcli.run.recipe import PassStep, Recipe, check
from effcli.training import loop, snapshot


def small() -> Graph:
    """90 + 10 and 640 + 4 weights: 2 x 5 x 3 x 3, 160 x 4."""
    return chain((1, 6, 6), nn.Conv2d(1, 10, 3), ("reshape.default", [-1, 160]), nn.Linear(160, 4))


def planned(graph: Graph, *steps: Any, **calibration: Any) -> Plan:
    recipe = check({"model": "net.pt2", "passes": list(steps), "calibration": calibration})
    return plan_of(recipe.for_graph(), graph)


def plan_of(recipe: Recipe, graph: Graph) -> Plan:
    return make(recipe, PlannedGraph(graph, recipe.calibration))


def test_bytes_by_hand() -> None:
    found = planned(small(), {"linear": {"bits": 4}})
    assert found.weights == 90 + 10 + 640 + 4
    assert found.input_bytes == 4 * 744
    # 9 codes of 4 bits take 2 words, 160 take 20; then the shape, a float32 scale per row, and zero points of 4 bits.
    convolution = 10 * 8 + 16 + 10 * 4 + 2 * 4
    linear = 4 * 80 + 16 + 4 * 4 + 4
    assert [row.nbytes for row in found.rows] == [convolution, linear]
    assert found.output_bytes == convolution + linear + 4 * (10 + 4)
    first, second = found.rows
    assert (first.name, first.kind, first.shape) == ("layer0", "conv", (10, 9))
    assert (second.format, second.status) == ("int4 channel asym", "compress")
    assert second.bits_per_weight == pytest.approx(8 * linear / 640)
    assert "before" in found.remarks[0] and found.operations == 0


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 3, "granularity": "tensor"},
        {"bits": 4, "granularity": "group", "group_size": 8, "symmetric": True, "ignore": ["stem"]},
        {"bits": 5, "layers": {"head": {"bits": 8}}},
    ],
    ids=str,
)
def test_planned_bytes_are_those_of_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    graph, step = residual(), {"linear": options}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    graph.save(tmp_path / "before")
    recipe = check({"model": "net.pt2", "passes": [step]}).for_graph()
    graph_sweep(tmp_path / "before", tmp_path / "after", recipe.passes[0])
    found = plan_of(recipe, graph)
    sizes = [
        sum(entry.nbytes for entry in Checkpoint.open(tmp_path / name).entries.values()) for name in ("before", "after")
    ]
    assert [found.input_bytes, found.output_bytes] == sizes


@pytest.mark.parametrize(
    ("steps", "exact"),
    [
        ((HALVE,), True),
        (({"linear": {"bits": 4}}, HALVE), True),
        (({"linear": {"bits": 4, "ignore": ["stem"]}}, {"smoothquant": {}}), True),
        ((PRUNE,), False),
        ((PRUNE, {"linear": {"bits": 4}}), False),
        (({"linear": {"bits": 4}}, PRUNE), False),
    ],
)
def test_passes_that_say_nothing_of_formats(steps: tuple[Any, ...], exact: bool, tmp_path: Path) -> None:
    """A pruned layer has at most the planned bytes, for it is not known yet what is kept."""
    graph = residual()
    recipe = check({"model": "net.pt2", "passes": list(steps)}).for_graph()
    source = tmp_path / "0"
    source.mkdir()
    graph.save(source)
    inputs = torch.randn(8, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    for number, step in enumerate(recipe.passes, start=1):
        target = tmp_path / str(number)
        target.mkdir()
        result = graph_sweep(source, target, step, lambda: iter([inputs]))
        source = target
    found = plan_of(recipe, graph)
    last = found.rows[-len(result.ledger) :]
    assert [(row.name, row.format) for row in last] == [(row.name, row.format) for row in result.ledger]
    written = sum(entry.nbytes for entry in Checkpoint.open(source).entries.values())
    assert found.output_bytes == written if exact else found.output_bytes > written
    # What is there already is known.
    assert plan.inspect("net", source).nbytes == written


def gelu_classifier() -> Graph:
    """A convolution behind an uncounted average, a table, a layer norm, a layer and a softmax."""
    steps: tuple[Any, ...] = (nn.Conv2d(3, 10, 3), ("avg_pool2d.default", [2, 2], [2, 2], [1, 1], False, False))
    steps += (("gelu.default",), ("mean.dim", [2, 3], False), nn.LayerNorm(10), nn.Linear(10, 7), ("softmax.int", 1))
    return chain((3, 8, 8), *steps)


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (residual, [{"int8": {}}]),
        (residual, [{"linear": {"bits": 4, "symmetric": True, "granularity": "channel"}}, {"int8": {}}]),
        (residual, ["fold", {"linear": {"bits": 4, "symmetric": True, "granularity": "channel"}}, {"int8": {}}]),
        (residual, [{"fold": {"ignore": ["stem"]}}, {"linear": {"bits": 4, "symmetric": True}}, {"int8": {}}]),
        (small, [{"linear": {"bits": 2, "symmetric": True, "granularity": "channel"}}, {"int8": {}}]),
        (small, [{"kmeans": {"bits": 2, "granularity": "tensor"}}, {"int8": {}}]),
        (gelu_classifier, [{"int8": {}}]),
    ],
)
def test_an_integer_network_is_planned_as_it_is_written(build: Any, steps: list[Any], tmp_path: Path) -> None:
    """Formats and bytes of every layer, and the bytes of the file, with the constants that are no layer's."""
    graph = build()
    recipe = check({"model": "net.pt2", "passes": steps}).for_graph()
    found = plan_of(recipe, graph)
    source = tmp_path / "0"
    source.mkdir()
    graph.save(source)
    inputs = torch.randn(8, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    for number, step in enumerate(recipe.passes):
        target = tmp_path / str(number + 1)
        target.mkdir()
        result = graph_sweep(source, target, step, lambda: iter([inputs]))
        source = target
    last = [row for row in found.rows if row.name in {each.name for each in result.ledger}][-len(result.ledger) :]
    assert [(row.format, row.nbytes) for row in last] == [(row.format, row.nbytes) for row in result.ledger]
    written = sum(array.nbytes for array in load_file(source / "effcli.safetensors").values())
    assert found.output_bytes == written
    before, after = found.input_bytes, found.output_bytes
    times = f"{before / after:.2f} times smaller" if after <= before else f"{after / before:.2f} times larger"
    assert f"({times})" in found.remarks[0]


def looked_up() -> Graph:
    """Rows of an embedding, positions added, and a layer."""
    b = Builder()
    rows = b.module("rows", nn.Embedding(20, 16), b.call("aten.to.dtype", b.input(), torch.int64))
    x = b.call("aten.add.Tensor", rows, b.tensor("places", torch.zeros(1, 5, 16)))
    return b.finish(b.module("head", nn.Linear(16, 3), x), Facts(origin="test", shape=(5,)))


def test_an_embedding_stays_floating_until_the_network_is_of_integers(tmp_path: Path) -> None:
    graph, step = looked_up(), {"linear": {"bits": 4}}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    graph.save(tmp_path / "before")
    recipe = check({"model": "net.pt2", "passes": [step]}).for_graph()
    result = graph_sweep(tmp_path / "before", tmp_path / "after", recipe.passes[0])
    found = plan_of(recipe, graph)
    assert [(row.name, row.kind, row.format, row.nbytes) for row in found.rows] == [
        (row.name, row.kind, row.format, row.nbytes) for row in result.ledger
    ]
    assert ("rows.weight", "keep", 4 * 20 * 16) in [(row.name, row.status, row.nbytes) for row in found.rows]
    sizes = [
        sum(entry.nbytes for entry in Checkpoint.open(tmp_path / name).entries.values()) for name in ("before", "after")
    ]
    assert [found.input_bytes, found.output_bytes] == sizes
    listed = {row.name: row.nbytes for row in plan.inspect("net", tmp_path / "before").rows}
    assert listed["rows.weight"] == 4 * 20 * 16 and listed["head"] == 4 * 3 * 16


def test_an_embedding_is_planned_as_a_table() -> None:
    """A row for each of 256 codes; positions are constants of 8 bits."""
    found = planned(looked_up(), "int8")
    assert [(row.name, row.kind, row.format, row.nbytes) for row in found.rows] == [
        ("head", "linear", "int8 channel sym", 3 * 16 + 3 * 5),
        ("rows.weight", "embedding", "int8 tensor", 256 * 16),
    ]
    assert found.output_bytes == 3 * 16 + 3 * 9 + 256 * 16 + 5 * 16


def test_rows_of_several_passes() -> None:
    found = planned(residual(), "fold", {"linear": {"ignore": ["block.*"]}})
    assert [row.step for row in found.rows] == ["1. fold"] * 4 + ["2. linear"] * 4
    status = {row.name: row.status for row in found.rows[4:]}
    assert status == {"stem": "compress", "block.a": "keep", "block.b": "keep", "head": "compress"}
    assert {row.status for row in found.rows[:4]} == {"change"}
    assert any("keeps block.a and 1 more: ignored by 'block.*'" in remark for remark in found.remarks)


def test_memory_grows_with_what_is_held_at_once() -> None:
    sizes = [planned(residual(), "awq", samples=64, batch_size=size).memory_bytes for size in (1, 8, 64)]
    assert sizes == sorted(set(sizes))
    # Between one and 64 inputs lie 63 times what one takes; the weights stay.
    assert (sizes[2] - sizes[0]) * 7 == (sizes[1] - sizes[0]) * 63
    assert planned(residual(), "linear", batch_size=64).memory_bytes < sizes[0]


def test_live_numbers_by_hand() -> None:
    # 36 inputs and 160 outputs live at the convolution; behind it, the view of the 160 beside them.
    assert plan._live_numbers(small()) == (320, 160)


def test_arithmetic_by_hand() -> None:
    # 16 patches of 9 inputs: 16 * 9 * 10 and 160 * 4 products forward, 16 * 9 * 9 and 160 * 160 for the Gram matrices.
    expected = 2 * 3 * (1440 + 640 + 1296 + 25600)
    assert planned(small(), "awq", samples=3).operations == expected


def test_a_training_by_hand() -> None:
    """10 inputs in batches of 4: 3 epochs of 3 steps, each forward, backward and teacher, and 4 looks at the error."""
    found = planned(small(), "kmeans", {"centroids": {"epochs": 3}}, samples=10, batch_size=4)
    assert found.operations == 2 * 10 * (3 * 4 + 4 * 2) * (1440 + 640)
    assert "forwards, gradients and Gram matrices" in found.remarks[2]
    halved = planned(small(), "kmeans", {"centroids": {"steps": 2, "accumulation": 2}}, samples=10, batch_size=4)
    # 2 of 2 steps in an epoch.
    assert halved.operations == 2 * 10 * (1 * 4 + 2 * 2) * (1440 + 640)
    sizes = [
        planned(small(), "kmeans", {"centroids": {"batch_size": size}}, samples=10**6).memory_bytes
        for size in (128, 256)
    ]
    # The input of 36 numbers, 160 of the convolution, 160 of its view, 4 outputs; each with its gradient.
    assert sizes[1] - sizes[0] == 128 * 2 * (36 + 160 + 160 + 4) * 4


@pytest.mark.parametrize("needs", [Needs.GRADIENTS, Needs.GRADIENTS | Needs.SQUARED_GRADIENTS])
def test_gradients_by_hand(needs: Needs) -> None:
    """Of the convolution alone: a forward and a backward more, and its sums."""
    options = {"ignore": ["layer2"]}
    found, without = (
        planned(small(), asking(asked, **options), samples=3, batch_size=64) for asked in (needs, Needs.NORMS)
    )
    assert (without.operations, found.operations) == (2 * 3 * 2080, 2 * 3 * 4 * 2080)
    # A pass over the inputs holds 2 * 320 + 160 numbers of each, more than 2 * 360 of a backward's.
    assert found.memory_bytes - without.memory_bytes == 4 * 90 * (len(needs) + 1)
    assert "forwards, gradients and Gram matrices" in found.remarks[2] and found.disk_bytes == 0


def test_what_is_cut_is_planned_as_it_was() -> None:
    """A pass that cuts sees no inputs of layers: a forward and a backward, or nothing at all."""
    found, without = (
        planned(small(), PassStep(name="trim", config=Trim(asks=needs.value)), samples=3)
        for needs in (Needs.SQUARED_GRADIENTS, Needs.NOTHING)
    )
    assert (without.operations, found.operations) == (0, 2 * 3 * 3 * 2080)
    # Of 730 weights: sums, those of the sample at hand, a gradient; of one input 360 numbers, each with its gradient.
    assert found.memory_bytes - without.memory_bytes == 4 * (3 * 730 + 2 * 360)
    assert {row.status for row in found.rows} == {"cut"} and found.output_bytes == found.input_bytes


def test_what_is_cut_and_restored_is_planned() -> None:
    """One forward and the Gram matrices of the layers that read channels to decide, to restore, or for both."""
    grams = {}
    for options in ({"restore": False}, {"criterion": "magnitude"}, {}, {"criterion": "lasso", "restore": False}):
        grams[str(options)] = planned(small(), {"channels": {"ratio": 0.2, **options}}, samples=3).operations
    without, restored, both, decided = grams.values()
    assert without == 0 and restored == decided == both > 2 * 3 * 2080
    compressed = planned(small(), {"channels": {"ratio": 0.2}}, samples=3, inputs="compressed").operations
    assert compressed == 2 * both


def test_a_training_with_too_few_steps_is_refused_before_any_pass() -> None:
    """64 inputs in batches of 16 are 4 steps an epoch: 20 rounds before 75 % of them take 7 epochs."""
    prune = {"gradual": {"epochs": 7, "rounds": 20, "towards": "original"}}
    planned(small(), prune, samples=64, batch_size=16)
    for fewer in ({"samples": 48}, {"samples": 64, "batch_size": 32}):
        with pytest.raises(RecipeError, match=r"^gradual: 20 rounds do not fit into 0.75 of"):
            planned(small(), prune, **{"batch_size": 16, **fewer})


def test_a_training_takes_the_disk_that_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two snapshots, until the former one is removed."""
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    sizes: list[int] = []
    write = snapshot.write_text

    def watched(file: Path, text: str) -> None:
        write(file, text)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "work").glob("*.safetensors")))

    monkeypatch.setattr(snapshot, "write_text", watched)
    graph = residual()
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    graph.save(tmp_path / "source")
    step = PassStep(name="tune", config=Tune(epochs=2, batch_size=4))
    inputs = torch.randn(8, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    train_graph(tmp_path / "source", tmp_path / "target", step, Held(inputs), batch_size=4, work=tmp_path / "work")
    found = planned(graph, step)
    # Headers and the states of random numbers, 5 kB in each.
    assert found.disk_bytes < max(sizes) < found.disk_bytes + 2 * 12_000
    assert f"disk: about {size(found.disk_bytes)}" in found.remarks[3]


def test_an_integer_network_that_no_pass_describes() -> None:
    """Its layers are listed as they were."""

    class Silent(NetworkPass):
        changes: ClassVar[Change] = Change.VALUES | Change.INTEGER

        def transform(self, graph: Graph, seen: Any) -> Transformed:
            return Transformed(graph)

    found = planned(small(), PassStep(name="silent", config=Silent()))
    assert [(row.name, row.status) for row in found.rows] == [("layer0", "change"), ("layer2", "change")]
    assert found.output_bytes == found.input_bytes


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(SelectionError, match="matches no layer"):
        planned(small(), {"linear": {"ignore": ["nothing"]}})


def test_inspection_of_a_graph(tmp_path: Path) -> None:
    small().save(tmp_path)
    found = plan.inspect("net", tmp_path)
    assert [(row.name, row.macs, row.nbytes) for row in found.rows] == [("layer0", 1440, 360), ("layer2", 640, 2560)]
    assert (found.weights, found.nbytes, found.bits_per_weight) == (744, 4 * 744, 32)
    assert found.remarks[0] == "test: 744 weights, 2,080 multiplications for an input of 1 x 6 x 6"
    assert json.loads(found.to_json())["model"] == "net"


@pytest.mark.parametrize(("bits", "nbytes"), [(8, 15), (4, 8), (2, 4)])
def test_inspection_of_an_integer_network(bits: Any, nbytes: int, tmp_path: Path) -> None:
    step = Linear(name="fc", inputs=("x",), output="y", layer="head", weight_bits=bits)
    values = {"x": Value(shape=(5,), scale=0.5, zero=-3), "y": Value(shape=(3,), scale=0.25, zero=7)}
    arrays = {
        "fc.weight": np.ones((3, 5), np.int8),
        "fc.bias": np.zeros(3, np.int32),
        "fc.multiplier": np.full(3, 1 << 30, np.int32),
        "fc.shift": np.full(3, 32, np.uint8),
    }
    program = Program(input="x", output="y", values=values, steps=(step,))
    IntegerNetwork(program, arrays, Facts(origin="test", shape=(5,))).save(tmp_path)
    found = plan.inspect("net", tmp_path)
    (row,) = found.rows
    assert (row.name, row.kind, row.shape, row.macs, row.nbytes) == ("head", "linear", (3, 5), 15, nbytes)
    assert row.format == f"int{bits} integer" and row.bits_per_weight == bits
    assert (found.weights, found.nbytes) == (15, nbytes)
    assert found.remarks[0].startswith("integer network of 1 operation: 15 weights, 15 multiplications")


def test_training_behind_fold_is_told_what_it_lacks() -> None:
    graph = chain((3, 8, 8), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ("reshape.default", [-1, 144]), nn.Linear(144, 2))
    told = "batch norms keep a training stable"
    assert any(told in remark for remark in planned(graph, "fold", "finetune").remarks)
    for steps in (("finetune", "fold"), ("fold", "kmeans", "centroids")):
        assert not any(told in remark for remark in planned(graph, *steps).remarks)
