"""Operators with weights as the modules of a graph.

Every module has tensors of its own, as passes change them in place and the network may share or view its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d}
_BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """weight (out, in), bias (out,)."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _filled(module, weight=weight, bias=bias)


def convolution(
    weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> nn.Module:
    """weight (out, in / groups, *kernel), bias (out,); stride, padding and dilation have one entry per kernel axis."""
    inputs, outputs = weight.shape[1] * groups, weight.shape[0]
    kernel = tuple(weight.shape[2:])
    options: dict[str, Any] = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
    kind = _CONVOLUTIONS[weight.dim()]
    module = kind(inputs, outputs, kernel, groups=groups, bias=bias is not None, device="meta", **options)
    return _filled(module, weight=weight, bias=bias)


def batch_norm(
    axes: int, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> nn.Module:
    """Of inputs with so many axes; all tensors (channels,)."""
    affine = weight is not None or bias is not None
    module = _BATCH_NORMS[axes](len(mean), eps, affine=affine, device="meta")
    scale, shift = (_or_full(value, mean, fill) if affine else None for value, fill in ((weight, 1.0), (bias, 0.0)))
    count = torch.zeros((), dtype=torch.long)
    return _filled(module, weight=scale, bias=shift, running_mean=mean, running_var=variance, num_batches_tracked=count)


def layer_norm(weight: Tensor, bias: Tensor | None, eps: float) -> nn.Module:
    """weight and bias of the shape that is normalised."""
    module = nn.LayerNorm(tuple(weight.shape), eps, bias=bias is not None, device="meta")
    return _filled(module, weight=weight, bias=bias)


def group_norm(groups: int, weight: Tensor, bias: Tensor | None, eps: float) -> nn.Module:
    """weight and bias (channels,)."""
    module = nn.GroupNorm(groups, len(weight), eps, device="meta")
    return _filled(module, weight=weight, bias=_or_full(bias, weight, 0.0))


def embedding(weight: Tensor) -> nn.Module:
    """weight (entries, width)."""
    return _filled(nn.Embedding(weight.shape[0], weight.shape[1], device="meta"), weight=weight)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules agree in type, options and tensors."""
    first, second = one.state_dict(), other.state_dict()
    return repr(one) == repr(other) and all(torch.equal(first[key], second[key]) for key in first)


def _or_full(value: Tensor | None, like: Tensor, fill: float) -> Tensor:
    return torch.full_like(like, fill) if value is None else value


def _filled(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, value in tensors.items():
        if value is not None:
            own = value.clone(memory_format=torch.contiguous_format)
            setattr(module, name, own if name in module._buffers else nn.Parameter(own, requires_grad=False))
    return module.eval()
