"""BitFit: train the biases of layers alone; their weights stay as they are, dense or compressed (arXiv:2106.10199)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from effcli.layers.contract import AttachPass, Layer, Outcome
from effcli.passes.train._tuning import LanguageTuning


class BitFit(LanguageTuning, AttachPass):
    """A `bitfit` step."""

    takes: ClassVar[str] = "bias"
    remedy: ClassVar[str] = "this network has none there: take lora or finetune"
    trains_weights: ClassVar[bool] = False
    trains_biases: ClassVar[bool] = True

    learning_rate: float = Field(1e-3, gt=0, le=1000, description="The highest one, of AdamW.")

    def attach(self, layer: Layer) -> nn.Module | None:
        return nn.Identity() if layer.has_bias else None

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The weight as it was; the engine keeps the bias."""
        return Outcome(layer.weight)


__all__ = ["BitFit"]
