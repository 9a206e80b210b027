"""A look at all layers before the first is changed: in both kinds of network, once, kept through a crash, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
import torch

from effcli.errors import PluginError
from effcli.graphs.plan import PlannedGraph
from effcli.graphs.sweep import graph_sweep
from effcli.inputs.options import Calibration
from effcli.inputs.text import Windows
from effcli.language import sweep
from effcli.language.journal import Journal
from effcli.language.plan import PlannedModel
from effcli.language.weights import open_weights
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome, Statistics, Surveyed
from effcli.layers.result import PassResult
from effcli.layers.selection import choose
from effcli.run.recipe import PassStep

LOOKED: list[str] = []


class Ranked(LayerPass):
    """Multiplies the weights of a layer by its rank among all, by the size of its inputs; rank 0 before the survey."""

    asks_for: int = Needs.NORMS.value
    rank: int = 0
    wrong: str = ""

    @property
    def surveys(self) -> Needs | None:
        return Needs(self.asks_for)

    def summarize(self, layer: Layer, seen: Sequence[Statistics]) -> float:
        LOOKED.append(layer.name)
        return sum(float(own.squares.sum()) for own in seen) if seen else float(layer.weight.square().sum())

    def survey(self, layers: Sequence[Surveyed]) -> Mapping[str, Any]:
        if self.wrong:
            return {"a name": {"x": self}, "a class": {layers[0].name: Calibration()}, "nothing": 3}[self.wrong]  # type: ignore[return-value]
        order = sorted(layers, key=lambda each: each.summary)
        return {each.name: each.options.model_copy(update={"rank": k + 1}) for k, each in enumerate(order)}

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(layer.weight * self.rank, {"rank": self.rank})


def ranks(result: PassResult) -> dict[str, int]:
    return {row.name: row.notes["rank"] for row in result.ledger if "rank" in row.notes}


def graph_ranks(folder: Path, config: LayerPass) -> dict[str, int]:
    graph = small_graphs.separable()
    for part in ("source", "target"):
        (folder / part).mkdir()
    graph.save(folder / "source")
    step = PassStep(name="ranked", config=config)
    batches = small_graphs.batches(graph) if step.needs else None
    return ranks(graph_sweep(folder / "source", folder / "target", step, batches))


@pytest.mark.parametrize("needs", [Needs.NORMS, Needs.NOTHING])
def test_a_graph_is_looked_at_first(needs: Needs, tmp_path: Path) -> None:
    LOOKED.clear()
    found = graph_ranks(tmp_path, Ranked(asks_for=needs.value))
    assert LOOKED == ["layer0", "layer2", "layer4", "layer7"] and sorted(found.values()) == [1, 2, 3, 4]
    if not needs:
        graph = small_graphs.separable()
        sizes = {name: float(graph.layer(name).weight.square().sum()) for name in found}
        assert sorted(found, key=lambda name: found[name]) == sorted(sizes, key=lambda name: sizes[name])


def test_layers_that_do_not_ask_keep_their_options(tmp_path: Path) -> None:
    class Some(Ranked):
        @property
        def surveys(self) -> Needs | None:
            return super().surveys if self.rank == 0 else None

    found = graph_ranks(tmp_path, Some(layers={"layer4": {"rank": 9}}, ignore=("layer0",)))
    assert found["layer4"] == 9 and sorted(found.values()) == [1, 2, 9]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=3)


def windows(inputs: str = "original") -> Windows:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 16), (1, 16))
    return Windows([torch.randint(architectures.VOCABULARY, shape, generator=generator) for shape in shapes], inputs)  # type: ignore[arg-type]


def swept(source: Path, target: Path, config: LayerPass, text: Windows | None, **more: Any) -> PassResult:
    target.mkdir(exist_ok=True)
    step = PassStep(name="ranked", config=config)
    return sweep.sweep(source, target, step, text, target.with_name(f"{target.name}-work"), **more)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("needs", [Needs.NORMS, Needs.NOTHING])
def test_a_language_model_is_looked_at_first(needs: Needs, head: bool, llama: Path, tmp_path: Path) -> None:
    """The head's inputs are those behind the last block."""
    LOOKED.clear()
    found = ranks(
        swept(llama, tmp_path / "out", Ranked(asks_for=needs.value, lm_head=head), windows() if needs else None)
    )
    assert len(LOOKED) == len(set(LOOKED)) == 21 + head
    assert sorted(found.values()) == list(range(1, 22 + head))
    before, after = open_weights(llama), open_weights(tmp_path / "out")
    for name, rank in found.items():
        torch.testing.assert_close(after.parameter(f"{name}.weight"), before.parameter(f"{name}.weight") * rank)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@pytest.mark.parametrize("lost", ["", "hidden-*.bin", "block-00000.json", "survey.json"])
def test_after_a_crash_it_is_not_looked_at_again(
    inputs: str, lost: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless what was found is lost; the result is the same."""
    expected = ranks(swept(llama, tmp_path / "whole", Ranked(), windows(inputs)))
    advance = Journal.advance

    def stop(self: Journal, done: int) -> None:
        advance(self, done)
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            swept(llama, tmp_path / "out", Ranked(), windows(inputs))
    if lost:
        for file in (tmp_path / "out-work").glob(lost):
            file.unlink()
    LOOKED.clear()
    assert ranks(swept(llama, tmp_path / "out", Ranked(), windows(inputs))) == expected
    assert len(LOOKED) == (21 if lost == "survey.json" else 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("a name", "options of 'x'"), ("a class", "of the type Calibration"), ("nothing", "of the type int")],
)
def test_a_wrong_answer_names_the_pass(wrong: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="Ranked") as caught:
        graph_ranks(tmp_path, Ranked(wrong=wrong))
    assert said in caught.value.cause and "`survey`" in caught.value.cause


def planned_model(llama: Path) -> Callable[[LayerPass], float]:
    def operations(config: LayerPass) -> float:
        network = PlannedModel(open_weights(llama), Calibration(samples=4, length=16))
        step = PassStep(name="step", config=config)
        return network.effort(step, choose(network.layered(step), step)).operations

    return operations


def planned_graph(_: Path) -> Callable[[LayerPass], float]:
    def operations(config: LayerPass) -> float:
        network = PlannedGraph(small_graphs.separable(), Calibration(samples=4))
        step = PassStep(name="step", config=config)
        return network.effort(step, choose(network.layered(step), step)).operations

    return operations


class Plain(LayerPass):
    """Asks for norms as the layers are reached, beside those of a survey where `first` is set."""

    first: bool = False

    @property
    def needs(self) -> Needs:
        return Needs.NORMS

    @property
    def surveys(self) -> Needs | None:
        return Needs.NORMS if self.first else None

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        return Outcome(layer.weight)


@pytest.mark.parametrize("network", [planned_model, planned_graph])
def test_a_plan_counts_its_forward(network: Any, llama: Path) -> None:
    operations = network(llama)
    plain, twice = operations(Plain()), operations(Plain(first=True))
    assert plain < twice <= 2 * plain
    # A pass that asks for inputs in its survey alone runs them through once.
    assert operations(Ranked()) == plain and operations(Ranked(asks_for=0)) == 0


def test_a_plan_says_so(llama: Path) -> None:
    from effcli.run import plan
    from effcli.run.recipe import check

    recipe = check({"model": str(llama), "passes": [{"magnitude": {"allocation": "global"}}]})
    network = PlannedModel(open_weights(llama), Calibration())
    assert "magnitude: looks at every layer before it changes the first" in plan.make(recipe, network).remarks
