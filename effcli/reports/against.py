"""What became of a checkpoint's input: its tensors, and how far its outputs moved."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from effcli.options import Options
from effcli.reports.report import Check
from effcli.reports.units import count, percent


class Moved(Options):
    """How far the outputs of two networks lie apart on the same inputs."""

    outputs: str = Field(default="logits", description="what the outputs are")
    inputs: str = Field(description="what the inputs were, e.g. 'random tokens'")
    relative: float = Field(description="‖a - b‖ / ‖b‖ over all of them, b those of the input")
    top1: float | None = Field(default=None, description="share of the same largest ones, 0 to 1; None without classes")

    @staticmethod
    def of(after: Tensor, before: Tensor, inputs: str, outputs: str = "logits", classes: bool = True) -> Moved:
        """after, before: floating (..., classes), or of any shape where there are no classes."""
        agree = (after.argmax(-1) == before.argmax(-1)).float()
        return Moved(
            outputs=outputs,
            inputs=inputs,
            relative=float((after - before).norm() / before.norm().clamp(min=1e-30)),
            top1=float(agree.mean()) if classes else None,
        )

    def __str__(self) -> str:
        kept = "" if self.top1 is None else f"; the largest one is the same in {self.top1:.1%}"
        return f"the passes changed the {self.outputs} by {percent(self.relative)} on {self.inputs}{kept}"


class Against(Options):
    """What became of the tensors of the input. Counts are of parameters and of tensors that no parameter is made of."""

    input: str
    network: str = Field(default="", description="the class of transformers that both were built as")
    equal: int = Field(default=0, description="carried over bit for bit")
    compressed: int = 0
    changed: int = Field(default=0, description="dense, of other values, as a pass that scales or rounds leaves them")
    problem: str = Field(default="", description="what was lost, added or altered")
    moved: Moved | None = Field(default=None, description="the loss by compression")

    @property
    def check(self) -> Check:
        """Whether the tensors are those of the input, or what the passes made of them."""
        if self.problem:
            return Check(text=f"against its input: {self.problem}", passed=False)
        told = [f"both built as {self.network}"] if self.network else []
        told += [] if self.moved is None else [f"{self.moved} (perplexity or accuracy tell what that costs)"]
        counts = self._counts()
        if counts:
            return Check(text=f"against its input: {counts}", passed=True, numbers="; ".join(told))
        text = "against its input: tensors cannot be compared"
        if self.moved is not None:
            text = f"against its input: outputs differ by {percent(self.moved.relative)} (tensors cannot be compared)"
        return Check(text=text, numbers="; ".join(told))

    def _counts(self) -> str:
        """What became of how many tensors; empty where none has a counterpart."""
        counts = {"compressed": self.compressed, "changed by the passes": self.changed, "equal": self.equal}
        found = [(number, what) for what, number in counts.items() if number]
        parts = [f"{count(number, 'tensor')} {what}" for number, what in found[:1]]
        return ", ".join([*parts, *(f"{number:,} {what}" for number, what in found[1:])])

    def __str__(self) -> str:
        if self.problem:
            return f"against its input: {self.problem}"
        built = f", as {self.network}" if self.network else ""
        counts = self._counts()
        # Of an integer network no tensor is that of its input.
        told = [counts] if counts else []
        told += [] if self.moved is None else [str(self.moved)]
        return f"against its input{built}: {'; '.join(told)}"


__all__ = ["Against", "Moved"]
