"""Every error text that the source holds is plain: it has a remedy, and no name that only the source knows.

The texts are read from the source. What stands in braces there is filled in at run time, and passes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import effcli
from effcli import errors

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.EffcliError)
}
# A run meets these itself: it begins anew, and shows the cause alone.
WITHOUT_REMEDY = {"UnfinishedError"}
# Characters, what is filled in left out. The longest remedy lists the forms that a question may have.
LONGEST = 250
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"
# What a user writes or reads: functions, groups of entry points, a key of config.json.
PUBLIC = {"effcli.load", "effcli.compress", "effcli.passes", "effcli.exporters", "effcli.formats", "effcli.config"}
# Exceptions of Python say nothing to somebody who does not read the source.
PYTHON = re.compile(r"\b(NoneType|Traceback|[A-Z]\w*(Error|Exception|Warning))\b")
# Words that begin with a capital wherever they stand.
NAMES = {"C", "NaN", "ONNX", "TMPDIR"}


@dataclass(frozen=True)
class Said:
    """An error as the source has it. remedy: None where it has none."""

    place: str
    kind: str
    cause: str
    remedy: str | None


@cache
def trees() -> dict[Path, ast.Module]:
    found = {}
    for folder in ("effcli", "passes", "kernels", "exporters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                found[path] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def constants(tree: ast.Module) -> dict[str, str]:
    """The texts that a module gives a name."""
    return {
        target.id: text(node.value, {})
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def text(node: ast.expr, known: dict[str, str]) -> str:
    """What a text says in the source; a hole for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text(part.value if isinstance(part, ast.FormattedValue) else part, known) for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left, known) + text(node.right, known)
    if isinstance(node, ast.Name):
        return known.get(node.id, HOLE)
    return HOLE


def said() -> Iterator[Said]:
    """Every error that is made with texts of its own."""
    for path, tree in trees().items():
        known = constants(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "mistakes.add":
                # Its remedy stands behind a semicolon, where the cause does not tell it already.
                yield Said(place, "RecipeError", text(node.args[1], known), HOLE)
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name not in KINDS or not node.args or isinstance(node.args[0], ast.Starred):
                continue
            given = [text(each, known) for each in node.args]
            given += [text(each.value, known) for each in node.keywords if each.arg == "remedy"]
            yield Said(place, name, given[0], given[1] if len(given) > 1 else None)


@cache
def internal() -> set[str]:
    """The classes of effcli that neither its users nor those who write passes for it know."""
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = {node.name for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    # Formats that have classes of their own, such as ONNX, are known to everybody.
    own = {name for name in found - set(effcli.__all__) if not name.isupper()}
    return {name for name in own if not re.search(rf"\b{name}\b", guide)}


def faults(error: Said, classes: set[str]) -> Iterator[str]:
    # Of a list of mistakes each line has its own.
    if not (error.remedy or error.kind in WITHOUT_REMEDY or error.cause.endswith(f":\n{HOLE}")):
        yield "no remedy"
    for part in filter(None, (error.cause, error.remedy)):
        if part.endswith(".") and not part.endswith("..."):
            yield "ends with a full stop"
        first = re.split(r"[\s:,]", part, maxsplit=1)[0]
        if first[:1].isupper() and first not in NAMES:
            yield f"begins with a capital: {first}"
        if len(part.replace(HOLE, "")) > LONGEST:
            yield f"{len(part)} characters"
        modules = set(re.findall(r"\beffcli\.[a-z_]\w*", part)) - PUBLIC
        private = re.findall(rf"(?<![\w{HOLE}.*/-])_[a-z]\w*", part)
        for name in (*modules, *private, *(classes & set(re.findall(r"\w+", part)))):
            yield f"the name {name}"
        for name in PYTHON.findall(part):
            yield f"an exception of Python: {name[0]}"


def test_error_texts_are_plain() -> None:
    found, classes = list(said()), internal()
    assert len(found) > 400
    assert [f"{error.place}: {fault}" for error in found for fault in faults(error, classes)] == []


@pytest.mark.parametrize(
    ("cause", "remedy", "fault"),
    [
        ("it fails", None, "no remedy"),
        ("it fails", "", "no remedy"),
        ("it fails.", "try", "full stop"),
        ("It fails", "try", "capital"),
        (f"it fails {'x' * LONGEST}", "try", "characters"),
        ("effcli.run.pipeline fails", "try", "effcli.run"),
        ("it fails in _open", "try", "_open"),
        ("a GraphNetwork fails", "try", "GraphNetwork"),
        ("it fails", "catch the KeyError", "KeyError"),
    ],
)
def test_a_text_that_is_not_plain_is_found(cause: str, remedy: str | None, fault: str) -> None:
    assert [one for one in faults(Said("", "DataError", cause, remedy), internal()) if fault in one]
