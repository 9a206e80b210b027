"""Inputs whose channels depend on each other, the Gram matrix of inputs, and random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from effcli.layers.statistics import Needs, Statistics


def related(tokens: int, columns: int, seed: int, loudness: float = 1.0) -> Tensor:
    """Channels that depend on each other and differ in magnitude, float32 (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, max(columns // 3, 1), generator=generator)
    mixed = mixed @ torch.randn(mixed.shape[1], columns, generator=generator)
    mixed += 0.3 * torch.randn(tokens, columns, generator=generator)
    return mixed * (torch.randn(columns, generator=generator) * loudness).exp()


def seen(inputs: Tensor) -> Statistics:
    gram = Statistics(inputs.shape[-1], Needs.GRAM)
    gram.add(inputs)
    return gram


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
