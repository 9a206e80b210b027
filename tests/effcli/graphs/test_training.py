"""A pass that trains on a network read as a graph: what it is given, what it leaves, how it goes on after a kill."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import small_graphs
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from small_graphs import Held
from torch import Tensor, nn
from torch.nn import functional as F

from effcli.errors import DataError, MachineError, RecipeError, UnfinishedError, UnsupportedError, UserError
from effcli.graphs.graph import Graph
from effcli.graphs.training import train, train_graph
from effcli.layers import attaching
from effcli.layers.contract import AttachPass, Layer, LayerPass, Needs, NetworkPass, Outcome, Step, Transformed
from effcli.layers.result import PassResult
from effcli.passes.quantize.linear import Linear
from effcli.run import detect
from effcli.run.recipe import PassStep, check
from effcli.training import loop


class Tune(AttachPass):
    """Fine-tuning, towards labels or what another network returns."""

    wanted: str = "LABELS"
    learning_rate: float = 0.01

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs[self.wanted]

    def attach(self, layer: Layer) -> nn.Module | None:
        return nn.Identity()

    def loss(self, step: Step) -> Tensor:
        if step.labels is not None:
            return F.cross_entropy(step.outputs, step.labels)
        wanted = step.dense if step.original is None else step.original
        assert wanted is not None and (step.dense is None) != (step.original is None)
        return F.mse_loss(step.outputs, wanted)

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        return Outcome(layer.weight, {"norm": float(layer.weight.norm())})


class Rounded(Tune):
    """Weights on a grid of whole numbers in the forward, straight through it in the backward."""

    bits: int = Field(4, ge=2)

    def attach(self, layer: Layer) -> nn.Module | None:
        class Grid(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight + (weight.mul(4).round().div(4) - weight).detach()

        return Grid() if layer.weight.shape[1] > 9 else None

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        return Linear(bits=self.bits).for_graph().apply(layer)


def labelled(graph: Graph, count: int = 40) -> Held:
    """Inputs, and the class that another network with the same layers takes each for."""
    other = small_graphs.separable()
    for number in (0, 7):
        small_graphs.seeded(other.layer(f"layer{number}"), 50 + number)
    inputs = small_graphs.inputs(graph, count)
    return Held(inputs, other.run(inputs).argmax(1).numpy())


def carried_out(
    config: AttachPass, tmp_path: Path, data: Held | None, graph: Graph | None = None, **more: Any
) -> PassResult:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir(exist_ok=True)
    (graph or small_graphs.separable()).save(source)
    step = PassStep(name="tune", config=config)
    fields = {"batch_size": 8, "original": source, "reference": source, **more}
    return train_graph(source, target, step, data, **fields)


def mean_loss(graph: Graph, data: Held) -> float:
    assert data.labels is not None
    return float(F.cross_entropy(graph.run(data.inputs), torch.from_numpy(data.labels)))


def test_labels_are_learnt(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    data = labelled(graph)
    result = carried_out(Tune(epochs=8), tmp_path, data)
    made = Graph.read(tmp_path / "target")
    before, after = mean_loss(graph, data), mean_loss(made, data)
    assert after < 0.6 * before
    assert {row.status for row in result.ledger} == {"changed"} and len(result.histograms) == 4
    assert all(row.notes["norm"] == pytest.approx(float(made.layer(row.name).weight.norm())) for row in result.ledger)
    assert result.training is not None and result.training.measured == "loss on the calibration inputs"
    assert result.training.errors[0][1] == pytest.approx(before, rel=1e-5)
    assert dict(result.training.errors)[result.training.kept] == pytest.approx(after, rel=1e-5)
    (remark,) = result.remarks
    assert remark.startswith(f"loss on the calibration inputs: {before:.3g} before training, {after:.3g} after")
    assert result.training.curve[-1][0] == result.training.steps == 40
    for name, parameter in graph.module.named_parameters():
        same = torch.equal(parameter, made.module.get_parameter(name))
        assert same == name.endswith("bias"), name


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"epochs": 1}, ", and it still fell: raise `epochs` (now 1), or `learning_rate` (now 0.01)"),
        ({"steps": 2}, ", and it still fell: raise `steps` (now 2), or `learning_rate` (now 0.01)"),
        ({"steps": 2, "keep_best": False}, ", and it still fell: raise `steps` (now 2), or `learning_rate` (now 0.01)"),
        ({"learning_rate": 100.0}, " made no error smaller; lower `learning_rate` (now 100)"),
        ({"learning_rate": 1e-30}, " made no error smaller; raise `learning_rate` (now 1e-30) or `epochs` (now 3)"),
        ({"epochs": 40}, " after"),
    ],
)
def test_a_training_that_was_too_short_or_learnt_nothing(options: dict[str, Any], advice: str, tmp_path: Path) -> None:
    """What to change stands in the remark; nothing where the error had settled."""
    graph = small_graphs.separable()
    made = carried_out(Tune(**{"learning_rate": 1e-2, **options}), tmp_path, labelled(graph, 16), graph)
    assert made.remarks[-1].endswith(advice)


def test_nothing_is_advised_where_there_is_no_error() -> None:
    graph = small_graphs.separable()
    config = Tune(wanted="ORIGINAL")
    made = train(graph, "tune", config, Held(small_graphs.inputs(graph, 8)), {"layer0": config}, batch_size=4)
    assert made.remarks[-1].endswith(" made no error smaller")


def test_the_gradient_is_that_of_the_whole_network(tmp_path: Path) -> None:
    """One plain step of Adam on all inputs has the signs of the gradients, worked out in float64."""
    graph = small_graphs.separable()
    data = labelled(graph)
    carried_out(Tune(steps=1, batch_size=40, learning_rate=1e-3, keep_best=False), tmp_path, data)
    made = Graph.read(tmp_path / "target")
    exact = copy.deepcopy(graph.module).double()
    weights = {site.name: exact.get_submodule(site.name).weight for site in graph.sites()}
    for weight in weights.values():
        weight.requires_grad_()
    assert data.labels is not None
    F.cross_entropy(exact(data.inputs.double()), torch.from_numpy(data.labels)).backward()
    for name, weight in weights.items():
        moved = made.layer(name).weight.double() - weight.detach()
        large = weight.grad.abs() > 1e-5
        assert bool((moved.sign() == -weight.grad.sign())[large].all()) and bool(large.any())
        torch.testing.assert_close(moved[large].abs(), torch.full_like(moved[large], 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("wanted", ["ORIGINAL", "DENSE"])
def test_the_outputs_of_another_network_are_learnt(wanted: str, tmp_path: Path) -> None:
    teacher, graph = small_graphs.separable(), small_graphs.separable()
    weight: Any = graph.layer("layer4").weight
    weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    (tmp_path / "teacher").mkdir()
    teacher.save(tmp_path / "teacher")
    data = Held(small_graphs.inputs(graph, 40))
    before = float(F.mse_loss(graph.run(data.inputs), teacher.run(data.inputs)))
    place = {"ORIGINAL": "original", "DENSE": "reference"}[wanted]
    carried_out(Tune(wanted=wanted, epochs=10), tmp_path, data, graph, **{place: tmp_path / "teacher"})
    made = Graph.read(tmp_path / "target")
    assert float(F.mse_loss(made.run(data.inputs), teacher.run(data.inputs))) < 0.3 * before


def test_without_a_pass_before_the_original_is_the_network_itself() -> None:
    graph = small_graphs.separable()
    data = Held(small_graphs.inputs(graph, 8))
    config = Tune(wanted="ORIGINAL")
    made = train(graph, "tune", config, data, {"layer0": config}, batch_size=4)
    assert made.training is not None and made.training.errors[0] == (0, 0.0) and not made.notes
    assert "stay as they are" in made.remarks[-1] and made.training.kept == 0


def test_weights_that_are_rounded_while_they_are_trained(tmp_path: Path) -> None:
    data = labelled(small_graphs.separable())
    result = carried_out(Rounded(epochs=3, learning_rate=1e-4, layers={"layer7": {"bits": 8}}), tmp_path, data)
    rows = {row.name: row for row in result.ledger}
    assert {name: row.status for name, row in rows.items()} == {
        "layer0": "compressed",
        "layer2": "kept",
        "layer4": "kept",
        "layer7": "compressed",
    }
    assert rows["layer0"].format.startswith("int4") and rows["layer7"].format.startswith("int8")
    assert result.remarks[:2] == [f"{name} stays as it is: it has no weight" for name in ("layer2", "layer4")]
    assert set(Graph.read(tmp_path / "target").stored) == {"layer0", "layer7"}


def test_the_seed_is_the_recipes_unless_the_pass_has_one(tmp_path: Path) -> None:
    data = labelled(small_graphs.separable())
    made = []
    for config, seed in ((Tune(epochs=1), 3), (Tune(epochs=1, seed=3), 0), (Tune(epochs=1), 0)):
        carried_out(config, tmp_path, data, seed=seed)
        made.append((tmp_path / "target" / "effcli.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_what_is_not_chosen_stays(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    result = carried_out(Tune(epochs=1, ignore=("layer0", "layer4")), tmp_path, labelled(graph))
    made = Graph.read(tmp_path / "target")
    same = [torch.equal(graph.layer(name).weight, made.layer(name).weight) for name in ("layer0", "layer4", "layer7")]
    assert same == [True, True, False]
    assert [row.reason for row in result.ledger if row.status == "kept"] == [
        "ignored by 'layer0'",
        "ignored by 'layer4'",
    ]


def test_a_layer_that_runs_twice() -> None:
    builder = small_graphs.Builder()
    layer = small_graphs.seeded(nn.Linear(5, 5), 0)
    node = builder.module("same", layer, builder.input())
    node = builder.module("same", layer, builder.call("aten.relu.default", node))
    graph = builder.finish(node, small_graphs.Facts(origin="test", shape=(5,)))
    teacher = Graph(copy.deepcopy(graph.module), graph.facts)
    small_graphs.seeded(teacher.layer("same"), 1)
    config = Tune(wanted="ORIGINAL", epochs=30)
    inputs = small_graphs.inputs(graph, 16)
    made = train(graph, "tune", config, Held(inputs), {"same": config}, batch_size=4, original=teacher)
    assert made.training is not None
    first, last = made.training.errors[0][1], min(error for _, error in made.training.errors)
    assert last < 0.5 * first
    assert float(F.mse_loss(graph.run(inputs), teacher.run(inputs))) == pytest.approx(last, rel=1e-4)


def test_layers_before_rounded_inputs_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the rounding, and little without a gradient there."""
    with_gradient = trained_before_rounding()
    monkeypatch.setattr(attaching, "straight_through", lambda network: contextlib.nullcontext())
    assert with_gradient < 0.5 and trained_before_rounding() > 1.5 * with_gradient


def trained_before_rounding() -> float:
    """The share of the error that is left when a layer before rounded inputs was trained."""
    graph = small_graphs.separable()
    teacher = Graph(copy.deepcopy(graph.module), graph.facts)
    weight: Any = graph.layer("layer0").weight
    weight *= 1 + 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    last: Any = graph.layer("layer7").weight
    graph.set_weight("layer7", Linear(activations="int8").apply(Layer("layer7", "linear", last, torch.float32)).weight)
    config, data = Tune(wanted="ORIGINAL", epochs=15), Held(small_graphs.inputs(graph, 40))
    made = train(graph, "tune", config, data, {"layer0": config}, batch_size=8, original=teacher)
    assert made.training is not None and graph.rounds_inputs
    return made.training.errors[-1][1] / made.training.errors[0][1]


def test_the_device_is_asked_for_unless_a_node_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def loop_train(*given: Any, device: str, **more: Any) -> Any:
        asked.append(device)
        raise Killed

    monkeypatch.setattr(loop, "train", loop_train)
    config = Tune(wanted="ORIGINAL")
    for named in (False, True):
        builder = small_graphs.Builder()
        node = builder.module("layer0", small_graphs.seeded(nn.Linear(4, 3), 0), builder.input())
        if named:
            zeros = builder.call("aten.zeros.default", [1, 3], device=torch.device("cpu"))
            node = builder.call("aten.add.Tensor", node, zeros)
        graph = builder.finish(node, small_graphs.Facts(origin="test", shape=(4,)))
        with pytest.raises(Killed):
            data = Held(small_graphs.inputs(graph, 4))
            train(graph, "tune", config, data, {"layer0": config}, batch_size=2, device="cuda")
    assert asked == ["cuda", "cpu"]


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("damage", [lambda data: data[:20], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_snapshot_is_thrown_away(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only this training begins anew, it says so, and its weights are those of one that ran through."""
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    data, config, work = labelled(small_graphs.separable()), Tune(epochs=1), tmp_path / "work"
    whole = carried_out(config, tmp_path, data)
    expected = (tmp_path / "target" / "effcli.safetensors").read_bytes()

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        carried_out(config, tmp_path, data, work=work, progress=kill)
    file = work / "step-2.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    told: list[int] = []
    result = carried_out(config, tmp_path, data, work=work, progress=lambda done, total: told.append(done))
    assert told == [0, 1, 2, 3, 4, 5] and result.training == whole.training
    assert result.remarks[:-1] == whole.remarks
    assert "tune trained anew" in result.remarks[-1] and "step-2.safetensors is damaged" in result.remarks[-1]
    assert (tmp_path / "target" / "effcli.safetensors").read_bytes() == expected


def test_a_snapshot_that_does_not_fit_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was taken up in part."""
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    data, config, work = labelled(small_graphs.separable()), Tune(epochs=1), tmp_path / "work"
    carried_out(config, tmp_path, data)
    expected = (tmp_path / "target" / "effcli.safetensors").read_bytes()
    carried_out(config, tmp_path, data, work=work)
    file = work / "step-5.safetensors"
    save_file({name: own for name, own in load_file(file).items() if name != "random/cpu"}, file)
    result = carried_out(config, tmp_path, data, work=work)
    assert "does not fit" in result.remarks[-1]
    assert (tmp_path / "target" / "effcli.safetensors").read_bytes() == expected


def test_a_snapshot_that_the_machine_does_not_give_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path, key: str) -> Any:
        raise UnfinishedError("cannot be read") from MachineError("out of memory")

    monkeypatch.setattr(loop.snapshots, "load", load)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(MachineError, match="out of memory"):
        carried_out(Tune(epochs=1), tmp_path, labelled(small_graphs.separable()), work=work)
    assert work.is_dir()


def test_what_a_training_undoes_is_said(tmp_path: Path) -> None:
    graph = small_graphs.separable()
    first: Any = graph.layer("layer0").weight
    first.view(-1)[::3] = 0
    last: Any = graph.layer("layer7").weight
    graph.set_weight("layer7", Linear(bits=8).for_graph().apply(Layer("layer7", "linear", last, torch.float32)).weight)
    remarks = carried_out(Tune(epochs=1), tmp_path, labelled(graph), graph).remarks
    assert "tune made compressed layers dense again: layer7" in remarks
    made = Graph.read(tmp_path / "target")
    zeros = {site.name: (graph.layer(site.name).weight == 0) for site in graph.sites()}
    filled = {name: int((made.layer(name).weight[own] != 0).sum()) for name, own in zeros.items()}  # type: ignore[index,operator]
    assert filled["layer0"] > 0
    names = [name for name, count in filled.items() if count]
    assert f"tune filled {sum(filled.values())} weights of value zero, in {', '.join(names)}" in remarks


class Mode(nn.Module):
    """Writes down whether it runs as in training, and drops no weight outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.seen: list[bool] = []

    def forward(self, weight: Tensor) -> Tensor:
        assert self.drop.training == self.training
        self.seen.append(self.training)
        return self.drop(weight)


def test_what_is_attached_is_in_training_for_the_loss_alone() -> None:
    modules: list[Mode] = []

    class Dropped(Tune):
        def attach(self, layer: Layer) -> nn.Module | None:
            modules.append(Mode())
            return modules[-1]

        def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
            assert torch.equal(trained(layer.weight), layer.weight)
            return Outcome(layer.weight)

    graph = small_graphs.separable()
    config, data = Dropped(epochs=2), labelled(graph, 16)
    made = train(graph, "tune", config, data, {"layer0": config}, batch_size=8)
    # Attached; two batches measured, trained on and measured, twice; finished.
    assert modules[0].seen[1:11] == [False] * 2 + ([True] * 2 + [False] * 2) * 2
    assert not any(modules[0].seen[11:]) and made.notes and not graph.layer("layer0").training


class Counting(nn.Module):
    """Keeps in a buffer how often it ran in training."""

    runs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.runs += self.training
        return weight * 1


def test_the_buffers_of_the_best_weights_are_kept() -> None:
    runs: list[float] = []

    class Counted(Tune):
        def attach(self, layer: Layer) -> nn.Module | None:
            return Counting()

        def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
            runs.append(float(trained.runs))  # type: ignore[arg-type]
            return Outcome(layer.weight)

        def measure(self, step: Step) -> tuple[float, float]:
            assert (step.scale, step.progress) == (1, 0)
            return next(errors), 1.0

    graph = small_graphs.separable()
    errors = iter([4.0, 1.0, 2.0, 3.0])
    config = Counted(epochs=3)
    made = train(graph, "tune", config, labelled(graph, 8), {"layer0": config}, batch_size=8)
    assert made.training is not None and made.training.kept == 1 and runs == [1]


def test_it_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    data = labelled(small_graphs.separable())
    config = Tune(epochs=3, accumulation=2)
    whole = carried_out(config, tmp_path, data)
    expected = (tmp_path / "target" / "effcli.safetensors").read_bytes()
    for at in (1, 4, 9):
        work = tmp_path / f"work-{at}"

        def kill(done: int, total: int, at: int = at) -> None:
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            carried_out(config, tmp_path, data, work=work, progress=kill)
        (tmp_path / "target" / "effcli.safetensors").unlink()
        told: list[tuple[int, int]] = []
        result = carried_out(config, tmp_path, data, work=work, progress=lambda *at, told=told: told.append(at))
        assert (tmp_path / "target" / "effcli.safetensors").read_bytes() == expected
        assert result == whole and told == [(k, 9) for k in range(at, 10)]
    told = []
    carried_out(Tune(epochs=2), tmp_path, data, work=tmp_path / "work-4", progress=lambda *at: told.append(at))
    assert told[0][0] == 0, "other options begin anew"


def test_the_graph_is_whole_after_an_error() -> None:
    graph = small_graphs.separable()
    before = copy.deepcopy(graph.module.state_dict())
    config = Tune(epochs=1)

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        train(graph, "tune", config, labelled(graph), {"layer0": config}, batch_size=8, progress=kill)
    assert {type(graph.layer(site.name)) for site in graph.sites()} == {nn.Conv2d, nn.Linear}
    assert set(graph.module.state_dict()) == set(before)
    assert not any(parameter.requires_grad for parameter in graph.module.parameters())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda graph: None, "trains on inputs of the network"),
        (
            lambda graph: Held(small_graphs.inputs(graph, 8)),
            "tune learns from labels, and the .* no labels",
        ),
        (
            lambda graph: Held(small_graphs.inputs(graph, 2), np.array([0, 4])),
            "go from 0 to 4, .* the classes 0 to 3",
        ),
        (lambda graph: Held(small_graphs.inputs(graph, 0), np.zeros(0, np.int64)), "no calibration input reached"),
    ],
)
def test_data_that_cannot_serve(data: Callable[[Graph], Held | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        carried_out(Tune(), tmp_path, data(small_graphs.separable()))
    assert raised.value.remedy


def test_what_it_compares_with_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="and none were") as raised:
        carried_out(Tune(wanted="DENSE"), tmp_path, Held(torch.zeros(4, 3, 8, 8)))
    assert raised.value.remedy == "put it after the step that compresses the weights"


def test_no_layer_to_train(tmp_path: Path) -> None:
    class Nothing(Tune):
        takes: ClassVar[str] = "mask"
        remedy: ClassVar[str] = "put it after a `prune` step"

        def attach(self, layer: Layer) -> None:
            return None

    with pytest.raises(UserError, match="tune finds no layer with a mask to train") as raised:
        carried_out(Nothing(), tmp_path, labelled(small_graphs.separable()))
    assert raised.value.remedy == "put it after a `prune` step"


def test_labels_of_a_network_without_classes() -> None:
    graph = small_graphs.chain((4,), nn.Linear(4, 4))
    config = Tune()
    with pytest.raises(UnsupportedError, match=r"tune learns from labels, .* no vector of one number for each class"):
        data = Held(small_graphs.inputs(graph, 4), np.zeros(4, np.int64))
        train(graph, "tune", config, data, {"layer0": config}, batch_size=2)


@pytest.mark.parametrize("missing", ["attach", "loss", "finish"])
def test_a_method_that_is_missing(missing: str) -> None:
    own = {name: getattr(Tune, name) for name in ("attach", "loss", "finish") if name != missing}
    kind = type("Part", (AttachPass,), {**own, "__module__": __name__})
    with pytest.raises(TypeError, match=f"abstract method '?{missing}'?"):
        kind()


class AskingLayer(LayerPass):
    @property
    def needs(self) -> Needs:
        return Needs.LABELS

    def apply(self, layer: Layer, seen: Any) -> Outcome:
        return Outcome(layer.weight)


class AskingNetwork(NetworkPass):
    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.ORIGINAL

    def transform(self, graph: Graph, seen: Any) -> Transformed:
        return Transformed(graph)


class AskingTraining(Tune):
    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.GRAM


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AskingLayer(), "asks for the whole network"),
        (AskingNetwork(), "which only a pass that trains is given"),
        (AskingTraining(), "asks for statistics of single layers"),
    ],
)
def test_what_passes_of_a_kind_are_not_given(config: Any, message: str) -> None:
    from effcli.layers.selection import choose

    with pytest.raises(UnsupportedError, match=message):
        choose(small_graphs.separable(), PassStep(name="asking", config=config))


def test_weights_that_never_count_are_the_last(tmp_path: Path) -> None:
    class Never(Tune):
        def counts(self, progress: float) -> bool:
            return False

    graph = small_graphs.separable()
    made = carried_out(Never(epochs=2), tmp_path, labelled(graph), graph)
    assert made.training is not None and made.training.kept == made.training.steps
    assert {row.status for row in made.ledger} == {"changed"}


def test_inputs_that_are_too_few_for_a_training_end_a_run_before_its_first_pass(tmp_path: Path) -> None:
    """The plan takes as many inputs for granted as the recipe asks for; 32 in batches of 16 are 2 steps an epoch."""
    images = np.random.default_rng(0).integers(0, 255, (32, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.arange(32) % 10)
    step = {"gradual": {"epochs": 3, "rounds": 5, "towards": "original"}}
    given = {"data": str(tmp_path / "few.npz"), "batch_size": 16}
    recipe = check({"model": "sample:cnn", "passes": ["fold", step], "calibration": given})
    network = detect.of_run(recipe)
    network.plan()
    with pytest.raises(RecipeError, match=r"^gradual: 5 rounds do not fit into 0.75 of 6 steps"):
        network.calibrate()
    fewer = check(
        {"model": "sample:cnn", "passes": [{"gradual": step["gradual"] | {"rounds": 4}}], "calibration": given}
    )
    detect.of_run(fewer).calibrate()
