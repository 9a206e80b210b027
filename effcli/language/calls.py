"""How a network calls its blocks and what they return: read off its own code with random numbers and few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Call:
    """How one block is called besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Returned:
    """What a block returns.

    items: of its tuple, None where it returns hidden states alone; place: where these stand among them.
    """

    items: tuple[Any, ...] | list[Any] | None = None
    place: int = 0

    @staticmethod
    def of(out: Any, hidden: Tensor) -> Returned | None:
        """Read off an output; None where nothing in it has the shape of the hidden states that went in."""
        if isinstance(out, Tensor):
            return Returned() if out.shape == hidden.shape else None
        if not isinstance(out, tuple | list):
            return None
        found = [k for k, item in enumerate(out) if isinstance(item, Tensor) and item.shape == hidden.shape]
        return Returned(out, found[0]) if found else None

    def hidden(self, out: Any) -> Tensor:
        """The hidden states in an output of this form."""
        result: Tensor = out if self.items is None else out[self.place]
        return result

    def around(self, hidden: Tensor) -> Any:
        """An output of this form with other hidden states."""
        return self._with([hidden if k == self.place else item for k, item in enumerate(self.items or ())], hidden)

    def changed(self, hidden: Tensor, seed: int) -> Any:
        """An output of this form with other hidden states, and numbers that depend on `seed` for all else."""
        generator = torch.Generator().manual_seed(seed)

        def other(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            if item.is_floating_point():
                return torch.randn(item.shape, generator=generator).to(item.device, item.dtype)
            return item ^ bool(seed) if item.dtype == torch.bool else item + seed

        return self._with(
            [hidden if k == self.place else other(item) for k, item in enumerate(self.items or ())], hidden
        )

    def _with(self, items: list[Any], hidden: Tensor) -> Any:
        if self.items is None:
            return hidden
        kind = type(self.items)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)


@dataclass(frozen=True)
class Manner:
    """How a network calls its blocks.

    returned: what each block returns that is not passed over; by_ids: whether the arguments depend on the token
    ids, not only on their shape.
    """

    returned: dict[int, Returned]
    by_ids: bool

    @property
    def last(self) -> int:
        """The last block that runs."""
        return max(self.returned)


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states among a block's arguments, and the others."""
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


def hidden_of(out: Any, hidden: Tensor) -> Tensor:
    """The hidden states in what a block returned for `hidden`."""
    found = Returned.of(out, hidden)
    assert found is not None, "the block was asked before"
    return found.hidden(out)


def kind_of(block: nn.Module) -> str:
    """What blocks have in common that share their inputs alike, so that one of each kind is tried."""
    shapes = [(key, tuple(value.shape)) for key, value in block.state_dict().items()]
    return repr((type(block).__name__, getattr(block, "attention_type", None), shapes))


def alike(first: Sequence[Call | None], second: Sequence[Call | None]) -> bool:
    """Whether blocks were called with equal arguments both times."""
    left, left_form = tree_flatten([call and (call.args, call.kwargs) for call in first])
    right, right_form = tree_flatten([call and (call.args, call.kwargs) for call in second])
    return left_form == right_form and all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first is second:
            return True
        return first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
    if type(first) is not type(second):
        return False
    # Of what is neither a tensor nor a plain value there is one to each forward pass.
    return first == second if isinstance(first, bool | int | float | str | None) else True
