"""effcli: compress trained networks, and say after each step what it did to size, quality and speed.

    report = effcli.compress("sample:lm", passes=["awq:bits=4"], output="out")
    print(report)
    model = effcli.load("out")

What is done is logged to `logging.getLogger("effcli")`, of which nothing is shown until a program sets up `logging`.

Importing this module imports no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effcli.api import compress as compress
    from effcli.errors import EffcliError as EffcliError
    from effcli.reports.printed import PrintedReport as Report
    from effcli.run.listener import Listener as Listener
    from effcli.run.recipe import Recipe as Recipe
    from effcli.runtime import load as load

_HOMES = {
    "EffcliError": "effcli.errors:EffcliError",
    "Listener": "effcli.run.listener:Listener",
    "Recipe": "effcli.run.recipe:Recipe",
    "Report": "effcli.reports.printed:PrintedReport",
    "compress": "effcli.api:compress",
    "load": "effcli.runtime:load",
}

__all__ = ["EffcliError", "Listener", "Recipe", "Report", "compress", "load"]

# A library without a handler has its errors written to standard error.
logging.getLogger("effcli").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("effcli")
    if name in _HOMES:
        module, _, own = _HOMES[name].partition(":")
        return getattr(import_module(module), own)
    raise AttributeError(f"module 'effcli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
