"""From a trace of torch.export to a graph: weights become modules, and each operation gets its one canonical form.

What is the same for every batch is settled here. The trace is run on shapes alone with a batch of two and one of three:
a size that differs is the batch, and so a reshape needs -1 there and nowhere else. What depends on weights alone is
computed once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Builder, Facts, Graph, function, where
from effcli.importers import _layers
from effcli.importers._aten import arguments, family, operation, passed
from effcli.importers._trace import Shape, Trace, record

_RANDOM = {"bernoulli", "normal", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"}
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


Values = dict[str, Any]
Rule = Callable[["Lowering", fx.Node, Values], Any]


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on no input, and the name of the weight that it comes from."""

    name: str
    value: Tensor


class Lowering:
    """Goes through a trace once, in order. `made` holds what each of its nodes became.

    That is a node of the graph, a `Constant`, a list of them, or a number. two, three: what `record` says. rules: what
    becomes of an operator, by its name; one without a rule stays as it is.
    """

    def __init__(self, trace: Trace, rules: Mapping[str, Rule]) -> None:
        self.rules = rules
        self.trace = _single(trace)
        self.remarks = in_float32(value.dtype for _, value in trace.weights.values())
        if trace.batch is not None:
            _free_batch(self.trace, trace.batch)
            self.remarks += (f"it was exported for batches of {trace.batch} and is taken for batches of any size",)
        self.order = {node: index for index, node in enumerate(trace.graph.nodes)}
        self.two, self.three = record(self.trace, 2), record(self.trace, 3)
        self.builder = Builder()
        self.made: dict[fx.Node, Any] = {}
        # What was expanded to the size of the batch, by the node that does it.
        self.expanded: dict[fx.Node, Any] = {}
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}

    def graph(self, origin: str) -> Graph:
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                weight = self.trace.weights.get(node.name)
                self.made[node] = Constant(*weight) if weight else self.builder.input()
            elif node.op == "call_function" and isinstance(self.two[node], Shape | list):
                self.visit(node)
        (end,) = next(node for node in self.trace.graph.nodes if node.op == "output").args
        output = self.made[end]
        if not isinstance(output, fx.Node) or self.moving(end) != [0]:
            raise UnsupportedError(
                f"the first axis of the output, {where(end)}, is not the batch", "return one row per input"
            )
        return self.builder.finish(output, Facts(origin=origin, shape=self.trace.shape, remarks=self.remarks))

    def visit(self, node: fx.Node) -> None:
        name, overload = operation(node)
        values = {key: self.resolved(value) for key, value in arguments(node).items()}
        if not name.endswith("_"):
            self.made[node] = self.result(node, name, overload, values)
            return
        name = name.removesuffix("_")
        changed = node.all_input_nodes[0]
        before = self.made[changed]
        result = self.result(node, name, overload, values)
        # Whoever reads the changed tensor from here on reads the result.
        for other in family(changed):
            if other.name in self.trace.weights:
                own = self.trace.weights[other.name][0]
                raise UnsupportedError(f"{where(node)} changes the network's own {own}", "export it after `.eval()`")
            if self.order[other] > self.order[node]:
                continue
            if self.made.get(other) is before:
                self.made[other] = result
            elif other is not node and any(self.order[user] > self.order[node] for user in other.users):
                raise UnsupportedError(
                    f"{where(node)} changes in place what {where(other)} shows too",
                    f"use {name} instead of {name}_",
                )
        self.made[node] = result

    def result(self, node: fx.Node, name: str, overload: str, values: dict[str, Any]) -> Any:
        found = [leaf for value in values.values() for leaf in _leaves(value)]
        if name in _RANDOM:
            raise UnsupportedError(f"{where(node)} gives other values each time", "export it again after `.eval()`")
        if name != "getitem" and not any(isinstance(leaf, fx.Node) for leaf in found):
            return self.computed(node, name, overload, values, found)
        rule = self.rules.get(name)
        return rule(self, node, values) if rule else self.plain(node, name, overload, values)

    def computed(self, node: fx.Node, name: str, overload: str, values: dict[str, Any], found: list[Any]) -> Any:
        """What a node gives that depends on weights alone."""
        args, kwargs = passed(name, overload, {key: _tensors(value) for key, value in values.items()})
        with torch.no_grad():
            value = function(f"aten.{name}.{overload}")(*args, **kwargs)
        owner = next((leaf.name for leaf in found if isinstance(leaf, Constant)), node.name)
        if isinstance(value, Tensor):
            return Constant(owner, value)
        return [Constant(f"{owner}_{index}", item) for index, item in enumerate(value)]

    def resolved(self, value: Any) -> Any:
        """An argument of the trace as what it became."""
        if isinstance(value, list | tuple):
            return [self.resolved(item) for item in value]
        if not isinstance(value, fx.Node):
            return value
        if value not in self.made:
            self.made[value] = self.number(value)
        return self.made[value]

    def number(self, node: fx.Node) -> Any:
        """A number that the trace computes from sizes; a node where it varies with the batch."""
        if self.two[node] == self.three[node]:
            return self.two[node]
        values = [self.resolved(value) for value in node.args]
        name, overload = operation(node)
        return self.call(node, f"aten.{name}.{overload}" if overload else f"operator.{name}", *values)

    def sizes(self, node: fx.Node) -> list[int]:
        """The sizes of a tensor, with -1 for the one that changes with the batch."""
        moving = self.moving(node)
        if len(moving) > 1:
            raise UnsupportedError(f"{where(node)} has the batch in {len(moving)} axes", "keep it in the first alone")
        return [-1 if axis in moving else size for axis, size in enumerate(self.two[node].sizes)]

    def moving(self, node: fx.Node) -> list[int]:
        """The axes whose size changes with the batch."""
        pairs = zip(self.two[node].sizes, self.three[node].sizes, strict=True)
        return [axis for axis, (two, three) in enumerate(pairs) if two != three]

    def plain(self, node: fx.Node, name: str, overload: str, values: dict[str, Any]) -> fx.Node:
        """An operator as it came."""
        args, kwargs = passed(name, overload, values)
        return self.call(node, f"aten.{name}.{overload}", *args, **kwargs)

    def call(self, node: fx.Node, operation: str, *args: Any, **kwargs: Any) -> fx.Node:
        placed = [self.placed(arg) for arg in args]
        named = {key: self.placed(arg) for key, arg in kwargs.items()}
        return self.builder.call(operation, *placed, source=node.meta["source"], **named)

    def module(self, node: fx.Node, owner: str, module: nn.Module, value: Any) -> fx.Node:
        """Call a module that is named after the parameter `owner`; one module for all its calls."""
        base, parametrized, _ = owner.partition(".parametrizations.")
        path, _, own = base.rpartition(".")
        name = base if parametrized or not path or not own.startswith(("weight", "running")) else path
        name = self.free(name, lambda taken: taken in self.modules and _layers.same(self.modules[taken], module))
        module = self.modules.setdefault(name, module)
        return self.builder.module(name, module, self.placed(value), source=node.meta["source"])

    def placed(self, value: Any) -> Any:
        """An argument with its constants put into the graph as tensors."""
        if isinstance(value, list):
            return [self.placed(item) for item in value]
        if not isinstance(value, Constant):
            return value
        tensor = value.value
        name = self.free(value.name, lambda taken: self.tensors.get(taken) is tensor)
        self.tensors[name] = tensor
        return self.builder.tensor(name, tensor.clone(memory_format=torch.contiguous_format))

    def free(self, name: str, suits: Callable[[str], bool]) -> str:
        """`name`, or one like it when another module or tensor has it or has it in its path."""
        taken = self.modules.keys() | self.tensors.keys()
        plain = re.sub(r"\W", "_", name)
        for candidate in (name, plain, *(f"{plain}_{count}" for count in range(2, len(taken) + 3))):
            path = f"{candidate}."
            if suits(candidate) or not any(f"{o}.".startswith(path) or path.startswith(f"{o}.") for o in taken):
                return candidate
        raise AssertionError("there are more names than modules")


def in_float32(dtypes: Iterable[torch.dtype]) -> tuple[str, ...]:
    """What the user should know of weights that come in these types: a graph holds them in float32."""
    others = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if dtype in _OTHER_FLOATS})
    verbs = {name: "rounded" if name == "float64" else "widened" for name in others}
    return tuple(f"weights in {name} were {verb} to float32" for name, verb in verbs.items())


def _single(trace: Trace) -> Trace:
    """The trace with float32 in place of every other floating type."""

    def single(value: Any) -> Any:
        return torch.float32 if isinstance(value, torch.dtype) and value in _OTHER_FLOATS else value

    for node in trace.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, single)
        node.kwargs = fx.node.map_aggregate(node.kwargs, single)
    weights = {key: (name, value.to(single(value.dtype))) for key, (name, value) in trace.weights.items()}
    return dataclasses.replace(trace, weights=weights)


def _free_batch(trace: Trace, batch: int) -> None:
    """Let reshapes in a trace for one size of the batch take any: (batch, ...) to (batch, ...) keeps the rows apart."""
    known = record(trace, batch)
    for node in trace.graph.nodes:
        if operation(node)[0] in ("view", "_unsafe_view", "reshape"):
            before, after = known[node.args[0]].sizes, known[node].sizes
            if before[:1] == after[:1] == (batch,):
                node.args = (node.args[0], [-1, *after[1:]])


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _tensors(value: Any) -> Any:
    """An argument with its constants as what they hold."""
    if isinstance(value, list):
        return [_tensors(item) for item in value]
    return value.value if isinstance(value, Constant) else value
