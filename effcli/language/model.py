"""A causal language model on its way through a run: result block by block, measured on text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effcli.errors import DataError, UnsupportedError
from effcli.files import digest
from effcli.files.checkpoint import read_config, weight_files
from effcli.files.exporter import Exporter
from effcli.files.layout import is_own, network_config
from effcli.inputs import text
from effcli.inputs.text import Windows
from effcli.inputs.tokens import longest_sequence
from effcli.language import latency, miniature, verify
from effcli.language.adapting import train_adapter
from effcli.language.beside import beside
from effcli.language.cutting import cut_model
from effcli.language.editing import edit_model, takes_adapter
from effcli.language.evaluate import Evaluation
from effcli.language.plan import PlannedModel
from effcli.language.sensitivity import PricedLanguageModel
from effcli.language.sweep import sweep
from effcli.language.training import train_language, train_weights
from effcli.language.verify import Verification
from effcli.language.weights import open_weights
from effcli.layers.contract import AdapterPass, CutPass, ParameterPass, TrainPass
from effcli.layers.result import PassResult, Phases, Progress, unseen
from effcli.platform.huggingface import language_loader, load_network_config
from effcli.platform.machine import pick_device
from effcli.reports import card
from effcli.reports.report import Continuation, Exported, Layout, Stage
from effcli.reports.sensitivity import Varied
from effcli.run.network import Counts, Measured
from effcli.run.plan import Plan, make
from effcli.run.recipe import PassStep, Recipe
from effcli.search.budget import Figure, Quantity
from effcli.search.space import unchanging

# What prepares images or sound beside the text.
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
# Why no choice can keep a budget.
_UNLIMITED: dict[Quantity, str] = {
    "accuracy_drop": "perplexity is measured, not accuracy",
    "ram": "no C code is made of a language model",
    "flash": "no C code is made of a language model",
}


class LanguageModel:
    """See `effcli.run.network.RunNetwork`."""

    quality: Figure = "perplexity"

    def __init__(self, recipe: Recipe, source: Path) -> None:
        self.recipe = recipe.for_language()
        self.source = source
        self._device = pick_device(self.recipe.device)
        self._windows: Windows | None = None
        self._evaluation: Evaluation | None = None

    @property
    def base(self) -> Path:
        return self.source

    @property
    def request(self) -> dict[str, str]:
        found = digest.of_folder(self.source)
        elsewhere = (f for f in weight_files(self.source) if f.parent != self.source or f.name not in found)
        return found | {str(file): digest.of_file(file) for file in elsewhere}

    @property
    def settings(self) -> dict[str, Any]:
        longest = self._longest()
        found = self.recipe.model_dump(mode="json")
        for name, options in (("calibration", self.recipe.calibration), ("evaluate", self.recipe.evaluate)):
            found[name]["length"] = text.window_length(options, longest)
        found["evaluate"]["prefill"], found["evaluate"]["decode"] = self._timed(longest)
        return found

    def _longest(self) -> int | None:
        own = network_config(read_config(self.source))
        return longest_sequence(load_network_config(self.source, own, self.recipe.trust_remote_code))

    def _timed(self, longest: int | None) -> tuple[int, int]:
        """Tokens of the prompt and tokens decoded whose time is taken."""
        wanted = self.recipe.evaluate
        given = wanted.model_fields_set
        prefill, decode = wanted.prefill if "prefill" in given else None, wanted.decode if "decode" in given else None
        return latency.lengths(prefill, decode, longest)

    def with_defaults(self, step: PassStep) -> PassStep:
        return step

    def plan(self, passes: Sequence[PassStep] | None = None) -> Plan:
        recipe = self.recipe if passes is None else self.recipe.model_copy(update={"passes": tuple(passes)})
        weights = open_weights(self.source, recipe.trust_remote_code, base=takes_adapter(recipe.passes[0]))
        return make(recipe, PlannedModel(weights, recipe.calibration))

    def miniature(self, target: Path) -> tuple[str, dict[str, float]]:
        return str(target), miniature.write(self.source, target, self.recipe.trust_remote_code)

    def unlimited(self, quantity: Quantity, option: Varied) -> str:
        if quantity == "macs" and option != "ratio":
            return f"{unchanging(option)} how many multiplications a network takes"
        return _UNLIMITED.get(quantity, "")

    def calibrate(self) -> tuple[str, ...]:
        if not any(step.needs for step in self.recipe.passes):
            return ()
        steps = [step.config for step in self.recipe.passes]
        self._windows, remarks = text.calibration_windows(
            self.recipe.calibration,
            self.source,
            self.recipe.trust_remote_code,
            answers=any(isinstance(step, TrainPass) and step.learns_answers for step in steps),
        )
        return tuple(remarks)

    def priced(self, checkpoint: Path) -> PricedLanguageModel:
        trust = self.recipe.trust_remote_code
        windows, remarks = text.calibration_windows(self.recipe.calibration, checkpoint, trust)
        return PricedLanguageModel(checkpoint, windows, tuple(remarks), trust)

    def open(self, work: Path) -> None:
        if self.recipe.evaluate.quality:
            self._evaluation = Evaluation(
                self.source,
                self.recipe.evaluate,
                work,
                calibration=self.recipe.calibration,
                trust_remote_code=self.recipe.trust_remote_code,
                device=self._device,
            )

    def count(self, checkpoint: Path) -> Counts:
        weights = open_weights(checkpoint, self.recipe.trust_remote_code, base=True)
        sites = weights.skeleton.sites()
        routed = any(site.kind == "expert" for site in sites)
        macs = None if routed else sum(site.rows * site.columns for site in sites)
        return Counts(weights.skeleton.weights(), weights.nonzeros(), macs)

    def measure(
        self, checkpoint: Path, first: bool, *, quality: bool = True, speed: bool = True, phases: Phases = unseen
    ) -> Measured:
        wanted, evaluation = self.recipe.evaluate, self._evaluation
        known = timed = None
        if quality and evaluation is not None:
            with phases(evaluation.measured) as progress:
                known = evaluation.measure(checkpoint, progress)
        written: list[Continuation] = []

        def write(network: Any) -> None:
            if known is not None and evaluation is not None:
                with phases("texts"):
                    written.extend(evaluation.continuations(network))

        remarks = tuple(evaluation.remarks) if evaluation is not None and first else ()
        if speed and wanted.latency:
            prefill, decode = self._timed(self._longest())
            try:
                timed = latency.measure(
                    str(checkpoint),
                    prefill=prefill,
                    decode=decode,
                    threads=self.recipe.threads,
                    device=self.recipe.device,
                    trust_remote_code=self.recipe.trust_remote_code,
                    phases=phases,
                    # The network is in memory: it need not be loaded twice.
                    afterwards=write,
                )
            except UnsupportedError as error:
                remarks += (f"its speed was not measured: {error.cause}",) if first else ()
        return Measured(known, timed, continuations=tuple(written), remarks=remarks)

    def footprint(self, checkpoint: Path) -> None:
        return None

    def sweep(
        self, step: PassStep, source: Path, target: Path, reference: Path, work: Path, progress: Progress
    ) -> PassResult:
        windows = self._windows if step.needs else None
        if isinstance(step.config, CutPass):
            trust = self.recipe.trust_remote_code
            return cut_model(source, target, step, windows, work, progress, trust, self._device)
        if isinstance(step.config, ParameterPass):
            return self._edit(step, source, target, work, progress)
        if isinstance(step.config, TrainPass):
            return train_language(
                train_adapter if isinstance(step.config, AdapterPass) else train_weights,
                source,
                target,
                step,
                windows,
                batch_size=self.recipe.calibration.batch_size,
                original=self.source,
                work=work,
                seed=self.recipe.seed,
                device=self.recipe.device,
                trust_remote_code=self.recipe.trust_remote_code,
                progress=progress,
            )
        return sweep(source, target, step, windows, work, progress, self.recipe.trust_remote_code, self._device)

    def _edit(self, step: PassStep, source: Path, target: Path, work: Path, progress: Progress) -> PassResult:
        """Carry out a pass over parameters, and the check that it asks for."""
        assert isinstance(step.config, ParameterPass)
        checks = step.config.checks
        trust, evaluation = self.recipe.trust_remote_code, self._evaluation
        if checks and (evaluation is None or not evaluation.reads_text):
            raise DataError(
                f"{step.name}: no text is evaluated, and check compares on that text", "leave check out, or name a text"
            )
        result = edit_model(source, target, step, work, progress, trust)
        if checks and evaluation is not None:
            before, after = evaluation.beside(beside(source, step, trust, self._device), target)
            result.remarks.append(
                f"checked: perplexity {before.perplexity:.4f} with the adapter beside the base, in float32, and "
                f"{after.perplexity:.4f} as written; KL {after.kl:.2g} nats for each token"
            )
        return result

    def verify(self, checkpoint: Path, stages: Sequence[Stage], phases: Phases = unseen) -> Verification:
        trust = self.recipe.trust_remote_code
        return verify.verify(checkpoint, against=self.source, stages=stages, trust_remote_code=trust, phases=phases)

    def time_export(self, exporter: Exporter, exported: Exported, folder: Path) -> Exported:
        wanted = self.recipe.evaluate
        if not wanted.latency:
            return exported
        speed = exporter.speed(folder, *self._timed(self._longest()), self.recipe.threads)
        return exported.model_copy(update={"speed": speed})

    def layout(self, checkpoint: Path) -> Layout:
        return "effcli" if is_own(read_config(checkpoint)) else "standard"

    def loaders(self, checkpoint: Path) -> tuple[str, str]:
        config = network_config(read_config(checkpoint))
        loader: type = language_loader(load_network_config(checkpoint, config, self.recipe.trust_remote_code))
        model, companion = loader.__name__, card.LANGUAGE[1]
        if model != card.LANGUAGE[0] and any((checkpoint / name).is_file() for name in _PROCESSORS):
            companion = "AutoProcessor"
        return model, companion
