"""How a class multiplies with its stacked expert weights: watched while its own code runs on zeros."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from effcli.errors import first_line

# Products and the places of their input and weight, by position or by name.
PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    F.linear: ((0, "input"), (1, "weight")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
}


def operands(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input and the weight of a call of one of `PRODUCTS`."""
    first, second = (args[at] if at < len(args) else kwargs.get(key) for at, key in PRODUCTS[func])
    return first, second


@dataclass(frozen=True)
class Stack:
    """How a stacked parameter is multiplied. transposed: as (experts, in, out); obstacle: why it must stay dense."""

    transposed: bool
    obstacle: str = ""


_known: dict[tuple[Any, ...], dict[str, Stack]] = {}


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """The parameters (experts, ., .) of a module of experts by name, each tried once for a class and its shapes."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    key = type(module), tuple(shapes.items())
    if key not in _known:
        _known[key] = _tried(module, shapes) if shapes else {}
    return _known[key]


def _tried(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Stack]:
    name = type(module).__name__
    zeros = {key: zeros_like(parameter, parameter.dtype) for key, parameter in module.named_parameters()}
    failed: list[str] = []
    for args in _arguments(module, shapes, zeros[next(iter(shapes))].dtype):
        watch = _Watch({key: zeros[key] for key in shapes})
        try:
            with torch.no_grad(), watch:
                torch.func.functional_call(module, zeros, args)
        except _NoProduct as found:
            # One class keeps its stacks in one order.
            order = next(iter(watch.batched.values()), _said(module))
            return {key: Stack(order, f"{name} {found}") for key in shapes}
        except Exception as error:  # the class's own code, called in a way that it may not know
            failed.append(first_line(error))
            continue
        return {key: _stack(name, watch.ways[key], _said(module)) for key in shapes}
    return {
        key: Stack(_said(module), f"{name} could not be tried: {(failed or ['it takes other arguments'])[0]}")
        for key in shapes
    }


def _stack(name: str, ways: set[bool], said: bool) -> Stack:
    if len(ways) == 1:
        return Stack(next(iter(ways)))
    return Stack(said, f"{name} multiplies it in two ways" if ways else f"{name} does not multiply an input with it")


def _said(module: nn.Module) -> bool:
    """What transformers says of the order of a class's stacks."""
    return bool(getattr(module, "is_transposed", False))


def _arguments(module: nn.Module, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments that classes of experts are called with: two tokens for two experts, or one for each."""
    count = max(shape[0] for shape in shapes.values())
    second = min(1, count - 1)
    indices = torch.tensor([[0, second], [second, 0]])
    scores = torch.ones(2, 2, dtype=dtype)
    takes = inspect.signature(module.forward)
    for width in dict.fromkeys(size for shape in shapes.values() for size in (shape[2], shape[1])):
        two, each = torch.zeros(2, width, dtype=dtype), torch.zeros(count, width, dtype=dtype)
        for args in (
            (two, indices, scores),
            (two, scores, indices),
            (two, [2] + [0] * (count - 1)),
            (two, torch.ones(2, count, dtype=dtype)),
            (each,),
        ):
            try:
                takes.bind(*args)
            except TypeError:
                continue
            yield args


class _NoProduct(Exception):
    """Says what a class does with its stacks that is no product of inputs with one expert's matrix."""


class _Watch(TorchFunctionMode):
    """Follows stacks through a class's code; raises `_NoProduct`.

    ways: for each stack whether it was multiplied as (in, out); batched: so for those multiplied as a whole.
    """

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in stacks.items()}
        self.ways: dict[str, set[bool]] = {name: set() for name in stacks}
        self.batched: dict[str, bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = [leaf for leaf in tree_leaves((args, kwargs)) if self._name(leaf)]
        if not held:
            return func(*args, **kwargs)
        called = getattr(func, "__name__", str(func))
        if func in PRODUCTS:
            inputs, weight = operands(func, args, kwargs)
            name = self._name(weight)
            if name and weight.ndim == 2 and not self._name(inputs):
                # F.linear takes a weight (out, in), the others (in, out); a view of a transposed matrix has its
                # neighbours along the first axis.
                straight = weight.stride(1) == 1
                self.ways[name].add(straight != (func is F.linear))
                return func(*args, **kwargs)
        if called in _WHOLE and any(tensor.ndim == 3 for tensor in held):
            for tensor in held:
                self.batched[str(self._name(tensor))] = tensor.stride(-1) == 1
            raise _NoProduct(f"multiplies all experts at once ({called})")
        out = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and not self._name(leaf) for leaf in tree_leaves(out)):
            raise _NoProduct(f"does more with its weights than multiply with those of one expert ({called})")
        return out

    def _name(self, value: Any) -> str | None:
        return self._names.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None


# What would multiply with the whole of a stack.
_WHOLE = {"bmm", "baddbmm", "einsum", "matmul", "__matmul__", "linear", "grouped_mm", "_grouped_mm", "tensordot"}


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take up no memory until they are written."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    # NumPy asks the system for zeroed memory, which exists once it is touched; torch writes zeros.
    flat = torch.from_numpy(np.zeros(tensor.numel() * dtype.itemsize, dtype=np.uint8))
    return flat.view(dtype).view(tensor.shape)
