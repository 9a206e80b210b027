"""Ratios of groups of channels under a budget, from the recipe to the smaller network, in both kinds of networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import architectures
import pytest

from effcli.errors import RecipeError, SelectionError
from effcli.files.checkpoint import weight_files
from effcli.reports.report import Stage
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.run.listener import Silent
from effcli.search import stage as stages

QUICK = ["evaluate.latency=false"]
SMALL = ["calibration.samples=4", "calibration.length=16", "evaluate.samples=4", "evaluate.length=16", *QUICK]


def searched(model: Path, folder: Path, *passes: str, overrides: list[str] = QUICK) -> tuple[Stage, Stage, Any]:
    """The stages of the input and of the last pass, and its options as they were written."""
    recipe = recipes.from_arguments(str(model), passes=passes, output=str(folder / "out"), overrides=overrides)
    report = pipeline.run(recipe, overwrite=True)
    assert report.stages[-1].search is not None
    return report.stages[0], report.stages[-1], recipes.load(folder / "out" / "recipe.yaml").passes[-1].config


def test_multiplications(net: Path, tmp_path: Path) -> None:
    before, after, options = searched(net, tmp_path, "auto:using=channels,macs=6000,by=gram")
    assert before.macs is not None and after.macs is not None and after.search is not None
    assert after.macs <= 6000 < before.macs and after.search.chosen.limited == after.macs
    assert after.name == "channels" and after.search.limited == "macs" and after.search.fixed_bytes is None
    chosen = {name: options.layers.get(name, {}).get("ratio", options.ratio) for name in after.search.values}
    assert chosen == after.search.values
    kept = {layer.name: layer for layer in after.search.sensitivity.layers}
    for row in after.ledger:
        if row.name in chosen:
            (option,) = (own for own in kept[row.name].options if own.value == chosen[row.name])
            assert option.format == f"{row.shape[0]} of {kept[row.name].shape[0]}"
    # No choice that was measured beside it is larger and keeps the budget.
    assert all(
        point.limited is None or point.limited > 6000 or point.cost >= after.search.chosen.cost
        for point in after.search.front
    )


@pytest.mark.parametrize("budget", ["size=9000", "average_ratio=0.3", "accuracy_drop=10%"])
def test_other_budgets(budget: str, net: Path, tmp_path: Path) -> None:
    before, after, _ = searched(net, tmp_path, f"auto:using=channels,{budget},by=gram,ratio=[0,0.25,0.5,0.75]")
    found = after.search
    assert found is not None and after.nbytes < before.nbytes
    assert any("chosen by the accuracy" in line for line in after.remarks) == budget.startswith("accuracy")
    match budget.split("=")[0]:
        case "size":
            assert after.nbytes == found.chosen.limited <= 9000
            assert after.nbytes == sum(file.stat().st_size for file in weight_files(tmp_path / "out"))
        case "average_ratio":
            assert found.chosen.average >= 0.3
        case "accuracy_drop":
            assert found.chosen.measured is not None and found.chosen.measured >= 0.9


@pytest.mark.parametrize("budget", ["macs=6000", "size=9000"])
def test_netadapt(budget: str, net: Path, tmp_path: Path) -> None:
    _, after, _ = searched(
        net, tmp_path, f"auto:using=channels,{budget},strategy=netadapt,rounds=3,ratio=[0,0.25,0.5,0.75]"
    )
    found = after.search
    assert found is not None and found.sensitivity.way == "gram" and found.measure == "accuracy"
    assert found.along == "choices of the rounds" and any("chosen by the accuracy" in line for line in after.remarks)
    *rounds, start = found.front
    assert start.name == "start" and len(rounds) >= 1
    figures = [point.limited for point in found.front]
    assert figures == sorted(figures) and figures[0] <= float(budget.split("=")[1]) < figures[1]
    assert (after.macs if budget.startswith("macs") else after.nbytes) == figures[0]
    assert after.quality is not None and after.quality.classification is not None
    assert found.chosen.measured == after.quality.classification.top1


def test_the_rounds_of_netadapt_are_told(net: Path, tmp_path: Path) -> None:
    class Heard(Silent):
        said: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    step = "auto:using=channels,macs=6000,strategy=netadapt,rounds=3,ratio=[0,0.25,0.5,0.75]"
    recipe = recipes.from_arguments(str(net), passes=[step], output=str(tmp_path / "out"), overrides=QUICK)
    found = pipeline.run(recipe, listener=Heard()).stages[-1].search
    assert found is not None
    told = [text for text in Heard.said if text.startswith("auto: round ")]
    assert len(told) == len(found.front) - 1 and told[0].startswith("auto: round 1 of 3: ")
    assert told[-1].startswith(f"auto: round {len(told)} of {len(told)}: ")
    assert told[0].endswith(" multiplications, 6,000 multiplications wanted")


def test_netadapt_of_bits(net: Path, tmp_path: Path) -> None:
    _, after, _ = searched(net, tmp_path, "auto:using=linear,bits=[2,4,8],size=4000,strategy=netadapt,rounds=2")
    assert after.search is not None and after.nbytes == after.search.chosen.limited <= 4000
    assert len(set(after.search.values.values())) > 1


def test_a_killed_search_measures_nothing_twice(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = "auto:using=channels,macs=6000,strategy=netadapt,rounds=3,ratio=[0,0.25,0.5,0.75]"
    _, whole, _ = searched(net, tmp_path / "whole", step)
    sweeps, left = [], [4]
    sweep = stages._Running._sweep

    def counting(self: Any, step: Any, source: Path, name: str) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        sweeps.append(step.config.layers | {"ratio": step.config.ratio})
        return sweep(self, step, source, name)

    monkeypatch.setattr(stages._Running, "_sweep", counting)
    with pytest.raises(KeyboardInterrupt):
        searched(net, tmp_path / "killed", step)
    left[0] = 1000
    _, again, _ = searched(net, tmp_path / "killed", step)
    assert again.search == whole.search.model_copy(update={"sensitivity": again.search.sensitivity})
    # All but the one that was under way when the run was killed.
    assert len([own for own in sweeps if sweeps.count(own) > 1]) <= 2


def test_a_search_whose_journal_is_damaged_begins_anew_with_nothing_of_before(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first choice has been carried out again by then, and what it left is thrown away with the journal."""
    step = "auto:using=channels,macs=6000,strategy=netadapt,rounds=3,ratio=[0,0.25,0.5,0.75]"
    _, whole, _ = searched(net, tmp_path / "whole", step)
    sweep, done = stages._Running._sweep, []

    def dying(self: Any, step: Any, source: Path, name: str) -> Path:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return sweep(self, step, source, name)

    with monkeypatch.context() as patched:
        patched.setattr(stages._Running, "_sweep", dying)
        with pytest.raises(KeyboardInterrupt):
            searched(net, tmp_path / "killed", step)
    (journal,) = (tmp_path / "killed").glob(".out.effcli/search-1")
    for file in journal.glob("accuracy-*.json"):
        file.unlink()
    for file in journal.glob("macs-*.json"):
        file.write_text("{")
    _, again, _ = searched(net, tmp_path / "killed", step)
    assert again.search is not None and again.search.values == whole.search.values  # type: ignore[union-attr]


@pytest.mark.parametrize("budget", ["average_ratio=0.25", "macs=110000", "size=700000", "perplexity_increase=50%"])
def test_a_language_model(budget: str, tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "llama")
    before, after, _ = searched(source, tmp_path, f"auto:using=channels,{budget},by=gram", overrides=SMALL)
    found = after.search
    assert before.macs is not None and after.macs is not None and after.macs < before.macs and found is not None
    assert {layer.kind for layer in found.sensitivity.layers} == {"heads", "feed_forward"}
    match budget.split("=")[0]:
        case "macs":
            assert after.macs == found.chosen.limited <= 110_000
        case "size":
            assert after.nbytes == found.chosen.limited <= 700_000


def test_it_stands_before_passes_that_compress(net: Path, tmp_path: Path) -> None:
    passes = ("auto:using=channels,average_ratio=0.25,by=gram", "linear:bits=8,granularity=channel")
    recipe = recipes.from_arguments(str(net), passes=passes, output=str(tmp_path / "out"), overrides=QUICK)
    assert [stage.name for stage in pipeline.run(recipe).stages] == ["input", "channels", "linear"]
    with pytest.raises(RecipeError, match="auto removes channels, and linear before it has compressed layers"):
        recipes.from_arguments(str(net), passes=passes[::-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "average_ratio=0.3,strategy=netadapt",
            "netadapt lowers what is measured down to its budget, and average_ratio",
        ),
        ("accuracy_drop=0.1,strategy=netadapt", "accuracy_drop is none that falls"),
        ("macs=6000,ranking=network", "channels is to rank all groups together"),
        ("macs=6000,strategy=netadapt,rounds=0", "rounds: should be greater than or equal to 1"),
        ("macs=6000,strategy=netadapt,measured=2", "leave `measured` out"),
        ("macs=6000,rounds=3", "`rounds` are those of netadapt"),
        ("macs=6000,ratio=[0,1]", "ratio"),
        ("average_bits=4", "channels is searched for its ratio"),
    ],
)
def test_mistakes(options: str, message: str, net: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.from_arguments(str(net), passes=[f"auto:using=channels,{options}"])


def test_netadapt_takes_small_networks_alone(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SMALL", 2000)
    with pytest.raises(RecipeError, match="carries out one layer after the other, again and again") as refused:
        searched(net, tmp_path, "auto:using=channels,macs=6000,strategy=netadapt")
    assert "strategy=knapsack" in str(refused.value.remedy)


def test_a_budget_that_no_ratio_keeps(net: Path, tmp_path: Path) -> None:
    for strategy, message in (("knapsack", "with the highest and"), ("netadapt,rounds=1", "the smallest choice takes")):
        with pytest.raises(SelectionError, match=message):
            searched(net, tmp_path, f"auto:using=channels,macs=100,by=gram,strategy={strategy},ratio=[0,0.5]")
