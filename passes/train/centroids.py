"""Fine-tuning of shared weights: train the tables of `kmeans` layers, codes fixed (arXiv:1510.00149, section 3.3).

The gradient of an entry is the sum of the gradients of the weights that share it. What is minimised is the squared
difference between the outputs of this network and those of the network before its weights were compressed, on the
calibration inputs: it takes no labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from effcli.formats import CodebookWeight
from effcli.layers.contract import AttachPass, Layer, Needs, Outcome, Step
from effcli.passes.quantize._tables import ascending


class Centroids(AttachPass):
    """A `centroids` step."""

    rare: ClassVar[tuple[str, ...]] = (
        *("schedule", "warmup", "accumulation", "clip", "shuffle", "seed", "keep_best", "precision"),
    )

    takes: ClassVar[str] = "table of shared weights"
    remedy: ClassVar[str] = "put it after a `kmeans` step"
    trains_weights: ClassVar[bool] = False
    measured: ClassVar[str] = "error of the outputs on the calibration inputs"

    epochs: int = Field(5, ge=1, description="Times that all calibration inputs are seen; the best one's tables stay.")
    learning_rate: float = Field(
        3e-3,
        gt=0,
        le=1000,
        description="Of Adam (arXiv:1412.6980), as a share of the mean magnitude of a layer's weights.",
    )
    shuffle: bool = Field(False, description="Take the inputs in another order in each epoch.")

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.DENSE

    def attach(self, layer: Layer) -> nn.Module | None:
        """The table of a layer, to be trained; None of a layer that has none."""
        weight = layer.stored
        learned = isinstance(weight, CodebookWeight) and weight.format.learned and weight.codes.numel()
        return _Table(weight) if isinstance(weight, CodebookWeight) and learned else None

    def loss(self, step: Step) -> Tensor:
        """Σ (y - ŷ)² over the mean Σ y² of a batch."""
        assert step.dense is not None
        return (step.outputs - step.dense).square().sum() / max(step.scale, 1e-30)

    def measure(self, step: Step) -> tuple[float, float]:
        """Σ (y - ŷ)² and Σ y²."""
        assert step.dense is not None
        difference = (step.outputs - step.dense).square().sum(dtype=torch.float64)
        return float(difference), float(step.dense.square().sum(dtype=torch.float64))

    def optimizer(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> Optimizer:
        """Adam, with steps in units of the mean magnitude of a table, and no floor under small gradients."""
        tables = [table for layer in parameters.values() for table in layer]
        groups = [
            {"params": [table], "lr": self.learning_rate * float(table.detach().abs().mean())} for table in tables
        ]
        return Adam(groups, eps=torch.finfo(torch.float32).tiny)

    def finish(self, layer: Layer, trained: nn.Module) -> Outcome:
        """The layer with its new table, and how far it has moved."""
        weight = layer.stored
        assert isinstance(weight, CodebookWeight) and isinstance(trained, _Table)
        entries = trained.entries.detach()
        moved = float((entries - weight.table.float()).norm() / weight.table.float().norm())
        table, codes = ascending(entries.to(weight.table.dtype), weight.codes)
        return Outcome(dataclasses.replace(weight, table=table, codes=codes), {"moved": round(moved, 6)})


class _Table(nn.Module):
    """A weight (out, in) as a function of its table. entries: float32 (tables, entries)."""

    index: Tensor
    free: Tensor
    scale: Tensor | None

    def __init__(self, weight: CodebookWeight) -> None:
        super().__init__()
        entries = weight.table.float()
        scale = weight.input_scale
        self.entries = nn.Parameter(entries.clone())
        self.register_buffer("index", weight.codes.reshape(len(entries), -1).long(), persistent=False)
        # An entry at 0 is that of pruned weights.
        self.register_buffer("free", entries != 0, persistent=False)
        self.register_buffer("scale", None if scale is None else scale.float(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        entries = torch.where(self.free, self.entries, 0)
        dense = entries.gather(1, self.index).view_as(weight)
        return dense if self.scale is None else dense / self.scale


__all__ = ["Centroids"]
