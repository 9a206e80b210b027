"""`passes`: the list of passes, and the options of one."""

from __future__ import annotations

from typing import Annotated

import typer

from effcli import passes as pass_table
from effcli.cli.flags import Debug, Json
from effcli.cli.printing import print_json, show


def passes(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the passes."""
    if context.invoked_subcommand is not None:
        return
    if json:
        print_json({name: entry.summary for name, entry in pass_table.PASSES.items()})
        return
    from effcli.reports import screen

    show(screen.passes_table({name: entry.summary for name, entry in pass_table.PASSES.items()}))


def passes_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A pass.", show_default=False, autocompletion=lambda: list(pass_table.PASSES)
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the options of a pass."""
    found = pass_table.load(name)
    if json:
        print_json(found.model_json_schema())
        return
    from effcli.reports import screen

    show(screen.options_table(name, pass_table.PASSES[name].summary, found))
