"""Tables at 80 columns, and the progress of a sweep on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console, RenderableType
from vision_report import latency, vision_report

from effcli.reports.report import LedgerRow, Report, Stage, Training
from effcli.reports.terminal import (
    SweepProgress,
    compare_table,
    ledger_table,
    remarks,
    stage_line,
    stage_table,
    trainings,
)
from effcli.run.forecast import Expected, Forecast


def drawn(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_full_table_fits_80_columns_uncut(report: Report) -> None:
    lines = drawn(stage_table(report))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for figure in ("269 MB", "2.36x", "34.10", "+16.2%", "0.152", "39.9±1.0%", "-1.3 pt", "1198", "41.3", "1.89x"):
        assert figure in text
    for figure in ("3m21s", "1.21 GB", "kernel of awq, gptq: int4 _weight_int4pack_mm_for_cpu; prefill bf16 matmul"):
        assert figure in text


def test_a_long_name_gives_way_before_a_figure(report: Report) -> None:
    renamed = tuple(stage.model_copy(update={"name": "smoothquant"}) for stage in report.stages)
    text = "\n".join(drawn(stage_table(report.model_copy(update={"stages": renamed}))))
    assert "39.9±1.0%" in text and "1.21 GB" in text


def test_columns_without_data_are_left_out(bare_report: Report) -> None:
    lines = drawn(stage_table(bare_report))
    assert lines[1].split() == ["step", "size", "/weight"]
    assert lines[0].split() == ["bits"]


def test_a_full_table_of_a_vision_network_fits_80_columns_uncut() -> None:
    lines = drawn(stage_table(vision_report()))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for figure in ("87.4±0.3%", "-0.7 pt", "99.3%", "96.4%", "24.8", "0.312", "2.80x", "0.92x", "655 MB"):
        assert figure in text
    assert "classification of 10,000 images" in text
    assert lines[0].split() == ["ONNX"] and lines[1].split() == ["bits", "agreement", "torch", "Runtime", "time"]


def test_a_long_name_gives_way_before_a_figure_of_a_vision_network() -> None:
    found = vision_report()
    renamed = tuple(stage.model_copy(update={"name": f"{stage.name}-ranges"}) for stage in found.stages)
    text = "\n".join(drawn(stage_table(found.model_copy(update={"stages": renamed}))))
    assert "87.4±0.3%" in text and "655 MB" in text and "2.80x" in text


def test_one_runtime_is_named_below_the_table(bare_report: Report) -> None:
    timed = bare_report.stages[1].model_copy(update={"latencies": (latency("torch int8", 1.5),)})
    lines = drawn(stage_table(bare_report.model_copy(update={"stages": (bare_report.stages[0], timed)})))
    assert lines[0].split() == ["bits", "latency"] and lines[1].split() == ["step", "size", "/weight", "ms"]
    assert lines[-1].startswith("latency of torch int8: one input")


def test_memory_stands_alone_where_no_time_was_taken(bare_report: Report) -> None:
    stages = (bare_report.stages[0], bare_report.stages[1].model_copy(update={"peak_memory": 5_000_000}))
    assert "5.00 MB" in "\n".join(drawn(stage_table(bare_report.model_copy(update={"stages": stages}))))


def test_the_line_of_a_stage(report: Report, bare_report: Report) -> None:
    line = stage_line(report)
    assert line.startswith("gptq: 114 MB (2.36x), 6.77 bits/weight, perplexity 32.40 (+10.4%), KL 0.0987 nats")
    assert line.endswith("in 6m52s")
    assert stage_line(bare_report) == "rtn: 1.00 kB (1.00x), 16.0 bits/weight"


def test_the_line_of_a_vision_network() -> None:
    line = stage_line(vision_report())
    assert "top-1 87.4±0.3% (-0.7 pt), top-5 99.3% (-0.2 pt), agreement 96.4%, SQNR 24.8 dB" in line
    assert "onnxruntime 0.312 ms (2.80x)" in line and "torch" not in line


def test_the_ledger_has_the_worst_layers_first_and_every_kept_one(report: Report) -> None:
    stage = report.stages[1]
    lines = drawn(ledger_table(stage, worst=5))
    assert lines[0].startswith("awq: 5 of 210 compressed layers, largest error first")
    worst = max(stage.ledger, key=lambda row: row.output_error or 0)
    assert lines[4].split()[0] == worst.name
    assert sum(line.startswith("model.") for line in lines) == 5
    assert any(line.startswith("kept lm_head: bfloat16, 56.6 MB; outside the blocks") for line in lines)
    assert sum(line.startswith("model.") for line in drawn(ledger_table(stage, worst=None), 120)) == 210


def test_kept_layers_of_one_kind_and_reason_share_a_line() -> None:
    rows = tuple(
        LedgerRow(
            name=f"layers.{block}.gate",
            kind="linear",
            shape=(8, 64),
            format="float32",
            bits_per_weight=32,
            nbytes=2048,
            status="kept",
            reason="too small",
        )
        for block in range(3)
    )
    stage = Stage(name="rtn", nbytes=1, weights=1, bits_per_weight=32, ledger=rows)
    text = "\n".join(drawn(ledger_table(stage)))
    assert "kept layers.*.gate (3 layers): float32, 6.14 kB; too small" in text
    assert "no layer compressed" in text


def test_an_unmeasured_error_comes_last_and_nan_first(report: Report) -> None:
    row = report.stages[1].ledger[0]
    rows = [
        row.model_copy(update={"name": name, "output_error": error})
        for name, error in (("none", None), ("small", 0.1), ("nan", float("nan")), ("large", 0.2))
    ]
    stage = report.stages[1].model_copy(update={"ledger": tuple(rows)})
    names = [line.split()[0] for line in drawn(ledger_table(stage))[4:8]]
    assert names == ["nan", "large", "small", "none"]


def test_names_are_not_read_as_markup(report: Report) -> None:
    row = report.stages[1].ledger[0].model_copy(update={"name": "a[red]b[/]", "format": "[bold]", "reason": "[/x]"})
    stage = report.stages[1].model_copy(update={"name": "[dim]", "ledger": (row,), "remarks": ("[/nothing]",)})
    odd = report.model_copy(update={"stages": (report.stages[0], stage), "output": "out/[b]"})
    text = "\n".join(
        line
        for shown in (stage_table(odd), ledger_table(stage), remarks(odd), compare_table(odd, report))
        for line in drawn(shown, 120)
    )
    for literal in ("a[red]b[/]", "[bold]", "[/x]", "[dim]", "[/nothing]", "[b]"):
        assert literal in text


def test_remarks(report: Report, bare_report: Report) -> None:
    assert drawn(remarks(report)) == ["awq: 20 samples of valid.txt were shorter than 512 tokens and were joined"]
    assert drawn(remarks(bare_report)) == []


def test_two_runs_side_by_side(make_report: Callable[..., Report]) -> None:
    lines = drawn(compare_table(make_report(), make_report(bits=3, output="out/awq3", scale=4.0)))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for figure in ("awq4", "awq3", "114 MB", "-11.6%", "int4 g64 asym", "int3 g64 asym", "20 of 209 different layers"):
        assert figure in text
    assert "2 layers are the same in both" in text


def test_which_errors_are_compared_stands_above_them(make_report: Callable[..., Report]) -> None:
    def only_weights(report: Report, names: Callable[[str], bool]) -> Report:
        stages = [
            stage.model_copy(
                update={
                    "ledger": tuple(
                        row.model_copy(update={"output_error": None}) if names(row.name) else row
                        for row in stage.ledger
                    )
                }
            )
            for stage in report.stages
        ]
        return report.model_copy(update={"stages": tuple(stages)})

    a, b = make_report(), make_report(bits=3, output="out/awq3", scale=4.0)
    assert "output error" in "\n".join(drawn(compare_table(a, b)))
    text = "\n".join(drawn(compare_table(only_weights(a, lambda name: True), b)))
    assert "weight error" in text and "output error" not in text and "error of" not in text
    lines = drawn(compare_table(only_weights(a, lambda name: ".0." in name), b, None))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "error of" in text and " weight " in text and " output " in text


def trained(report: Report, training: Training) -> Report:
    stage = report.stages[1].model_copy(update={"training": training})
    return report.model_copy(update={"stages": (report.stages[0], stage)})


def test_a_training_in_a_line(report: Report) -> None:
    assert drawn(trainings(report)) == []
    curve = tuple((k, 8.0 - k) for k in range(1, 8))
    made = trained(report, Training(steps=7, curve=curve, errors=((0, 0.5), (7, 0.25)), kept=7))
    name = report.stages[1].name
    assert drawn(trainings(made), 120) == [
        f"{name}: 7 steps, loss 7.00 to 1.00; the weights of step 7 are kept \N{FULL BLOCK}▇▆▅▃▂▁"
    ]
    long = tuple((k, 1.0 + (k > 500)) for k in range(1, 1001))
    (line,) = drawn(trainings(trained(report, Training(steps=1000, curve=long, kept=0))), 120)
    assert line.endswith(f"no step made the error less {12 * '▁'}{12 * '█'}")
    for curve in ((), ((1, 2.0),), ((1, float("nan")), (2, 1.0), (3, float("inf")))):
        assert len(drawn(trainings(trained(report, Training(steps=3, curve=curve, kept=0))), 120)) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sweep(console: Console, quiet: bool = False) -> str:
    clock = Clock()
    with SweepProgress(quiet, console, clock) as progress:
        progress.start("awq", 30)
        for done in range(1, 31):
            clock.now += 4.0
            progress.advance(done)
        progress.finish()
        progress.finish()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_progress_is_one_line_where_there_is_no_terminal() -> None:
    assert sweep(Console(file=io.StringIO(), width=80)) == "awq: 30 blocks in 2m00s\n"


@pytest.mark.parametrize("width", [80, 100])
def test_progress_is_one_line_without_a_bar_when_it_is_to_be_quiet(width: int) -> None:
    assert sweep(Console(file=io.StringIO(), width=width), quiet=True) == "awq: 30 blocks in 2m00s\n"
    terminal = Console(file=Terminal(), width=width, force_terminal=True, color_system=None)
    assert sweep(terminal, quiet=True) == "awq: 30 blocks in 2m00s\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_phase_that_is_over_in_a_moment_leaves_no_line(quiet: bool) -> None:
    console, clock = Console(file=io.StringIO(), width=80), Clock()
    with SweepProgress(quiet, console, clock) as progress:
        for name, seconds in (("input: perplexity", 1.9), ("input: speed", 2.0), ("verifying", 0.0)):
            progress.start(name, 0)
            clock.now += seconds
            progress.finish()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "input: speed: 2.0s\n"


@pytest.mark.parametrize("width", [80, 100])
def test_a_phase_of_unknown_length_shows_how_long_it_has_taken(width: int) -> None:
    console, clock = Console(file=Terminal(), width=width, force_terminal=True, color_system=None), Clock()
    with SweepProgress(console=console, clock=clock) as progress:
        progress.start("exporting to onnx [2]", 0)
        clock.now = 75.0
        progress.finish()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "exporting to onnx [2]" in text and "0:01:15" in text
    assert " of " not in text and " left" not in text
    assert max(len(line) for line in re.split(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]", text)) <= width


@pytest.mark.parametrize("width", [80, 100])
def test_a_phase_whose_length_is_found_out_is_the_same_phase(width: int) -> None:
    console, clock = Console(file=Terminal(), width=width, force_terminal=True, color_system=None), Clock()
    plain = Console(file=io.StringIO(), width=width)
    for shown in (console, plain):
        clock.now = 0.0
        with SweepProgress(console=shown, clock=clock) as progress:
            progress.start("awq: perplexity", 0, "step")
            clock.now = 10.0
            progress.start("awq: perplexity", 40, "step")
            progress.advance(0)
            clock.now = 40.0
            progress.advance(10)
            progress.finish()
    assert isinstance(console.file, io.StringIO) and isinstance(plain.file, io.StringIO)
    assert "step 11 of 40, 1m30s left" in console.file.getvalue() and "0:00:40" in console.file.getvalue()
    assert plain.file.getvalue() == "awq: perplexity: 10 steps in 40s\n"


def test_progress_on_a_terminal_says_block_time_left_and_memory() -> None:
    console = Console(file=Terminal(), width=100, force_terminal=True, color_system=None)
    clock = Clock()
    progress = SweepProgress(console=console, clock=clock)
    progress.start("awq", 30)
    assert isinstance(console.file, io.StringIO)
    assert "block 1 of 30" in console.file.getvalue() and "left" not in console.file.getvalue()
    clock.now = 40.0
    progress.advance(10)
    progress.finish()
    text = console.file.getvalue()
    assert "block 11 of 30, 1m20s left" in text
    assert " MB" in text or " GB" in text


def test_progress_of_what_began_in_the_middle() -> None:
    """The time left follows the steps that were seen, not those of a run before."""
    console = Console(file=Terminal(), width=100, force_terminal=True, color_system=None)
    clock = Clock()
    progress = SweepProgress(console=console, clock=clock)
    progress.start("tune", 1000, "step")
    progress.advance(900)
    clock.now = 10.0
    progress.advance(910)
    progress.finish()
    assert isinstance(console.file, io.StringIO)
    assert "step 911 of 1000, 1m30s left" in console.file.getvalue()
    plain = Console(file=io.StringIO(), width=80)
    progress = SweepProgress(console=plain, clock=clock)
    progress.start("tune", 2, "step")
    clock.now += 2.0
    progress.advance(2)
    progress.finish()
    assert isinstance(plain.file, io.StringIO) and plain.file.getvalue().startswith("tune: 2 steps in ")


def test_a_failed_sweep_takes_the_bar_away_and_claims_nothing() -> None:
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(RuntimeError), SweepProgress(console=console) as progress:
        progress.start("awq", 30)
        raise RuntimeError
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
    shown = Console(file=Terminal(), width=80, force_terminal=True)
    with pytest.raises(RuntimeError), SweepProgress(console=shown) as progress:
        progress.start("awq", 30)
        raise RuntimeError
    assert isinstance(shown.file, Terminal)
    assert shown.file.getvalue().rstrip("\r\n").endswith("\x1b[2K")


def test_two_models_are_named_where_they_differ(make_report: Callable[..., Report]) -> None:
    a, b = make_report(), make_report(bits=3, output="out/awq3")
    assert not any(line.startswith("model ") for line in drawn(compare_table(a, b)))
    other = b.model_copy(update={"model": "another/model"})
    (line,) = (line for line in drawn(compare_table(a, other)) if line.startswith("model "))
    assert "another/model" in line and line.endswith("differs")


def test_with_a_forecast_the_time_left_of_all_phases_is_shown() -> None:
    console, clock = Console(file=Terminal(), width=120, force_terminal=True, color_system=None), Clock()
    expected = (("planning", 5), ("awq", 100), ("verifying", 20))
    forecast = Forecast(phases=tuple(Expected(phase=name, seconds=seconds) for name, seconds in expected))
    with SweepProgress(console=console, clock=clock, forecast=forecast) as progress:
        progress.start("planning", 0)
        clock.now = 10.0
        progress.finish()
        progress.start("awq", 10)
        progress.advance(0)
        clock.now = 40.0
        progress.advance(1)
        progress.finish()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    # Before a phase says how long it takes, the forecast does.
    assert "2m05s left in all" in text and "block 1 of 10, 2m00s left in all" in text
    assert "block 2 of 10, 4m30s left, 4m50s in all" in text
