"""Forward passes through a network that is never whole in memory.

`enter` runs what stands before the blocks and records how each block would be called; `through` runs one open block;
`leave` runs what stands behind them. Each is the network's own code: only the blocks' `forward` is replaced while
entering and leaving, so masks, position embeddings and head come from the architecture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from effcli.errors import CheckpointError, UnsupportedError, foreign
from effcli.language.skeleton import Skeleton
from effcli.language.weights import Weights, empty
from effcli.sites import LayerSite
from effcli.stock import logits_of

_UNFIT = "config.json must be the one that the weights were saved with"


@dataclass(frozen=True)
class Call:
    """How one block is called besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Entered(Exception):
    """Raised from the last block's place: what follows is not needed on the way in."""


@dataclass
class Stream:
    """A network's forward pass in parts. Use as a context manager: the parts outside the blocks are held open."""

    weights: Weights
    with_head: bool = False
    _returns_tuple: bool = False
    _held: list[str] = field(default_factory=list)

    @property
    def skeleton(self) -> Skeleton:
        return self.weights.skeleton

    def __enter__(self) -> Self:
        head = f"{self.skeleton.head}.weight"
        self._held = [name for name in self.skeleton.outer_parameters() if self.with_head or name != head]
        self.weights.fill(self.skeleton.model, "", self._held)
        if self.skeleton.tied:
            # Filling replaced the embedding's parameter; the head must follow it.
            self.skeleton.model.tie_weights()  # type: ignore[operator]
        return self

    def __exit__(self, *_: object) -> None:
        empty(self.skeleton.model, "", self._held)
        if self.skeleton.tied:
            self.skeleton.model.tie_weights()  # type: ignore[operator]

    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call | None]]:
        """Hidden states (batch, length, hidden) of token ids (batch, length) before block 0, and each block's call.

        None for a block that the network passes over, as one that attends to images where there are none.
        """
        found = self._enter(ids)
        if found is None:
            self._returns_tuple = True
            found = self._enter(ids)
        if found is None:
            path = self.weights.checkpoint.path
            raise UnsupportedError(f"the blocks of {path} hand on hidden states of different shapes", _UNFIT)
        return found

    def _enter(self, ids: Tensor) -> tuple[Tensor, list[Call | None]] | None:
        """None when hidden states lost an axis between two blocks: the network indexed what it took for a tuple."""
        calls: list[Call | None] = [None] * len(self.skeleton.blocks)
        first: list[Tensor] = []

        def record(k: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            first.append(hidden)
            if hidden.ndim != first[0].ndim:
                raise _Entered
            calls[k] = Call(args, kwargs)
            if k == len(self.skeleton.blocks) - 1:
                raise _Entered
            return self._wrapped(hidden)

        with self._running(), self._replaced(record), torch.inference_mode(), suppress(_Entered):
            logits_of(self.skeleton.model, ids)
        if not first:
            raise CheckpointError(f"the network in {self.weights.checkpoint.path} reaches none of its blocks", _UNFIT)
        if first[-1].ndim != first[0].ndim:
            return None
        return first[0], calls

    def through(self, k: int, hidden: Tensor, call: Call | None) -> Tensor:
        """Hidden states after block k, which must be open."""
        if call is None:
            return hidden
        with self._running():
            out = self.skeleton.blocks[k](hidden, *call.args, **call.kwargs)
        if isinstance(out, tuple):
            self._returns_tuple = True
            out = out[0]
        return out  # type: ignore[no-any-return]

    def leave(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) from the hidden states behind the last block."""

        def pass_on(k: int, *args: Any, **kwargs: Any) -> Any:
            # From every block: the network may pass over the last one.
            return self._wrapped(hidden)

        with self._running(), self._replaced(pass_on), torch.inference_mode():
            return logits_of(self.skeleton.model, ids)  # type: ignore[no-any-return]

    def _running(self) -> AbstractContextManager[None]:
        return running(self.weights.checkpoint.path)

    def _wrapped(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._returns_tuple else hidden

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        blocks = list(self.skeleton.blocks)
        try:
            for k, block in enumerate(blocks):
                block.forward = _bound(forward, k)
            yield
        finally:
            for block in blocks:
                del block.forward


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Map what the code of the network in `path` raises while it runs: its config then asks for what does not fit."""
    with foreign(lambda cause: CheckpointError(f"the network in {path} does not run: {cause}", _UNFIT)):
        yield


def _bound(forward: Callable[..., Any], k: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(k, *args, **kwargs)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


# Products and the places of their input and weight, by position or by name.
_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    F.linear: ((0, "input"), (1, "weight")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
}


class WatchLayers(TorchFunctionMode):
    """Reports every product of an input with a watched weight: one way for modules, Conv1D and stacked experts.

    on_call(site, inputs (..., in), output) is called after each such product.
    """

    def __init__(
        self, root: nn.Module, prefix: str, sites: Sequence[LayerSite], on_call: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self._on_call = on_call
        self._names: dict[tuple[int, int], str] = {}
        for site in sites:
            parameter = root.get_parameter(site.parameter.removeprefix(prefix))
            offset = 0 if site.index is None else site.index * site.rows * site.columns
            self._names[parameter.untyped_storage().data_ptr(), offset] = site.name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            inputs, weight = (args[at] if at < len(args) else kwargs.get(key) for at, key in _PRODUCTS[func])
            if isinstance(weight, Tensor):
                name = self._names.get((weight.untyped_storage().data_ptr(), int(weight.storage_offset())))
                if name is not None:
                    self._on_call(name, inputs, out)
        return out
