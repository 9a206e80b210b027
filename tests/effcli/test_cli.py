"""The command line: what it says when something is wrong, with which exit code, and what a script gets to read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effcli import passes
from effcli.cli import main
from effcli.errors import MachineError, NumericsError
from effcli.platform.registry import Entry
from effcli.reports import terminal
from effcli.reports.report import Check, PhaseTime, Report

COMMANDS = ["compress", "run", "plan", "inspect", "eval", "bench", "passes", "export", "verify", "compare", "report"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """Standard error of a command that must fail with `code`, leaving standard output empty."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in text] == []
    assert main([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Usage: effcli" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import effcli

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"effcli {effcli.__version__}\n"


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "effcli", "verfy"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: No such command 'verfy'\n  did you mean 'verify'?\n"


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (["comprss"], "'comprss'", "did you mean 'compress'"),
        (["compress", "m", "--bitz", "4"], "--bitz", "did you mean --bits?"),
        (["eval", "m", "--eval", "x"], "No such option: --eval", "did you mean --text, --choices or --images?"),
        (["eval", "m", "--evals", "x"], "--evals", "did you mean --text, --choices or --images?"),
        (["compress", "m", "--text", "x"], "--text", "did you mean --eval?"),
        (["verify", "o", "--reference", "x"], "--reference", "did you mean --against?"),
        (["eval", "m", "--weigths", "x"], "--weigths", "did you mean --weights?"),
        (["run", "r", "--pass", "x"], "--pass", "an option of compress, plan and inspect; see `effcli run --help`"),
        (["verify", "o", "-q"], "-q", "-q is an option of compress and run; see `effcli verify --help`"),
        (["eval", "m", "--zebra"], "--zebra", "see `effcli eval --help`"),
        (["compress"], "MODEL", "see `effcli compress --help`"),
        (["compress", "m", "--bits", "four"], "--bits", "see `effcli compress --help`"),
        (["compress", "m", "--pass", "awk", "-o", "o"], "no pass 'awk'", "did you mean 'awq'?"),
        (
            ["compress", "m", "--pass", "awq:bitz=4", "-o", "o"],
            "--pass awq: bitz: awq has no option",
            "did you mean 'bits'?",
        ),
        (["compress", "m", "--pass", "awq", "--set", "sed=4", "-o", "o"], "'sed'", "did you mean 'seed'"),
        (
            ["compress", "m", "--pass", "awq", "--pass", "linear", "--bits", "4"],
            "--bits is ambiguous",
            "--pass NAME:bits",
        ),
        (["compress", "m", "--pass", "awq"], "output: missing", "-o OUT"),
        (["compress", "m", "-o", "o"], "at least one pass", "known: linear"),
        (["compress", "m", "--pass", "awq", "--export", "gguf", "-o", "o"], "no export target 'gguf'", "safetensors"),
        (["run", "none.yaml"], "no recipe none.yaml", "check the path"),
        (["plan", "none.yaml", "--pass", "awq"], "none.yaml is a recipe", "--set"),
        (["passes", "show", "awk"], "no pass 'awk'", "did you mean 'awq'?"),
        (["export", "o", "--to", "c"], "o does not exist", "effcli compress"),
        (["export", "o", "--to", "safetensor"], "'safetensor'", "did you mean 'safetensors'?"),
        (["report", "none"], "none does not exist", "effcli compress"),
        (["compare", "none", "none"], "none does not exist", "effcli compress"),
        (["eval", "m", "--samples", "0"], "samples: should be greater", ""),
        (["eval", "m", "--samples", "9" * 38], "samples: a whole number of more than 64 bits", "a smaller one"),
        (["inspect", "m", "--sensitivity", "--bits", "\u00b2"], "--bits \u00b2: not whole numbers", "--bits 2,3,4"),
        (["inspect", "m", "--sensitivity", "--bits", "9" * 5000], ": not whole numbers", "--bits 2,3,4"),
        (["plan", "n" * 999, "--pass", "awq"], "File name too long", "a shorter name"),
    ],
)
def test_mistakes(
    arguments: list[str],
    cause: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Files of the checkout may be near to what is mistyped.
    monkeypatch.chdir(tmp_path)
    lines = fails(capsys, *arguments).splitlines()
    assert len(lines) == 1 + bool(remedy)
    assert lines[0].startswith("error: ")
    assert cause in lines[0]
    assert remedy in lines[-1]


def test_a_recipe_with_several_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("modle: m\npasses: [awk]\n")
    text = fails(capsys, "run", str(path), "--set", "seed=x")
    assert f"{path} has 4 mistakes" in text
    for key in ("modle: ", "model: missing", "passes.0: ", "--set seed: "):
        assert f"  {key}" in text


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NumericsError("NaN in x", "check it"), 1, "error: NaN in x\n  check it\n"),
        (MachineError("no"), 2, "error: no\n"),
        (MemoryError(), 2, "error: out of memory\n"),
        (ZeroDivisionError("a\nb"), 2, "error: internal error: ZeroDivisionError: a b\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n  nothing was kept; give the same command again"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(passes, "load", fail)
    assert text in fails(capsys, "passes", "show", "awq", code=code)
    assert main(["passes", "show", "awq", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupt_says_what_stays(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effcli.run import pipeline

    def run(recipe: Any, **options: Any) -> Any:
        if kept:
            (tmp_path / ".o.effcli").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", run)
    text = fails(capsys, "compress", "m", "--pass", "awq", "-o", str(tmp_path / "o"), code=130)
    if kept:
        assert text.startswith(f"error: interrupted; what is finished stays in {tmp_path}/.o.effcli\n")
        assert "the same command continues from there; remove that folder" in text
    else:
        assert text == "error: interrupted\n  nothing was kept; give the same command again\n"


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert {name: summary for name, _, summary in lines} == {
        name: entry.summary for name, entry in passes.PASSES.items()
    }
    for name, family, _ in lines:
        assert passes.PASSES[name].place.startswith(f"effcli.passes.{family}.")
    assert list(dict.fromkeys(family for _, family, _ in lines)) == ["quantize", "prune", "train", "adapt", "search"]
    assert main(["passes", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(passes.PASSES)


def test_passes_are_shown_by_families(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effcli.cli.passes.to_terminal", lambda: True)
    monkeypatch.setitem(passes.PASSES, "own", Entry("elsewhere:Own", "Does something.", package="effcli-own"))
    assert main(["passes"]) == 0
    groups = [group.splitlines() for group in capsys.readouterr().out.split("\n\n")]
    assert [group[0].strip() for group in groups] == [*passes.FAMILIES, "of other packages"]
    for title, *lines in groups[:-1]:
        names = {name for name, entry in passes.PASSES.items() if f".{title.strip()}." in entry.place}
        assert {line.split()[0] for line in lines if not line.startswith(" ")} == names
    assert groups[-1][1].split() == ["own", "Does", "something.", "effcli-own"]


@pytest.mark.parametrize("name", passes.PASSES)
def test_passes_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "show", name]) == 0
    text = capsys.readouterr().out
    options = passes.load(name).model_fields
    assert [option for option in options if option not in text] == []
    assert main(["passes", "show", name, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(options)


def test_passes_show_tells_the_defaults_of_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "show", "linear"]) == 0
    text = capsys.readouterr().out
    assert "64; in graphs null" in text and "group; in graphs" in text
    assert main(["passes", "show", "kmeans", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["properties"]
    assert {key: value["graph_default"] for key, value in found.items() if "graph_default" in value} == {
        "granularity": "tensor"
    }
    assert passes.load("kmeans")().for_graph().model_dump()["granularity"] == "tensor"


@pytest.fixture
def finished(tmp_path: Path, make_report: Callable[..., Report]) -> Path:
    """A folder with the report of a run."""
    make_report().write(tmp_path)
    return tmp_path


def test_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished)]) == 0
    out, err = capsys.readouterr()
    assert "perplexity" in out
    assert err == ""
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(finished), "--json"]) == 0
    assert Report.model_validate_json(capsys.readouterr().out) == Report.read(finished)


def test_compare(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(finished), str(finished)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["compare", str(finished), str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_bench_and_eval_print_what_was_measured(
    make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effcli.language import evaluate, latency

    stage = make_report().stages[-1]
    assert stage.quality is not None and stage.speed is not None
    asked: dict[str, Any] = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda model, options, **keys: asked.update(o=options) or stage.quality)
    monkeypatch.setattr(latency, "measure", lambda model, **keys: asked.update(keys) or stage.speed)

    assert main(["eval", "sample:lm", "--choices", "piqa.jsonl", "--limit", "5"]) == 0
    assert asked["o"].model_dump(include={"perplexity", "choices", "limit"}) == {
        "perplexity": False,
        "choices": "piqa.jsonl",
        "limit": 5,
    }
    assert re.search(r"perplexity +32\.40", capsys.readouterr().out)
    assert main(["eval", "sample:lm", "--json"]) == 0
    assert asked["o"].perplexity is True
    assert json.loads(capsys.readouterr().out)["perplexity"] == stage.quality.perplexity

    assert main(["bench", "sample:lm", "--threads", "2"]) == 0
    # The default follows the model.
    assert (asked["threads"], asked["prefill"], asked["device"]) == (2, None, "cpu")
    assert stage.speed.kernel in capsys.readouterr().out
    assert main(["bench", "sample:lm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel"] == stage.speed.kernel


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "sample:lm", "--images", "x.npz"],
        ["eval", "sample:lm", "--set", "preprocess.scale=2"],
        ["eval", "sample:cnn", "--text", "x.txt"],
        ["eval", "sample:cnn", "--limit", "3"],
        ["bench", "sample:cnn", "--prefill", "64"],
        ["bench", "sample:cnn", "--device", "cuda"],
    ],
)
def test_options_of_the_other_kind_of_network(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, *arguments).startswith(f"error: {arguments[2]}: {arguments[1]}")


@pytest.mark.parametrize("quiet", [False, True])
def test_compress_shows_the_run(
    quiet: bool, make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effcli.run import pipeline

    report = make_report().model_copy(update={"phases": (PhaseTime(name="planning", seconds=75),)})

    def run(recipe: Any, *, overwrite: bool, listener: Any, forecast: Any) -> Report:
        assert (recipe.model, recipe.output, overwrite) == ("m", "o", True)
        for stage in report.stages:
            listener.progress_start(stage.name, 2)
            listener.progress(1)
            listener.progress(2)
            listener.progress_end()
            listener.stage(stage)
        listener.say("a [remark]")
        return report

    monkeypatch.setattr(pipeline, "run", run)
    if not quiet:
        monkeypatch.setattr(terminal, "MOMENT", 0.0)
    arguments = ["compress", "m", "--pass", "awq", "-o", "o", "--overwrite"]
    assert main([*arguments, *(["--quiet"] if quiet else [])]) == 0
    out, err = capsys.readouterr()
    if quiet:
        assert err.splitlines()[0].startswith("input: ") and len(err.splitlines()) == len(report.stages)
        verified, written = out.splitlines()
        assert verified.startswith("verified: transformers 5.23.0") and written.startswith("written to o, ")
    else:
        assert "perplexity" in out and "written to o" in out
        assert "gptq: 2 blocks in" in err and "a [remark]" in err
        assert "1m15s" not in out
        assert main([*arguments, "--verbose"]) == 0
        assert "1m15s" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert Report.model_validate_json(capsys.readouterr().out) == report


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_verify(passed: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from effcli.language import verify

    class Found:
        layers = ()
        checks = (Check(text="the line", passed=passed, numbers="1.5 of 2"), Check(text="the input is not here"))

        def __init__(self) -> None:
            self.passed = passed

        def to_json(self) -> str:
            return "{}"

    monkeypatch.setattr(verify, "verify", lambda path, **keys: Found())
    assert main(["verify", "o"]) == code
    found = ["verified:", "  \N{CHECK MARK} the line"] if passed else ["NOT VERIFIED: the line"]
    assert capsys.readouterr().out.splitlines() == [*found, "  - the input is not here"]
    assert main(["verify", "o", "--verbose"]) == code
    assert capsys.readouterr().out.splitlines() == [*found, "    1.5 of 2", "  - the input is not here"]
    assert main(["verify", "o", "--json"]) == code
    assert capsys.readouterr().out == "{}\n"


def test_the_shape_that_inspect_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shapeless.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Conv2d(3, 4, 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "--set shape=" in fails(capsys, "inspect", "shapeless:make")
    for command in ("inspect", "bench"):
        assert main([command, "shapeless:make", "--set", "shape=[3,8,8]"]) == 0
    assert "for an input of 3 x 8 x 8" in " ".join(capsys.readouterr().out.split())
    assert "only shape can be set here" in fails(capsys, "inspect", "shapeless:make", "--set", "seed=1")
    assert "is a language model" in fails(capsys, "inspect", "sample:lm", "--set", "shape=[3,8,8]")


def test_a_device_that_is_not_there_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    told = fails(capsys, "compress", "sample:lm", "--pass", "linear", "-o", "never-made", "--device", "cuda:99")
    assert "there is no device cuda:99 on this machine" in told and not Path("never-made").exists()


def test_help_of_an_export_lists_the_options_of_each_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--to onnx" in text and "--accuracy-level" in text and "--max-flash" in text


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("effcli comp", ["compress", "compare"]),
        ("effcli compress sample:lm --pass gp", ["gptq"]),
        ("effcli compress sample:lm --export on", ["onnx"]),
        ("effcli passes show smooth", ["smoothquant"]),
        ("effcli verify out --target cortex-m4", ["cortex-m4"]),
    ],
)
def test_a_shell_completes(words: str, offered: list[str]) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_EFFCLI_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "effcli"], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == sorted(offered)
