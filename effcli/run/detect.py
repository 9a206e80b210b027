"""What a model is: a language model or a network read as a graph. That is asked here, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from effcli import importers
from effcli.files import locate as samples
from effcli.run.network import Reading

if TYPE_CHECKING:
    from effcli.run.network import Found, RunNetwork
    from effcli.run.recipe import Recipe


def find(model: str, revision: str | None = None) -> Found:
    """What `model` names: see `effcli.files.locate.locate`."""
    return at(samples.locate(model, revision), model)


def at(source: str | Path, name: str = "") -> Found:
    """What stands at `source`, a path or `package.module:function`; name: what to call it."""
    if importers.recognises(source):
        from effcli.graphs.found import FoundGraph

        return FoundGraph(name or str(source), source)
    from effcli.language.found import FoundLanguageModel

    return FoundLanguageModel(name or str(source), Path(source))


def of_run(recipe: Recipe) -> RunNetwork:
    """The network that `recipe` names, as a run works on it."""
    return find(recipe.model, recipe.revision).of_run(recipe)


__all__ = ["Reading", "at", "find", "of_run"]
