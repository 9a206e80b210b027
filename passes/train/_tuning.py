"""What passes share that train the weights of layers: what is learned, and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from effcli.layers.contract import Needs, Step, TrainPass
from effcli.training.losses import response


class Tuning(TrainPass):
    """Options that say what weights and biases are trained towards."""

    rare: ClassVar[tuple[str, ...]] = (
        *(
            "distance",
            "schedule",
            "warmup",
            "accumulation",
            "clip",
            "shuffle",
            "seed",
            "precision",
            "track",
            "track_folder",
        ),
    )
    takes: ClassVar[str] = "floating weight"
    remedy: ClassVar[str] = "put it before the step that compresses the weights"
    trains_biases: ClassVar[bool] = True
    takes_language: ClassVar[bool] = True
    graph_defaults: ClassVar[Mapping[str, Any]] = {"distance": "mse"}

    towards: Literal["labels", "original"] = Field(
        "labels",
        description="What is learned: the labels of the calibration inputs, which of text are the next tokens "
        "(cross-entropy), or the outputs of the original network, which needs no labels.",
    )
    distance: Literal["kl", "mse"] = Field(
        "kl",
        description="From the outputs of the original network: KL(original || network) of classes or tokens "
        "(arXiv:1503.02531), or their mean squared distance (arXiv:1312.6184).",
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Share of every weight that goes in a step at a learning rate of 1 (AdamW)."
    )

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | (Needs.LABELS if self.towards == "labels" else Needs.ORIGINAL)

    def loss(self, step: Step) -> Tensor:
        """The cross-entropy of the labels, or the distance of the outputs from those of the original."""
        if step.labels is not None:
            return F.cross_entropy(step.outputs, step.labels)
        assert step.original is not None
        if self.distance == "kl":
            return response(step.outputs, step.original)
        return F.mse_loss(step.outputs, step.original)

    def optimizer(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> Optimizer:
        """AdamW (arXiv:1711.05101); biases do not decay."""
        every = [own for layer in parameters.values() for own in layer]
        groups: list[dict[str, Any]] = [
            {"params": [own], "weight_decay": self.weight_decay if own.ndim > 1 else 0.0} for own in every
        ]
        return AdamW(groups, lr=self.learning_rate)
