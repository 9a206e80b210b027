"""A sparsity for every layer under a budget: what it is chosen from, what it costs, what it is carried out as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import architectures
import pytest

from effcli.cli import main
from effcli.errors import RecipeError, SelectionError
from effcli.files.checkpoint import weight_files
from effcli.reports.report import Report
from effcli.reports.sensitivity import LayerCosts, Option, Search, Sensitivity
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.run.recipe import PassStep
from effcli.search.budget import Budget, Figure
from effcli.search.values import choose_values


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("models") / "llama")


def run(model: Path | str, step: str, output: Path) -> tuple[Report, Search]:
    small = ["calibration.samples=8", "evaluate.latency=false"]
    if model != "sample:cnn":
        small += ["calibration.samples=4", "calibration.length=32", "evaluate=false"]
    report = pipeline.run(recipes.from_arguments(str(model), passes=[step], output=str(output), overrides=small))
    found = report.stages[-1].search
    assert found is not None and found.sensitivity.option == "sparsity"
    return report, found


def average(found: Search) -> float:
    """The share of all weights that the chosen sparsities remove."""
    weights = {layer.name: layer.shape[0] * layer.shape[1] for layer in found.sensitivity.layers}
    return sum(weights[name] * value for name, value in found.values.items()) / sum(weights.values())


def test_what_is_chosen_follows_the_pass() -> None:
    step = PassStep.model_validate({"auto": {"using": "magnitude", "average_sparsity": "50%"}})
    config: Any = step.config
    assert config.option == "sparsity" and config.bits is None and config.ratio is None
    assert config.sparsity == (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert [own.config.sparsity for own in step.candidates] == list(config.sparsity)  # type: ignore[attr-defined]
    assert str(config.budget) == "sparsity 0.5 on average"
    assert PassStep.model_validate(step.model_dump(mode="json")) == step
    config = PassStep.model_validate({"auto": {"average_bits": 3}}).config
    assert config.option == "bits" and config.bits == (2, 3, 4, 8) and config.sparsity is None
    config = PassStep.model_validate({"auto": {"using": "channels", "macs": 9, "ratio": [0.5, 0, 0.5]}}).config
    assert config.option == "ratio" and config.ratio == (0, 0.5)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("auto:using=magnitude,size=1kB,bits=[2]", "magnitude is searched for its sparsity; leave `bits` out"),
        ("auto:using=linear,size=1kB,sparsity=[0.5]", "linear is searched for its bits; leave `sparsity` out"),
        ("auto:using=magnitude,average_bits=3", "give average_sparsity, not average_bits"),
        ("auto:using=linear,average_sparsity=0.5", "give average_bits, not average_sparsity"),
        ("auto:using=channels,average_sparsity=0.5", "give average_ratio, not average_sparsity"),
        ("auto:using=magnitude,average_sparsity=1", "less than 1"),
        ("auto:using=magnitude,size=1kB,sparsity=[1]", "less than 1"),
        ("auto:using=magnitude,size=1kB,sparsity=[-0.1]", "greater than or equal to 0"),
        ("auto:using=magnitude,size=1kB,sparsity=[]", "at least 1"),
        ("auto:using=magnitude,size=1kB,options={sparsity: 0.5}", "the sparsity is what is chosen"),
        ("auto:using=magnitude,size=1kB,pattern=2:4", "exclude each other"),
        ("auto:using=magnitude,size=1kB,allocation=global", "to divide its sparsity among the layers itself"),
        (
            "auto:using=magnitude,size=1kB,layers={'*': {allocation: global}}",
            "to divide its sparsity among the layers itself",
        ),
        ("auto:using=magnitude,size=1kB,layers={'*': {sparsity: null}}", "sparsity of '*' is null"),
        ("auto:using=gradual,average_sparsity=0.5", "give average_bits, not average_sparsity"),
        ("auto:using=gradual,average_bits=3", "gradual has no bits to choose"),
    ],
)
def test_mistakes(step: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipes.from_arguments("sample:cnn", passes=[step])
    assert message in f"{refused.value.cause}; {refused.value.remedy}"


def layer(name: str, weights: int, *costs: float) -> LayerCosts:
    """A layer of so many weights with the sparsities 0, 0.5 and 0.8, which take 70, 60 and 50 bytes."""
    options = tuple(
        Option(value=value, format="", nbytes=70 - 10 * at, output_error=0, cost=cost)
        for at, (value, cost) in enumerate(zip((0.0, 0.5, 0.8), costs, strict=True))
    )
    return LayerCosts(name=name, kind="linear", shape=(1, weights), options=options)


def sensitivity(*layers: LayerCosts) -> Sensitivity:
    return Sensitivity(
        model="m", step="s", option="sparsity", way="gram", unit="nats", inputs=1, layers=layers, seconds=0
    )


class Files:
    """An evaluator whose weight files take `more` bytes than the layers were priced at, and 1000 besides."""

    name = "auto"
    quality: Figure = "perplexity"
    fixed_bytes = 1000

    def __init__(self, more: int = 0) -> None:
        self.more = more
        self.measured: list[dict[str, float]] = []

    def say(self, text: str) -> None: ...

    def original(self) -> float:
        return 1.0

    def measure(self, figure: Figure, values: Mapping[str, float]) -> float:
        assert figure == "size"
        self.measured.append(dict(values))
        return 1000 + self.more + sum({0.0: 70, 0.5: 60, 0.8: 50}[value] for value in values.values())


def test_an_average_is_of_weights_and_not_of_bytes() -> None:
    """Two layers of 30 and of 10 weights: half of all goes where it costs least, whatever the bytes are."""
    costs = sensitivity(layer("large", 30, 0, 1, 5), layer("small", 10, 0, 3, 4))
    found = {}
    for limit in (0.35, 0.5, 0.6):
        search = choose_values(costs, Budget(quantity="average_sparsity", limit=limit), Files())
        found[limit] = search.values
        assert search.chosen.average == pytest.approx(average(search)) and search.chosen.average >= limit - 1e-9
    # 15 of 40 go; 20 of 40, everywhere alike for 4, cheaper than 24 of the large one alone for 5; 24 of it alone.
    assert found == {
        0.35: {"large": 0.5, "small": 0},
        0.5: {"large": 0.5, "small": 0.5},
        0.6: {"large": 0.8, "small": 0},
    }
    assert [point.name for point in search.uniform] == ["sparsity 0", "sparsity 0.5", "sparsity 0.8"]
    assert [point.average for point in search.uniform] == pytest.approx([0, 0.5, 0.8])


def test_an_average_counts_layers_that_keep_a_sparsity_of_their_own() -> None:
    """With 0.9 of 30 weights fixed, 27 of 60 go already: half of all takes 3 more, and 0.2 is out of reach."""
    own = Option(value=0.9, format="", nbytes=40, output_error=0, cost=1)
    fixed = LayerCosts(name="fixed", kind="linear", shape=(1, 30), options=(own,))
    costs = sensitivity(layer("a", 20, 0, 1, 5), layer("b", 10, 0, 2, 9), fixed)
    found = choose_values(costs, Budget(quantity="average_sparsity", limit=0.5), Files())
    assert found.values == {"a": 0.5, "b": 0, "fixed": 0.9} and found.chosen.average == pytest.approx(37 / 60)
    # More than the values that can be chosen, and still within reach.
    found = choose_values(costs, Budget(quantity="average_sparsity", limit=0.85), Files())
    assert found.values == {"a": 0.8, "b": 0.8, "fixed": 0.9} and found.chosen.average == pytest.approx(0.85)
    with pytest.raises(SelectionError, match=r"0\.2 is outside of what the layers together can have, 0\.45 to 0\.85"):
        choose_values(costs, Budget(quantity="average_sparsity", limit=0.2), Files())


def test_a_size_that_was_guessed_too_low_is_corrected() -> None:
    costs = sensitivity(layer("a", 10, 0, 1, 5), layer("b", 10, 0, 2, 9))
    budget = Budget(quantity="size", limit=1130)
    exact, lower = Files(), Files(more=7)
    assert choose_values(costs, budget, exact).values == {"a": 0.5, "b": 0}
    found = choose_values(costs, budget, lower)
    # 130 bytes are left for the layers, and 123 once it is seen that they take 7 more.
    assert found.values == {"a": 0.5, "b": 0.5}
    assert found.chosen.limited == 1127 and found.limited == "size, bytes"
    assert len(exact.measured) == 1 and len(lower.measured) == 2
    with pytest.raises(
        SelectionError, match=r"the budget is 1.10 kB, and the highest sparsity everywhere takes 1.11 kB"
    ):
        choose_values(costs, Budget(quantity="size", limit=1101), Files(more=7))


@pytest.mark.parametrize(("limit", "values"), [(900, {"a": 0.8, "b": 0.8}), (910, {"a": 0.8, "b": 0.5}), (899, None)])
def test_a_size_that_was_guessed_too_high_is_not_refused(limit: int, values: dict[str, float] | None) -> None:
    """The files take 200 bytes less than headers may: 900 with the highest sparsity everywhere, not 1100."""
    costs, less = sensitivity(layer("a", 10, 0, 1, 5), layer("b", 10, 0, 2, 9)), Files(more=-200)
    budget = Budget(quantity="size", limit=limit)
    if values is None:
        with pytest.raises(SelectionError, match="the highest sparsity everywhere takes 900 B"):
            choose_values(costs, budget, less)
    else:
        found = choose_values(costs, budget, less)
        assert found.values == values and found.chosen.limited == limit


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
@pytest.mark.parametrize("name", ["wanda", "taylor"])
def test_language_models(llama: Path, way: str, name: str, tmp_path: Path) -> None:
    step = f"auto:using={name},by={way},sparsity=[0,0.25,0.5,0.75],average_sparsity=0.5"
    report, found = run(llama, step, tmp_path / "out")
    assert found.budget == "sparsity 0.5 on average"
    assert average(found) == pytest.approx(found.chosen.average) and found.chosen.average >= 0.5 - 1e-9
    uniform = {point.average: point for point in found.uniform}
    assert list(uniform) == pytest.approx([0, 0.25, 0.5, 0.75])
    assert found.chosen.cost <= uniform[0.5].cost
    for layer in found.sensitivity.layers:
        untouched, *others = layer.options
        assert untouched.cost == 0 and not untouched.format.startswith("sparse")
        assert all(option.cost > 0 and option.format.startswith("sparse") for option in others)
    ledger = {row.name: row for row in report.stages[-1].ledger}
    for own, value in found.values.items():
        assert ledger[own].notes["sparsity"] == pytest.approx(value, abs=1e-3)
    step_back = recipes.load(tmp_path / "out" / "recipe.yaml").passes[0]
    assert step_back.name == name and step_back.candidates == ()


def test_a_size_is_kept_by_the_files(llama: Path, tmp_path: Path) -> None:
    """The guess comes from half of the windows; what counts are the files of the choice that is carried out."""
    ends = {}
    for value in (0.5, 0.75):
        given = recipes.from_arguments(
            str(llama), passes=[f"magnitude:sparsity={value}"], output=str(tmp_path / str(value)), no_eval=True
        )
        pipeline.run(given)
        ends[value] = sum(file.stat().st_size for file in weight_files(tmp_path / str(value)))
    limit = (ends[0.5] + ends[0.75]) // 2
    step = f"auto:using=magnitude,by=gram,sparsity=[0.25,0.5,0.75],size={limit}"
    report, found = run(llama, step, tmp_path / "out")
    files = sum(file.stat().st_size for file in weight_files(tmp_path / "out"))
    assert found.chosen.limited == files <= limit
    assert files > limit - 0.02 * limit
    assert found.limited == "size, bytes"
    assert sum(row.nbytes for row in report.stages[-1].ledger if row.name in found.values) == found.chosen.nbytes


def test_accuracy_of_a_graph(tmp_path: Path) -> None:
    report, found = run("sample:cnn", "auto:using=magnitude,by=gram,accuracy_drop=20%", tmp_path / "out")
    assert found.measure == "accuracy" and found.chosen.measured is not None
    original = report.stages[0].quality
    assert original is not None and original.classification is not None and original.classification.top1 is not None
    assert found.chosen.measured >= original.classification.top1 - 0.2
    assert 0 < found.chosen.average < 0.8
    assert (
        "sparsity per layer for magnitude: accuracy down by at most 20 points"
        in (tmp_path / "out" / "search.html").read_text()
        or "sparsity per layer for magnitude" in (tmp_path / "out" / "search.html").read_text()
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs=100", "auto.macs: .* sparsity does not change how many multiplications"),
        ("latency=5", "auto.latency: .* takes as long whatever their sparsity"),
    ],
)
def test_what_sparsity_cannot_be_limited_by(net: Path, tmp_path: Path, budget: str, message: str) -> None:
    given = recipes.from_arguments(
        str(net), passes=[f"auto:using=magnitude,{budget}"], output=str(tmp_path / "out"), no_eval=True
    )
    with pytest.raises(RecipeError, match=message):
        pipeline.run(given)


def test_an_average_outside_is_refused_with_the_recipe(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = "auto:using=magnitude,sparsity=[0,0.5],average_sparsity=0.6"
    assert main(["plan", str(net), "--pass", step]) == 1
    assert "average_sparsity: 0.6 is outside of the sparsity to choose from, 0 to 0.5" in capsys.readouterr().err
    assert main(["plan", str(net), "--pass", "auto:using=magnitude,size=3kB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "it chooses sparsity 0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8 of magnitude for each layer" in shown
    assert "upper bound" in shown


def test_a_size_that_no_sparsity_keeps(net: Path, tmp_path: Path) -> None:
    for size, message in (("200B", "the highest sparsity everywhere takes"), ("9MB", "the lowest sparsity everywhere")):
        given = recipes.from_arguments(
            str(net), passes=[f"auto:using=magnitude,by=gram,size={size}"], output=str(tmp_path / "o"), no_eval=True
        )
        with pytest.raises(SelectionError, match=message):
            pipeline.run(given, overwrite=True)


def test_inspect(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "s.html", tmp_path / "s.json"
    arguments = ["inspect", str(net), "--sensitivity", "--pass", "magnitude", "--by", "gram"]
    assert main([*arguments, "--sparsity", "0.5,.25", "-o", str(page)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "each layer alone with magnitude, cost by sparsity" in shown
    assert "sum over the layers: sparsity 0.25: 0." in shown
    assert "Over sparsity" in page.read_text() and "<h3>sparsity 0.25" in page.read_text()
    assert main([*arguments, "-o", str(data)]) == 0
    # What costs nothing takes no column, and of many values some are left out.
    shown = " ".join(capsys.readouterr().out.split())
    assert "layer shape 0.2 0.4 0.6 0.8" in shown
    found = Sensitivity.model_validate_json(data.read_text())
    assert found.option == "sparsity" and "sparsity" not in found.settings
    for own in found.layers:
        assert [option.value for option in own.options] == [0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
        costs = [option.cost for option in own.options]
        assert costs[0] == 0 and costs == sorted(costs)
