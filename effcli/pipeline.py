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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from effcli import exporters, importers, memory, samples
from effcli import recipe as recipes
from effcli.checkpoint import weight_files, write_text
from effcli.contract import Needs
from effcli.errors import EffcliError, OutputError, UnsupportedError, UserError, writing
from effcli.machine import device_name
from effcli.plan import Plan
from effcli.recipe import ExportStep, PassStep, Recipe
from effcli.reports import card, html
from effcli.reports.human import size
from effcli.reports.report import Exported, Report, Stage

if TYPE_CHECKING:
    from effcli.subject import Subject
    from effcli.swept import Swept

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
    for step in recipe.export:
        exporters.require(step.name)
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
        self.subject = subject_of(recipe)
        self.recipe = self.subject.recipe
        self.output = output
        self.listener = listener
        if self.subject.source.resolve() == output.resolve():
            raise OutputError(f"{output} is the model itself", "choose another --output; the input is never changed")
        self.work = output.parent / f".{output.name}.effcli"

    def carry_out(self) -> Report:
        plan = self.subject.plan()
        self._check_space(plan)
        remarks = self.subject.calibrate()
        self._open_work()
        try:
            return self._compress(remarks, plan.weights)
        except OutputError:
            raise  # a disk with room again goes on from here
        except UserError:
            # The input is at fault: nothing written so far can serve a second try.
            shutil.rmtree(self.work, ignore_errors=True)
            raise

    def _compress(self, remarks: tuple[str, ...], count: int) -> Report:
        self.subject.open(self.work)
        base = self.subject.base
        stages = [self._stage(0, lambda: self._measured(base, "input", {}, count, first=True))]
        current = reference = base
        for number, step in enumerate(self.recipe.passes, start=1):
            said = remarks if step.config.needed is not Needs.NOTHING else ()
            target = self._pass(number, step, current, reference, said, count, stages)
            dense = not any(row.status == "compressed" for row in stages[-1].ledger)
            former, current = current, target
            if reference == former and dense:
                reference = target
            if former not in (base, reference):
                shutil.rmtree(former, ignore_errors=True)
        return self._finish(current, stages)

    def _open_work(self) -> None:
        """Continue unfinished work of the same request; start anew otherwise."""
        request = {
            "recipe": self.recipe.model_dump(mode="json", exclude={"output", "export"}),
            "files": self.subject.request,
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

    def _stage(self, number: int, measure: Callable[[], Stage]) -> Stage:
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
        reference: Path,
        said: tuple[str, ...],
        count: int,
        stages: list[Stage],
    ) -> Path:
        """Carry out one step and measure what came out; the new checkpoint."""
        target = self.work / f"checkpoint-{number}"

        def measure() -> Stage:
            with writing(target):
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
            memory.reset_peak()
            started = time.perf_counter()
            swept = self._sweep(number, step, source, target, reference)
            seconds, peak = time.perf_counter() - started, memory.peak()
            measured = self._measured(target, step.name, step.config.model_dump(mode="json"), count)
            return measured.model_copy(
                update={
                    "seconds": seconds,
                    "peak_memory": peak,
                    "remarks": (*said, *swept.remarks, *measured.remarks),
                    "ledger": tuple(swept.ledger),
                    "histograms": tuple(swept.histograms),
                    "activations": tuple(swept.activations),
                }
            )

        stages.append(self._stage(number, measure))
        return target

    def _sweep(self, number: int, step: PassStep, source: Path, target: Path, reference: Path) -> Swept:
        started = False

        def progress(done: int, total: int) -> None:
            nonlocal started
            if not started:
                self.listener.progress_start(step.name, total)
                started = True
            self.listener.progress(done)

        try:
            return self.subject.sweep(step, source, target, reference, self.work / f"pass-{number}", progress)
        finally:
            self.listener.progress_end()

    def _measured(self, path: Path, name: str, options: dict[str, Any], count: int, first: bool = False) -> Stage:
        found = self.subject.measure(path, first)
        nbytes = sum(file.stat().st_size for file in weight_files(path))
        return Stage(
            name=name,
            options=options,
            nbytes=nbytes,
            weights=count,
            bits_per_weight=8 * nbytes / count,
            quality=found.quality,
            speed=found.speed,
            latencies=found.latencies,
            remarks=found.remarks,
        )

    def _finish(self, finished: Path, stages: list[Stage]) -> Report:
        report = Report(
            effcli_version=version("effcli"),
            model=self.recipe.model,
            output=self.recipe.output,
            machine=_machine(),
            software=_software(),
            stages=tuple(stages),
            verified=self.subject.verify(finished) if self.recipe.evaluate.enabled else None,
            recipe=self.recipe.model_dump(mode="json"),
        )
        self._describe(report, finished)
        write_text(finished / "recipe.yaml", recipes.dump(self.recipe))
        self._put_in_place(finished)
        if self.recipe.export:
            # Only now: an export that fails must not take the finished checkpoint with it.
            report = report.model_copy(update={"exports": tuple(map(self._export, self.recipe.export))})
            self._describe(report, self.output)
        return report

    def _describe(self, report: Report, folder: Path) -> None:
        """Write the report and the model card into `folder`."""
        base = self.subject.source / "README.md"
        base_card = base.read_text(encoding="utf-8", errors="replace") if base.is_file() else None
        report.write(folder)
        html.write(report, folder)
        card_text = card.model_card(report, base_card, layout=self.subject.layout(folder))
        write_text(folder / card.FILE_NAME, card_text)

    def _export(self, step: ExportStep) -> Exported:
        folder = self.output / "exports" / step.name
        with writing(self.output):
            folder.parent.mkdir(exist_ok=True)
        try:
            exported: Exported = exporters.load(step.name).export(self.output, folder, step.config, overwrite=True)
            exported = self.subject.time_export(exported, folder)
        except EffcliError as error:
            cause = f"{self.output} is finished, but not exported to {step.name}: {error.cause}"
            raise type(error)(cause, error.remedy) from error
        self.listener.say(f"exported to {step.name}: {exported.checked or size(exported.nbytes)}")
        return exported

    def _put_in_place(self, finished: Path) -> None:
        with writing(self.output):
            old = self.work / "replaced"
            if self.output.exists():
                self.output.rename(old)
            finished.rename(self.output)
            shutil.rmtree(self.work, ignore_errors=True)


def subject_of(recipe: Recipe) -> Subject:
    """The network that `recipe` names, as a run works on it."""
    source = samples.locate(recipe.model, recipe.revision)
    if importers.recognises(source):
        from effcli.graphs.network import GraphNetwork

        return GraphNetwork(recipe, source)
    from effcli.language.model import LanguageModel

    return LanguageModel(recipe, Path(source))


def _machine() -> str:
    return f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, {platform.system()}"


def _software() -> dict[str, str]:
    names = ("torch", "transformers", "compressed-tensors", "effcli")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
