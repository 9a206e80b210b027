"""YAML as people expect it: the scalars of YAML 1.2's core schema, and a key that stands twice is an error.

PyYAML follows YAML 1.1, where `2:4` is the number 124 in base 60, `no` is false, and `1e-3` is text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from effcli.errors import RecipeError, first_line

_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)

_PATTERNS = {tag: re.compile(f"(?:{pattern})") for tag, pattern, _ in _SCALARS}
# Far above what any recipe holds: nested lists and mappings, digits of a whole number, characters.
_DEPTH = 64
_DIGITS = 40
_CHARACTERS = 1 << 24


class _Loader(yaml.SafeLoader):
    """Reads the scalars below and no others."""

    _depth = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # Recipes are small trees; a reference could make one that has no end.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "references (*name) are not read", mark)
        self._depth += 1
        if self._depth > _DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is nested too deep", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        problem = None if node is None else _problem(node)
        if node is not None and problem:
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node


def _problem(node: yaml.Node) -> str | None:
    """Why a node with the tag that was written or found for it cannot be read; None when it can."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    shown = kind if kind == node.tag else f"!!{kind}"
    if not isinstance(node, yaml.ScalarNode):
        own = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        return None if kind == own else f"{shown} is not read for a {'list' if own == 'seq' else 'mapping'}"
    text = node.value
    if kind == "str":
        odd = any("\ud800" <= char <= "\udfff" for char in text)
        return "a text holds half a character" if odd else None
    if node.tag not in _PATTERNS:
        return f"the tag {shown} is not read"
    if not _PATTERNS[node.tag].fullmatch(text):
        return f"{text[:40]!r} is no {shown}"
    return f"a number of {len(text)} digits" if kind == "int" and len(text) > _DIGITS else None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _tag, re.compile(f"^(?:{_pattern})$"), ["" if char == "\0" else char for char in _first]
        )


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Read back, these end a line or vanish unless they are escaped, which only double quotes can do.
    style = '"' if any(char in text for char in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # Decimal whatever the leading zeros: YAML 1.1 read 010 as 8.
    return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, source: str) -> Any:
    """The data in `text`; a `RecipeError` that names `source` and the line when it is not YAML."""
    if len(text) > _CHARACTERS:
        raise RecipeError(f"{source} has {len(text):,} characters, more than are read", "give a recipe")
    try:
        return yaml.load(text, _Loader)
    except (ValueError, OverflowError, RecursionError) as error:
        # An escape that is no character, for one; the reader has no error of its own for these.
        raise RecipeError(f"{source}: not YAML: {first_line(error)}", "quote texts that hold : # [ or {") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise RecipeError(f"{source}{where}: not YAML: {problem}", "quote texts that hold : # [ or {") from None


def dump(data: Any) -> str:
    """`data` as YAML in the order given, small values on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)
