"""What passes share that train the weights of layers: what is learned, and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from effcli.errors import RecipeError, UnsupportedError
from effcli.layers.contract import Needs, Step, TrainPass
from effcli.platform.installed import require
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
    # Options that a layer may have of its own.
    per_layer: ClassVar[frozenset[str]] = frozenset()
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

    @model_validator(mode="after")
    def _trained_together(self) -> Self:
        own = sorted({key for options in self.layers.values() for key in options} - self.per_layer)
        if own:
            raise ValueError(f"layers are trained together: {', '.join(own)} is one for all")
        return self

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | (Needs.LABELS if self.towards == "labels" else Needs.ORIGINAL)

    def loss(self, step: Step) -> Tensor:
        """The cross-entropy of the labels, or the distance of the outputs from those of the original."""
        if step.labels is not None:
            return F.cross_entropy(step.outputs, step.labels)
        assert step.original is not None
        if self.distance == "kl":
            if step.outputs.ndim != 2 or step.outputs.shape[1] < 2:
                shape = tuple(step.outputs.shape[1:])
                raise UnsupportedError(
                    f"distance=kl is of classes, and an input's output has the shape {shape}", "set distance=mse"
                )
            return response(step.outputs, step.original)
        return F.mse_loss(step.outputs, step.original)

    def optimizer(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> Optimizer:
        """AdamW (arXiv:1711.05101); biases do not decay."""
        every = [own for layer in parameters.values() for own in layer]
        groups: list[dict[str, Any]] = [
            {"params": [own], "weight_decay": self.weight_decay if own.ndim > 1 else 0.0} for own in every
        ]
        return self._adamw(groups)

    def _adamw(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        """The optimizer of groups of parameters."""
        return AdamW(groups, lr=self.learning_rate)


class LanguageTuning(Tuning):
    """What is learned of a text besides."""

    takes_language: ClassVar[bool] = True
    rare: ClassVar[tuple[str, ...]] = (*Tuning.rare, "learned", "checkpointing", "moments", "fast_forward")

    learned: Literal["answers", "all"] = Field(
        "answers",
        description="Of documents with prompts or messages: what is learned are the completions and what the assistant "
        "says, or all tokens. Of plain texts all tokens are.",
    )

    checkpointing: bool = Field(
        False,
        description="Keep the states between the blocks alone, and compute each block once more on the way back: less "
        "memory, about a third more time.",
    )
    moments: Literal["float32", "int8"] = Field(
        "float32",
        description="Of the optimizer's two moments; int8 takes a quarter of their memory, by the package bitsandbytes "
        "(arXiv:2110.02861).",
    )

    fast_forward: int | None = Field(
        None,
        ge=1,
        description="Steps between two line searches: the last step is taken again as long as that lowers the error of "
        "up to 32 inputs that are held out (Fast Forward, arXiv:2409.04206).",
    )

    @model_validator(mode="after")
    def _searches_on_what_is_held_out(self) -> Self:
        if self.fast_forward is not None and not self.hold_out:
            raise ValueError("fast_forward looks at inputs that are held out: set hold_out, such as hold_out=10%")
        return self

    @property
    def fast_forwards(self) -> int:
        return self.fast_forward or 0

    @property
    def learns_answers(self) -> bool:
        return self.learned == "answers"

    @property
    def recomputes(self) -> bool:
        return self.checkpointing

    @property
    def moment_bytes(self) -> float:
        return 2.0 if self.moments == "int8" else super().moment_bytes

    def require(self) -> None:
        super().require()
        if self.moments == "int8":
            require("bitsandbytes", "train")

    def for_graph(self) -> Self:
        given = sorted({"learned", "checkpointing", "moments", "fast_forward"} & self.model_fields_set)
        if given:
            raise RecipeError(f"`{given[0]}` is of language models, and this network is none", "leave it out")
        return super().for_graph()

    def _adamw(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        if self.moments == "float32":
            return super()._adamw(groups)
        optim: Any = import_module("bitsandbytes.optim")
        made: Optimizer = optim.AdamW8bit(groups, lr=self.learning_rate)
        return made
