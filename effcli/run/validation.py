"""Mistakes in options, gathered and said in words: pydantic's errors become key paths, sentences and suggestions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from effcli.errors import RecipeError, did_you_mean
from effcli.run import yaml_files as yamls

Model = TypeVar("Model", bound=BaseModel)


class Typed:
    """What a user typed, by the key path of what it became in the recipe."""

    def __init__(self) -> None:
        self._flags: dict[str, str] = {}

    def add(self, path: str, flag: str) -> None:
        """What is at `path`, and below it, came from `flag`, and no longer from what was typed before."""
        kept = {other: own for other, own in self._flags.items() if not _below(other, path)}
        self._flags = {**kept, path: flag}

    def name(self, path: str) -> str:
        """What was typed, with what is left of the path; empty for what came from elsewhere."""
        found = max((own for own in self._flags if _below(path, own)), key=len, default=None)
        return "" if found is None else ": ".join(filter(None, (self._flags[found], path[len(found) + 1 :])))


def _below(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


class Mistakes:
    """Mistakes by key path, in the order they were found."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, path: str, message: str) -> None:
        """Note a mistake at a key path; a remedy follows after `; `."""
        messages = self.found.setdefault(path, [])
        if message not in messages:
            messages.append(message)

    def raise_if_any(self, source: str, typed: Typed | None = None) -> None:
        """Raise one `RecipeError` that lists every mistake, by what was typed where that is known, else by key path."""
        places = {path: (typed.name(path) if typed is not None else "") for path in self.found}
        lines = [": ".join(filter(None, (places[path] or path, _joined(self.found[path])))) for path in self.found]
        if len(lines) == 1:
            cause, _, remedy = lines[0].partition("; ")
            raise RecipeError(cause if any(places.values()) else f"{source}: {cause}", remedy)
        if lines:
            raise RecipeError(f"{source} has {len(lines)} mistakes:\n" + "\n".join(f"  {line}" for line in lines))


def validated(
    kind: type[Model],
    data: Mapping[str, Any],
    path: str,
    mistakes: Mistakes,
    *,
    owner: str = "",
    known: Iterable[str] = (),
    skip: str = "",
) -> Model | None:
    """Validate `data`; on failure translate each of pydantic's errors to a key path and a sentence."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            location = item["loc"]
            if skip and location[:1] == (skip,):
                continue
            place = join(path, *_within(data, location))
            mistakes.add(place, _sentence(kind, item, owner, known))
        return None


def _within(data: Any, location: Sequence[str | int]) -> list[str]:
    """The part of pydantic's location that is a path of the user's data; it also names members of unions."""
    walked: list[str] = []
    for step, below in zip(location, (*location, None)[1:], strict=True):
        if isinstance(data, BaseModel):
            data = data.__dict__
        if isinstance(data, Mapping):
            if below is not None and (step not in data or (below in data and not isinstance(data[step], Mapping))):
                # The member of a union that a key of the data chose.
                continue
            known = step in data
            walked.append(str(step))
            data = data[step] if known else None
        elif isinstance(data, list | tuple) and isinstance(step, int) and step < len(data):
            walked.append(str(step))
            data = data[step]
        else:
            break
    return walked


def _sentence(kind: type[BaseModel], item: Any, owner: str, known: Iterable[str]) -> str:
    """One mistake in words."""
    location, message = item["loc"], str(item["msg"])
    if item["type"] == "extra_forbidden":
        names = set(known) or set(_model_at(kind, location[:-1]).model_fields)
        what = f"{owner} has no option {location[-1]!r}" if owner else f"there is no key {location[-1]!r}"
        return f"{what}; {did_you_mean(str(location[-1]), names)}"
    if item["type"] == "missing":
        return "missing"
    if item["type"] == "value_error":
        return message.removeprefix("Value error, ")
    if item["type"] in ("tuple_type", "list_type") and isinstance(item["input"], str):
        return f"should be a list, not {shown(item['input'])}; write [{item['input']}]"
    message = message.removeprefix("Input ")
    return f"{message}, not {shown(item['input'])}"


def _model_at(kind: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    """The model that stands at a location below `kind`."""
    for step in location:
        field = kind.model_fields.get(str(step))
        below = _models(field.annotation) if field is not None else []
        if below:
            kind = below[0]
    return kind


def _models(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType):
        return [model for member in get_args(annotation) for model in _models(member)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def join(*steps: str) -> str:
    """A key path."""
    return ".".join(step for step in steps if step)


def shown(value: Any) -> str:
    """A value as it would be written, cut when long."""
    text = repr(value) if not isinstance(value, bool) and value is not None else yamls.dump(value).split("\n")[0]
    return text if len(text) <= 60 else text[:57] + "..."


def _joined(messages: Sequence[str]) -> str:
    """The messages about one key. A union reports each of its members; for the reader that is one mistake."""
    stems = [message.partition(", not ") for message in messages]
    if len(messages) > 1 and len({given for _, _, given in stems}) == 1 and stems[0][2]:
        wanted = " or ".join(stem.removeprefix("should be ") for stem, _, _ in stems)
        return f"should be {wanted}, not {stems[0][2]}"
    return "; ".join(messages)
