from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from effcli import exporters, passes
from effcli.cli import main
from effcli.errors import RecipeError
from effcli.run import recipe
from effcli.run.schema import recipe_schema

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples").glob("*.yaml"))
# What a step needs to be valid.
REQUIRED = {"auto": {"average_bits": 4}}
# What the options may need besides, to say more than one thing.
TOGETHER = {"merge": {"adapter": "folder"}}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def valid(schema: dict[str, Any], data: Any) -> bool:
    return bool(Draft202012Validator(schema).is_valid(data))


def whole(step: Any, **keys: Any) -> dict[str, Any]:
    return {"model": "sample:lm", "passes": [step], **keys}


def both(schema: dict[str, Any], data: Any) -> tuple[bool, bool]:
    """What the schema and what effcli say of a recipe."""
    try:
        recipe.check(data)
    except RecipeError:
        return valid(schema, data), False
    return valid(schema, data), True


def test_is_a_schema(schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path, schema: dict[str, Any]) -> None:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert valid(schema, given)
    assert valid(schema, yaml.safe_load(recipe.dump(recipe.load(path))))
    for key in given:
        assert not valid(schema, {**{name: given[name] for name in given if name != key}, f"{key}_": given[key]})


@pytest.mark.parametrize("name", passes.PASSES)
def test_every_option_of_a_pass(name: str, schema: dict[str, Any]) -> None:
    required = REQUIRED.get(name, {})
    assert both(schema, whole(name)) == (True, not required)
    assert both(schema, whole({name: required})) == (True, True)
    options = passes.load(name)(**required, **TOGETHER.get(name, {})).model_dump(mode="json", exclude_none=True)
    assert both(schema, whole({name: options})) == (True, True)
    for key in options:
        assert both(schema, whole({name: {**required, f"{key}_": options[key]}})) == (False, False), key
        inside = {**required, "layers": {"*": {key: options[key]}}}
        if key in recipe.not_per_layer(passes.load(name)):
            assert both(schema, whole({name: inside})) == (False, False), key


@pytest.mark.parametrize("name", exporters.TARGETS)
def test_every_option_of_an_export_target(name: str, schema: dict[str, Any]) -> None:
    options = exporters.load(name)().model_dump(mode="json", exclude_none=True)
    for target in (name, {name: None}, {name: options}, [name], [{name: options}]):
        assert both(schema, whole("linear", export=target)) == (True, True)
    for key in options or ("any",):
        assert both(schema, whole("linear", export={name: {f"{key}_": options.get(key)}})) == (False, False)


@pytest.mark.parametrize(
    "data",
    [
        whole("linear", evaluate=False),
        whole("linear", evaluate={"perplexity": None, "choices": ["a.jsonl"]}),
        whole({"linear": {"bits": 4, "layers": {"*.down_proj": {"bits": 8}}}}),
        whole({"auto": {"using": "linear", "size": "40MB", "symmetric": True, "options": {"range": "minmax"}}}),
        whole({"auto": {"accuracy_drop": "1%"}}),
        whole("int8", export=[{"c": {"max_ram": "64k", "max_flash": 1024}}]),
        whole("int8", preprocess={"mean": [0.5, 0.5, 0.5], "crop": [8, 8]}, shape=[3, 8, 8]),
    ],
)
def test_what_is_valid(data: dict[str, Any], schema: dict[str, Any]) -> None:
    assert both(schema, data) == (True, True)


@pytest.mark.parametrize(
    "data",
    [
        {"passes": ["linear"]},
        {"model": "sample:lm"},
        whole("lineal"),
        whole({"linear": {}, "awq": {}}),
        whole({}),
        whole({"linear": {"bits": 7}}),
        whole({"linear": {"layers": {"*": {"bit": 4}}}}),
        whole({"auto": {"average_bits": 4, "symetric": True}}),
        whole("linear", export=["onx"]),
        whole("linear", calibration={"sample": 4}),
        whole("linear", evaluate={"perplexitie": True}),
        whole("linear", seed=-1),
    ],
)
def test_what_is_not_valid(data: dict[str, Any], schema: dict[str, Any]) -> None:
    assert both(schema, data) == (False, False)


def test_everything_is_described(schema: dict[str, Any]) -> None:
    names, steps = schema["properties"]["passes"]["items"]["anyOf"]
    assert [name["const"] for name in names["oneOf"]] == list(steps["properties"]) == list(passes.PASSES)
    for name, step in steps["properties"].items():
        assert step["description"] == passes.PASSES[name].summary
        options = step["anyOf"][0]["properties"]
        own = passes.load(name).model_fields
        assert [key for key in own if not options[key].get("description")] == []
