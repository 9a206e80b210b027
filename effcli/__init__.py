"""effcli: compress trained networks, and say after each step what it did to size, quality and speed.

    report = effcli.compress("sample:lm", passes=["awq:bits=4"], output="out")
    model = effcli.load("out")

Importing this module imports no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effcli.api import compress as compress
    from effcli.reports.report import Report as Report
    from effcli.run.recipe import Recipe as Recipe
    from effcli.runtime import load as load

_HOMES = {
    "Recipe": "effcli.run.recipe",
    "Report": "effcli.reports.report",
    "compress": "effcli.api",
    "load": "effcli.runtime",
}

__all__ = ["Recipe", "Report", "compress", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("effcli")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'effcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
