"""What is known by name: effcli's own classes, and those that other packages offer through entry points.

Nothing of a package is imported before its class is asked for: the line about it is read from its source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from effcli.errors import UserError, first_line

T = TypeVar("T")

# The groups of entry points through which other packages offer classes.
PASSES, EXPORTERS, FORMATS = GROUPS = "effcli.passes", "effcli.exporters", "effcli.formats"


class Entry(NamedTuple):
    """Where a class is, as `module:Class`, and one line about it."""

    place: str
    summary: str
    packages: tuple[str, ...] = ()  # what effcli's own needs beside effcli's dependencies, all in the extra of its name
    package: str = ""  # the distribution that offers it; empty for effcli's own


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Classes by name. noun: what one is; group: of the entry points; bases: what it must derive from one of."""

    noun: str
    group: str
    bases: tuple[str, ...]
    own: Mapping[str, Entry]

    def known(self) -> dict[str, Entry]:
        """All of them, effcli's own first. Of several with one name, effcli's is taken, or else none can be."""
        found: dict[str, Entry] = dict(self.own)
        for name, entry in self._offered():
            found.setdefault(name, entry)
        return found

    def find(self, name: str) -> Entry | None:
        """The entry of this name, without a look at other packages where effcli has one."""
        return self.own.get(name) or self.known().get(name)

    def clashes(self) -> dict[str, str]:
        """A line on each name that more than one package uses."""
        lines: dict[str, str] = {}
        offered = list(self._offered())
        for name in dict.fromkeys(name for name, _ in offered):
            packages = [entry.package for other, entry in offered if other == name]
            if name in self.own:
                lines[name] = f"the {self.noun} {name!r} is effcli's own; that of {_listed(packages)} is not used"
            elif len(packages) > 1:
                lines[name] = f"{_listed(packages)} both have a {self.noun} {name!r}; none can be used"
        return lines

    def load(self, name: str) -> type[T]:
        """The class of this name, which must be known. `UserError` when that of another package cannot serve."""
        entry = self.own.get(name)
        if entry is not None:
            found: type[T] = _class_at(entry.place)
            return found
        rivals = [entry for other, entry in self._offered() if other == name]
        if len(rivals) > 1:
            raise UserError(
                f"{_listed([entry.package for entry in rivals])} both have a {self.noun} {name!r}",
                "keep the one that you want, and pip uninstall the others",
            )
        return self._foreign(name, rivals[0])

    def _foreign(self, name: str, entry: Entry) -> type[T]:
        what = f"the {self.noun} {name!r} of the package {entry.package}"
        remedy = f"pip install --upgrade {entry.package}, or pip uninstall {entry.package}"
        try:
            found: Any = _class_at(entry.place)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # whatever the code of a package raises
            cause = f"{what} cannot be imported from {entry.place}: {type(error).__name__}: {first_line(error)}"
            raise UserError(cause, remedy) from error
        bases = tuple(_class_at(base) for base in self.bases)
        if not isinstance(found, type) or not issubclass(found, bases):
            names = " or ".join(base.partition(":")[2] for base in self.bases)
            raise UserError(f"{what} is not a {names}: {entry.place}", remedy)
        missing = sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise UserError(f"{what} is not complete: {entry.place} lacks {', '.join(missing)}", remedy)
        offered: type[T] = found
        return offered

    def _offered(self) -> Iterator[tuple[str, Entry]]:
        """Names and entries of other packages, in an order that does not hang on the search path."""
        found = {(_package(point), point.name, point.value) for point in entry_points(group=self.group)}
        for package, name, place in sorted(found):
            yield name, Entry(place, _summary(place), package=package)


def offered_as(kind: type, group: str) -> tuple[str, str]:
    """The name under which another package offers a class in `group`, and the package.

    The name is empty of a class that an offered one is made with, both are of ours.
    """
    points = list(_well_formed(group))
    place = f"{kind.__module__}:{kind.__qualname__}"
    for point in points:
        if point.value == place:
            return point.name, _package(point)
    top = kind.__module__.partition(".")[0]
    return "", next((_package(point) for point in points if point.module.partition(".")[0] == top), "")


def package_at_fault(error: BaseException) -> str:
    """The package of another's class whose code raised an error, however deep it called others; empty for ours."""
    offered = {point.module.partition(".")[0]: _package(point) for group in GROUPS for point in _well_formed(group)}
    found, here = "", error.__traceback__
    while here is not None:
        found = offered.get(str(here.tb_frame.f_globals.get("__name__", "")).partition(".")[0], found)
        here = here.tb_next
    return found


def _well_formed(group: str) -> Iterator[EntryPoint]:
    return (point for point in entry_points(group=group) if point.pattern.match(point.value))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"


def _listed(names: list[str]) -> str:
    return " and ".join(names)


def _class_at(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _summary(place: str) -> str:
    """The variable `summary` of the class at `place`, or the first line of its docstring; read, not imported."""
    module, _, name = place.partition(":")
    source = _source(module)
    try:
        tree = ast.parse(source.read_bytes()) if source is not None else None
    except (OSError, SyntaxError, ValueError):
        tree = None
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
                value = getattr(item, "value", None)
                if isinstance(target, ast.Name) and target.id == "summary" and isinstance(value, ast.Constant):
                    return str(value.value)
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _source(module: str) -> Path | None:
    """The file of a module. Only its outermost package is looked for by Python, which imports nothing."""
    top, *below = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, AttributeError, ValueError):
        return None
    if spec is None:
        return None
    if not below:
        return Path(spec.origin) if spec.origin is not None else None
    for folder in spec.submodule_search_locations or ():
        for path in (Path(folder, *below[:-1], f"{below[-1]}.py"), Path(folder, *below, "__init__.py")):
            if path.is_file():
                return path
    return None


__all__ = ["EXPORTERS", "FORMATS", "GROUPS", "PASSES", "Entry", "Registry", "offered_as", "package_at_fault"]
