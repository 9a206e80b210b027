"""effcli beside other compression tools: one checkpoint, one text, one evaluator; time, memory, bytes, perplexity.

    python benchmarks/peers.py CHECKPOINT --environments DIR --results DIR [--only NAME ...] [--columns w4 w3 w8a8]
    python benchmarks/peers.py --results DIR --table

Every run is one tool and one column, in two child processes: one compresses, one loads the result and evaluates it.
Peers run in virtual environments of their own below --environments, made when missing. Each run's figures are written
to RESULTS/TOOL-COLUMN.json when it ends, so that runs can be done and repeated one by one; the table is printed from
these files. `--timings` repeats the compressions and keeps the perplexities that are there, so not for a tool that has
changed since.

Columns:
  dense  the original, for its size and perplexity
  w4     weights of 4 bits in groups of 64 along the input, one scale (and zero point) a group; NF4 in blocks of 64
  w3     the same with 3 bits
  w8a8   weights of 8 bits, symmetric, one scale an output channel; activations of 8 bits, one scale a token, computed
         while the model runs

Figures:
  compression  seconds of the tool's own call, from the loaded model and the tokens to the compressed model in memory.
               effcli and bitsandbytes stream, so theirs include reading, effcli's also writing.
  process      seconds from the child's start to its end: imports, reading, compressing, writing
  peak memory  highest resident set of that process, as the system counts it (ru_maxrss)
  weight files bytes of the result's *.safetensors, *.bin, *.pt
  perplexity   of the result as its own tool loads it, over the first 20 windows of 512 tokens of the evaluation text,
               one window at a time, logits in float32 (peers/child.py); nothing of effcli is in that loop

Before anything runs, the checkpoint is copied in --dtype (float32) into a scratch folder, and all tools get the copy.
A processor without bfloat16 arithmetic computes it several times slower than float32, which would measure the
processor. What is not quantized (embedding, norms) is then stored in 32 bits by all of them, the original included.
`--dtype bfloat16` leaves the usual checkpoint as it is.

A tool that fails, refuses or cannot be installed has a row with its own last words. Formats for which a tool has no
row are named below the table.

What to know when reading the table:
  effcli         `gptq plain` leaves out scales and sweeps, which the peers do not have, but not effcli's choice of
                 ranges and damping; `gptq compressed` runs every window a second time, so that each block sees what
                 the compressed blocks before it return
  llmcompressor  awq as released stops where there is no accelerator; the second row replaces one method by nothing
                 (peers/peer_llmcompressor.py). Its weights are decompressed to dense ones when the model first runs.
  auto-round     its light recipe (50 iterations) with its default, symmetric weights; the default of 200 iterations is
                 the row `auto-round default`, which only runs when named by --only. 0.16.1 tunes asymmetric 4-bit
                 weights and then cannot save them in its own format, so that row tunes for one iteration only
  gptqmodel      asks for torch 2.14.1 or later and is installed beside torch 2.13.0 without its dependencies' leave
                 (ENVIRONMENTS). Symmetric weights, its default. Its torch kernels refuse float32; evaluated are
                 the weights that they unpack in float16. Its awq packs with those kernels and so refuses float32
  quanto         chooses groups itself: 128, lowered until it divides the inputs (96 for 576). Its int8 activations
                 have one static scale a tensor
  bitsandbytes   its w8a8 is LLM.int8(): outlier columns of the activations stay in floating point
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import HERE, Measured, checked, machine, megabytes, run, table, threads_environment

CHILDREN = HERE / "peers"
COLUMNS = {"dense": "dense", "w4": "W4 g64", "w3": "W3 g64", "w8a8": "W8A8"}
WEIGHTS = (".safetensors", ".bin", ".pt")

GPTQMODEL_NEEDS = (
    *("numpy", "safetensors", "filelock", "threadpoolctl", "packaging", "device-smi", "protobuf", "pillow", "requests"),
    *("pypcre", "tokenicer", "logbar", "jinja2", "ninja", "maturin", "datasets", "pyarrow", "dill", "defuser"),
)

# Arguments of pip, one tuple a call. "" is the Python that runs this script.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (),
    "llmcompressor": (("torch==2.13.0", "llmcompressor==0.14.0.1"),),
    "auto-round": (("torch==2.13.0", "auto-round==0.16.1"),),
    # gptqmodel asks for torch 2.14.1 or later; it is installed without that demand, beside the torch of all others.
    "gptqmodel": (
        ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0", "torchao==0.18.0", *GPTQMODEL_NEEDS),
        ("--upgrade", "pip", "setuptools", "wheel"),
        ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
    ),
    "bitsandbytes": (("torch==2.13.0", "bitsandbytes==0.50.2", "transformers==5.24.0", "accelerate==1.15.0"),),
    "optimum-quanto": (("torch==2.13.0", "optimum-quanto==0.2.7", "transformers==5.24.0", "accelerate==1.15.0"),),
    "hqq": (("torch==2.13.0", "hqq==0.2.8.post1"),),
}

# Python to run once in a new environment. These two compile a C++ extension where they first need it, which takes
# minutes and is not to be measured; a process killed while quanto does leaves a lock on which all later ones wait.
PREPARATIONS = {
    "gptqmodel": "from gptqmodel.extension import load\nload('pack_block_cpu')",
    "optimum-quanto": "import optimum.quanto\nfrom optimum.quanto.library.extensions.extension import get_extension\n"
    "get_extension('quanto_cpp').lib",
}


@dataclass(frozen=True)
class Tool:
    """A row. script: the child in peers/; columns: its options for each format it offers; mark: said in the row."""

    environment: str
    script: str
    columns: dict[str, dict[str, Any]]
    mark: str = ""
    unasked: bool = True


def effcli(mark: str = "", inputs: str = "original", **columns: list[str]) -> Tool:
    """A row of effcli: for each column the passes, spelled as for `effcli compress --pass`; inputs: of calibration."""
    options = {column: {"passes": passes, "inputs": inputs} for column, passes in columns.items()}
    return Tool("", "peer_effcli.py", options, mark)


def both(**options: Any) -> dict[str, dict[str, Any]]:
    """The columns w4 and w3, in groups of 64, with further options."""
    return {f"w{bits}": {"bits": bits, "group_size": 64, **options} for bits in (4, 3)}


TOOLS: dict[str, Tool] = {
    "original": Tool("", "peer_original.py", {"dense": {}}),
    "effcli linear": effcli(w4=["linear:bits=4,group_size=64"], w3=["linear:bits=3,group_size=64"]),
    "effcli awq": effcli(w4=["awq:bits=4,group_size=64"], w3=["awq:bits=3,group_size=64"]),
    "effcli gptq": effcli(w4=["gptq:bits=4,group_size=64"], w3=["gptq:bits=3,group_size=64"]),
    "effcli gptq plain": effcli(
        "scales=false, sweeps=0",
        w4=["gptq:bits=4,group_size=64,scales=false,sweeps=0"],
        w3=["gptq:bits=3,group_size=64,scales=false,sweeps=0"],
    ),
    "effcli gptq compressed": effcli(
        "calibration inputs: compressed",
        "compressed",
        w4=["gptq:bits=4,group_size=64"],
        w3=["gptq:bits=3,group_size=64"],
    ),
    "effcli nf4": effcli(w4=["nf4:block_size=64"]),
    "effcli smoothquant": effcli(
        w8a8=["smoothquant", "linear:bits=8,granularity=channel,symmetric=true,activations=int8"]
    ),
    "llmcompressor awq": Tool("llmcompressor", "peer_llmcompressor.py", both(method="awq"), "as released"),
    "llmcompressor awq unpinned": Tool(
        "llmcompressor", "peer_llmcompressor.py", both(method="awq", pinning=False), "pin_memory replaced by nothing"
    ),
    "llmcompressor gptq": Tool("llmcompressor", "peer_llmcompressor.py", both(method="gptq")),
    "llmcompressor smoothquant": Tool(
        "llmcompressor", "peer_llmcompressor.py", {"w8a8": {"method": "smoothquant"}}, "then GPTQ"
    ),
    "auto-round light": Tool(
        "auto-round", "peer_auto_round.py", both(sym=True, iters=50, lr=5e-3), "symmetric, 50 iterations"
    ),
    "auto-round light asymmetric": Tool(
        "auto-round",
        "peer_auto_round.py",
        {
            "w4": {"bits": 4, "group_size": 64, "sym": False, "iters": 1},
            "w3": {"bits": 3, "group_size": 64, "sym": False, "iters": 50, "lr": 5e-3},
        },
        "W4 with 1 iteration only, to show whether it saves",
    ),
    "auto-round default": Tool(
        "auto-round", "peer_auto_round.py", both(sym=True, iters=200), "symmetric, 200 iterations", unasked=False
    ),
    "gptqmodel gptq": Tool("gptqmodel", "peer_gptqmodel.py", both(), "symmetric"),
    "gptqmodel awq": Tool("gptqmodel", "peer_gptqmodel.py", both(quant_method="awq", format="gemm")),
    "bitsandbytes": Tool(
        "bitsandbytes",
        "peer_bitsandbytes.py",
        {"w4": {"method": "nf4"}, "w8a8": {"method": "int8"}},
        "NF4, blocks of 64; LLM.int8()",
    ),
    "quanto": Tool(
        "optimum-quanto",
        "peer_quanto.py",
        {
            "w4": {"weights": "qint4"},
            "w8a8": {"weights": "qint8", "activations": "qint8"},
        },
        "own group sizes; static activations",
    ),
    "hqq": Tool("hqq", "peer_hqq.py", both()),
}


@dataclass(frozen=True)
class Protocol:
    """What is the same for all. samples and windows count stretches of `length` tokens."""

    checkpoint: Path
    calibration: Path
    evaluation: Path
    samples: int
    length: int
    windows: int
    dtype: str

    def job(self, output: Path, options: Mapping[str, Any]) -> str:
        """The JSON that a child reads."""
        paths = {key: str(getattr(self, key).resolve()) for key in ("checkpoint", "calibration", "evaluation")}
        return json.dumps(
            {**vars(self), **paths, "output": str(output), "report": f"{output}.json", "options": dict(options)}
        )

    def settings(self) -> dict[str, Any]:
        """What two results must share to stand in one table."""
        names = {key: getattr(self, key).name for key in ("checkpoint", "calibration", "evaluation")}
        return {**names, **{key: getattr(self, key) for key in ("samples", "length", "windows", "dtype")}}


def environment(name: str, folder: Path) -> Path:
    """The Python of the environment `name` below `folder`, made when missing. Raises `Failed` with pip's last words."""
    if not ENVIRONMENTS[name]:
        return Path(sys.executable)
    python, finished = folder / name / "bin" / "python", folder / name / "finished"
    if finished.exists():
        return python
    print(f"making {folder / name}", file=sys.stderr)
    calls = [[sys.executable, "-m", "venv", "--clear", folder / name]]
    calls += [[python, "-m", "pip", "install", "--quiet", *arguments] for arguments in ENVIRONMENTS[name]]
    if name in PREPARATIONS:
        calls.append([python, "-c", PREPARATIONS[name]])
    for call in calls:
        result = run(call)
        if result.code:
            said = [line for line in result.errors.splitlines() if line.startswith("ERROR")]
            raise Failed("installation", said[0] if said else result.last_line)
    finished.touch()
    return python


class Failed(Exception):
    """A step of a run that did not come to its end. words: what the tool said last."""

    def __init__(self, step: str, words: str) -> None:
        super().__init__(f"{step}: {words}")


def child(
    step: str, python: Path, script: str, job: str, variables: Mapping[str, str]
) -> tuple[Measured, dict[str, Any]]:
    """Run one step of a tool's script, and return its figures and its report; raises `Failed`."""
    file = Path(json.loads(job)["report"])
    file.unlink(missing_ok=True)
    result = run([python, CHILDREN / script, step, job], variables)
    report = read(file)
    if "error" in report or not report:
        raise Failed(step, report.get("error") or f"exit code {result.code}: {result.last_line}")
    return result, report


def carry_out(
    tool: Tool, column: str, python: Path, protocol: Protocol, variables: Mapping[str, str], known: float | None
) -> Iterator[dict[str, Any]]:
    """Compress and evaluate; yields figures as they come, and then `error` if a step fails. known: the perplexity."""
    with tempfile.TemporaryDirectory(prefix="effcli-peers-") as scratch:
        output = Path(scratch) / "out"
        job = protocol.job(output, tool.columns[column])
        try:
            result, report = child("compress", python, tool.script, job, variables)
            size = sum(file.stat().st_size for file in output.rglob("*") if file.suffix in WEIGHTS)
            yield {"compression": report["seconds"], "process": result.seconds, "peak": result.peak, "bytes": size}
            if known is not None:
                yield {"perplexity": known}
                return
            result, report = child("evaluate", python, tool.script, job, variables)
            yield {"perplexity": report["perplexity"], "evaluation": result.seconds}
        except Failed as failure:
            yield {"error": str(failure)}


def result_file(results: Path, name: str, column: str) -> Path:
    return results / f"{name.replace(' ', '-')}-{column}.json"


def read(file: Path) -> dict[str, Any]:
    """A stored result; empty when there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def packages(python: Path) -> str:
    """What is installed there, of the packages that matter for the figures."""
    names = *(name for name in ENVIRONMENTS if name), "effcli", "compressed-tensors", "torch", "transformers"
    code = f"""from importlib.metadata import distributions
found = {{d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()}}
print(", ".join(f"{{n}} {{found[n]}}" for n in {names} if n in found))"""
    return run([python, "-I", "-c", code]).output.strip()


def measure(name: str, tool: Tool, column: str, options: argparse.Namespace, protocol: Protocol) -> None:
    """Measure one tool in one column and store what came of it."""
    file = result_file(options.results, name, column)
    settings, before = protocol.settings(), read(file)
    known = before.get("perplexity") if options.timings and before.get("settings") == settings else None
    result: dict[str, Any] = {"tool": name, "column": column, "settings": settings, "machine": machine(options.threads)}
    try:
        python = environment(tool.environment, options.environments)
    except Failed as failure:
        result["error"] = str(failure)
    else:
        result["packages"] = packages(python)
        for figures in carry_out(tool, column, python, protocol, threads_environment(options.threads), known):
            result.update(figures)
            print(f"{name}, {column}: {figures}", file=sys.stderr)
    options.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def row(result: Mapping[str, Any], mark: str, column: str) -> list[str]:
    """A line of the table. mark: what is said of the tool; column: what its format is called."""

    def cell(key: str, form: str = "{:.1f}") -> str:
        return form.format(result[key]) if key in result else ""

    name = result["tool"]
    sizes = [megabytes(result[key]) if key in result else "" for key in ("peak", "bytes")]
    remarks = [mark, result.get("error", "")]
    cells = [name, column, cell("compression"), cell("process"), *sizes]
    return [*cells, cell("perplexity", "{:.2f}"), "; ".join(text.replace("|", "/") for text in remarks if text)]


def report(results: Path, tools: Mapping[str, Tool], columns: Mapping[str, str]) -> str:
    """The table of what is stored in `results`, and what is to be said with it."""
    found = [read(result_file(results, name, column)) for column in columns for name in tools]
    found = [result for result in found if result]
    header = ["", "format", "compression, s", "process, s", "peak memory", "weight files", "perplexity", "remarks"]
    offered = {(tool.environment, column) for tool in tools.values() for column in tool.columns}
    missing = [
        f"{name} {columns[column]}"
        for name in dict.fromkeys(tool.environment for tool in tools.values())
        for column in columns
        if name and column != "dense" and (name, column) not in offered
    ]
    rows = [row(result, tools[result["tool"]].mark, columns[result["column"]]) for result in found]
    parts = [table(header, rows), *([f"Not run: {', '.join(missing)}."] if missing else [])]
    for title, key in (("Protocol", "settings"), ("Machine", "machine"), ("Installed", "packages")):
        # Results of several sittings may lie here: each different value is named.
        values = dict.fromkeys(str(result[key]) for result in found if result.get(key))
        parts.append(f"{title}: " + "; ".join(values))
    return "\n\n".join(parts)


def main(tools: Mapping[str, Tool], columns: Mapping[str, str], about: str) -> None:
    """The command line of a comparison. columns: what each format is called; about: the docstring of the script."""
    assets = os.environ.get("EFFCLI_ASSETS")
    texts = Path(assets) / "text_wikitext2" if assets else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a folder; not needed with --table")
    parser.add_argument("--results", type=Path, required=True, help="where each run's JSON goes")
    parser.add_argument("--environments", type=Path, default=cache / "effcli-benchmarks", help="the peers' own")
    parser.add_argument("--only", nargs="+", choices=tools, metavar="NAME", help=f"of {', '.join(tools)}")
    parser.add_argument("--columns", nargs="+", choices=columns, default=list(columns))
    parser.add_argument("--calibration", type=Path, default=texts and texts / "valid.txt", help="a text file")
    parser.add_argument("--evaluation", type=Path, default=texts and texts / "test.txt", help="a text file")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads; default: each library's own choice")
    parser.add_argument("--timings", action="store_true", help="keep stored perplexities, measure the rest again")
    parser.add_argument("--table", action="store_true", help="only print the table of the stored results")
    options = parser.parse_args()
    if not options.table:
        if options.checkpoint is None or options.calibration is None or options.evaluation is None:
            parser.error("give a checkpoint, --calibration and --evaluation (or set EFFCLI_ASSETS)")
        wanted = options.only or [name for name, tool in tools.items() if tool.unasked]
        with tempfile.TemporaryDirectory(prefix="effcli-peers-") as scratch:
            copy = Path(scratch) / options.checkpoint.name
            checked([sys.executable, CHILDREN / "cast.py", options.checkpoint, copy, options.dtype])
            sizes = options.samples, options.length, options.windows
            protocol = Protocol(copy, options.calibration, options.evaluation, *sizes, options.dtype)
            for name in wanted:
                for column in options.columns:
                    if column in tools[name].columns:
                        measure(name, tools[name], column, options, protocol)
    print(report(options.results, tools, columns))


if __name__ == "__main__":
    main(TOOLS, COLUMNS, __doc__ or "")
