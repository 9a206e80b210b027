"""`export`, `verify`, `compare` and `report`: what is done with a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effcli import exporters
from effcli.cli.flags import Debug, Folder, Json, Overwrite, TrustRemoteCode
from effcli.cli.printing import print_report, show
from effcli.errors import UserError

if TYPE_CHECKING:
    from effcli.graphs.verify import GraphVerification
    from effcli.language.verify import Verification


def export(
    source: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET[:KEY=VALUE,...]",
            help=f"One of {', '.join(exporters.TARGETS)}, with its options.",
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
    exporters.check(to.partition(":")[0])
    from effcli import recipe

    step = recipe.check_export(to, {"dequantize": True} if dequantize else {})
    exporters.require(step.name)
    target = output if output is not None else source / "exports" / step.name
    done = exporters.load(step.name).export(source, target, step.config, overwrite)
    print(f"written: {target}" + (f" ({done.checked})" if done.checked else ""))
    for remark in done.remarks:
        print(f"  {remark}")


def verify(path: Folder, trust_remote_code: TrustRemoteCode = False, json: Json = False, debug: Debug = False) -> None:
    """Load OUT as its users will and compare its outputs with effcli's own arithmetic."""
    from effcli import importers

    result: Verification | GraphVerification
    if importers.recognises(path):
        from effcli.graphs import verify as graphverify

        result = graphverify.verify(path)
    else:
        from effcli.language import verify as verification

        result = verification.verify(path, trust_remote_code=trust_remote_code)
    print(result.to_json() if json else result.line)
    if not result.passed:
        raise typer.Exit(UserError.exit_code)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A directory that effcli wrote.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Set two runs side by side."""
    from effcli.reports.report import Report

    first, second = Report.read(a), Report.read(b)
    if json:
        from effcli.reports.compare import compare as compare_reports

        print(compare_reports(first, second).model_dump_json(indent=1))
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
        print(found.model_dump_json(indent=1))
        return
    print_report(found, layers)
    print(f"written: {path / html.FILE_NAME}")
