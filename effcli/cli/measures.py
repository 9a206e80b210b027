"""`inspect`, `eval` and `bench`: what measures one network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from effcli.cli.flags import Calib, Debug, Device, Json, Model, Overrides, Threads, TrustRemoteCode, Weights
from effcli.cli.printing import path_of, print_json, say, show
from effcli.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from effcli.reports.sensitivity import Value, Varied


def inspect(
    model: Model,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Say what each layer alone costs, for each value of an option.")
    ] = False,
    step: Annotated[
        str | None,
        typer.Option("--pass", metavar="NAME[:KEY=VALUE,...]", help="What changes the layers.", show_default="awq"),
    ] = None,
    bits: Annotated[
        str | None, typer.Option("--bits", metavar="N,N,...", help="The bits to try.", show_default="2,3,4,8")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            metavar="SHARE,...",
            help="The sparsities to try, of a pass that removes weights.",
            show_default="0,0.2,0.3 to 0.8",
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            "--ratio",
            metavar="SHARE,...",
            help="The ratios to try, of a pass that removes channels.",
            show_default="0,0.125 to 0.75",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="WAY",
            help="gram (one forward), fisher (and one backward), or loss (each layer in turn).",
            show_default="loss for small networks, else fisher",
        ),
    ] = None,
    calib: Calib = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write this .html or .json.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    weights: Weights = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what MODEL consists of, or which of its layers suffer from few bits or from pruning."""
    values: dict[Varied, str | None] = {"bits": bits, "sparsity": sparsity, "ratio": ratio}
    if sensitivity:
        keys = {"weights": weights, "trust_remote_code": trust_remote_code or None}
        _sensitivity(model, step or "awq", values, by, calib, output, overrides or [], keys, json)
        return
    given: dict[str, Any] = {"--pass": step, **{f"--{option}": text for option, text in values.items()}}
    given |= {"--by": by, "--calib": calib, "--output": output}
    _refuse(given, "it belongs to --sensitivity", "add --sensitivity, or leave it out")
    from effcli.reports import screen
    from effcli.run import detect, recipe
    from effcli.run import plan as planning

    shape = recipe.check_inputs(overrides or (), ("shape",)).shape
    network = detect.find(model)
    network.refuse({"--weights": weights, "--set": overrides})
    with screen.Waiting(quiet=json) as shown, shown.phases("reading the network"):
        found = network.inspect(detect.Reading(path_of(weights), shape, trust_remote_code=trust_remote_code))
    if json:
        print_json(found.to_json())
    else:
        show(screen.records_table("", planning.summary(found.rows), found.remarks))


def _sensitivity(
    model: str,
    step: str,
    given: Mapping[Varied, str | None],
    by: str | None,
    calib: str | None,
    output: Path | None,
    overrides: list[str],
    keys: dict[str, Any],
    json: bool,
) -> None:
    from effcli.run import recipe

    option, values = _values(step, given)
    if by not in (None, "gram", "fisher", "loss"):
        raise RecipeError(f"--by {by}: there is no such way", did_you_mean(by, ("gram", "fisher", "loss")))
    if output is not None and output.suffix not in (".html", ".json"):
        raise RecipeError(f"--output {output}: neither .html nor .json", "name a file with one of these endings")
    recipes = [
        recipe.from_arguments(model, passes=[step], varied=(option, value), calib=calib, overrides=overrides, **keys)
        for value in values
    ]
    from effcli.reports import screen
    from effcli.reports.html_sensitivity import write
    from effcli.reports.sensitivity import Way
    from effcli.reports.terminal_search import sensitivity_table
    from effcli.search.inspect import inspect as inspect_layers

    with screen.Screen(recipes[0], quiet=json) as shown:
        found = inspect_layers(recipes, option, cast("Way | None", by), shown)
    if output is not None:
        write(found, output)
    if json:
        print_json(found.model_dump_json(indent=1))
    else:
        show(sensitivity_table(found))
        if output is not None:
            say(f"written to {output}")


def _values(step: str, given: Mapping[Varied, str | None]) -> tuple[Varied, list[Value]]:
    """The option that is tried and its values, in order: the one that was given, else that of the pass."""
    from effcli.run import recipe
    from effcli.run.overrides import parse_pass
    from effcli.search.space import SPACES, option_of

    named = [option for option, text in given.items() if text]
    if len(named) > 1:
        raise RecipeError(f"--{named[0]} and --{named[1]} exclude each other", "try one option of the pass at a time")
    if not named:
        (name,) = parse_pass(step)
        option = option_of(name, recipe.PassStep.registry)
        return option, list(SPACES[option].defaults)
    option, text = named[0], given[named[0]] or ""
    parts = [part.strip() for part in text.split(",")]
    if option == "bits":
        if not all(re.fullmatch("[0-9]{1,4}", part) for part in parts):
            raise RecipeError(f"--bits {text}: not whole numbers", "write --bits 2,3,4")
        return option, sorted({int(part) for part in parts})
    if not all(re.fullmatch(r"0?\.[0-9]{1,9}|0", part) for part in parts):
        raise RecipeError(f"--{option} {text}: not shares from 0 to less than 1", f"write --{option} 0.25,0.5")
    return option, sorted({float(part) for part in parts})


def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Text to measure perplexity on.", show_default="the sample's own"),
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--choices",
            metavar="FILE",
            help="Multiple-choice questions, jsonl or parquet; may be given for several files.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            "--images", metavar="DATA", help="Labelled images: npz, folder, parquet.", show_default="those of the model"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Windows of text, or images.", show_default=False)
    ] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens per window.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first questions.", show_default=False)] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Also the distance from this model: KL divergence, or agreement.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="E.g. preprocess.scale=0.00392, shape=[3,32,32].", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the quality of MODEL: perplexity, multiple-choice or top-1 accuracy, the distance to another model."""
    from effcli.run import detect, recipe

    # Without a text, questions are all that was asked for.
    given: dict[str, Any] = {"perplexity": text if text is not None else not choices, "latency": False}
    questions = choices[0] if choices and len(choices) == 1 else choices or None
    given |= {"choices": questions, "images": images, "samples": samples, "length": length, "limit": limit}
    options = recipe.check_evaluate({key: value for key, value in given.items() if value is not None})
    from effcli.reports import screen

    network = detect.find(model)
    flags = {"--text": text, "--choices": questions, "--length": length, "--limit": limit}
    network.refuse({**flags, "--images": images, "--weights": weights, "--set": overrides})
    shaped = recipe.check_inputs(overrides or ())
    reading = detect.Reading(path_of(weights), shaped.shape, shaped.preprocess, trust_remote_code)
    with screen.Waiting(quiet=json) as shown:
        quality = network.evaluate(options, reading, reference, shown.phases)
    if json:
        print_json(quality.model_dump_json(indent=1))
    else:
        show(screen.quality_table(quality))


def bench(
    model: Model,
    prefill: Annotated[
        int | None,
        typer.Option("--prefill", help="Tokens of the prompt; 128, or as many as the model takes.", min=1),
    ] = None,
    decode: Annotated[
        int | None, typer.Option("--decode", help="Tokens to generate; 32, or as many as the model takes.", min=1)
    ] = None,
    threads: Threads = None,
    device: Device = None,
    weights: Weights = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="E.g. shape=[3,32,32].", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the speed of MODEL: prefill and decode of a language model, one input of any other network."""
    from effcli.reports import screen
    from effcli.reports.report import Speed
    from effcli.run import detect, recipe

    shape = recipe.check_inputs(overrides or (), ("shape",)).shape
    network = detect.find(model)
    flags = {"--prefill": prefill, "--decode": decode, "--device": device}
    network.refuse({**flags, "--weights": weights, "--set": overrides})
    reading = detect.Reading(path_of(weights), shape, trust_remote_code=trust_remote_code)
    with screen.Waiting(quiet=json) as shown:
        found = network.time(reading, prefill, decode, threads, device, shown.phases)
    if isinstance(found, Speed):
        print_json(found.model_dump_json(indent=1)) if json else show(screen.speed_table(found))
    else:
        rows = [latency.model_dump(mode="json") for latency in found]
        print_json(rows) if json else show(screen.records_table("", found))


def _refuse(given: dict[str, Any], why: str, remedy: str = "leave it out") -> None:
    """Raise `RecipeError` for the first option that was given."""
    for flag, value in given.items():
        if value:
            raise RecipeError(f"{flag}: {why}", remedy)
