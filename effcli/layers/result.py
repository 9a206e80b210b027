"""What a pass leaves besides its checkpoint: the ledger, histograms of weights, remarks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from effcli.errors import NumericsError
from effcli.formats import Dense
from effcli.layers.layer import LayerSite
from effcli.reports.report import ActivationRange, Histogram, LedgerRow, Training

WORST_LAYERS = 6

_DAMAGED = "the checkpoint is damaged; download or train it again"

# Called with (done, total): in blocks; of a graph in layers, or in steps where a pass trains.
Progress = Callable[[int, int], None]


class Phases(Protocol):
    """Whom work of several phases tells of each, one after the other."""

    def __call__(self, name: str, unit: str = "step") -> AbstractContextManager[Progress]:
        """A phase that lasts as long as the context. unit: what its progress counts, where it counts anything."""


def unseen(name: str, unit: str = "step") -> AbstractContextManager[Progress]:
    """A phase of which nobody is told."""
    return nullcontext(lambda done, total: None)


Status = Literal["compressed", "changed", "kept", "removed"]

_BINS = 64

_HISTOGRAM_SAMPLE = 1 << 16


@dataclass
class PassResult:
    """What a pass left besides its checkpoint."""

    ledger: list[LedgerRow] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    activations: list[ActivationRange] = field(default_factory=list)
    training: Training | None = None


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `NumericsError` when a weight of `module` that is in memory is NaN or infinite."""
    for own, parameter in module.named_parameters():
        if not parameter.is_meta:
            check_tensor(parameter, f"{name}.{own}" if name else own)


def check_tensor(tensor: Tensor, name: str, remedy: str = _DAMAGED) -> None:
    """Raise `NumericsError` when the tensor called `name` holds NaN or infinity."""
    # A finite sum has finite terms and is much faster than looking at each; the reverse needs that look.
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(f"{name} holds NaN or infinity", remedy)


def worst(result: PassResult) -> list[Histogram]:
    """The histograms of the layers that lost most."""
    error = {row.name: row.output_error if row.output_error is not None else row.weight_error for row in result.ledger}
    ranked = sorted(result.histograms, key=lambda item: -(error.get(item.layer) or 0.0))
    return ranked[:WORST_LAYERS]


def layer_row(site: LayerSite, format: str, nbytes: int, status: Status, **more: Any) -> LedgerRow:
    """The ledger's line for a layer that takes `nbytes` on disk; more: any other field of the line."""
    return LedgerRow(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        format=format,
        bits_per_weight=8 * nbytes / max(site.rows * site.columns, 1),
        nbytes=nbytes,
        status=status,
        **more,
    )


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 of nothing."""
    return part / whole if whole > 0 else 0.0


# Why what is no layer is kept.
MATRIX = "an embedding or a matrix that is not a linear layer"
CARRIED = "no parameter of the network: carried over as it is"


def dense_row(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> LedgerRow:
    """The ledger's line for a matrix that stands in the file as floating-point numbers."""
    return LedgerRow(
        name=name,
        kind=kind,
        shape=shape,
        format=str(Dense(dtype)),
        bits_per_weight=8 * dtype.itemsize,
        nbytes=torch.Size(shape).numel() * dtype.itemsize,
        status="kept",
        reason=reason,
    )


def histogram(name: str, before: Tensor, after: Tensor) -> Histogram:
    """Counts of weights before and after, over the same bins; a large layer is sampled evenly."""
    step = max(1, before.numel() // _HISTOGRAM_SAMPLE)
    first, second = before.reshape(-1)[::step].float(), after.reshape(-1)[::step].float()
    low = float(torch.minimum(first.min(), second.min()))
    high = float(torch.maximum(first.max(), second.max()))
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, _BINS + 1)
    counts = [torch.histc(values, _BINS, low, high).long().tolist() for values in (first, second)]
    return Histogram(layer=name, edges=tuple(edges.tolist()), before=tuple(counts[0]), after=tuple(counts[1]))
