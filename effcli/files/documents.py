"""JSON that came from outside: parsed within limits, checked against a model, refused with a cause when it is wrong.

Every JSON file and header is read here, so that a damaged one ends in one `UserError` wherever it is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from effcli.errors import CheckpointError, UserError, at_fault

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

RESTORE = "restore it from the original, or download it again"
# Far above what any writer makes: nested lists and objects, digits of an integer, bytes of a file.
_DEPTH = 64
_DIGITS = 40
_BYTES = 256 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(
    file: Path, *, remedy: str = RESTORE, error: type[UserError] = CheckpointError, limit: int = _BYTES
) -> Any:
    """The content of a JSON file of at most `limit` bytes; `error` when it is missing, too large or not JSON."""
    try:
        if not file.is_file():
            raise error(f"{file} is missing" if not file.exists() else f"{file} is not a file", remedy)
        size = file.stat().st_size
        if size > limit:
            raise error(f"{file} has {size:,} bytes, more than the {limit:,} that are read", remedy)
        data = file.read_bytes()
    except OSError as found:
        if not at_fault(found):
            raise
        raise error(f"cannot read {file}: {found.strerror or found}", remedy) from found
    return parse_json(data, str(file), remedy=remedy, error=error)


def parse_json(
    data: bytes | str,
    source: str,
    *,
    remedy: str = RESTORE,
    error: type[UserError] = CheckpointError,
    unique: bool = False,
) -> Any:
    """The value that `data` holds as JSON; `error`, naming `source`, when it is no JSON, nested too deep or not text.

    unique: refuse an object that holds one key twice.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_unique if unique else None)
        if text.count("[") + text.count("{") > _DEPTH:
            _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _Refused as found:
        raise error(f"{source} is damaged: {found}", remedy) from found
    except UnicodeError as found:
        raise error(f"{source} is not JSON: it is not UTF-8 text", remedy) from found
    except RecursionError as found:
        raise error(f"{source} is not JSON, or nested too deep", remedy) from found
    except ValueError as found:
        raise error(f"{source} is not JSON: it is damaged", remedy) from found
    return value


def read_object(
    file: Path, *, remedy: str = RESTORE, error: type[UserError] = CheckpointError, limit: int = _BYTES
) -> dict[str, Any]:
    """The JSON object in `file`; see `read_json`."""
    value = read_json(file, remedy=remedy, error=error, limit=limit)
    if not isinstance(value, dict):
        raise error(f"{file} is not a JSON object: it is damaged", remedy)
    return value


def read_model(
    kind: type[Model], file: Path, *, remedy: str = RESTORE, error: type[UserError] = CheckpointError
) -> Model:
    """The file `file` as a `kind`; `error` names the first key that is wrong."""
    return check_model(kind, read_object(file, remedy=remedy, error=error), str(file), remedy=remedy, error=error)


def check_model(
    kind: type[Model], data: Any, source: str, *, remedy: str = RESTORE, error: type[UserError] = CheckpointError
) -> Model:
    """`data`, parsed from `source`, as a `kind`; `error` names the first key that is wrong and counts the others."""
    from effcli.run.validation import Mistakes, validated

    if not isinstance(data, Mapping):
        raise error(f"{source} is damaged: it should hold an object, not {_kind_of(data)}", remedy)
    mistakes = Mistakes()
    made = validated(kind, data, "", mistakes)
    if made is not None:
        return made
    (path, messages), *others = mistakes.found.items()
    more = f" (and {len(others)} more)" if others else ""
    where = f"{path}: " if path else ""
    raise error(f"{source} is damaged: {where}{messages[0]}{more}", remedy)


def says(value: Any) -> bool:
    """Whether a value says anything: null, false and what holds nothing else do not."""
    if isinstance(value, Mapping):
        return any(says(below) for below in value.values())
    if isinstance(value, list | tuple):
        return any(says(below) for below in value)
    return value is not None and value is not False and value != ""


class _Refused(ValueError):
    """JSON that could be read and is not taken."""


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise _Refused(f"a number of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"{twice!r} stands twice in it")
    return made


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            below
            for item in level
            for below in (item.values() if isinstance(item, dict) else item)
            if isinstance(below, dict | list)
        ]
        if not level:
            return
    raise _Refused("it is nested too deep")


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
