"""What became of a checkpoint's input: its tensors, and how far its outputs moved."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from effcli.options import Options
from effcli.reports.report import Check
from effcli.reports.units import count


class Moved(Options):
    """How far the outputs of two networks lie apart on the same inputs."""

    outputs: str = Field(default="logits", description="what the outputs are")
    relative: float = Field(description="‖a - b‖ / ‖b‖ over all of them, b those of the input")
    top1: float | None = Field(default=None, description="share of the same largest ones, 0 to 1; None without classes")

    @staticmethod
    def of(after: Tensor, before: Tensor, outputs: str = "logits", classes: bool = True) -> Moved:
        """after, before: floating (..., classes), or of any shape where there are no classes."""
        agree = (after.argmax(-1) == before.argmax(-1)).float()
        return Moved(
            outputs=outputs,
            relative=float((after - before).norm() / before.norm().clamp(min=1e-30)),
            top1=float(agree.mean()) if classes else None,
        )

    def __str__(self) -> str:
        alike = "" if self.top1 is None else f", top-1 {self.top1:.1%}"
        return f"its {self.outputs} moved by {self.relative:.1e} relative{alike}"


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
        numbers = "" if self.moved is None else f"compression: {self.moved}"
        counted = self.equal or self.compressed or self.changed
        if not counted:
            return Check(text="against its input: only outputs can be compared", numbers=numbers)
        parts = [f"{count(self.equal, 'tensor')} equal bit for bit"]
        parts += [f"{self.compressed:,} compressed"] * bool(self.compressed)
        parts += [f"{self.changed:,} changed by the passes"] * bool(self.changed)
        built = f", as {self.network}" if self.network else ""
        return Check(text=f"against its input{built}: {', '.join(parts)}", passed=True, numbers=numbers)

    def __str__(self) -> str:
        if self.problem:
            return f"against its input: {self.problem}"
        counts = [(self.equal, "tensors equal bit for bit"), (self.compressed, "compressed"), (self.changed, "changed")]
        parts = [f"{number} {what}" for number, what in counts if number or what != "changed"]
        built = f", as {self.network}" if self.network else ""
        # Of an integer network no tensor is that of its input.
        told = [", ".join(parts)] if self.equal or self.compressed or self.changed else []
        told += [] if self.moved is None else [str(self.moved)]
        return f"against its input{built}: {'; '.join(told)}"


__all__ = ["Against", "Moved"]
