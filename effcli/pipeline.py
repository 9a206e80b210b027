"""A whole run: measure the input, carry out each pass, measure again, verify, write the report.

Everything is made in a hidden folder beside the output and renamed into place at the end, so that an output is either
whole or not there. The folder outlives a crash: the same recipe run again goes on from the last written block.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from effcli import card, html, latency, memory, samples, text, verify
from effcli import recipe as recipes
from effcli.checkpoint import read_config, weight_files, write_text
from effcli.contract import Needs
from effcli.errors import OutputError, UnsupportedError, UserError, writing
from effcli.evaluate import Yardstick
from effcli.exporters import load as load_exporter
from effcli.human import size
from effcli.plan import Plan, make
from effcli.recipe import PassStep, Recipe
from effcli.report import Quality, Report, Speed, Stage
from effcli.storage import is_own
from effcli.sweep import Swept, Windows, sweep

# Room that a run needs beside the planned bytes: hidden states, the parts before they are joined, the report.
_DISK_FACTOR = 2.2


class Listener(Protocol):
    """Whom a run tells how it goes."""

    def stage(self, stage: Stage) -> None: ...

    def progress_start(self, name: str, total: int) -> None: ...

    def progress(self, done: int) -> None: ...

    def progress_end(self) -> None: ...

    def say(self, text: str) -> None: ...


class Silent:
    """A listener for scripts."""

    def stage(self, stage: Stage) -> None: ...

    def progress_start(self, name: str, total: int) -> None: ...

    def progress(self, done: int) -> None: ...

    def progress_end(self) -> None: ...

    def say(self, text: str) -> None: ...


def run(recipe: Recipe, *, overwrite: bool = False, listener: Listener | None = None) -> Report:
    """Carry out a recipe and return its report; the checkpoint and the report stand in `recipe.output`."""
    output = recipe.target.absolute()
    check_output(output, overwrite)
    if recipe.device not in ("cpu", "auto"):
        raise UnsupportedError(
            f"this version compresses on the CPU, not on {recipe.device}",
            "leave out --device; `effcli bench --device cuda` measures the result on a GPU",
        )
    threads = torch.get_num_threads()
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        return _Run(recipe, output, listener or Silent()).carry_out()
    finally:
        torch.set_num_threads(threads)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless `output` can be written."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file", "choose another --output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(
            f"{output} exists and is not empty", "choose another --output, or replace it with --overwrite"
        )
    parent = _existing(output.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent}", "choose a writable --output")


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


class _Run:
    def __init__(self, recipe: Recipe, output: Path, listener: Listener) -> None:
        self.recipe = recipe
        self.output = output
        self.listener = listener
        self.source = samples.resolve(recipe.model, recipe.revision)
        if self.source.resolve() == output.resolve():
            raise OutputError(f"{output} is the model itself", "choose another --output; the input is never changed")
        self.work = output.parent / f".{output.name}.effcli"

    def carry_out(self) -> Report:
        plan = make(self.recipe)
        self._check_space(plan)
        windows, remarks = self._windows()
        self._open_work()
        try:
            return self._compress(windows, remarks, plan.weights)
        except OutputError:
            raise  # a disk with room again goes on from here
        except UserError:
            # The input is at fault: nothing written so far can serve a second try.
            shutil.rmtree(self.work, ignore_errors=True)
            raise

    def _compress(self, windows: Windows | None, remarks: list[str], count: int) -> Report:
        yardstick = self._yardstick()
        stages = [self._stage(0, lambda: self._measured(self.source, "input", {}, count, yardstick))]
        current = self.source
        for number, step in enumerate(self.recipe.passes, start=1):
            needs = windows if step.config.needs is Needs.INPUTS else None
            said = tuple(remarks) if needs is not None else ()
            current = self._pass(number, step, current, needs, said, count, yardstick, stages)
        return self._finish(current, stages)

    def _windows(self) -> tuple[Windows | None, list[str]]:
        if all(step.config.needs is Needs.NOTHING for step in self.recipe.passes):
            return None, []
        return text.calibration_windows(self.recipe, self.source)

    def _yardstick(self) -> Yardstick | None:
        if not self.recipe.evaluate.quality:
            return None
        recipe = self.recipe
        return Yardstick(
            self.source,
            recipe.evaluate,
            self.work,
            calibration=recipe.calibration,
            trust_remote_code=recipe.trust_remote_code,
        )

    def _open_work(self) -> None:
        """Continue unfinished work of the same request; start anew otherwise."""
        files = weight_files(self.source)
        request = {
            "recipe": self.recipe.model_dump(mode="json", exclude={"output", "export"}),
            "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
            "versions": _software(),
        }
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        marker = self.work / "request"
        if marker.is_file() and marker.read_text(encoding="utf-8") == digest:
            self.listener.say("going on from the last written block")
            return
        with writing(self.output):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        write_text(marker, digest)

    def _check_space(self, plan: Plan) -> None:
        free = shutil.disk_usage(_existing(self.output.parent)).free
        needed = int(plan.output_bytes * _DISK_FACTOR)
        if free < needed:
            raise OutputError(
                f"no space left for {self.output}: about {size(needed)} are needed, {size(free)} are free",
                "free some space or choose another --output",
            )

    def _stage(self, number: int, measure: Any) -> Stage:
        """A stage from the working folder when a run before this one measured it, else measured now."""
        file = self.work / f"stage-{number}.json"
        if file.is_file():
            stage = Stage.model_validate_json(file.read_text(encoding="utf-8"))
        else:
            stage = measure()
            write_text(file, stage.model_dump_json())
        self.listener.stage(stage)
        return stage

    def _pass(
        self,
        number: int,
        step: PassStep,
        source: Path,
        windows: Windows | None,
        said: tuple[str, ...],
        count: int,
        yardstick: Yardstick | None,
        stages: list[Stage],
    ) -> Path:
        target = self.work / f"checkpoint-{number}"
        if not (self.work / f"stage-{number}.json").is_file():
            with writing(target):
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
            memory.reset_peak()
            started = time.perf_counter()
            swept = self._sweep(number, step, source, target, windows)
            seconds, peak = time.perf_counter() - started, memory.peak()
        options = step.config.model_dump(mode="json")

        def measure() -> Stage:
            measured = self._measured(target, step.name, options, count, yardstick)
            return measured.model_copy(
                update={
                    "seconds": seconds,
                    "peak_memory": peak,
                    "remarks": (*said, *swept.remarks),
                    "ledger": tuple(swept.ledger),
                    "histograms": tuple(swept.histograms),
                }
            )

        stages.append(self._stage(number, measure))
        if source != self.source:
            shutil.rmtree(source, ignore_errors=True)
        return target

    def _sweep(self, number: int, step: PassStep, source: Path, target: Path, windows: Windows | None) -> Swept:
        started = False

        def progress(done: int, total: int) -> None:
            nonlocal started
            if not started:
                self.listener.progress_start(step.name, total)
                started = True
            self.listener.progress(done)

        try:
            return sweep(
                source, target, step, windows, self.work / f"pass-{number}", progress, self.recipe.trust_remote_code
            )
        finally:
            self.listener.progress_end()

    def _measured(
        self, path: Path, name: str, options: dict[str, Any], count: int, yardstick: Yardstick | None
    ) -> Stage:
        wanted = self.recipe.evaluate
        quality: Quality | None = yardstick.measure(path) if yardstick is not None else None
        speed: Speed | None = None
        if wanted.latency:
            speed = latency.measure(
                str(path),
                prefill=wanted.prefill,
                decode=wanted.decode,
                threads=self.recipe.threads,
                trust_remote_code=self.recipe.trust_remote_code,
            )
        nbytes = sum(file.stat().st_size for file in weight_files(path))
        remarks = tuple(yardstick.remarks) if yardstick is not None and name == "input" else ()
        return Stage(
            name=name,
            options=options,
            nbytes=nbytes,
            weights=count,
            bits_per_weight=8 * nbytes / count,
            quality=quality,
            speed=speed,
            remarks=remarks,
        )

    def _finish(self, finished: Path, stages: list[Stage]) -> Report:
        verified = None
        if self.recipe.evaluate.enabled:
            verified = verify.verify(finished, trust_remote_code=self.recipe.trust_remote_code).line
        report = Report(
            effcli_version=version("effcli"),
            model=self.recipe.model,
            output=self.recipe.output,
            machine=_machine(),
            software=_software(),
            stages=tuple(stages),
            verified=verified,
            recipe=self.recipe.model_dump(mode="json"),
        )
        layout: card.Layout = "effcli" if is_own(read_config(finished)) else "standard"
        base = self.source / "README.md"
        base_card = base.read_text(encoding="utf-8", errors="replace") if base.is_file() else None
        report.write(finished)
        html.write(report, finished)
        write_text(finished / card.FILE_NAME, card.model_card(report, base_card, layout=layout))
        write_text(finished / "recipe.yaml", recipes.dump(self.recipe))
        for target in self.recipe.export:
            with writing(finished):
                (finished / "exports").mkdir(exist_ok=True)
            load_exporter(target).export(finished, finished / "exports" / target)
        self._put_in_place(finished)
        return report

    def _put_in_place(self, finished: Path) -> None:
        with writing(self.output):
            old = self.work / "replaced"
            if self.output.exists():
                self.output.rename(old)
            finished.rename(self.output)
            shutil.rmtree(self.work, ignore_errors=True)


def _machine() -> str:
    return f"{latency.device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {platform.system()}"


def _software() -> dict[str, str]:
    names = ("torch", "transformers", "compressed-tensors", "effcli")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
