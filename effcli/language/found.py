"""A causal language model that was found, before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import RecipeError, UnsupportedError, naming
from effcli.files import locate as samples
from effcli.layers.result import unseen

if TYPE_CHECKING:
    import torch

    from effcli.inputs.options import Evaluate
    from effcli.language.verify import Verification
    from effcli.layers.result import Phases
    from effcli.reports.report import Quality, Speed
    from effcli.run.network import Reading, RunNetwork
    from effcli.run.plan import Inspection
    from effcli.run.recipe import Recipe

# Options for networks that read no text.
_FOREIGN = ("--images", "--weights", "--set")


class FoundLanguageModel:
    """See `effcli.run.network.Found`."""

    def __init__(self, name: str, source: Path) -> None:
        self.name = name
        self.source = source

    def refuse(self, given: Mapping[str, Any]) -> None:
        for flag in _FOREIGN:
            if given.get(flag):
                raise RecipeError(f"{flag}: {self.name} is a language model", "leave it out")

    def of_run(self, recipe: Recipe) -> RunNetwork:
        from effcli.language.model import LanguageModel

        return LanguageModel(recipe, self.source)

    def inspect(self, reading: Reading) -> Inspection:
        from effcli.language import plan

        return plan.inspect(self.name, self.source, reading.trust_remote_code)

    def evaluate(
        self, options: Evaluate, reading: Reading, reference: str | None = None, phases: Phases = unseen
    ) -> Quality:
        from effcli.language import evaluate

        return evaluate.evaluate(
            self.name, options, reference=reference, trust_remote_code=reading.trust_remote_code, phases=phases
        )

    def time(
        self,
        reading: Reading,
        prefill: int | None,
        decode: int | None,
        threads: int | None,
        device: str | None,
        phases: Phases = unseen,
    ) -> Speed:
        from effcli.language import latency

        return latency.measure(
            self.name,
            prefill=prefill,
            decode=decode,
            threads=threads,
            device=device or "cpu",
            trust_remote_code=reading.trust_remote_code,
            phases=phases,
        )

    def verify(
        self,
        target: str | None = None,
        against: str | None = None,
        trust_remote_code: bool = False,
        phases: Phases = unseen,
    ) -> Verification:
        from effcli.language import verify
        from effcli.language.weights import open_weights

        if target is not None:
            raise UnsupportedError(
                f"{self.source} holds no integer network, which C is made from",
                "verify it without --target, or let `int8` be the last pass",
            )
        if against is not None:
            with naming(f"--against {against}"):
                open_weights(samples.resolve(against), trust_remote_code)
        return verify.verify(self.source, against=against, trust_remote_code=trust_remote_code, phases=phases)

    def load(self, device: str | torch.device, trust_remote_code: bool, packed: bool) -> Any:
        from effcli.language.loading import load

        return load(self.source, device=device, trust_remote_code=trust_remote_code, packed=packed)


__all__ = ["FoundLanguageModel"]
