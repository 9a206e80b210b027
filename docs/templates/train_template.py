"""Plain fine-tuning: towards the labels of the inputs, or what the original network returns (arXiv:1503.02531)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from effcli.layers.contract import AttachPass, Layer, Needs, Outcome, Step


class FineTune(AttachPass):
    """Train all floating weights towards the labels, or the outputs of the original network (arXiv:1503.02531)."""

    takes: ClassVar[str] = "floating weight"
    remedy: ClassVar[str] = "put it before the step that compresses the weights"

    labels: bool = Field(True, description="Learn from labels; without, from the outputs of the original network.")

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | (Needs.LABELS if self.labels else Needs.ORIGINAL)

    def attach(self, layer: Layer) -> nn.Module | None:
        """A floating weight is trained as it is; a compressed one stays, for it would come out dense."""
        return nn.Identity() if layer.stored is None else None

    def loss(self, step: Step) -> Tensor:
        """The cross-entropy of the labels, or the mean squared distance between the outputs."""
        if step.labels is not None:
            return F.cross_entropy(step.outputs, step.labels)
        assert step.original is not None
        return F.mse_loss(step.outputs, step.original)

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The trained weight, dense."""
        return Outcome(layer.weight)
