"""Packages that few runs need, asked for before any work."""

from __future__ import annotations

from importlib.util import find_spec

from effcli.errors import UnsupportedError


def require(package: str, extra: str) -> None:
    """Raise `UnsupportedError` unless a package is installed; extra: of effcli, which installs it."""
    if find_spec(package) is None:
        raise UnsupportedError(f"the package {package} is not installed", f"pip install 'effcli[{extra}]'")


__all__ = ["require"]
