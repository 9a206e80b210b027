"""Fine-tuning: train the weights that are left, towards the labels or what the original network returns.

Of a language model the labels are the next tokens.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from effcli.layers.contract import AttachPass, Layer, Outcome
from effcli.passes.train._tuning import LanguageTuning


class FineTune(LanguageTuning, AttachPass):
    """A `finetune` step. Removed weights stay removed, and compressed layers as they are."""

    takes: ClassVar[str] = "floating weight"
    remedy: ClassVar[str] = "put it before the step that compresses the weights"
    trains_biases: ClassVar[bool] = True
    rare: ClassVar[tuple[str, ...]] = (*LanguageTuning.rare, "force")

    force: bool = Field(False, description="Take `fast_forward` although all weights are trained.")

    @model_validator(mode="after")
    def _few_are_trained(self) -> Self:
        if self.fast_forward is not None and not self.force:
            raise ValueError(
                "fast_forward gains nothing where whole weights are trained (arXiv:2409.04206): take a pass "
                "that trains an adapter, or set force"
            )
        return self

    def attach(self, layer: Layer) -> nn.Module | None:
        """A floating weight is trained as it is; a compressed one stays, for it would come out dense."""
        return nn.Identity() if layer.stored is None else None

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The trained weight, dense or under the mask that it had."""
        return Outcome(layer.weight)


__all__ = ["FineTune"]
