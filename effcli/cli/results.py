"""`export`, `verify`, `compare` and `report`: what is done with a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from effcli import exporters
from effcli.cli.flags import Debug, Folder, Json, Overwrite, TrustRemoteCode, Verbose
from effcli.cli.printing import indented, print_json, print_report, say, show
from effcli.errors import CheckpointError, UserError
from effcli.exporters.firmware import targets
from effcli.reports.columns import exported_size
from effcli.run import yaml_files as yamls


class ExportCommand(TyperCommand):
    """A command whose help lists the options of each export target as well."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from effcli.reports import screen

        show(screen.targets_table({name: exporters.load(name) for name in exporters.TARGETS}))


def export(
    context: typer.Context,
    source: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET[:KEY=VALUE,...]",
            help=f"One of {', '.join(exporters.TARGETS)}, with its options.",
            show_default=False,
            autocompletion=lambda: list(exporters.REGISTRY.known()),
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where to write.", show_default="OUT/exports/TARGET"),
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a finished checkpoint in another format.

    Options of the target may follow as --KEY VALUE: `--dequantize` for safetensors, `--precision float16` for onnx,
    `--name kws --max-ram 64k` for c, `--checkpoint-format gptq_v2` for gptq.
    """
    exporters.check(to.partition(":")[0])
    from effcli.run import recipe

    step = recipe.check_export(to, _options(context.args))
    exporters.require(step.name)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist", "give a folder that `effcli compress` wrote")
    if step.clash:
        say(step.clash)
    target = output if output is not None else source / "exports" / step.name
    from effcli.platform.steps import telling
    from effcli.reports import screen

    with screen.Waiting() as shown, shown.phases(f"exporting to {step.name}") as progress, telling(progress):
        done = step.config.export(source, target, overwrite)
    say(f"written to {target}, {exported_size(done)}")
    if done.checked:
        indented(f"checked: {done.checked}")
    for remark in done.remarks:
        indented(remark)
    rows = step.config.table(target)
    if rows:
        show(screen.records_table("", rows))


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """`--max-ram 64k --single-header` as {"max_ram": "64k", "single_header": True}; values are YAML, as in `--to`."""
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag}", "see `effcli export --help`")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        key = flag[2:].replace("-", "_")
        if key in found:
            raise UserError(f"{flag} stands twice", "give each option once")
        found[key] = yamls.parse(value, flag) if equals else True
    return found


def verify(
    path: Folder,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help=f"Also compile an integer network as C, and run it in QEMU: {', '.join(targets.TARGETS)}.",
            show_default=False,
            autocompletion=lambda: list(targets.TARGETS),
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="The network that OUT was made from.",
            show_default="(as report.json says)",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Load OUT as its users will; compare it with effcli's own arithmetic, and tensor by tensor with its input."""
    from effcli.reports import screen
    from effcli.reports.result import check_lines
    from effcli.run import detect

    if against is not None:
        detect.check_input(path, against)
    with screen.Waiting(quiet=json) as shown:
        result = detect.at(path).verify(target, against, trust_remote_code, shown.phases)
    if json:
        print_json(result.to_json())
    else:
        for line in check_lines(result.checks, verbose):
            say(line)
        if result.layers:
            show(screen.records_table("", result.layers))
    if not result.passed:
        raise typer.Exit(UserError.exit_code)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A directory that effcli wrote.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Set two runs side by side."""
    from effcli.reports import screen
    from effcli.reports.report import Report

    with screen.Waiting(quiet=json) as shown, shown.phases("reading the reports"):
        first, second = Report.read(a), Report.read(b)
    if json:
        from effcli.reports.compare import compare as compare_reports

        print_json(compare_reports(first, second).model_dump_json(indent=1))
    else:
        from effcli.reports import terminal

        show(terminal.compare_table(first, second))


def report(
    path: Folder,
    layers: Annotated[
        int, typer.Option("--layers", help="Show this many layers of each pass, worst first.", min=0)
    ] = 10,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the report of a finished run, and write its OUT/report.html again."""
    from effcli.reports import html
    from effcli.reports.report import Report

    found = Report.read(path)
    html.write(found, path)
    if json:
        print_json(found.model_dump_json(indent=1))
        return
    print_report(found, layers)
    say(f"written to {path / html.FILE_NAME}")
