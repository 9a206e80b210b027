"""Bits under a budget, from the recipe to the step that is carried out, on language models and on graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest

from effcli.cli import main
from effcli.errors import DataError, RecipeError, SelectionError
from effcli.files.checkpoint import weight_files
from effcli.language.weights import open_weights
from effcli.layers.selection import choose
from effcli.reports import units
from effcli.reports.sensitivity import Search, Sensitivity
from effcli.run import pipeline
from effcli.run import recipe as recipes
from effcli.run import yaml_files as yamls
from effcli.run.recipe import PassStep, Recipe
from effcli.search import stage as stages

SMALL = ["calibration.samples=4", "calibration.length=32", "evaluate.samples=4", "evaluate.length=32"]
QUICK = ["calibration.samples=16", "evaluate.samples=40"]
# A run, told what becomes of a recipe.
Resolve = Callable[[Recipe], tuple[Recipe, tuple[Search, ...]]]


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Carry out a recipe; what it says with the bits of every layer, and what each search found."""

    def carried_out(given: Recipe) -> tuple[Recipe, tuple[Search, ...]]:
        untimed = given.evaluate.model_copy(update={"latency": False})
        output = str(tmp_path / "resolved")
        report = pipeline.run(given.model_copy(update={"output": output, "evaluate": untimed}), overwrite=True)
        searches = tuple(stage.search for stage in report.stages if stage.search is not None)
        return recipes.load(tmp_path / "resolved" / "recipe.yaml"), searches

    return carried_out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("models") / "llama")


def recipe(model: Path | str, *steps: Any, more: list[str] | None = None, **keys: Any) -> Recipe:
    small = [
        key for key in (QUICK if model == "sample:cnn" else SMALL) if not (keys.get("no_eval") and "evaluate" in key)
    ]
    return recipes.from_arguments(str(model), passes=steps, overrides=[*small, *(more or [])], **keys)


def auto(**options: Any) -> dict[str, Any]:
    return {"auto": {"using": "linear", "group_size": 32, "by": "gram", **options}}


def test_a_recipe_without_a_search_stays_as_it_is(llama: Path, resolve: Resolve) -> None:
    given = recipe(llama, "linear:bits=4,group_size=32")
    resolved, searches = resolve(given)
    assert (resolved.passes, searches) == (given.passes, ())


@pytest.mark.parametrize("bits", [2.5, 3, 3.7, 4, 8])
def test_average_bits(llama: Path, bits: float, resolve: Resolve) -> None:
    resolved, (found,) = resolve(recipe(llama, auto(average_bits=bits)))
    uniform = {round(point.average): point for point in found.uniform}

    assert list(uniform) == [2, 3, 4, 8]
    below, above = max(b for b in uniform if b <= bits), min(b for b in uniform if b >= bits)
    share = (bits - below) / max(above - below, 1)
    budget = uniform[below].nbytes + share * (uniform[above].nbytes - uniform[below].nbytes)
    assert found.chosen.nbytes <= budget
    if below == above:
        assert found.chosen.cost <= uniform[below].cost
    assert set(found.values.values()) <= {2, 3, 4, 8}
    assert resolved.passes[0].name == "linear"
    assert resolved.passes[0].candidates == ()
    assert [layer.name for layer in found.sensitivity.layers] == list(found.values)


def test_what_is_written_gives_the_same_bytes_again(llama: Path, tmp_path: Path) -> None:
    given = recipe(llama, auto(average_bits=3, using="awq", by="fisher"), output=str(tmp_path / "a"), no_eval=True)
    (tmp_path / "given.yaml").write_text(recipes.dump(given))
    assert recipes.load(tmp_path / "given.yaml") == given
    assert main(["run", str(tmp_path / "given.yaml"), "--quiet"]) == 0
    written = recipes.load(tmp_path / "a" / "recipe.yaml")
    assert written.passes[0].name == "awq"
    assert main(["run", str(tmp_path / "a" / "recipe.yaml"), "-o", str(tmp_path / "b"), "--quiet"]) == 0
    first, second = ([path.read_bytes() for path in weight_files(tmp_path / name)] for name in ("a", "b"))
    assert first == second

    found = Search.model_validate_json((tmp_path / "a" / "search.json").read_text())
    ledger = {row.name: row for row in pipeline.Report.read(tmp_path / "a").stages[-1].ledger}
    assert sum(ledger[name].nbytes for name in found.values) == found.chosen.nbytes
    for name, bits in found.values.items():
        assert ledger[name].format.startswith(f"int{bits} ")
    assert "<svg" in (tmp_path / "a" / "search.html").read_text()


def test_a_size_in_bytes_is_kept(llama: Path, tmp_path: Path, resolve: Resolve) -> None:
    plain = pipeline.run(recipe(llama, "linear:bits=3,group_size=32", output=str(tmp_path / "plain"), no_eval=True))
    limit = plain.stages[-1].nbytes + 20_000
    given = recipe(llama, auto(size=limit), output=str(tmp_path / "out"), no_eval=True)
    resolved, (found,) = resolve(given)
    report = pipeline.run(resolved, overwrite=True)

    assert report.stages[-1].nbytes <= limit
    assert found.chosen.average > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "10kB"}, "the fewest bits everywhere take"),
        ({"size": "9GB"}, "the most bits everywhere take only"),
        ({"average_bits": 3, "ignore": ["*.none"]}, "matches no layer"),
        ({"average_bits": 3, "group_size": 48}, "group size 48 does not divide"),
        ({"perplexity_increase": 1e-9, "bits": [2, 3]}, "even the most bits take perplexity from"),
    ],
)
def test_a_budget_that_cannot_be_kept(llama: Path, options: dict[str, Any], message: str, resolve: Resolve) -> None:
    with pytest.raises(SelectionError, match=message):
        resolve(recipe(llama, auto(**options)))


def test_the_smallest_choice_that_keeps_the_perplexity(llama: Path, resolve: Resolve) -> None:
    resolved, (found,) = resolve(recipe(llama, auto(perplexity_increase="0.5%", bits=[2, 3, 4])))
    base = 1000.0  # of a network of random weights over 1,024 tokens, about

    assert found.measure == "perplexity"
    assert found.chosen.measured is not None
    assert found.chosen.measured == pytest.approx(base, rel=0.5)
    measured = [point for point in found.front if point.measured is not None]
    assert len(measured) >= 3
    smaller = [point for point in measured if point.nbytes < found.chosen.nbytes]
    assert all(point.measured is not None and point.measured > found.chosen.measured for point in smaller[-1:])
    assert resolved.passes[0].name == "linear"


def test_points_are_measured_on_request(llama: Path, resolve: Resolve) -> None:
    _, (found,) = resolve(recipe(llama, auto(average_bits=3, measured=2)))
    measured = {point.nbytes for point in found.front if point.measured is not None}
    assert {found.front[0].nbytes, found.front[-1].nbytes, found.chosen.nbytes} == measured


def test_bits_of_its_own_stay_with_a_layer(llama: Path, resolve: Resolve) -> None:
    layers = {"*.down_proj": {"bits": 8}, "*.q_proj": {"group_size": 16}}
    resolved, (found,) = resolve(recipe(llama, auto(average_bits=3.5, layers=layers, bits=[2, 3, 4])))

    assert all((bits == 8) == name.endswith("down_proj") for name, bits in found.values.items())
    config: Any = resolved.passes[0].config
    for choice in choose(open_weights(llama).skeleton, resolved.passes[0]).values():
        if choice.config is not None:
            own: Any = choice.config
            assert own.bits == found.values[choice.site.name]
            assert own.group_size == (16 if choice.site.name.endswith("q_proj") else 32)
    assert list(config.layers)[:2] == list(layers)


def test_layers_with_brackets_in_their_names() -> None:
    step = PassStep.model_validate({"linear": {"bits": 2, "group_size": 16}})
    config: Any = stages.with_values(step, "bits", {"a[0].b": 4, "c": 3, "d": 3}).config
    assert config.bits == 3
    assert config.layers == {"a[[]0].b": {"bits": 4}}


def test_the_same_again(llama: Path, resolve: Resolve) -> None:
    first, second = (resolve(recipe(llama, auto(average_bits=3, by="fisher"))) for _ in range(2))
    assert first[0] == second[0]
    assert first[1][0].front == second[1][0].front


def test_a_graph_behind_another_step(tmp_path: Path, resolve: Resolve) -> None:
    given = recipe("sample:cnn", "fold", {"auto": {"average_bits": 4, "using": "linear"}}, output=str(tmp_path / "out"))
    resolved, (found,) = resolve(given)

    assert [step.name for step in resolved.passes] == ["fold", "linear"]
    assert found.sensitivity.way == "loss"
    assert found.sensitivity.unit == "nats"
    uniform = next(point for point in found.uniform if point.average == 4)
    assert found.chosen.nbytes <= uniform.nbytes
    assert found.chosen.cost < uniform.cost
    report = pipeline.run(resolved, overwrite=True)
    ledger = {row.name: row for row in report.stages[-1].ledger}
    assert sum(ledger[name].nbytes for name in found.values) == found.chosen.nbytes


def test_accuracy_of_a_graph(resolve: Resolve) -> None:
    _, (found,) = resolve(recipe("sample:cnn", {"auto": {"accuracy_drop": "5%", "using": "linear", "by": "gram"}}))
    assert found.measure == "accuracy"
    assert found.chosen.measured is not None
    assert found.chosen.measured > 0.5
    with pytest.raises(RecipeError, match="accuracy is measured, not perplexity"):
        resolve(recipe("sample:cnn", {"auto": {"perplexity_increase": "5%", "using": "linear", "by": "gram"}}))


def test_without_a_measurement_there_is_no_such_budget(llama: Path, resolve: Resolve) -> None:
    with pytest.raises(DataError, match="perplexity is not measured"):
        resolve(recipe(llama, auto(perplexity_increase="5%"), no_eval=True))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            "auto",
            "give one budget of average_bits, average_sparsity, average_ratio, size, perplexity_increase, "
            "accuracy_drop, macs, latency, ram, ",
        ),
        ("auto", "flash, not none"),
        ("auto:average_bits=3,size=4MB", "not average_bits and size"),
        ("auto:average_bits=3,using=fold", "fold has no bits to choose"),
        ("auto:average_bits=3,using=auto", "auto has no bits to choose"),
        ("auto:average_bits=3,using=awk", "there is no pass 'awk'"),
        ("auto:average_bits=3,grup_size=4", "awq has no option 'grup_size'"),
        ("auto:average_bits=3,bits=[1,4]", "not 1"),
        ("auto:average_bits=3,bits=[]", "at least 1"),
        ("auto:average_bits=1.5", "average_bits: 1.5 is outside of the bits to choose from, 2 to 8"),
        ("auto:average_bits=6,bits=[4,2,3]", "6 is outside of the bits to choose from, 2 to 4"),
        ("auto:average_bits=6,bits=[2,4],layers={'*': {symmetric: true}}", "6 is outside of the bits to choose from"),
        ("auto:using=magnitude,average_sparsity=90%", "0.9 is outside of the sparsity to choose from, 0 to 0.8"),
        ("auto:size=4Q", "'4Q' is no size"),
        ("auto:size=1.2.3MB", "'1.2.3MB' is no size"),
        ("auto:size=0B", "greater than 0"),
        ("auto:average_bits=3,options={bits: 3}", "the bits are what is chosen"),
        ("auto:average_bits=3,options={group_size: 3},group_size=4", "stands beside `options` and in it"),
        ("auto:perplexity_increase=-1", "greater than 0"),
        ("auto:average_bits=3,by=magic", "'gram', 'fisher' or 'loss'"),
        ("auto:average_bits=3,layers={'*.q_proj': {bits: 7}}", "not 7"),
    ],
)
def test_mistakes_in_a_request(step: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        recipes.from_arguments("sample:lm", passes=[step])


@pytest.mark.parametrize(
    ("text", "nbytes"), [("40MB", 40_000_000), ("1.5 GB", 1_500_000_000), ("64KiB", 65536), (7, 7)]
)
def test_sizes(text: Any, nbytes: int) -> None:
    config: Any = PassStep.model_validate({"auto": {"size": text}}).config
    assert config.size == nbytes


def test_bits_are_sorted_and_once() -> None:
    config: Any = PassStep.model_validate({"auto": {"average_bits": 3, "bits": [8, 3, 3]}}).config
    assert config.bits == (3, 8)
    assert [step.config.bits for step in PassStep(name="auto", config=config).candidates] == [3, 8]  # type: ignore[attr-defined]


def test_a_plan_says_what_it_cannot_know(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = "auto:average_bits=3,using=linear,group_size=32"
    assert main(["plan", str(llama), "--pass", step, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (line,) = (remark for remark in found["remarks"] if "auto measures the layers before it can say" in remark)
    assert line.endswith("it chooses bits 2, 3, 4, 8 of linear for each layer; budget: 3 bits on average")
    plain = {}
    for bits in (2, 8):
        assert main(["plan", str(llama), "--pass", f"linear:bits={bits},group_size=32", "--json"]) == 0
        plain[bits] = json.loads(capsys.readouterr().out)
    assert found["output_bytes"] == plain[8]["output_bytes"]
    assert [row["nbytes"] for row in found["rows"]] == [row["nbytes"] for row in plain[8]["rows"]]
    assert {row["format"] for row in found["rows"] if row["status"] == "compress"} == {"int2 to int8 g32 asym"}
    ends = (units.size(plain[bits]["output_bytes"]) for bits in (2, 8))
    assert found["remarks"][0] == f"weights: {units.size(found['input_bytes'])} before, {' to '.join(ends)} after"


@pytest.mark.parametrize("way", ["gram", "fisher", "loss"])
@pytest.mark.parametrize("model", ["llama", "sample:cnn"])
def test_inspect(llama: Path, model: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(llama) if model == "llama" else model
    page, data = tmp_path / "s.html", tmp_path / "s.json"
    size = "group_size=32" if model == "llama" else "granularity=channel"
    arguments = ["inspect", source, "--sensitivity", "--pass", f"linear:{size}", "--bits", "3,8", "--by", way]
    small = SMALL[:2] if model == "llama" else QUICK[:1]
    arguments += [f"--set={each}" for each in small]
    assert main([*arguments, "-o", str(page)]) == 0
    text = capsys.readouterr().out
    assert f"{way}: " in text
    assert "3 bits" in text and "8 bits" in text
    assert page.read_text().count("<svg") > 2 and "<h3>3 bits" in page.read_text()
    assert main([*arguments, "-o", str(data), "--json"]) == 0
    found = Sensitivity.model_validate_json(capsys.readouterr().out)
    assert found.way == way
    stored = Sensitivity.model_validate_json(data.read_text())
    assert stored.layers == found.layers
    for layer in found.layers:
        few, many = layer.options
        assert (few.value, many.value) == (3, 8)
        assert few.nbytes < many.nbytes
        assert few.cost >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "3"], "--bits: it belongs to --sensitivity"),
        (["--sparsity", "0.5"], "--sparsity: it belongs to --sensitivity"),
        (["--sensitivity", "--bits", "3", "--sparsity", "0.5"], "--bits and --sparsity exclude each other"),
        (["--sensitivity", "--sparsity", "0.5,x"], "--sparsity 0.5,x: not shares from 0 to less than 1"),
        (["--sensitivity", "--sparsity", "1.5"], "--sparsity 1.5: not shares from 0 to less than 1"),
        (["--sensitivity", "--sparsity", "0.5"], "awq has no option 'sparsity'"),
        (["--sensitivity", "--bits", "3,x"], "--bits 3,x: not whole numbers"),
        (["--sensitivity", "--bits", "7"], "error: --bits: should be 2, 3, 4, 5, 6 or 8, not 7"),
        (["--sensitivity", "--pass", "linear:bitz=3"], "error: --pass linear: bitz: linear has no option 'bitz'"),
        (["--sensitivity", "--pass", "linear:bits=3", "--bits", "4"], "--bits 4 and bits=3 contradict"),
        (["--sensitivity", "--by", "los"], "did you mean 'loss'?"),
        (["--sensitivity", "--pass", "fold"], "fold has no option 'bits'"),
        (["--sensitivity", "-o", "x.txt"], "neither .html nor .json"),
        (["--sensitivity", "--calib", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_at_inspect(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "sample:lm", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_auto_is_written_like_any_step() -> None:
    given = recipes.from_arguments("sample:lm", passes=["auto:average_bits=3.5,group_size=64"])
    again = recipes.check(yamls.parse(recipes.dump(given), "again"))
    assert again == given
