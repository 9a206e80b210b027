"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from effcli import exporters, passes

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a .pt2 or .onnx file, package.module:function, a Hub id, sample:lm or sample:cnn.",
        show_default=False,
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A directory that effcli wrote.", show_default=False)]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="OUT", help="The directory to write.", show_default=False)
]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="NAME[:KEY=VALUE,...]",
        help="A pass with its options; several are carried out in order. See `effcli passes`.",
        show_default=False,
        autocompletion=lambda: list(passes.REGISTRY.known()),
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="DIR", help="First merge a PEFT adapter: `--pass merge`.", show_default=False),
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits per weight of the one pass.", show_default=False)]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", help="Weights that share a scale, in the one pass.", show_default=False)
]
Calib = Annotated[
    str | None, typer.Option("--calib", metavar="DATA", help="Text or images to calibrate on.", show_default=False)
]
Evals = Annotated[
    list[str] | None,
    typer.Option(
        "--eval",
        metavar="DATA",
        help="Text to measure perplexity on (a .jsonl of texts too), a .jsonl of multiple-choice questions, or "
        "labelled images (npz, folder, parquet); may be given for each, and for several files of questions.",
        show_default=False,
    ),
]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Measure nothing but bytes, and skip verifying.")]
Export = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        metavar="TARGET[:KEY=VALUE,...]",
        help=f"Also write OUT/exports/TARGET: {', '.join(exporters.TARGETS)}.",
        show_default=False,
        autocompletion=lambda: list(exporters.REGISTRY.known()),
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FILE", help="Safetensors for a network that a function makes.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any key of the recipe, e.g. calibration.samples=32.", show_default=False
    ),
]
# Compressing runs on the CPU only.
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N or auto.", show_default="cpu")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.", show_default="as torch chooses")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.", show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No bars, no tables: a line for each stage and long phase, two for the result."),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also the figures behind each check; of a run, the time of each phase."),
]
Predict = Annotated[
    bool,
    typer.Option("--predict", help="First predict the time of each phase, from a rehearsal on this machine."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
LogFile = Annotated[
    Path | None,
    typer.Option("--log-file", metavar="FILE", help="Append what is done to a file, with times.", show_default=False),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        help="What goes into --log-file: debug, info, warning or error, and what is graver.",
        show_default="info",
    ),
]
