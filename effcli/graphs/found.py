"""A network that is or becomes a graph, or an integer network, before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import RecipeError
from effcli.layers.result import unseen

if TYPE_CHECKING:
    import torch

    from effcli.graphs.verify import GraphVerification
    from effcli.inputs.options import Evaluate
    from effcli.layers.result import Phases
    from effcli.reports.report import Latency, Quality
    from effcli.run.network import Reading, RunNetwork
    from effcli.run.plan import Inspection
    from effcli.run.recipe import Recipe

# Options for networks that read text: of what is read, and of how it is timed.
_OF_TEXT = ("--text", "--choices", "--length", "--limit")
_OF_TOKENS = ("--prefill", "--decode", "--device")


class FoundGraph:
    """See `effcli.run.network.Found`. source: a path, or `package.module:function`."""

    def __init__(self, name: str, source: str | Path) -> None:
        self.name = name
        self.source = source

    def refuse(self, given: Mapping[str, Any]) -> None:
        for flag in _OF_TEXT:
            if given.get(flag):
                raise RecipeError(f"{flag}: {self.name} reads no text", "give labelled images with --images")
        for flag in _OF_TOKENS:
            if given.get(flag) not in (None, "cpu"):
                raise RecipeError(f"{flag}: {self.name} reads no text, and is timed on the CPU", "leave it out")

    def of_run(self, recipe: Recipe) -> RunNetwork:
        from effcli.graphs.network import GraphNetwork

        return GraphNetwork(recipe, self.source)

    def inspect(self, reading: Reading) -> Inspection:
        from effcli.graphs import plan

        return plan.inspect(self.name, self.source, reading.weights, reading.trust_remote_code, reading.shape)

    def evaluate(
        self, options: Evaluate, reading: Reading, reference: str | None = None, phases: Phases = unseen
    ) -> Quality:
        from effcli.graphs import network

        return network.evaluate(
            self.name,
            options,
            reference=reference,
            weights=reading.weights,
            shape=reading.shape,
            preprocess=reading.preprocess,
            trust_remote_code=reading.trust_remote_code,
            phases=phases,
        )

    def time(
        self,
        reading: Reading,
        prefill: int | None,
        decode: int | None,
        threads: int | None,
        device: str | None,
        phases: Phases = unseen,
    ) -> tuple[Latency, ...]:
        from effcli.graphs import timing

        return timing.measure(
            self.name,
            weights=reading.weights,
            shape=reading.shape,
            threads=threads,
            trust_remote_code=reading.trust_remote_code,
            phases=phases,
        )

    def verify(
        self,
        target: str | None = None,
        against: str | None = None,
        trust_remote_code: bool = False,
        phases: Phases = unseen,
    ) -> GraphVerification:
        from effcli.graphs import verify

        return verify.verify(
            Path(self.source), target, against=against, trust_remote_code=trust_remote_code, phases=phases
        )

    def load(self, device: str | torch.device, trust_remote_code: bool, packed: bool) -> Any:
        from effcli.graphs.loading import load

        return load(self.source, device, trust_remote_code)


__all__ = ["FoundGraph"]
