"""`passes`: the list of passes, and the options of one; `schema`: those of a whole recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from effcli import exporters
from effcli import passes as pass_table
from effcli.cli.flags import Debug, Json
from effcli.cli.printing import print_json, say, show, to_terminal


def passes(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the passes by families, and the export targets of other packages.

    Piped, each pass is one line: its name, its family or the package that offers it, and what it does.
    """
    if context.invoked_subcommand is not None:
        return
    known = pass_table.REGISTRY.known()
    if json:
        print_json({name: entry.summary for name, entry in known.items()})
        return
    from effcli.reports import screen

    targets = {name: entry for name, entry in exporters.REGISTRY.known().items() if entry.package}
    clashes = (*pass_table.REGISTRY.clashes().values(), *exporters.REGISTRY.clashes().values())
    if to_terminal():
        show(screen.passes_table(pass_table.families(), targets, clashes))
        return
    for line in screen.passes_lines(pass_table.families(), targets, clashes):
        say(line)


def passes_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A pass.", show_default=False, autocompletion=lambda: list(pass_table.REGISTRY.known())
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the options of a pass."""
    found = pass_table.load(name)
    if json:
        described = found.model_json_schema()
        for key, value in found.graph_defaults.items():
            described["properties"][key]["graph_default"] = value
        print_json(described)
        return
    from effcli.reports import screen

    show(screen.options_table(name, pass_table.REGISTRY.known()[name].summary, found))


def schema(debug: Debug = False) -> None:
    """Print the JSON schema of a recipe, by which an editor completes YAML.

    `effcli schema > recipe.schema.json`, and in a recipe as the first line
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from effcli.run.schema import recipe_schema

    print_json(recipe_schema())
