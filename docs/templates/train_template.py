"""Plain fine-tuning: towards the labels of the inputs, or what the original network returns (arXiv:1503.02531)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from effcli.layers.contract import Layer, Needs, Outcome, Step, TrainPass


class FineTune(TrainPass):
    """Train all weights towards the labels, or the outputs of the original network (arXiv:1503.02531)."""

    labels: bool = Field(True, description="Learn from labels; without, from the outputs of the original network.")

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | (Needs.LABELS if self.labels else Needs.ORIGINAL)

    def attach(self, layer: Layer) -> nn.Module | None:
        """Every weight is trained as it is."""
        return nn.Identity()

    def loss(self, step: Step) -> Tensor:
        """The cross-entropy of the labels, or the mean squared distance between the outputs."""
        if step.labels is not None:
            return F.cross_entropy(step.outputs, step.labels)
        assert step.original is not None
        return F.mse_loss(step.outputs, step.original)

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The trained weight, dense."""
        return Outcome(layer.weight)
