"""The JSON schema of a recipe with all passes and export targets, by which editors complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from effcli import passes
from effcli.errors import UserError
from effcli.layers.contract import SearchPass
from effcli.options import Options
from effcli.run.recipe import ExportStep, PassStep, Recipe, RecipeStep, not_per_layer
from effcli.search.space import VARIED, varies

_NULL = {"type": "null"}


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe as YAML gives it."""
    schema = Recipe.model_json_schema()
    keys, definitions = schema["properties"], schema["$defs"]
    step, export = _step(PassStep, definitions), _step(ExportStep, definitions)
    keys["passes"]["items"] = step
    keys["export"]["anyOf"] = [{"type": keys["export"].pop("type"), "items": export}, export, _NULL]
    keys["export"].pop("items")
    for name in ("PassStep", "ExportStep", "Pass", "Exporter"):
        definitions.pop(name)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "A recipe of effcli"}


def _step(kind: type[RecipeStep], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of `name` or `name: {option: value}`; what the options refer to goes into `definitions`."""
    names: list[dict[str, Any]] = []
    named: dict[str, Any] = {}
    for name, entry in kind.registry.known().items():
        try:
            options = _options(kind.registry.load(name), definitions)
        except UserError as error:
            # Its package is at fault, and the rest of the recipe can be completed nevertheless.
            options = {"type": "object", "description": error.cause}
        names.append({"const": name, "description": entry.summary})
        named[name] = {"description": entry.summary, "anyOf": [options, _NULL]}
    one = {"type": "object", "properties": named, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"oneOf": names}, one]}


def _options(kind: type[Options], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of the options of one pass or export target."""
    found = kind.model_json_schema()
    definitions.update(found.pop("$defs", {}))
    keys = found["properties"]
    if issubclass(kind, SearchPass):
        # Those of the pass whose options are chosen may stand beside its own.
        found["properties"] = keys = {**_of_searched_passes(), **keys}
    if "layers" in keys:
        own = {name: schema for name, schema in keys.items() if name not in not_per_layer(kind)}
        keys["layers"]["additionalProperties"] = {"type": "object", "properties": own, "additionalProperties": False}
    return found


def _of_searched_passes() -> dict[str, Any]:
    """The options of all passes of which a search can choose one, each with all that it may be in one of them."""
    found: dict[str, list[Any]] = {}
    for kind in (passes.load(name) for name in passes.PASSES):
        if any(varies(kind, option) for option in VARIED):
            for name, schema in kind.model_json_schema()["properties"].items():
                if schema not in found.setdefault(name, []):
                    found[name].append(schema)
    return {name: schemas[0] if len(schemas) == 1 else {"anyOf": schemas} for name, schemas in found.items()}


__all__ = ["recipe_schema"]
