"""Imports go one way: cli -> pipeline -> passes -> kernels, and all of them may use the core."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from effcli import exporters, passes

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("effcli", "passes", "kernels", "exporters")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)

# Who may look up a pass by name. Nobody may import a particular one.
KNOW_PASSES = {
    "effcli.cli.flags",
    "effcli.cli.passes",
    "effcli.run.recipe",
    "effcli.run.schema",
}
# The modules that stand above the passes: nothing below may lean on them.
ABOVE = (
    "api",
    "cli",
    "run.pipeline",
    "run.recipe",
    "run.plan",
    "run.schema",
    "search.sensitivity",
    "search.stage",
    "language.sweep",
    "language.model",
    "language.plan",
    "graphs.sweep",
    "graphs.training",
    "graphs.network",
    "graphs.plan",
    "training.loop",
)
# What a package of the tool may not know of: of two kinds of networks neither needs the other, inputs need none.
STRANGERS = {
    "effcli.language": ("effcli.graphs", "effcli.importers._"),
    "effcli.graphs": ("effcli.language",),
    "effcli.importers": ("effcli.language", "effcli.reports"),
    "effcli.inputs": ("effcli.language", "effcli.graphs"),
    "effcli.training": ("effcli.language", "effcli.graphs", "effcli.importers", "effcli.inputs", "effcli.layers"),
    "effcli.layers.selection": ("effcli.language", "effcli.graphs"),
    "effcli.run.plan": ("effcli.language", "effcli.graphs"),
    "effcli.reports": ("effcli.language", "effcli.graphs", "effcli.inputs"),
}


def module_name(path: Path) -> str:
    *folders, name = path.relative_to(ROOT).with_suffix("").parts
    top = folders if folders[0] == "effcli" else ["effcli", *folders]
    return ".".join([*top, name]).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, at the top or inside a function; `from effcli import x` gives `effcli.x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def pass_in(name: str) -> str:
    """The pass whose module, or what stands in it, is called `name`; empty where there is none."""
    family, _, rest = name.removeprefix("effcli.passes.").partition(".") if below(name, "effcli.passes") else ("",) * 3
    found = rest.partition(".")[0]
    return found if family and found in passes.PASSES else ""


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    here, folder = module_name(path), path.relative_to(ROOT).parts[0]
    strangers = [name for package, names in STRANGERS.items() if below(here, package) for name in names]
    for name in imports(path):
        # A bare name would import a second copy of the folder from the checkout.
        assert name.split(".")[0] not in {"passes", "kernels", "exporters"}, name
        if folder == "effcli":
            assert pass_in(name) == "", f"{here} names a pass: {name}"
            if below(name, "effcli.passes"):
                assert here in KNOW_PASSES, f"{here} imports {name}"
            assert not any(below(name, stranger) for stranger in strangers), f"{here} imports {name}"
        else:
            assert not any(below(name, f"effcli.{module}") for module in ABOVE), f"{here} imports {name}"
        if folder == "passes":
            assert not below(name, "effcli.exporters"), f"{here} imports {name}"
            assert pass_in(name) == "", f"{here} imports another pass: {name}"
        if folder == "exporters":
            assert not below(name, "effcli.passes"), f"{here} imports {name}"
        if folder == "kernels" and below(name, "effcli"):
            allowed = ("effcli.kernels", "effcli.formats", "effcli.errors")
            assert name == "effcli" or any(below(name, module) for module in allowed), f"{here} imports {name}"


def imported_modules(path: Path, known: Container[str]) -> Iterator[str]:
    """The modules that `path` imports: of `from effcli.graphs import plan` the module plan, not its package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module)


def test_no_module_imports_itself_on_a_detour() -> None:
    """Imports inside functions and for types alone count as well."""
    modules = {module_name(path): path for path in SOURCES}
    order = {name: set(imported_modules(path, modules)) & modules.keys() - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(order).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("folder", "table"),
    [
        ("passes", {name: entry.place.partition(":")[0] for name, entry in passes.PASSES.items()}),
        ("exporters", {name: entry.place.partition(":")[0] for name, entry in exporters.TARGETS.items()}),
    ],
)
def test_tables_match_the_folders(folder: str, table: dict[str, str]) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if not path.stem.startswith("_")]
    files = [path for path in files if "firmware" not in path.parts]
    assert table == {path.stem: module_name(path) for path in files}


def test_kernels_package_is_a_docstring() -> None:
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("module", ["effcli", "effcli.cli", "effcli.importers", "effcli.passes", "effcli.exporters"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = "torch", "transformers", "triton", "pydantic", "numpy"
    code = f"import {module}, sys; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", ["effcli.run.pipeline", "effcli.run.recipe", "effcli.runtime"])
def test_triton_waits_for_a_kernel(module: str) -> None:
    code = f"import {module}, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
