"""The templates of all pages. What goes into one is escaped, whatever it is and wherever it stands."""

from __future__ import annotations

import functools
from typing import Any

import jinja2
from markupsafe import Markup

from effcli.reports import svg
from effcli.reports.escaping import markup


def render(name: str, **context: Any) -> Markup:
    """The template `name` with what it shows; of a name that it uses and that is not given it says so by an error."""
    return Markup(_ENVIRONMENT.get_template(name).render(context))


def drawn(picture: str) -> Markup:
    """A picture of one of the modules svg*, which have escaped the names in it."""
    return Markup(picture)


def _shown(value: Any) -> Markup:
    """Everything that a template shows goes through this: autoescape alone leaves control characters as they are."""
    return value if isinstance(value, Markup) else _escaped(str(value))


@functools.lru_cache(1 << 14)
def _escaped(text: str) -> Markup:
    # A ledger of ten thousand layers says the same few words in most of its cells.
    return Markup(markup(text))


def _breakable(name: str) -> Markup:
    """A layer's name that may wrap after its dots."""
    return Markup(markup(name).replace(".", ".<wbr>"))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("effcli.reports"),
    autoescape=True,
    finalize=_shown,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["breakable"] = _breakable
_ENVIRONMENT.globals["series"] = range(svg.SERIES)

__all__ = ["drawn", "render"]
