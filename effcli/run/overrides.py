"""Recipes as plain data: the chain syntax of `--pass`, and `--set KEY=VALUE`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from effcli.errors import RecipeError
from effcli.run import yaml_files as yamls
from effcli.run.validation import shown


def parse_pass(text: str, flag: str = "--pass") -> dict[str, Any]:
    """`wanda:sparsity=0.5,pattern=2:4` -> {"wanda": {"sparsity": 0.5, "pattern": "2:4"}}; `flag` is for messages.

    Values are YAML: numbers, true, text, or lists and mappings in brackets, whose commas do not end the option.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in _split(rest) if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{flag} {text}: {part!r} is not KEY=VALUE", f"write {flag} NAME:KEY=VALUE,KEY=VALUE")
        if key.strip() in options:
            raise RecipeError(f"{flag} {text}: {key.strip()!r} stands twice", "give each option once")
        options[key.strip()] = yamls.parse(value, f"{flag} {text}")
    return {name.strip(): options}


def apply_overrides(data: Any, overrides: Iterable[str]) -> Any:
    """A copy of plain recipe data with `KEY=VALUE` applied, e.g. `passes.1.bits=3` or `calibration.samples=32`.

    Values are YAML. In `passes.0.layers.PATTERN.OPTION=VALUE` the pattern may hold dots. Whether a key exists is for
    `recipe.check` to say, together with every other mistake, and so is what is wrong with data that are no mapping.
    """
    result: Any = plain(data)
    if not isinstance(result, dict):
        return result
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {override}: this is not KEY=VALUE", "for example --set calibration.samples=32")
        _assign(result, key.strip(), yamls.parse(text, f"--set {override}"))
    return result


def set_on_only_step(steps: list[Any], option: str, flag: str, value: Any) -> None:
    """Set `option` of the one step there is; refused when there is none, when there are several, or for a clash."""
    if not steps:
        raise RecipeError(f"{flag} says nothing without a pass", f"name one: --pass awq {flag} {value}")
    if len(steps) > 1:
        raise RecipeError(
            f"{flag} is ambiguous: there are {len(steps)} passes", f"write it in its pass: --pass NAME:{option}={value}"
        )
    steps[0] = _step_with_options(steps[0])
    for options in steps[0].values():
        if isinstance(options, dict):
            if options.get(option, value) != value:
                raise RecipeError(f"{flag} {value} and {option}={options[option]} contradict", "leave one of them out")
            options[option] = value


def plain(data: Any) -> Any:
    """A deep copy of plain data in which tuples are lists, so that it can be changed in place."""
    if isinstance(data, BaseModel):
        return plain(data.model_dump(mode="json", exclude_unset=True))
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return data


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the entry at the dotted `key`, making the mappings on the way."""
    steps = _path(key)
    here: Any = data
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        place = ".".join(steps[:depth])
        if isinstance(here, list):
            if not re.fullmatch("[0-9]{1,6}", step) or int(step) >= len(here):
                count = f"{len(here)} entr{'y' if len(here) == 1 else 'ies'}, numbered from 0"
                raise RecipeError(f"--set {key}: {place!r} has no entry {step!r}", f"it has {count}")
            index = int(step)
            if last:
                here[index] = value
            elif place == "passes":
                here[index] = _step_with_options(here[index])
                here = here[index]
                # The pass's name is part of the data but not of the path.
                name = next(iter(here), None)
                if name is not None and steps[depth + 1] != name:
                    here = here[name]
            else:
                here = here[index]
        elif isinstance(here, dict):
            if last:
                here[step] = value
            elif isinstance(here.get(step), dict | list):
                here = here[step]
            elif step not in here:
                here = here.setdefault(step, {})
            else:
                path = ".".join(steps[: depth + 1])
                raise RecipeError(
                    f"--set {key}: {path!r} is {shown(here[step])} and has no keys",
                    f"set {path} itself, or leave out what made it {shown(here[step])}",
                )
        else:
            raise RecipeError(f"--set {key}: {place!r} is {shown(here)} and has no keys", f"set {place} itself")


def _path(key: str) -> list[str]:
    """Split a dotted key; in `passes.N.layers.PATTERN.OPTION` the pattern keeps its dots."""
    steps = key.split(".")
    if steps[0] == "passes" and "layers" in steps[2:4]:
        at = steps.index("layers", 2)
        pattern = ".".join(steps[at + 1 : -1])
        if pattern:
            return [*steps[: at + 1], pattern, steps[-1]]
    return steps


def _step_with_options(step: Any) -> dict[str, Any]:
    """A step as `{name: {options}}`, however short it was written."""
    if isinstance(step, str):
        return {step: {}}
    if isinstance(step, dict):
        return {name: {} if options is None else options for name, options in step.items()}
    return {}


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return [part for part in parts if part.strip()]
