"""What a model is: a language model or a network read as a graph. That is asked here, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from effcli import importers
from effcli.errors import CheckpointError
from effcli.files import locate as samples
from effcli.reports.report import FILE_NAME, Report
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


def check_input(output: Path, given: str) -> None:
    """Raise unless `given`, what the user says that `output` was made from, is there and of the same kind.

    `CheckpointError` says which of the two names is wrong, and what a report says of the right one.
    """
    made_from = f"name the model that {output} was made from"
    if (output / FILE_NAME).is_file():
        made_from += f", by its report {Report.read(output).model}"
    try:
        source = samples.locate(given)
    except CheckpointError as error:
        raise CheckpointError(f"--against {given}: {error.cause}", f"{made_from}: {error.remedy}") from error
    kinds = [_kind(output), _kind(source)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise CheckpointError(f"--against {given}: it is {kinds[1]}, and {output} is {kinds[0]}", made_from)


def _kind(source: str | Path) -> str | None:
    """What stands at `source`, in words; None where it is no checkpoint."""
    if importers.recognises(source):
        return "a network read as a graph"
    return "a language model" if (Path(source) / "config.json").is_file() else None


def of_run(recipe: Recipe) -> RunNetwork:
    """The network that `recipe` names, as a run works on it."""
    return find(recipe.model, recipe.revision).of_run(recipe)


__all__ = ["Reading", "at", "check_input", "find", "of_run"]
