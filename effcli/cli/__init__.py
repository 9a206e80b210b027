"""The command line. Everything heavy is imported inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 the user's mistake, 2 a failure of ours or the machine's, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from effcli.cli import measures, passes, results, runs
from effcli.cli.guard import complain, guarded, usage_error
from effcli.cli.printing import finish_output, take_any_encoding
from effcli.errors import MachineError, not_utf8

app = typer.Typer(
    name="effcli",
    help="Compress trained networks, and say after each step what it did to size, quality and speed.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
passes_app = typer.Typer(help="List the passes, or show the options of one.", invoke_without_command=True)
app.add_typer(passes_app, name="passes")

# In the order in which `--help` lists them.
_COMMANDS: dict[str, Callable[..., None]] = {
    "compress": runs.compress,
    "run": runs.run,
    "plan": runs.plan,
    "inspect": measures.inspect,
    "eval": measures.evaluate,
    "bench": measures.bench,
    "export": results.export,
    "verify": results.verify,
    "compare": results.compare,
    "report": results.report,
    "schema": passes.schema,
}
# An export takes the options of its target, which the target itself checks.
_SETTINGS = {"export": {"allow_extra_args": True, "ignore_unknown_options": True}}
_CLASSES = {"export": results.ExportCommand}
for name, command in _COMMANDS.items():
    app.command(name, cls=_CLASSES.get(name), context_settings=_SETTINGS.get(name))(guarded(command))
passes_app.callback()(guarded(passes.passes))
passes_app.command("show")(guarded(passes.passes_show))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    take_any_encoding()
    words = sys.argv[1:] if arguments is None else list(arguments)
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            refusal = not_utf8(word)
            complain(refusal.cause, refusal.remedy)
            return refusal.exit_code
    try:
        # Typer's own handling would leave with 2 for a mistyped option, which is the user's mistake and not ours.
        code = typer.main.get_command(app).main(args=words, prog_name="effcli", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        complain(*usage_error(error))
        return 1
    try:
        finish_output()
    except MachineError as full:
        complain(full.cause, full.remedy)
        return full.exit_code
    return code if isinstance(code, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        import effcli

        print(f"effcli {effcli.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


__all__ = ["app", "main"]
