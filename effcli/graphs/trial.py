"""A graph run on shapes alone, without memory for values: what cannot run is found before anything is computed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from effcli.errors import first_line

# More numbers than any value of a network has for one input: 512 MiB of float32.
MOST_NUMBERS = 1 << 27
# Of sizes, as torch holds them.
_BITS = 63
# An extent that a graph may take for that of its batch.
_BATCH = 3


class Sizes(fx.Interpreter):
    """Runs a graph whose arithmetic on sizes stays within numbers of 64 bits, as that of every network does."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload) or target is operator.getitem:
            return super().call_function(target, args, kwargs)
        given = args[0] if target is torch.sym_sum and isinstance(args[0], list | tuple) else args
        if not all(isinstance(value, int | float | Tensor) for value in given):
            raise ValueError(f"it computes with {given!r:.60}, which are no sizes")
        if target is operator.pow and all(isinstance(value, int) for value in given):
            base, exponent = given
            if abs(base) > 1 and exponent * (abs(base).bit_length() - 1) >= _BITS:
                raise ValueError("it makes a size of more than 64 bits")
        value = super().call_function(target, args, kwargs)
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise ValueError("it makes a size of more than 64 bits")
        return value


def largest(module: fx.GraphModule, shape: tuple[int, ...]) -> int:
    """How many numbers the largest value has for one input of `shape`.

    `ValueError` names the node that cannot run, or whose value is beyond every network's, and says when the first axis
    of the output does not grow with the batch.
    """
    (one, numbers), (several, more) = (_run(module, (batch, *shape)) for batch in (1, _BATCH))
    if several[1:] != one[1:] or several[0] != _BATCH * one[0]:
        raise ValueError(f"one input gives an output of the shape {one}, {_BATCH} inputs one of {several}")
    return max(numbers, more)


def _run(module: fx.GraphModule, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The shape of the output, and the numbers of the largest value for one input."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, found = shape[0], [0]

    class Trial(Sizes):
        def run_node(self, n: fx.Node) -> Any:
            try:
                value = super().run_node(n)
            except Exception as error:  # whatever torch says of arguments that do not fit
                raise ValueError(f"{n.name} ({n.target}): {first_line(error)}") from error
            if isinstance(value, Tensor) and n.op != "get_attr":
                numbers = value.numel() // batch
                if numbers > MOST_NUMBERS:
                    raise ValueError(f"{n.name} makes {numbers:,} numbers of one input")
                found.append(numbers)
            return value

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        interpreter = Trial(module, garbage_collect_values=True)
        # It would add the graph to every error.
        interpreter.extra_traceback = False
        device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
        output = interpreter.run(torch.zeros(shape, device=device))
    if not isinstance(output, Tensor) or output.ndim == 0:
        raise ValueError("the output has no axis for the batch")
    return tuple(output.shape), max(found)


__all__ = ["MOST_NUMBERS", "Sizes", "largest"]
