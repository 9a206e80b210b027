#!/usr/bin/env python3
"""Fill in the tables of docs/ that come from the options and records themselves; --check only compares.

A table stands between `<!-- fields of MODULE:CLASS -->` and `<!-- end of fields -->`: a row for each field of that
pydantic model, with the values it takes, its default, and its description.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
_TABLE = re.compile(r"(<!-- fields of (\S+):(\S+) -->\n).*?(<!-- end of fields -->)", re.S)
_WORDS = {"string": "text", "integer": "int", "number": "float", "boolean": "true, false", "null": "null"}
_WORDS |= {"object": "mapping", "array": "list"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def values(schema: Mapping[str, Any]) -> str:
    """What a field takes, from its JSON schema."""
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values(member) for member in schema["anyOf"]))
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    kind = schema.get("type", "any")
    word = _WORDS.get(kind, kind)
    if kind == "array" and schema.get("items"):
        word = f"list of {values(schema['items'])}"
    bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return f"{word} {' and '.join(bounds)}" if bounds else word


def written(value: Any) -> str:
    """A default as people write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "none" if value in ((), [], {}) else str(value)


def table(kind: Any) -> str:
    """The fields of a pydantic model as a Markdown table; those that a pass shares with all others come last."""
    from effcli.layers.contract import Pass

    schema = kind.model_json_schema()
    graphs = getattr(kind, "graph_defaults", {})
    rows = []
    for name in sorted(schema["properties"], key=lambda name: issubclass(kind, Pass) and name in Pass.model_fields):
        field = schema["properties"][name]
        required = name in schema.get("required", ())
        # A default that is made anew each time, an empty mapping, stands in no schema.
        default = "required" if required else written(field.get("default", ()))
        if name in graphs:
            default += f"; in graphs {written(graphs[name])}"
        cells = (f"`{name}`", values(field), default if len(default) < 40 else "", field.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(("| field | values | default | meaning |", "|---|---|---|---|", *rows))


def filled(text: str) -> str:
    """`text` with each of its tables as it should be."""

    def fill(match: re.Match[str]) -> str:
        kind = getattr(importlib.import_module(match[2]), match[3])
        return f"{match[1]}{table(kind)}\n{match[4]}"

    return _TABLE.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not current")
    check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(str(page.relative_to(DOCS.parent)))
            if not check:
                page.write_text(filled(text), encoding="utf-8")
    if check and stale:
        raise SystemExit(f"not current: {', '.join(stale)}; run scripts/pages.py")


if __name__ == "__main__":
    main()
