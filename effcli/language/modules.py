"""Modules that stand in for dense ones and multiply with the packed weight: `QuantizedLinear` and `QuantizedExperts`.

Both take a weight in any format and hold it in the form that the kernel of their device reads and nothing dense: codes
in few bits, and scales that are quantized themselves stay so. Moved to another device they are laid out anew. Their
`state_dict()` is empty: what stands in a file is written by the checkpoint writer from `Quantized.pack()`, and the
layouts of one machine are no business of another. Nothing in them is trainable; gradients flow through them to their
input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcli.formats import Quantized
from effcli.kernels.quantized_matmul import Packed, matmul, prepare, route_name


class QuantizedLinear(nn.Module):
    """y = Ŵ (x / s) + b in place of `nn.Linear` or transformers' `Conv1D`.

    weight: (out, in), whose input scale s, if any, stays explicit; bias: floating (out,) or None.
    `device` defaults to where the codes are; dtype: of `weight`, that of the codes' scales unless given.
    """

    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Quantized,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.packed = prepare(weight, device)
        for name, tensor in (("bias", bias), ("input_scale", weight.input_scale)):
            held = None if tensor is None else tensor.detach().to(self.packed.device)
            self.register_buffer(name, held, persistent=False)
        self._register_packed()

    @property
    def weight(self) -> Tensor:
        """(out, in), dequantized for this one look, the input scale divided in: what a dense layer would hold."""
        weight = self.packed.restore()
        return (weight if self.input_scale is None else weight.with_input_scale(self.input_scale)).effective(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        y = matmul(x, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        kernel = route_name(self.packed, 1, self.packed.dtype)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.packed.format}, kernel={kernel!r}"
        )

    def _register_packed(self) -> None:
        """Show the packed tensors as buffers, so that a model's memory is counted as it is."""
        for name, tensor in self.packed.tensors().items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # A layout belongs to its device and its scales keep their dtype: `fn` is asked where to, and no more.
        for name in [name for name in self._buffers if name.startswith("packed_")]:
            del self._buffers[name]
        base: Any = super()
        base._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.packed.device)).device
        if device != self.packed.device:
            self.packed = prepare(self.packed.restore(), device)
        self._register_packed()
        return self


class QuantizedExperts(nn.Module):
    """Stands in for a stacked parameter (experts, out, in) that is read as `F.linear(x, stack[expert])`.

    weights: one (out, in) per expert; an expert kept dense is a plain tensor. Whoever multiplies the whole stack at
    once must be told not to: transformers does so unless the experts' implementation is "eager".
    transposed: the parameter is (experts, in, out) and read as `x @ stack[expert]`.
    """

    def __init__(
        self,
        weights: Sequence[Quantized | Tensor],
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            QuantizedLinear(weight, device=device) if isinstance(weight, Quantized) else _Dense(weight, device)
            for weight in weights
        )
        self.transposed = transposed
        shape = tuple(weights[0].shape) if weights else (0, 0)
        self.shape = torch.Size((len(weights), *(shape[::-1] if transposed else shape)))

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int | Tensor) -> Any:
        """Expert number `expert` (an int or a 0-dimensional tensor): a tensor, or what serves as one in F.linear."""
        held = self.experts[int(expert)]
        if isinstance(held, _Dense):
            return held.dense.T if self.transposed else held.dense
        return Expert(held, self.transposed)


_MATMULS: tuple[Any, ...] = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class Expert:
    """One quantized expert, which serves as its weight.

    As (out, in) `F.linear` multiplies with the packed weight, as (in, out), transposed, `x @ weight` does; all else
    takes a dense copy.
    """

    def __init__(self, linear: nn.Module, transposed: bool = False) -> None:
        assert isinstance(linear, QuantizedLinear)
        self.linear = linear
        self.transposed = transposed
        shape = linear.out_features, linear.in_features
        self.shape = torch.Size(shape[::-1] if transposed else shape)
        self.dtype = linear.packed.dtype
        self.device = linear.packed.device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense, name)

    @property
    def T(self) -> Tensor:
        return self.dense.T

    @property
    def dense(self) -> Tensor:
        """The weight dequantized, in the shape that it serves in."""
        return self.linear.weight.T if self.transposed else self.linear.weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **named)
            if isinstance(weight, Expert) and not weight.transposed and isinstance(x, Tensor):
                y = weight.linear(x)
                return y if bias is None else y + bias
        if func in _MATMULS and len(args) == 2 and isinstance(args[0], Tensor):
            weight = args[1]
            if isinstance(weight, Expert) and weight.transposed:
                return weight.linear(args[0])
        return func(*map(_dense, args), **{name: _dense(value) for name, value in named.items()})


class _Dense(nn.Module):
    """An expert that stayed dense."""

    dense: Tensor

    def __init__(self, weight: Tensor, device: torch.device | str | None) -> None:
        super().__init__()
        self.register_buffer("dense", weight.detach().to(device), persistent=False)


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _dense(value: Any) -> Any:
    return value.dense if isinstance(value, Expert) else value


__all__ = ["Expert", "Packed", "QuantizedExperts", "QuantizedLinear"]
