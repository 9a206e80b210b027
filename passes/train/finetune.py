"""Fine-tuning: train the weights that are left, towards the labels or what the original network returns.

Of a language model the labels are the next tokens.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from effcli.layers.contract import AttachPass, Layer, Outcome
from effcli.passes.train._tuning import LanguageTuning


class FineTune(LanguageTuning, AttachPass):
    """A `finetune` step. Removed weights stay removed, and compressed layers as they are."""

    takes: ClassVar[str] = "floating weight"
    remedy: ClassVar[str] = "put it before the step that compresses the weights"
    trains_biases: ClassVar[bool] = True

    def attach(self, layer: Layer) -> nn.Module | None:
        """A floating weight is trained as it is; a compressed one stays, for it would come out dense."""
        return nn.Identity() if layer.stored is None else None

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The trained weight, dense or under the mask that it had."""
        return Outcome(layer.weight)


__all__ = ["FineTune"]
