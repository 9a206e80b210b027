"""A search of another package: the engine knows it by its class alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_graphs
from pydantic import Field

from effcli import passes
from effcli.cli import main
from effcli.errors import DataError, RecipeError
from effcli.language.sweep import sweep
from effcli.layers.contract import Evaluator, Needs, SearchPass
from effcli.layers.selection import choose
from effcli.passes.search.auto import Auto
from effcli.platform.registry import Entry
from effcli.reports.report import Report
from effcli.reports.sensitivity import Point, Search, Sensitivity
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.run.recipe import PassStep
from effcli.search.budget import Budget
from effcli.search.stage import with_values


class Alike(SearchPass):
    """The same bits for every layer: those of the best accuracy, of equal ones the most."""

    tried: tuple[int, ...] = (3, 5)

    @property
    def needs(self) -> Needs:
        return Needs.GRAM

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        return "linear", {"granularity": "channel", "ignore": self.ignore}

    @property
    def space(self) -> Sequence[Mapping[str, Any]]:
        return [{"bits": bits} for bits in self.tried]

    @property
    def budget(self) -> Budget:
        return Budget(quantity="accuracy_drop", limit=1)

    def choose(self, costs: Sensitivity, evaluator: Evaluator) -> Search:
        points = {}
        for at, width in enumerate(self.tried):
            bits = {layer.name: width for layer in costs.layers}
            points[width] = Point(
                name=f"{width} bits",
                nbytes=sum(layer.options[at].nbytes for layer in costs.layers),
                average=width,
                cost=sum(layer.options[at].cost for layer in costs.layers),
                measured=evaluator.measure(evaluator.quality, bits),
            )
        best = max(points, key=lambda width: (points[width].measured, width))
        shown = tuple(points.values())
        return Search(
            sensitivity=costs,
            budget=str(self.budget),
            front=shown,
            uniform=shown,
            chosen=points[best],
            values={layer.name: best for layer in costs.layers},
            measure=evaluator.quality,
        )


class Unsaid(Alike):
    """A search that asks for nothing itself, of a pass that looks at the inputs of the layers."""

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        return "awq", {}


class Other(Alike):
    """A search of which a test says what it chooses among, of which pass."""

    among: tuple[dict[str, Any], ...] = ({"bits": 2}, {"bits": 8})
    of: str = "linear"
    fixed: dict[str, Any] = Field(default_factory=dict)

    @property
    def base(self) -> tuple[str, Mapping[str, Any]]:
        return self.of, self.fixed

    @property
    def space(self) -> Sequence[Mapping[str, Any]]:
        return self.among


class Backwards(Auto):
    """`auto` that names its alternatives in another order."""

    @property
    def space(self) -> Sequence[Mapping[str, Any]]:
        return [{"bits": bits} for bits in (8, 2, 4)]


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Alike, Unsaid, Other, Backwards):
        monkeypatch.setitem(passes.PASSES, kind.__name__.lower(), Entry(f"{__name__}:{kind.__name__}", "A search."))


def test_a_search_that_says_less_than_it_must() -> None:
    class Unfinished(SearchPass):
        """A search that never chooses."""

        @property
        def base(self) -> tuple[str, Mapping[str, Any]]:
            return "linear", {}

    with pytest.raises(TypeError, match=r"budget.*choose.*space"):
        Unfinished()  # type: ignore[abstract]


@pytest.mark.usefixtures("alike")
def test_another_search_is_carried_out_like_auto(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(net), "--pass", "fold", "--pass", "alike:tried=[2,8]"]
    assert main(["plan", *arguments, "--json"]) == 0
    remarks = json.loads(capsys.readouterr().out)["remarks"]
    assert any(line.startswith("alike measures the layers before it can say") for line in remarks)
    small = ["--set", "calibration.samples=8", "--set", "evaluate.latency=false"]
    assert main(["compress", *arguments, *small, "-o", str(tmp_path / "out")]) == 0
    stage = Report.read(tmp_path / "out").stages[-1]
    assert stage.name == "linear" and stage.search is not None
    assert set(stage.search.values.values()) == {8}
    assert {row.format.split()[0] for row in stage.ledger} == {"int8"}
    assert recipes.load(tmp_path / "out" / "recipe.yaml").passes[1].config.model_dump()["bits"] == 8
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("alike")
def test_alternatives_are_checked_with_the_recipe() -> None:
    with pytest.raises(RecipeError, match="bits"):
        recipes.from_arguments("sample:cnn", passes=["alike:tried=[2,9]"])


@pytest.mark.usefixtures("alike")
def test_what_the_alternatives_need_is_read(net: Path, tmp_path: Path) -> None:
    """A pass that a search chose is given the inputs of its layers, though the search asked for none."""
    step = PassStep.model_validate({"unsaid": {}})
    assert step.config.needs == Needs.NOTHING
    assert step.needs == PassStep.model_validate("awq").needs != Needs.NOTHING
    small = ["calibration.samples=8", "evaluate.latency=false"]
    recipe = recipes.from_arguments(str(net), passes=["unsaid"], output=str(tmp_path / "out"), overrides=small)
    stage = pipeline.run(recipe).stages[-1]
    assert stage.name == "awq"
    assert all(row.output_error is not None for row in stage.ledger if row.status == "compressed")


def test_a_language_model_is_not_compressed_without_what_the_pass_needs(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "llama", num_hidden_layers=1)
    with pytest.raises(DataError, match="awq looks at the inputs of the layers"):
        sweep(source, tmp_path / "out", PassStep.model_validate("awq"), None, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_chosen_bits_outlive_a_wider_pattern_behind_them() -> None:
    layers = {"layer0": {"granularity": "channel"}, "layer*": {"granularity": "tensor"}}
    step = PassStep.model_validate({"linear": {"bits": 4, "layers": layers}})
    graph = small_graphs.separable()
    bits = {site.name: 4 for site in graph.sites()} | {"layer0": 8}
    found = {name: choice.config for name, choice in choose(graph, with_values(step, "bits", bits)).items()}
    assert {name: own.bits for name, own in found.items()} == bits  # type: ignore[union-attr]
    assert found["layer0"].granularity == "tensor"  # type: ignore[union-attr]


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"among": [{"granularity": "tensor"}, {"granularity": "channel"}]}, "offers {'granularity': 'tensor'}"),
        ({"among": [{"bits": 4}, {"bits": 8, "symmetric": True}]}, "offers {'bits': 8, 'symmetric': True}"),
        ({"among": [{}]}, "a search chooses among values of bits, sparsity or ratio, and it offers {}"),
        ({"among": []}, "a search chooses among values of bits, sparsity or ratio, and it offers nothing"),
        (
            {"among": [{"sparsity": 0.25}, {"bits": 4}]},
            "a search chooses among values of bits, sparsity or ratio, and it offers {'bits': 4}",
        ),
        ({"of": "nf4"}, "nf4 has no bits to choose layer by layer"),
        ({"of": "fold"}, "fold has no bits to choose layer by layer"),
        ({"fixed": {"bits": 4}}, "the bits are what is chosen\nleave them out of the options of linear"),
    ],
)
def test_what_no_search_can_choose_is_refused_with_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as refused:
        recipes.from_arguments("sample:cnn", passes=[{"other": options}])
    assert "using" not in str(refused.value)


@pytest.mark.usefixtures("alike")
def test_the_order_of_alternatives_does_not_matter(net: Path, tmp_path: Path) -> None:
    assert [own.config.bits for own in PassStep.model_validate({"alike": {"tried": [8, 2, 6]}}).candidates] == [2, 6, 8]  # type: ignore[attr-defined]
    found = {}
    for name in ("auto", "backwards"):
        step = f"{name}:using=linear,by=gram,bits=[2,4,8],size=4600"
        small = ["calibration.samples=8", "evaluate.latency=false"]
        recipe = recipes.from_arguments(str(net), passes=[step], output=str(tmp_path / name), overrides=small)
        stage = pipeline.run(recipe).stages[-1]
        assert stage.search is not None and stage.nbytes <= 4600
        found[name] = stage.search.values
    assert found["auto"] == found["backwards"]
    assert len(set(found["auto"].values())) > 1
