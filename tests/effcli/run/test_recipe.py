"""Recipes: read, overridden, checked whole, and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effcli.errors import RecipeError
from effcli.passes.quantize.linear import Linear
from effcli.passes.train.centroids import Centroids
from effcli.run import recipe
from effcli.run import yaml_files as yamls
from effcli.run.recipe import Calibration, Evaluate, PassStep, Recipe, not_per_layer

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
BITS = st.sampled_from([2, 3, 4, 8])
LAYERS = st.dictionaries(TEXT, st.fixed_dictionaries({"bits": BITS}), max_size=2)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    options = {"bits": BITS, "group_size": st.sampled_from([32, 64]), "lm_head": st.booleans(), "layers": LAYERS}
    options |= {"ignore": st.lists(TEXT, max_size=2)}
    return {draw(st.sampled_from(["linear", "awq"])): draw(st.fixed_dictionaries({}, optional=options))}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    number = st.integers(2, 10**6)
    keys: dict[str, st.SearchStrategy[Any]] = {
        "output": st.none() | TEXT,
        "calibration": st.builds(Calibration, data=st.none() | TEXT, samples=number, length=number),
        "evaluate": st.just(False) | st.builds(Evaluate, perplexity=st.booleans() | TEXT, choices=st.none() | TEXT),
        "export": st.sampled_from([["safetensors"], [{"onnx": {"precision": "float16"}}]]),
        "seed": number,
        "device": st.sampled_from(["cpu", "cuda:1", "auto"]),
        "threads": st.none() | number,
        "trust_remote_code": st.booleans(),
        "revision": st.none() | TEXT,
    }
    data = draw(st.fixed_dictionaries({"model": TEXT}, optional=keys))
    return recipe.check(data | {"passes": draw(st.lists(steps(), min_size=1, max_size=3))})


def mistakes(data: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.check(data)
    return str(caught.value)


@given(recipes())
def test_dump_loads_back_to_an_equal_recipe(made: Recipe) -> None:
    text = recipe.dump(made)
    again = recipe.check(yamls.parse(text, "dump"))
    assert again == made
    assert recipe.dump(again) == text
    assert Recipe.model_validate_json(made.model_dump_json()) == made


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ncalibration: {data: valid.txt, samples: 64}\nevaluate: {perplexity: test.txt}\n"
        "passes:\n  - linear\n  - awq: {bits: 3, layers: {'*.down_proj': {bits: 8}}}\n"
    )
    made = recipe.load(path, ["passes.0.bits=5", "output=out"])
    assert made.output == "out"
    assert made.calibration == Calibration(data="valid.txt", samples=64)
    assert made.evaluate == Evaluate(perplexity="test.txt")
    assert [step.name for step in made.passes] == ["linear", "awq"]
    assert made.passes[0].config.model_dump()["bits"] == 5
    assert made.passes[1].config.layers == {"*.down_proj": {"bits": 8}}


def test_every_mistake_is_reported_at_once() -> None:
    text = mistakes(
        {
            "modell": "m",
            "calibration": {"sampels": 3, "length": "long"},
            "evaluate": {"perplexity": [1]},
            "passes": [
                {"awq": {"bitz": 3, "layers": {"*.down_proj": {"bitz": 8}, "x": {"bits": 7, "ignore": []}}}},
                "awk",
                {"linear": {"bits": 7}},
                {"linear": {}, "awq": {}},
                {"linear": 4},
            ],
            "export": ["gguf"],
            "device": "gpu",
            "threads": 0,
        }
    )
    for line in (
        "modell: there is no key 'modell'; did you mean 'model'?",
        "model: missing",
        "calibration.sampels: there is no key 'sampels'; did you mean 'samples'?",
        "calibration.length: should be a valid integer",
        "evaluate.perplexity: should be a valid string or a valid boolean, not [1]",
        "passes.0.bitz: awq has no option 'bitz'; did you mean 'bits'?",
        "passes.0.layers.*.down_proj.bitz: awq has no option 'bitz'; did you mean 'bits'?",
        "passes.0.layers.x.bits: ",
        "passes.0.layers.x.ignore: belongs to the whole pass",
        "passes.1: there is no pass 'awk'; did you mean 'awq'?",
        "passes.2.bits: ",
        "passes.3: a step is a name or",
        "passes.4: the options of linear must be a mapping, not 4",
        "export: there is no export target 'gguf'",
        "device: must be cpu, cuda, cuda:N or auto, not 'gpu'",
        "threads: should be greater than or equal to 1, not 0",
    ):
        assert line in text
    assert "16 mistakes" in text


def test_one_mistake_is_cause_and_remedy() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.check({"model": "m", "passes": [{"awq": {"bitz": 3}}]}, "a.yaml")
    assert caught.value.cause == "a.yaml: passes.0.bitz: awq has no option 'bitz'"
    assert caught.value.remedy == "did you mean 'bits'?"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a mapping"),
        ({"model": "m"}, "name at least one pass"),
        ({"model": "m", "passes": []}, "name at least one pass"),
        ({"model": "m", "passes": "awq"}, "must be a list"),
        ({"model": "m", "passes": {"awq": {}}}, "must be a list"),
        ({"model": "m", "passes": 3}, "must be a list"),
        ({"model": "m", "passes": ["awq"], "calibration": 3}, "calibration: "),
        ({"model": "m", "passes": [None]}, "passes.0: a step is a name"),
        ({"model": "m", "passes": [{"awq": {"layers": 3}}]}, "passes.0.layers: "),
        ({"model": "m", "passes": [{"awq": {"layers": {"x": 3}}}]}, "passes.0.layers.x: "),
    ],
)
def test_wrong_shapes(data: Any, message: str) -> None:
    assert message in mistakes(data)


@pytest.mark.parametrize("key", ["learning_rate", "epochs", "seed", "precision", "ignore"])
def test_one_layer_has_no_training_of_its_own(key: str) -> None:
    text = mistakes({"model": "m", "passes": [{"centroids": {"layers": {"x": {key: 1}}}}]})
    assert f"passes.0.layers.x.{key}: belongs to the whole pass, as all of its options do" in text
    assert not_per_layer(Centroids) == set(Centroids.model_fields)
    assert not_per_layer(Linear) == {"ignore", "layers", "lm_head"}


def test_a_mistake_of_the_pass_is_not_repeated_for_its_layers() -> None:
    text = mistakes({"model": "m", "passes": [{"awq": {"bits": 7, "layers": {"x": {"group_size": 32}}}}]})
    assert "layers" not in text


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("awq", {"awq": {}}),
        ("awq:", {"awq": {}}),
        ("wanda:sparsity=0.5,pattern=2:4", {"wanda": {"sparsity": 0.5, "pattern": "2:4"}}),
        ("awq:ignore=[a,b],bits=4", {"awq": {"ignore": ["a", "b"], "bits": 4}}),
        ("awq:layers={'*.x': {bits: 8, clip: true}}", {"awq": {"layers": {"*.x": {"bits": 8, "clip": True}}}}),
        ("x:a='1,2',b=", {"x": {"a": "1,2", "b": None}}),
    ],
)
def test_parse_pass(text: str, step: dict[str, Any]) -> None:
    assert recipe.parse_pass(text) == step


@pytest.mark.parametrize("text", ["awq:bits", "awq:=4", "awq:bits=4,bits=3", "awq:bits=[4"])
def test_parse_pass_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="--pass awq"):
        recipe.parse_pass(text)


def test_overrides() -> None:
    data = {"model": "m", "passes": ["awq", {"linear": None}, {"awq": {"bits": 4}}]}
    found = recipe.apply_overrides(
        data,
        [
            "passes.0.bits=3",
            "passes.1.linear.bits=8",
            "passes.2.layers.*.0.down_proj.bits=8",
            "passes.2.ignore=[a, b]",
            "calibration.samples=32",
            "model=a=b",
            "evaluate=false",
        ],
    )
    assert found == {
        "model": "a=b",
        "passes": [
            {"awq": {"bits": 3}},
            {"linear": {"bits": 8}},
            {"awq": {"bits": 4, "layers": {"*.0.down_proj": {"bits": 8}}, "ignore": ["a", "b"]}},
        ],
        "calibration": {"samples": 32},
        "evaluate": False,
    }
    assert data == {"model": "m", "passes": ["awq", {"linear": None}, {"awq": {"bits": 4}}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits", "not KEY=VALUE"),
        ("=3", "not KEY=VALUE"),
        ("passes.1.bits=3", "'passes' has no entry '1'"),
        ("passes.x.bits=3", "'passes' has no entry 'x'"),
        ("passes.-1.bits=3", "'passes' has no entry '-1'"),
        ("model.x=3", "'model' is 'm' and has no keys"),
        ("evaluate.samples=3", "'evaluate' is false and has no keys"),
        ("passes.0.bits.x=3", "'passes.0.bits' is 4 and has no keys"),
        ("seed=[", "not YAML"),
    ],
)
def test_overrides_refuse(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.apply_overrides({"model": "m", "evaluate": False, "passes": [{"awq": {"bits": 4}}]}, [override])
    assert message in str(caught.value)


def test_an_unknown_key_in_an_override_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.from_arguments("m", passes=["awq"], overrides=["passes.0.bitz=3", "calibratoin.samples=1"])
    assert "passes.0.bitz: awq has no option 'bitz'; did you mean 'bits'?" in str(caught.value)
    assert "there is no key 'calibratoin'; did you mean 'calibration'?" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"passes": "magnitude:sparsity=2"}, "--pass magnitude: sparsity: should be less than 1, not 2"),
        ({"passes": "awk"}, "--pass awk: there is no pass 'awk'\n"),
        ({"passes": "awq", "bits": 9}, "--bits: should be 2, 3, 4, 5, 6 or 8, not 9"),
        ({"passes": "awq:bits=9", "bits": 9}, "--bits: should be"),
        ({"passes": "nf4", "group_size": 3}, "--group-size: nf4 has no option 'group_size'\n"),
        ({"passes": "linear:layers={a: {bits: 9}}"}, "--pass linear: layers.a.bits: should be"),
        ({"passes": ["int8", "linear"]}, "--pass linear: linear cannot follow int8"),
        ({"passes": ["linear:bits=9"], "adapter": "folder"}, "--pass linear: bits: should be"),
        ({"passes": f"linear:bits={2**64}"}, "--pass linear: bits: a whole number of more than 64 bits\n"),
        ({"passes": "linear", "adapter": "a\0"}, "--adapter: holds a zero byte"),
        ({"passes": "awq:bits=3", "overrides": ["passes.0.bits=9"]}, "--set passes.0.bits: should be"),
        ({"passes": "awq:bits=3", "overrides": ["passes.0.awq.bits=9"]}, "--set passes.0.awq.bits: should be"),
        ({"passes": "awq:bits=9", "overrides": ["passes.0=linera"]}, "--set passes.0: there is no pass 'linera'\n"),
        ({"passes": "awq", "export": ["onx"]}, "--export onx: there is no export target 'onx'\n"),
        # What was not typed has its key path.
        ({"passes": {"awq": {"bits": 9}}}, "the request: passes.0.bits: should be"),
        ({"passes": [{"awq": {"bits": 9}}], "group_size": 32}, "the request: passes.0.bits: should be"),
        ({"passes": "awq", "device": "gpu"}, "the request: device: must be"),
    ],
)
def test_mistakes_name_what_was_typed(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.from_arguments("m", **keys)
    assert str(caught.value).startswith(message)


def test_passes_of_one_name_are_told_apart() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.from_arguments("m", passes=["awq:bits=9", "linear:bits=9", "linear:bits=10", {"linear": {"bits": 11}}])
    first, second, third, fourth = (line.strip() for line in str(caught.value).splitlines()[1:])
    assert str(caught.value).startswith("the request has 4 mistakes:\n")
    assert first.startswith("--pass awq: bits: ") and second.startswith("--pass linear (pass 2): bits: ")
    assert third.startswith("--pass linear (pass 3): bits: ") and fourth.startswith("passes.3.bits: ")


def test_an_override_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: m\npasses: [linear: {bits: 9}]\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    assert caught.value.cause.startswith(f"{path}: passes.0.bits: should be")
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, ["passes.0.bits=10"])
    assert caught.value.cause == "--set passes.0.bits: should be 2, 3, 4, 5, 6 or 8, not 10"


def test_from_arguments() -> None:
    made = recipe.from_arguments(
        "m",
        output="out",
        passes=["awq:group_size=32"],
        bits=3,
        calib="valid.txt",
        evals=["test.txt", "piqa.jsonl"],
        overrides=["calibration.samples=8", "evaluate.limit=5"],
        threads=None,
    )
    assert made.calibration == Calibration(data="valid.txt", samples=8)
    assert made.evaluate == Evaluate(perplexity="test.txt", choices="piqa.jsonl", limit=5)
    assert made.passes[0].config.model_dump(include={"bits", "group_size"}) == {"bits": 3, "group_size": 32}


def test_from_arguments_takes_configs_and_steps() -> None:
    step = recipe.check({"model": "m", "passes": [{"awq": {"bits": 3}}]}).passes[0]
    assert recipe.from_arguments("m", passes="awq:bits=3").passes == (step,)
    for item in (step, step.config, {"awq": {"bits": 3}}, "awq:bits=3"):
        made = recipe.from_arguments("m", passes=[item], overrides=["passes.0.group_size=32"])
        assert made.passes[0] == PassStep(name="awq", config=step.for_layer({"group_size": 32}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"passes": ["awq", "linear"], "bits": 4}, "--bits is ambiguous"),
        ({"passes": [], "bits": 4}, "--bits says nothing without a pass"),
        ({"passes": ["awq:bits=3"], "bits": 4}, "contradict"),
        ({"passes": ["awq"], "evals": ["a.txt"], "no_eval": True}, "contradict"),
        ({"passes": ["awq"], "evals": ["a.txt", "b.txt"]}, "there is already a.txt"),
        ({"passes": ["awq"], "colour": 3}, "there is no key 'colour'"),
        ({"passes": [{}], "bits": 4}, "a step is a name"),
        ({"passes": [3], "bits": 4}, "a step is a name"),
        ({"passes": {"awq": 3}, "bits": 4}, "the options of awq must be a mapping"),
        ({"passes": "awq:ignore=head"}, "--pass awq: ignore: should be a list, not 'head'\nwrite [head]"),
    ],
)
def test_from_arguments_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.from_arguments("m", **keys)
    assert message in str(caught.value)


@pytest.mark.parametrize("off", [False, None, {"perplexity": None, "images": None, "latency": False}])
def test_evaluation_can_be_off(off: Any) -> None:
    made = recipe.check({"model": "m", "passes": ["awq"], "evaluate": off})
    assert made.evaluate == Evaluate.nothing()
    assert not made.evaluate.enabled
    assert recipe.check({"model": "m", "passes": ["awq"]}).evaluate.enabled


def test_no_output() -> None:
    with pytest.raises(RecipeError, match="-o OUT"):
        _ = recipe.from_arguments("m", passes=["awq"]).target


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").touch()
    with pytest.raises(RecipeError, match=r"did you mean 'pipeline.yaml'"):
        recipe.load(tmp_path / "pipelin.yaml")


def test_a_zero_byte_is_refused_where_it_stands() -> None:
    with pytest.raises(RecipeError, match="model: holds a zero byte"):
        recipe.check({"model": "a\0", "passes": ["linear"]})
    with pytest.raises(RecipeError, match=r"passes\.0\.linear: a key holds a zero byte"):
        recipe.check({"model": "a", "passes": [{"linear": {"b\0": 1}}]})


def test_a_window_length_that_follows_the_model_is_not_written_out() -> None:
    keys: dict[str, Any] = {"output": "out", "passes": "linear:bits=4"}
    free = recipe.from_arguments("sample:lm", **keys)
    assert "length" not in recipe.dump(free)
    assert "length: 512" in recipe.dump(recipe.from_arguments("sample:lm", calibration={"length": 512}, **keys))


@pytest.mark.parametrize("number", [10**38, 2**63, -(2**63) - 1])
def test_whole_numbers_have_64_bits(number: int) -> None:
    made = {"model": "m", "passes": [{"kmeans": {"iterations": number}}], "seed": number, "shape": [3, number]}
    text = mistakes({**made, "calibration": {"samples": number}})
    for path in ("passes.0.kmeans.iterations", "seed", "shape.1", "calibration.samples"):
        assert f"{path}: a whole number of more than 64 bits" in text
    for refused in (
        lambda: recipe.check_evaluate({"samples": number}),
        lambda: recipe.check_inputs([f"shape=[{number}]"]),
        lambda: recipe.check_export(f"c:tests={number}", {}),
    ):
        with pytest.raises(RecipeError, match="more than 64 bits"):
            refused()
    assert recipe.check({**made, "passes": ["fold"], "seed": 2**63 - 1, "shape": None}).seed == 2**63 - 1
