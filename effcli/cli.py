"""The command line. Everything heavy is imported inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 the user's mistake, 2 a failure of ours or the machine's, 130 interrupted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effcli import exporters
from effcli import passes as pass_table
from effcli.errors import EffcliError, MachineError, RecipeError, UserError
from effcli.flags import (
    Bits,
    Calib,
    Debug,
    Device,
    Evals,
    Export,
    Folder,
    GroupSize,
    Json,
    Model,
    NoEval,
    Output,
    Overrides,
    Overwrite,
    Quiet,
    Revision,
    Steps,
    Threads,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from effcli.recipe import Recipe
    from effcli.report import Report

app = typer.Typer(
    name="effcli",
    help="Compress trained networks, and say after each step what it did to size, quality and speed.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
passes_app = typer.Typer(help="List the passes, or show the options of one.", invoke_without_command=True)
app.add_typer(passes_app, name="passes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        # Typer's own handling would leave with 2 for a mistyped option, which is the user's mistake and not ours.
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name="effcli", standalone_mode=False
        )
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _complain(*_usage_error(error))
        return 1
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> tuple[str, str]:
    """Cause and remedy of an error that Typer found in the arguments."""
    context = getattr(error, "ctx", None)
    near = getattr(error, "possibilities", None)
    if near:
        return error.message, f"did you mean {near[0]}?"
    cause, _, suggestion = error.format_message().partition(" Did you mean ")
    if suggestion:
        return cause.rstrip("."), f"did you mean {suggestion}"
    return cause, f"see `{context.command_path if context is not None else 'effcli'} --help`"


def _complain(cause: str, remedy: str = "") -> None:
    # Plain text without wrapping: people search for these lines and paste them.
    print(f"error: {cause}", file=sys.stderr)
    if remedy:
        print(f"  {remedy}", file=sys.stderr)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what goes wrong in a command into one or two lines and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except EffcliError as error:
            _traceback(debug)
            _complain(error.cause, error.remedy)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _traceback(debug)
            _complain("interrupted", "the same command goes on where this one stopped, if it was writing an output")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except MemoryError:
            _traceback(debug)
            _complain("out of memory", "ask for less at a time: --set calibration.batch_size=1, or fewer samples")
            raise typer.Exit(MachineError.exit_code) from None
        except Exception as error:
            if hasattr(error, "format_message"):
                raise
            _traceback(debug)
            text = " ".join(str(error).split())
            remedy = "" if debug else "run it again with --debug for the traceback, and report it"
            _complain(f"internal error: {type(error).__name__}{': ' + text if text else ''}", remedy)
            raise typer.Exit(MachineError.exit_code) from None

    return guarded


def _traceback(debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()


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


@app.command()
@_guarded
def compress(
    model: Model,
    output: Output = None,
    passes: Steps = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    calib: Calib = None,
    evals: Evals = None,
    no_eval: NoEval = False,
    export: Export = None,
    overrides: Overrides = None,
    device: Device = None,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL with one or more passes into the directory OUT."""
    from effcli import recipe

    made = recipe.from_arguments(
        model,
        output=output,
        passes=passes or (),
        bits=bits,
        group_size=group_size,
        calib=calib,
        evals=evals or (),
        no_eval=no_eval,
        export=export or (),
        overrides=overrides or (),
        device=device,
        threads=threads,
        revision=revision,
        trust_remote_code=trust_remote_code or None,
    )
    _run(made, overwrite, quiet, json)


@app.command()
@_guarded
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    output: Output = None,
    overrides: Overrides = None,
    no_eval: NoEval = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Carry out a recipe: the same as `compress`, written down."""
    _run(_load(recipe, output, overrides, no_eval), overwrite, quiet, json)


@app.command()
@_guarded
def plan(
    model: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model with --pass.")],
    passes: Steps = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    calib: Calib = None,
    overrides: Overrides = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a run would do to each layer, to the size and to the memory. No weight is read, nothing is written."""
    from effcli import recipe

    if model.endswith((".yaml", ".yml")):
        if passes or bits is not None or group_size is not None or calib or revision or trust_remote_code:
            raise RecipeError(f"{model} is a recipe and names its passes itself", "change keys of it with --set")
        made = _load(Path(model), None, overrides, False)
    else:
        made = recipe.from_arguments(
            model,
            passes=passes or (),
            bits=bits,
            group_size=group_size,
            calib=calib,
            overrides=overrides or (),
            revision=revision,
            trust_remote_code=trust_remote_code or None,
        )
    from effcli import plan as planning
    from effcli import screen

    found = planning.make(made)
    if json:
        print(found.to_json())
    else:
        _print(screen.records_table("", planning.summary(found.rows), found.remarks))


@app.command()
@_guarded
def inspect(model: Model, trust_remote_code: TrustRemoteCode = False, json: Json = False, debug: Debug = False) -> None:
    """Say what MODEL consists of, from the headers of its files."""
    from effcli import plan as planning
    from effcli import screen

    found = planning.inspect(model, trust_remote_code)
    if json:
        print(found.to_json())
    else:
        _print(screen.records_table("", planning.summary(found.rows), found.remarks))


@app.command("eval")
@_guarded
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Text to measure perplexity on.", show_default="the sample's own"),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option("--choices", metavar="FILE", help="A .jsonl of multiple-choice questions.", show_default=False),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Windows of text.", show_default=False)] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens per window.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first questions.", show_default=False)] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="MODEL", help="Also the KL divergence from this model.", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the quality of MODEL: perplexity, multiple-choice accuracy, and the distance to another model."""
    from effcli import recipe

    # Without a text, questions are all that was asked for.
    given: dict[str, Any] = {"perplexity": text if text is not None else choices is None, "latency": False}
    given |= {"choices": choices, "samples": samples, "length": length, "limit": limit}
    options = recipe.check_evaluate({key: value for key, value in given.items() if value is not None})
    from effcli import evaluate as evaluation
    from effcli import screen

    quality = evaluation.evaluate(model, options, reference=reference, trust_remote_code=trust_remote_code)
    if json:
        print(quality.model_dump_json(indent=1))
    else:
        _print(screen.quality_table(quality))


@app.command()
@_guarded
def bench(
    model: Model,
    prefill: Annotated[int, typer.Option("--prefill", help="Tokens of the prompt.", min=1)] = 128,
    decode: Annotated[int, typer.Option("--decode", help="Tokens to generate.", min=1)] = 32,
    threads: Threads = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the speed of MODEL: prefill and decode, with the kernels that run."""
    from effcli import latency, screen

    speed = latency.measure(
        model,
        prefill=prefill,
        decode=decode,
        threads=threads,
        device=device or "cpu",
        trust_remote_code=trust_remote_code,
    )
    if json:
        print(speed.model_dump_json(indent=1))
    else:
        _print(screen.speed_table(speed))


@passes_app.callback()
@_guarded
def passes(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the passes."""
    if context.invoked_subcommand is not None:
        return
    if json:
        _print_json({name: entry.summary for name, entry in pass_table.PASSES.items()})
        return
    from effcli import screen

    _print(screen.passes_table({name: entry.summary for name, entry in pass_table.PASSES.items()}))


@passes_app.command("show")
@_guarded
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
    module = pass_table.load(name)
    if json:
        _print_json(module.Config.model_json_schema())
        return
    from effcli import screen

    _print(screen.options_table(name, pass_table.PASSES[name].summary, module.Config))


@app.command()
@_guarded
def export(
    source: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET",
            help=f"One of: {', '.join(exporters.TARGETS)}.",
            show_default=False,
            autocompletion=lambda: list(exporters.TARGETS),
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where to write.", show_default="OUT/exports/TARGET"),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write dense weights that any loader reads; the file grows.")
    ] = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a finished checkpoint in another format."""
    module = exporters.load(to)
    target = output if output is not None else source / "exports" / to
    module.export(source, target, dequantize=dequantize, overwrite=overwrite)
    print(f"written: {target}")


@app.command()
@_guarded
def verify(path: Folder, trust_remote_code: TrustRemoteCode = False, json: Json = False, debug: Debug = False) -> None:
    """Load OUT as its users will and compare its logits with effcli's own arithmetic."""
    from effcli import verify as verification

    result = verification.verify(path, trust_remote_code=trust_remote_code)
    print(result.to_json() if json else result.line)
    if not result.passed:
        raise typer.Exit(UserError.exit_code)


@app.command()
@_guarded
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A directory that effcli wrote.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Set two runs side by side."""
    from effcli.report import Report

    first, second = Report.read(a), Report.read(b)
    if json:
        from effcli.compare import compare as compare_reports

        print(compare_reports(first, second).model_dump_json(indent=1))
    else:
        from effcli import terminal

        _print(terminal.compare_table(first, second))


@app.command()
@_guarded
def report(
    path: Folder,
    layers: Annotated[
        int, typer.Option("--layers", help="Show this many layers of each pass, worst first.", min=0)
    ] = 10,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the report of a finished run, and write its OUT/report.html again."""
    from effcli import html
    from effcli.report import Report

    found = Report.read(path)
    html.write(found, path)
    if json:
        print(found.model_dump_json(indent=1))
        return
    _print_report(found, layers)
    print(f"written: {path / html.FILE_NAME}")


def _load(path: Path, output: str | None, overrides: list[str] | None, no_eval: bool) -> Recipe:
    from effcli import recipe

    given = list(overrides or ())
    if no_eval:
        given.append("evaluate=false")
    made = recipe.load(path, given)
    return made if output is None else made.model_copy(update={"output": output})


def _run(recipe: Recipe, overwrite: bool, quiet: bool, json: bool) -> None:
    # Known before torch is imported and the model looked for.
    target = recipe.target
    from effcli import pipeline
    from effcli.screen import Screen

    with Screen(recipe, quiet=quiet) as screen:
        result = pipeline.run(recipe, overwrite=overwrite, listener=screen)
    if json:
        print(result.model_dump_json(indent=1))
    elif not quiet:
        _print_report(result, layers=None)
        print(f"written: {target}" + (f" ({result.verified})" if result.verified else ""))


def _print_report(report: Report, layers: int | None) -> None:
    """The table of a run, what became of its layers (`layers` of each pass; None: only those kept), and remarks."""
    from effcli import terminal

    _print(terminal.stage_table(report))
    if layers is not None:
        for stage in report.stages[1:]:
            _print(terminal.ledger_table(stage, layers))
    _print(terminal.remarks(report))


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=1))


__all__ = ["app", "main"]
