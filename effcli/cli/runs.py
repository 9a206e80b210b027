"""`compress`, `run` and `plan`: what carries out a recipe, or says what it would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effcli.cli.flags import (
    Adapter,
    Bits,
    Calib,
    Debug,
    Device,
    Evals,
    Export,
    GroupSize,
    Json,
    Model,
    NoEval,
    Output,
    Overrides,
    Overwrite,
    Predict,
    Quiet,
    Revision,
    Steps,
    Threads,
    TrustRemoteCode,
    Verbose,
    Weights,
)
from effcli.cli.printing import print_json, print_report, say, show
from effcli.errors import RecipeError

if TYPE_CHECKING:
    from effcli.run.forecast import Forecast
    from effcli.run.recipe import Recipe


def compress(
    model: Model,
    output: Output = None,
    passes: Steps = None,
    adapter: Adapter = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    calib: Calib = None,
    evals: Evals = None,
    no_eval: NoEval = False,
    export: Export = None,
    overrides: Overrides = None,
    device: Device = None,
    threads: Threads = None,
    weights: Weights = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    predict: Predict = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL with one or more passes into the directory OUT."""
    from effcli.run import recipe

    made = recipe.from_arguments(
        model,
        output=output,
        passes=passes or (),
        adapter=adapter,
        bits=bits,
        group_size=group_size,
        calib=calib,
        evals=evals or (),
        no_eval=no_eval,
        export=export or (),
        overrides=overrides or (),
        device=device,
        threads=threads,
        weights=weights,
        revision=revision,
        trust_remote_code=trust_remote_code or None,
    )
    _run(made, overwrite, predict, quiet, verbose, json)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)],
    output: Output = None,
    overrides: Overrides = None,
    no_eval: NoEval = False,
    overwrite: Overwrite = False,
    predict: Predict = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Carry out a recipe: the same as `compress`, written down."""
    _run(_load(recipe, output, overrides, no_eval), overwrite, predict, quiet, verbose, json)


def plan(
    model: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model with --pass.")],
    passes: Steps = None,
    adapter: Adapter = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    calib: Calib = None,
    overrides: Overrides = None,
    weights: Weights = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    no_time: Annotated[
        bool, typer.Option("--no-time", help="Predict no time: then no weight of a language model is read.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a run would do to each layer, to the size and to the memory, and how long it would take here.

    The time is that of a rehearsal on a part of the network and of the data. Nothing is written but temporary files.
    """
    from effcli.run import recipe

    if model.endswith((".yaml", ".yml")):
        if (
            passes
            or adapter
            or bits is not None
            or group_size is not None
            or calib
            or weights
            or revision
            or trust_remote_code
        ):
            raise RecipeError(f"{model} is a recipe and names its passes itself", "change keys of it with --set")
        made = _load(Path(model), None, overrides, False)
    else:
        made = recipe.from_arguments(
            model,
            passes=passes or (),
            adapter=adapter,
            bits=bits,
            group_size=group_size,
            calib=calib,
            overrides=overrides or (),
            weights=weights,
            revision=revision,
            trust_remote_code=trust_remote_code or None,
        )
    from effcli.reports import screen
    from effcli.run import detect
    from effcli.run import plan as planning
    from effcli.search import stage as searching

    found = searching.plan(detect.of_run(made))
    if not no_time:
        found = found.model_copy(update={"forecast": _predicted(made, quiet=json)})
    if json:
        print_json(found.to_json())
        return
    remarks = (*found.remarks, *([found.layout] if found.layout else []))
    show(screen.records_table("", planning.summary(found.rows), remarks))
    if found.forecast is not None:
        show(screen.forecast_table(found.forecast))


def _predicted(recipe: Recipe, quiet: bool) -> Forecast:
    """What the phases of a run are expected to take."""
    from effcli.reports.screen import Waiting
    from effcli.run.rehearse import predict

    with Waiting(quiet=quiet) as shown, shown.phases("rehearsing"):
        return predict(recipe)


def _load(path: Path, output: str | None, overrides: list[str] | None, no_eval: bool) -> Recipe:
    from effcli.run import recipe

    given = list(overrides or ())
    if no_eval:
        given.append("evaluate=false")
    made = recipe.load(path, given)
    return made if output is None else made.model_copy(update={"output": output})


@contextmanager
def _said_what_stays(target: Path) -> Iterator[None]:
    """Let an interrupt of a run that writes `target` say what stays of it, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        from effcli.run.workplace import Workplace, resolved

        work = Workplace(resolved(target.absolute())).folder
        if not work.exists():
            raise
        raise KeyboardInterrupt(
            f"interrupted; what is finished stays in {work}\n"
            "the same command continues from there; remove that folder if you do not want it"
        ) from stopped


def _run(recipe: Recipe, overwrite: bool, predict: bool, quiet: bool, verbose: bool, json: bool) -> None:
    # Known before torch is imported and the model looked for.
    target = recipe.target
    from effcli.reports.result import result_lines, summary_lines
    from effcli.reports.screen import Screen
    from effcli.run import pipeline
    from effcli.run.workplace import EXPORTS

    forecast = None
    if predict:
        pipeline.check(recipe, overwrite)
        forecast = _predicted(recipe, quiet)
    with Screen(recipe, quiet=quiet, forecast=forecast) as screen, _said_what_stays(target):
        result = pipeline.run(recipe, overwrite=overwrite, listener=screen, forecast=forecast)
    if json:
        print_json(result.model_dump_json(indent=1))
        return
    if not quiet:
        print_report(result, layers=None)
        if verbose:
            from effcli.reports.terminal import phase_table

            show(phase_table(result))
    lines = summary_lines(result, target) if quiet else result_lines(result, target, target / EXPORTS, verbose)
    for line in lines:
        say(line)
