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
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effcli import exporters
from effcli.errors import EffcliError, OutputError, UnfinishedError, UserError, behind, writing
from effcli.files import locate as samples
from effcli.files.checkpoint import weight_files, write_text
from effcli.files.digest import of_path
from effcli.files.documents import read_model
from effcli.files.layout import ADAPTER, adapter_in
from effcli.layers.contract import Change, Pass, SearchPass
from effcli.platform import memory
from effcli.platform.machine import cpu_threads, device_name, pick_device
from effcli.platform.steps import telling
from effcli.reports import card, html, html_sensitivity
from effcli.reports.report import Exported, PhaseTime, Report, Stage
from effcli.reports.units import count, size
from effcli.run import detect
from effcli.run import recipe as recipes
from effcli.run.forecast import Forecast
from effcli.run.listener import Listener, Silent, phases, told
from effcli.run.logged import Logged
from effcli.run.plan import Plan
from effcli.run.recipe import ExportStep, PassStep, Recipe, RecipeStep
from effcli.run.timed import Timed
from effcli.run.workplace import EXPORTS, Workplace, check_output, existing, exports_in, files_in, resolved
from effcli.search import stage as searching
from effcli.search.stage import Position

if TYPE_CHECKING:
    from effcli.layers.result import PassResult, Progress
    from effcli.search.budget import Figure

# The report of a finished run, and why its exports ended early if they did.
_Done = tuple[Report, EffcliError | None]
# Room that a run needs for the planned bytes: the parts before they are joined, what measures them, the report.
_DISK_FACTOR = 2.2


def check(recipe: Recipe, overwrite: bool = False) -> None:
    """Raise what a run would raise before any work."""
    check_output(resolved(recipe.target.absolute()), overwrite, recipe.inputs)
    for step in recipe.export:
        exporters.require(step.name)
    for part in _named(recipe.passes):
        part.config.require()
    # It may not be there.
    pick_device(recipe.device)


def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
    forecast: Forecast | None = None,
    called: str = "",
) -> Report:
    """Carry out a recipe and return its report; the checkpoint and the report stand in `recipe.output`.

    listener: a `Timed` one keeps the time of the phases itself, and nothing is logged; forecast: what is expected of
    them, for the report; called: what the report and the recipe beside it name as the model, where that of `recipe` is
    soon gone.
    """
    listener = listener if isinstance(listener, Timed) else Logged(listener or Silent())
    check(recipe, overwrite)
    for clash in filter(None, (step.clash for step in (*_named(recipe.passes), *recipe.export))):
        listener.say(clash)
    torch.manual_seed(recipe.seed)
    with cpu_threads(recipe.threads):
        output = resolved(recipe.target.absolute())
        return _Run(recipe, output, overwrite, listener, forecast, called or recipe.model).carry_out()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        overwrite: bool,
        listener: Timed,
        forecast: Forecast | None,
        called: str,
    ) -> None:
        self.network = detect.of_run(recipe)
        self.called = called
        given = recipe.model_copy(update={"model": called}).model_dump(mode="json", exclude_unset=True)
        self.given = {key: value for key, value in given.items() if value != []}
        self.recipe = self.network.recipe
        self.output = output
        self.overwrite = overwrite
        self.listener = listener
        self.forecast = forecast
        self.place = Workplace(output)
        self.work = self.place.folder
        self.finished: list[Stage] = []

    def carry_out(self) -> Report:
        with self._phase("planning"):
            plan = searching.plan(self.network)
        self._check_space(plan)
        if plan.layout:
            self.listener.say(plan.layout)
        with self._phase("reading calibration data"):
            remarks = self.network.calibrate()
        with self.place.locked():
            with self._phase("reading files of the model and of the data"):
                request = self._request()
            if self.place.placed == request:
                report = Report.read(self.output)
                # What the request leaves out must be the same; its steps may stand there as a search chose them.
                if self._settings(()) == {**report.recipe, "passes": []}:
                    # Killed when all was done but the removal of what is beside the output.
                    self.place.finish()
                    return report
            self._open_work(request)
            try:
                report, failed = self._carry_out(remarks, request)
            except OutputError:
                raise  # a disk with room again goes on from here
            except UserError as error:
                if behind(error) is None:
                    # The input is at fault: nothing written so far can serve a second try.
                    self.place.remove()
                raise
        # The output is in its place, and what is beside it may be another process's by now.
        if failed is not None:
            raise failed
        return report

    def _carry_out(self, remarks: tuple[str, ...], request: str) -> _Done:
        try:
            return self._compress(remarks)
        except UnfinishedError as error:
            self._begin_anew(error)
            self.place.begin(request)
            return self._compress(remarks)

    def _compress(self, remarks: tuple[str, ...]) -> _Done:
        with self._phase("reading evaluation data"):
            self.network.open(self.work)
        base = self.network.base
        stages = [self._stage(0, lambda: self._measured(base, "input", {}, first=True))]
        searching.check_measured(self.network, stages[0])
        steps: list[PassStep] = []
        current = reference = base
        for number, step in enumerate(self.recipe.passes, start=1):
            position = Position(step, tuple(steps), self.recipe.passes[number:], current, reference, stages[0])
            stages.append(self._pass(number, position, remarks))
            steps.append(_as_carried_out(step, stages[-1]))
            former = current
            current, reference = self._after(number, stages[-1], current, reference)
            if former not in (base, reference):
                shutil.rmtree(former, ignore_errors=True)
        return self._finish(current, stages, steps)

    def _after(self, number: int, stage: Stage, current: Path, reference: Path) -> tuple[Path, Path]:
        """The current and the reference checkpoint after a pass; reference: the last before weights were compressed."""
        target = self.work / f"checkpoint-{number}"
        dense = not any(row.status == "compressed" for row in stage.ledger)
        return target, target if reference == current and dense else reference

    def _request(self) -> str:
        """A digest of all that decides what the output holds, exports left out."""
        request = {
            "recipe": self.recipe.model_dump(mode="json", exclude={"output", "export"}),
            "files": self.network.request,
            "data": {str(path): digest for path, digest in self._digests.items()},
            "versions": _software(_named(self.recipe.passes)),
        }
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def _open_work(self, request: str) -> None:
        """Continue unfinished work of the same request; start anew otherwise."""
        going_on = self.place.holds(request)
        if going_on:
            try:
                self.finished = self._read_stages()
            except UnfinishedError as error:
                self._begin_anew(error)
                going_on = False
        if not going_on:
            self.place.remove()
        # Another process may have finished since it was first asked.
        check_output(self.output, self.overwrite)
        if going_on:
            self.listener.say("going on from the last written block")
        else:
            self.place.begin(request)

    def _begin_anew(self, error: UnfinishedError) -> None:
        failure = behind(error)
        if failure is not None:
            # What is there may be whole: the same command reads it once the machine does.
            raise failure from error
        self.finished = []
        self.listener.say(f"beginning anew, for unfinished work cannot be continued: {error.cause}")

    def _read_stages(self) -> list[Stage]:
        """The finished stages of unfinished work; `UnfinishedError` unless they and their checkpoints are whole."""
        stages: list[Stage] = []
        current = reference = base = self.work
        for number in range(len(self.recipe.passes) + 1):
            file = self.work / f"stage-{number}.json"
            if not file.exists():
                break
            stages.append(read_model(Stage, file, error=UnfinishedError))
            if number:
                current, reference = self._after(number, stages[-1], current, reference)
        for path in {current, reference} - {base}:
            if not (path / "config.json").is_file():
                raise UnfinishedError(f"{path} is not whole")
        return stages

    @cached_property
    def _digests(self) -> dict[Path, str]:
        """Of every file and folder of calibration and evaluation data that the recipe names, or that stands for it."""
        paths = (samples.CALIBRATION_TEXT, samples.EVALUATION_TEXT, *self.recipe.data.values())
        return {path: of_path(path) for path in paths}

    def _check_space(self, plan: Plan) -> None:
        # What stands in the working folder is either needed no more or written already.
        free = shutil.disk_usage(existing(self.output.parent)).free + self.place.nbytes
        needed = int(plan.output_bytes * _DISK_FACTOR) + plan.disk_bytes
        if free < needed:
            raise OutputError(
                f"no space left for {self.output}: about {size(needed)} are needed, {size(free)} are free",
                "free some space or choose another --output",
            )

    def _stage(self, number: int, measure: Callable[[], Stage]) -> Stage:
        """A stage that a run before this one measured, else measured now."""
        if number < len(self.finished):
            stage = self.finished[number]
        else:
            stage = measure()
            write_text(self.work / f"stage-{number}.json", stage.model_dump_json())
        self.listener.stage(stage)
        return stage

    def _pass(self, number: int, position: Position, remarks: tuple[str, ...]) -> Stage:
        """Carry out one step, or what it searches for, and measure what came out; remarks: on the calibration data."""
        target = self.work / f"checkpoint-{number}"

        def measure() -> Stage:
            step, found = position.step, None
            if isinstance(step.config, SearchPass):
                step, found = searching.carry_out(self.network, position, self._search_folder(number), self.listener)
            with writing(target):
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
            memory.reset_peak()
            started = time.perf_counter()
            result = self._sweep(number, step, position.source, target, position.reference)
            seconds, peak = time.perf_counter() - started, memory.peak()
            measured = self._measured(target, step.name, step.config.model_dump(mode="json"))
            return measured.model_copy(
                update={
                    "seconds": seconds,
                    "peak_memory": peak,
                    "remarks": (
                        *(remarks if step.needs else ()),
                        *result.remarks,
                        *measured.remarks,
                        *_runs_dense(step.config, measured),
                        *_chosen_by(position.step.config, self.network.quality),
                    ),
                    "ledger": tuple(result.ledger),
                    "histograms": tuple(result.histograms),
                    "activations": tuple(result.activations),
                    "training": result.training,
                    "search": found,
                }
            )

        stage = self._stage(number, measure)
        # What was kept to go on from serves no more.
        for folder in (self.work / f"pass-{number}", self._search_folder(number)):
            shutil.rmtree(folder, ignore_errors=True)
        return stage

    def _sweep(self, number: int, step: PassStep, source: Path, target: Path, reference: Path) -> PassResult:
        with told(self.listener, step.name, step.config.unit) as progress:
            return self.network.sweep(step, source, target, reference, self.work / f"pass-{number}", progress)

    def _measured(self, path: Path, name: str, options: dict[str, Any], first: bool = False) -> Stage:
        tell = phases(self.listener, name)
        with tell("counting weights"):
            counts = self.network.count(path)
        found = self.network.measure(path, first, phases=tell)
        adapter = adapter_in(path)
        files = weight_files(path) + ([] if adapter is None else weight_files(adapter))
        nbytes = sum(file.stat().st_size for file in files)
        return Stage(
            name=name,
            options=options,
            nbytes=nbytes,
            weights=counts.weights,
            nonzeros=counts.nonzeros,
            macs=counts.macs,
            bits_per_weight=8 * nbytes / max(counts.weights, 1),
            quality=found.quality,
            speed=found.speed,
            latencies=found.latencies,
            continuations=found.continuations,
            remarks=found.remarks,
        )

    def _search_folder(self, number: int) -> Path:
        """The folder of the search of a step."""
        return self.work / f"search-{number}"

    def _settings(self, steps: Sequence[PassStep]) -> dict[str, Any]:
        """The recipe as JSON, as it is carried out, with these steps."""
        return {
            **self.network.settings,
            "model": self.called,
            "passes": [step.model_dump(mode="json") for step in steps],
        }

    def _finish(self, finished: Path, stages: list[Stage], steps: list[PassStep]) -> _Done:
        """Describe and place the finished checkpoint; steps: as they were carried out."""
        verified = None
        if self.recipe.evaluate.enabled:
            verified = self.network.verify(finished, stages, phases(self.listener, "verifying"))
        report = Report(
            effcli_version=version("effcli"),
            model=self.called,
            output=self.recipe.output,
            machine=_machine(pick_device(self.recipe.device)),
            software=_software((*steps, *self.recipe.export)),
            stages=tuple(stages),
            verified=None if verified is None else verified.line,
            checks=() if verified is None else verified.checks,
            layout=self.network.layout(finished),
            loader=self._loader(finished),
            recipe=self._settings(steps),
            given=self.given,
            data={name: self._digests[path] for name, path in self.recipe.data.items()},
        )
        exported, failed = self._exports(finished)
        report = report.model_copy(update={"exports": exported, "phases": self._phases()})
        with self._phase("writing the report"):
            self._describe(report, finished)
        carried_out = self.recipe.model_copy(update={"model": self.called, "passes": tuple(steps)})
        write_text(finished / "recipe.yaml", recipes.dump(carried_out))
        html_sensitivity.write_all([stage.search for stage in stages if stage.search is not None], finished)
        # The last to be written, for it lists the others.
        report = report.model_copy(update={"files": files_in(finished)})
        report.write(finished)
        # Others may have put something there since the beginning.
        check_output(self.output, self.overwrite)
        self._say_what_goes()
        self.place.place(finished)
        return report, failed

    def _loader(self, finished: Path) -> str:
        if self.network.layout(finished) != "standard" or adapter_in(finished) is not None:
            return "effcli.load"
        return f"transformers.{self.network.loaders(finished)[0]}.from_pretrained"

    def _phases(self) -> tuple[PhaseTime, ...]:
        """How long each phase took so far, and what was expected of it."""
        measured = self.listener.phases
        return measured if self.forecast is None else self.forecast.beside(measured)

    def _phase(self, name: str) -> AbstractContextManager[Progress]:
        """A phase of the run which counts nothing."""
        return told(self.listener, name)

    def _say_what_goes(self) -> None:
        """Name the exports in the output that is replaced which this run does not make again."""
        again = {step.name for step in self.recipe.export}
        going = [name for name in exports_in(self.output) if name not in again]
        if going:
            self.listener.say(f"exports of the former output go with it: {', '.join(going)}")

    def _describe(self, report: Report, folder: Path) -> None:
        """Write the report as a page and the model card into `folder`."""
        base = self.network.source / "README.md"
        base_card = base.read_text(encoding="utf-8", errors="replace") if base.is_file() else None
        html.write(report, folder)
        layout, loaders = self.network.layout(folder), self.network.loaders(folder)
        adapter = ADAPTER if adapter_in(folder) is not None else ""
        card_text = card.model_card(report, base_card, layout=layout, loaders=loaders, adapter=adapter)
        write_text(folder / card.FILE_NAME, card_text)

    def _exports(self, finished: Path) -> tuple[tuple[Exported, ...], EffcliError | None]:
        """Make every export that no run before this one has made, up to one that fails: it takes nothing with it."""
        exports = finished / EXPORTS
        known = {step.name: self._recorded(step, exports / step.name) for step in self.recipe.export}
        for path in exports.iterdir() if exports.is_dir() else ():
            if known.get(path.name) is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        made: list[Exported] = []
        for step in self.recipe.export:
            done = known[step.name]
            if done is not None:
                made.append(done)
                continue
            try:
                made.append(self._export(step, finished))
            except OutputError:
                raise  # the same command makes it once there is room
            except EffcliError as error:
                told = error.cause.replace(str(finished), str(self.output))
                cause = f"{self.output} is finished, but not exported to {step.name}: {told}"
                failed = type(error)(cause, error.remedy.replace(str(finished), str(self.output)))
                failed.__cause__ = error
                return tuple(made), failed
            write_text(self._record(step), made[-1].model_dump_json())
        return tuple(made), None

    def _record(self, step: ExportStep) -> Path:
        """What says that an export with these options is made."""
        return self.work / f"export-{step.name}-{_key(step)}.json"

    def _recorded(self, step: ExportStep, folder: Path) -> Exported | None:
        """The export that a run before this one made in `folder`."""
        if not self._record(step).exists() or not folder.is_dir():
            return None
        try:
            return read_model(Exported, self._record(step), error=UnfinishedError)
        except UnfinishedError as error:
            self.listener.say(f"exporting to {step.name} again: {error.cause}")
            return None

    def _export(self, step: ExportStep, finished: Path) -> Exported:
        folder = finished / EXPORTS / step.name
        with writing(self.output):
            folder.parent.mkdir(exist_ok=True)
        with told(self.listener, f"exporting to {step.name}", "step") as progress, telling(progress):
            exported = step.config.export(finished, folder, overwrite=True)
        with self._phase(f"{step.name}: speed"):
            exported = self.network.time_export(step.config, exported, folder)
        self.listener.say(f"exported to {step.name}: {exported.checked or size(exported.nbytes)}")
        return exported


def _as_carried_out(step: PassStep, stage: Stage) -> PassStep:
    """A step of the recipe, or what a search has made of it."""
    return step if stage.search is None else PassStep.model_validate({stage.name: stage.options})


def _named(steps: Iterable[PassStep]) -> list[PassStep]:
    """The steps, and behind each one that searches a step of what it searches for."""
    return [each for step in steps for each in (step, *step.candidates[:1])]


def _key(step: ExportStep) -> str:
    """What tells the options of two exports apart."""
    return hashlib.sha256(step.model_dump_json().encode()).hexdigest()[:16]


def _machine(device: torch.device) -> str:
    found = f"{device_name(torch.device('cpu'))}, {count(os.cpu_count() or 1, 'core')}, {platform.system()}"
    return found if device.type == "cpu" else f"{found}, {device_name(device)}"


def _software(steps: Iterable[RecipeStep]) -> dict[str, str]:
    """The versions of what computes, packages that `steps` come from among them."""
    foreign = sorted({step.package for step in steps} - {""})
    names = ("torch", "transformers", "compressed-tensors", "effcli", *foreign)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _runs_dense(config: Pass, stage: Stage) -> tuple[str, ...]:
    """What to know of the speed of a stage whose pass removes single weights, where no kernel leaves them out."""
    timed = stage.latencies or stage.speed
    if Change.MASK not in config.changes or not timed or (stage.speed and "zeros" not in stage.speed.kernel):
        return ()
    return ("it runs dense: no kernel makes its sparse layers faster here",)


def _chosen_by(config: Pass, quality: Figure) -> tuple[str, ...]:
    """What to know of the quality of a stage where a search compared choices by it."""
    if not isinstance(config, SearchPass) or not (config.budget.of_quality or config.exhaustive):
        return ()
    return (f"its values were chosen by the {quality} on the evaluation data: on other data it may be worse",)
