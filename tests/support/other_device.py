"""A device that is none: tensors that say they are on it, and refuse to meet one that is on the CPU.

Without a GPU this shows what a GPU would refuse: a tensor made where its neighbours are not, a result that is not
brought back before it is written. The numbers are computed by the CPU, some by other kernels than usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("maia:0")


class Elsewhere(Tensor):
    """A tensor whose numbers are in `inner`, on the CPU, and whose device is DEVICE."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any, **more: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, **more}).to(DEVICE)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"a tensor on {DEVICE} is no array")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


def carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `func` gives on the device that its tensors or its `device` are on."""
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
    there = [item for item in tensors if isinstance(item, Elsewhere)]
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not copies:
        strays = [item for item in tensors if not isinstance(item, Elsewhere) and item.ndim]
        if strays:
            raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, found {tuple(strays[0].shape)} on the CPU")
    device = kwargs.get("device")
    if device is not None:
        # What torch itself makes inside of an operation it makes where it takes our tensors to be, which is on `meta`.
        goes = torch.device(device).type == DEVICE.type or (not tensors and torch.device(device).type == "meta")
        kwargs = {**kwargs, "device": "cpu" if goes else device}
    else:
        goes = bool(there)
    if copies and func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], Elsewhere)
    plain_args, plain_kwargs = tree_map_only(Elsewhere, lambda item: item.inner, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not goes:
        return out
    # What is changed in place stays the same object.
    known = {id(item.inner): item for item in there}
    return tree_map_only(Tensor, lambda item: known[id(item)] if id(item) in known else Elsewhere(item), out)


class _Made(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


@contextmanager
def present() -> Iterator[torch.device]:
    """Let DEVICE be there."""
    with _Made():
        yield DEVICE
