"""What stands around every command: exceptions become one or two lines and an exit code."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from effcli.cli.flags import LogFile, LogLevel
from effcli.cli.logs import LOGGER, recording
from effcli.errors import EffcliError, MachineError, machine_condition
from effcli.platform.registry import package_at_fault
from effcli.reports.escaping import terminal

_NAMED = inspect.Parameter.KEYWORD_ONLY


def usage_error(error: Any) -> tuple[str, str]:
    """Cause and remedy of an error that Typer found in the arguments."""
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if option and context is not None and error.message.startswith("No such option"):
        return error.message, _other_option(option, context)
    near = getattr(error, "possibilities", None)
    if near:
        return error.message, f"did you mean {near[0]}?"
    cause, _, suggestion = error.format_message().partition(" Did you mean ")
    if suggestion:
        return cause.rstrip("."), f"did you mean {suggestion}"
    return cause, f"see `{context.command_path if context is not None else 'effcli'} --help`"


# What several commands call by different names.
_ALIKE = (("--eval", "--text", "--choices", "--images"), ("--reference", "--against"))


def _other_option(name: str, context: Any) -> str:
    """What may have been meant by an option that the command of `context` does not have."""
    own = set(_options(context.command))
    commands = {command.name: set(_options(command)) for command in context.find_root().command.commands.values()}
    near = difflib.get_close_matches(name, own.union(*commands.values()), cutoff=0.7)
    meant = near[0] if near else ""
    if meant != name and own.intersection(near):
        meant = next(option for option in near if option in own)
        return f"did you mean {meant}?"
    alike = [option for names in _ALIKE if meant in names for option in names if option in own]
    if alike:
        return f"did you mean {_listed(alike, 'or')}?"
    see = f"see `{context.command_path} --help`"
    having = [str(command) for command, options in commands.items() if meant in options]
    return f"{meant} is an option of {_listed(having, 'and')}; {see}" if having else see


def _options(command: Any) -> Iterator[str]:
    return (name for parameter in command.params for name in parameter.opts if name.startswith("-"))


def _listed(words: Sequence[str], last: str) -> str:
    return f" {last} ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def complain(cause: str, remedy: str = "") -> None:
    LOGGER.error("%s", f"{cause}\n  {remedy}" if remedy else cause)
    # Plain text without wrapping: people search for these lines and paste them.
    try:
        print(f"error: {terminal(cause, lines=True)}", file=sys.stderr)
        if remedy:
            print(f"  {terminal(remedy, lines=True)}", file=sys.stderr)
    except OSError:
        # Standard error is full or closed: the exit code still says it.
        return


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what goes wrong in a command into one or two lines and an exit code; give it the options of a log."""
    signature = inspect.signature(command, eval_str=True)
    own = {"log_file": LogFile, "log_level": LogLevel}
    more = [inspect.Parameter(name, _NAMED, default=None, annotation=kind) for name, kind in own.items()]

    @functools.wraps(command)
    def guarded(*args: Any, log_file: Path | None = None, log_level: str | None = None, **kwargs: Any) -> None:
        debug = kwargs.get("debug", False)
        # The first says what is wrong with the log itself.
        with _ended(debug), recording(log_file, log_level), _ended(debug):
            command(*args, **kwargs)

    # What Typer reads; a wrapper alone shows it the signature of the command.
    guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    return guarded


@contextmanager
def _ended(debug: bool) -> Iterator[None]:
    """The end of a command as an exit code, with what it has to say of that; debug: with tracebacks."""
    try:
        yield
    except EffcliError as error:
        _traceback(debug)
        complain(error.cause, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stopped:
        _traceback(debug)
        cause, _, remedy = str(stopped).partition("\n")
        complain(cause or "interrupted", remedy or "nothing was kept; give the same command again")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if hasattr(error, "format_message"):
            raise
        _traceback(debug)
        known = machine_condition(error)
        if known is not None:
            complain(known.cause, known.remedy)
            raise typer.Exit(known.exit_code) from None
        text = " ".join(str(error).split())
        package = package_at_fault(error)
        remedy = "" if debug else "run it again with --debug for the traceback, and report it"
        what = f"the package {package} failed" if package else "internal error"
        remedy += f" to those who make {package}" if package and remedy else ""
        complain(f"{what}: {type(error).__name__}{': ' + text if text else ''}", remedy)
        raise typer.Exit(MachineError.exit_code) from None


def _traceback(debug: bool) -> None:
    if LOGGER.isEnabledFor(logging.DEBUG):
        LOGGER.debug("traceback", exc_info=True)
    if debug:
        import traceback

        print(terminal(traceback.format_exc(), lines=True), file=sys.stderr, end="")
