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
from torch.overrides import TorchFunctionMode

from effcli.errors import CheckpointError, EffcliError, UnsupportedError, foreign
from effcli.inputs.tokens import vocabulary_size
from effcli.language.calls import Call, Manner, Returned, alike, kind_of, split
from effcli.language.experts import PRODUCTS, operands
from effcli.language.skeleton import Skeleton
from effcli.language.weights import Weights, empty, zeros_for_weights
from effcli.layers.layer import LayerSite
from effcli.platform.huggingface import logits_of

_UNFIT = "config.json must be the one that the weights were saved with"


class _Entered(Exception):
    """Raised from the last block's place or the head's: what follows is not needed on the way in."""


@dataclass
class Stream:
    """A network's forward pass in parts. Use as a context manager: the parts outside the blocks are held open."""

    weights: Weights
    with_head: bool = False
    _held: list[str] = field(default_factory=list)
    _calls: dict[tuple[int, ...], list[Call | None]] = field(default_factory=dict)

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
        """Hidden states (batch, length, ...) of token ids (batch, length) before block 0, and each block's call.

        None for a block that the network passes over, as one that attends to images where there are none.
        """
        ids = ids.to(self.weights.device)
        manner = self._manner(ids)
        calls: list[Call | None] = [None] * len(self.skeleton.blocks)
        first: list[Tensor] = []

        def record(k: int, *args: Any, **kwargs: Any) -> Any:
            hidden, calls[k] = split(args, kwargs)
            first.append(hidden)
            if k == manner.last:
                raise _Entered
            return manner.returned[k].around(hidden)

        with self._running(), self._replaced(record), torch.inference_mode(), suppress(_Entered):
            logits_of(self.skeleton.model, ids)
        if not manner.by_ids:
            self._calls.setdefault(tuple(ids.shape), calls)
        return first[0], calls

    def call(self, k: int, ids: Tensor) -> Call | None:
        """How block k is called for token ids (batch, length).

        Ids of one shape are called alike, for there is no padding, unless the network hands its blocks something made
        of the ids: then it is made again, which costs less than to keep it for every batch and block.
        """
        if tuple(ids.shape) in self._calls:
            return self._calls[tuple(ids.shape)][k]
        return self.enter(ids)[1][k]

    def through(self, k: int, hidden: Tensor, call: Call | None) -> Tensor:
        """Hidden states after block k, which must be open."""
        if call is None:
            return hidden
        with self._running():
            out = self.skeleton.blocks[k](hidden, *call.args, **call.kwargs)
        assert self.skeleton.manner is not None, "calls come from `enter`"
        return self.skeleton.manner.returned[k].hidden(out)

    def leave(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) from the hidden states behind the last block."""
        with torch.inference_mode():
            return self._leave(ids, hidden)

    def _leave(self, ids: Tensor, hidden: Tensor) -> Tensor:
        ids = ids.to(self.weights.device)
        manner = self._manner(ids)
        with self._running(), self._replaced(lambda k, *args, **kwargs: manner.returned[k].around(hidden)):
            return logits_of(self.skeleton.model, ids)  # type: ignore[no-any-return]

    def _running(self) -> AbstractContextManager[None]:
        return running(self.weights.checkpoint.path)

    def _manner(self, ids: Tensor) -> Manner:
        """How the network calls its blocks, found once with the first few of `ids`."""
        if self.skeleton.manner is None:
            few = ids[:1, :_FEW]
            vocabulary = vocabulary_size(self.skeleton.config)
            returned: dict[int, Returned] = {}
            calls = self._trace(few, 0, returned)
            if not alike(calls, self._trace(few, 1, returned)):
                raise _unsupported(self.skeleton, "hand more on to one another than hidden states")
            by_ids = not alike(calls, self._trace((few + 1) % vocabulary, 0, returned))
            self.skeleton.manner = Manner(returned, by_ids)
        return self.skeleton.manner

    def _trace(self, ids: Tensor, seed: int, returned: dict[int, Returned]) -> list[Call | None]:
        """How each block is called when those before it return random numbers; raises `UnsupportedError`.

        returned: what each block returns; filled in where it is empty.
        """
        generator = torch.Generator().manual_seed(seed)
        blocks = self.skeleton.blocks
        last = max(returned, default=None)
        kinds: dict[str, Returned] = {}
        calls: list[Call | None] = [None] * len(blocks)
        outputs: list[Tensor] = []

        def ask(k: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = split(args, kwargs)
            if any(calls[k:]):
                raise _unsupported(self.skeleton, "do not run once each in their order")
            if hidden.shape[:2] != ids.shape:
                shape = tuple(hidden.shape)
                raise _unsupported(self.skeleton, f"take {shape} for {ids.shape[1]} tokens, not (batch, length, ...)")
            if outputs and not (outputs[-1].shape == hidden.shape and torch.equal(outputs[-1], hidden)):
                raise _unsupported(self.skeleton, "do not take their hidden states from one another as they are")
            calls[k] = call
            if last is None:
                kind = kind_of(blocks[k])
                if kind not in kinds:
                    kinds[kind] = self._ask(k, hidden, call)
                returned[k] = kinds[kind]
            elif k == last:
                raise _Entered
            outputs.append(torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype))
            return returned[k].changed(outputs[-1], seed)

        with (
            self._running(),
            self._replaced(ask),
            self._before_head(),
            torch.inference_mode(),
            suppress(_Entered),
        ):
            try:
                self.skeleton.model(input_ids=ids, use_cache=False)
            except (EffcliError, _Entered):
                raise
            except Exception:
                if not outputs:
                    # It says what it lacks.
                    logits_of(self.skeleton.model, ids)
                # What stands behind the blocks may lack its weights, and is of no interest here.
                if calls[-1] is None:
                    raise
        if not any(calls):
            raise CheckpointError(f"the network in {self.weights.checkpoint.path} reaches none of its blocks", _UNFIT)
        return calls

    @contextmanager
    def _before_head(self) -> Iterator[None]:
        """End a forward pass where it reaches the output head."""

        def end(*args: Any, **kwargs: Any) -> Any:
            raise _Entered

        head = self.skeleton.model.get_submodule(self.skeleton.head) if self.skeleton.head else nn.Identity()
        head.forward = end
        try:
            yield
        finally:
            del head.forward

    def _ask(self, k: int, hidden: Tensor, call: Call) -> Returned:
        """What block k returns: its own code, with zeros for the weights that are not in memory."""
        block = self.skeleton.blocks[k]
        stand_in = block.__dict__.pop("forward")
        try:
            with (
                foreign(lambda cause: _unsupported(self.skeleton, f"cannot be run one by one: {cause}")),
                zeros_for_weights(block, self.skeleton.dtype, self.weights.device),
            ):
                out = block(hidden, *call.args, **call.kwargs)
        finally:
            block.forward = stand_in
        found = Returned.of(out, hidden)
        if found is None:
            raise _unsupported(
                self.skeleton, f"return no hidden states of the shape that they take ({type(out).__name__})"
            )
        return found

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        blocks = list(self.skeleton.blocks)
        try:
            for k, block in enumerate(blocks):
                block.forward = _bound(forward, k)
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)


# Tokens that are enough to see how the blocks are called.
_FEW = 4


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Map what the code of the network in `path` raises while it runs: its config then asks for what does not fit."""
    with foreign(lambda cause: CheckpointError(f"the network in {path} does not run: {cause}", _UNFIT)):
        yield


def _bound(forward: Callable[..., Any], k: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(k, *args, **kwargs)


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
        if func in PRODUCTS:
            inputs, weight = operands(func, args, kwargs)
            if isinstance(weight, Tensor):
                name = self._names.get((weight.untyped_storage().data_ptr(), int(weight.storage_offset())))
                if name is not None:
                    self._on_call(name, inputs, out)
        return out


def _unsupported(skeleton: Skeleton, what: str) -> UnsupportedError:
    """The error for blocks which cannot be run one after another."""
    return UnsupportedError(
        f"the blocks of {type(skeleton.model).__name__} ({skeleton.block_path}) {what}",
        "it cannot be run block by block: passes without calibration take it, with --no-eval",
    )
