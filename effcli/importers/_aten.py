"""What a node of a trace asks of aten: the operator's name, its arguments by name, the memory that it gives on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effcli.graphs.graph import function

# In evaluation these give their first argument itself, which their schemas do not say.
UNCHANGED = {"alpha_dropout", "dropout", "feature_dropout", "lift_fresh"}


def operation(node: fx.Node) -> tuple[str, str]:
    """An operator as its name and overload, such as ('relu_', 'default')."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removeprefix("aten::"), node.target._overloadname
    return str(getattr(node.target, "__name__", node.target)), ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a node by its name, defaults filled in; those of a Python function by their position."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(index): value for index, value in enumerate(node.args)}
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = index < len(node.args)
        found[argument.name] = node.args[index] if given else node.kwargs.get(argument.name, argument.default_value)
    return found


def passed(name: str, overload: str, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments by name as `aten.name.overload` takes them: by position, and by keyword what must be."""
    target: Any = function(f"aten.{name}.{overload}")
    keywords = {argument.name for argument in target._schema.arguments if argument.kwarg_only}
    positional = [value for key, value in values.items() if key not in keywords]
    return positional, {key: value for key, value in values.items() if key in keywords and value is not None}


def family(node: fx.Node) -> set[fx.Node]:
    """The nodes that share memory with `node`, itself included: views of it, and what it is a view of."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        member = waiting.pop()
        if member not in found:
            found.add(member)
            waiting += [*_viewed(member), *(user for user in member.users if member in _viewed(user))]
    return found


def _viewed(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory `node` gives on."""
    if node.op != "call_function":
        return []
    values = arguments(node)
    if isinstance(node.target, torch._ops.OpOverload):
        shared = [argument.name for argument in node.target._schema.arguments if argument.alias_info is not None]
        if operation(node)[0] in UNCHANGED:
            shared.append(next(iter(values)))
        values = {name: values[name] for name in shared}
    return [value for value in values.values() if isinstance(value, fx.Node)]
