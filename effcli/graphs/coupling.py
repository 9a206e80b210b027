"""What must be cut together in a graph, and cutting it: channels are followed through every node by numbers.

Every entry of a value carries a number, that of the channel whose removal would remove it. A layer gives its output
channels new numbers; an operator that moves entries moves their numbers, one that meets two values makes their numbers
one, one that mixes channels or is not understood fixes them: they cannot be cut, and the reason names the node. In the
end what goes with a channel must be whole slices along one axis of every value, or its numbers are joined until it is.
Batch norms, residual additions, gates, depthwise and grouped convolutions, concatenations, flattening, attention heads
and fused projections need no more than that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcli.errors import UserError
from effcli.formats import Mask
from effcli.graphs.graph import Graph, operation, where
from effcli.layers.coupling import Classes, Coupled, Cut, Member, entries_kept, shortened

# One number of the output for one number of each input, whatever it is computed from them.
_POINTWISE = {
    f"aten.{name}"
    for name in (
        *("relu.default", "relu6.default", "leaky_relu.default", "prelu.default", "elu.default", "selu.default"),
        *("gelu.default", "silu.default", "mish.default", "softplus.default", "hardtanh.default", "hardswish.default"),
        *("hardsigmoid.default", "sigmoid.default", "tanh.default", "erf.default", "exp.default", "log.default"),
        *("abs.default", "neg.default", "sqrt.default", "rsqrt.default", "reciprocal.default", "square.default"),
        *("sin.default", "cos.default", "clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_max.default"),
        *("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar", "div.Tensor"),
        *("div.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "maximum.default", "minimum.default"),
        *("where.self", "masked_fill.Scalar", "to.dtype", "clone.default", "contiguous.default"),
    )
}
# Over the two last axes, or the one of (n, channels, length).
_POOLS = {
    "aten.max_pool2d.default": 2,
    "aten.avg_pool2d.default": 2,
    "aten.adaptive_avg_pool2d.default": 2,
    "aten.adaptive_max_pool2d.default": 2,
    "aten.upsample_nearest2d.vec": 2,
    "aten.upsample_bilinear2d.vec": 2,
    "aten.max_pool1d.default": 1,
    "aten.avg_pool1d.default": 1,
    "aten.adaptive_avg_pool1d.default": 1,
}
# Over the axes of their second argument, some of them with a flag that the axes stay.
_REDUCTIONS = {"aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default"}
_SOFTMAXES = {"aten.softmax.int", "aten.log_softmax.int"}


def coupled(graph: Graph) -> list[Coupled]:
    """The channels of every layer, each group once, in the order in which the layers run.

    Groups that cannot be cut say why and have no members.
    """
    return [group.coupled for group in _Following(graph).groups()]


def cut(graph: Graph, cuts: Iterable[Cut]) -> None:
    """Take channels out of `graph`, in place: weights, biases, norms, and every size that its nodes name.

    cuts: of groups of `coupled(graph)`, as the graph is now. What is left computes what it did with those channels set
    to zero. Raises `UserError` for a layer whose weight is compressed and where nothing would be left of a value,
    `UnsupportedError` where the network does not run without these channels; the graph is as it was then.
    """
    cuts = [one for one in cuts if one.changes]
    if not cuts:
        return
    draft = _with_tensors_of(graph)
    following = _Following(draft)
    removed = following.removed(cuts)
    kept = entries_kept(cuts)
    for parameter in kept:
        owner = parameter.rpartition(".")[0]
        if owner in graph.stored:
            raise UserError(f"{owner} is stored as {graph.stored[owner].format}", "cut channels before compressing")
    following.check_left(removed)
    for node in draft.nodes:
        following.resize(node, removed)
    for name in {parameter.rpartition(".")[0]: None for parameter in kept}:
        if name in draft.masks:
            shape = draft.module.state_dict()[f"{name}.weight"].shape
            draft.masks[name] = _shortened(draft.masks[name], shape, kept.get(f"{name}.weight", {}))
        _shorten(draft.layer(name), {k.rpartition(".")[2]: v for k, v in kept.items() if _owns(name, k)})
    draft.module.recompile()
    graph.become(draft)


def _with_tensors_of(graph: Graph) -> Graph:
    """A graph of its own nodes and modules, which holds the same tensors: none of them is copied."""
    tensors = (*graph.module.parameters(), *graph.module.buffers())
    made = Graph(copy.deepcopy(graph.module, {id(tensor): tensor for tensor in tensors}), graph.facts, graph.stored)
    made.masks = dict(graph.masks)
    return made


def _owns(name: str, parameter: str) -> bool:
    return parameter.rpartition(".")[0] == name


def _shortened(mask: Mask, shape: torch.Size, axes: Mapping[int, Tensor]) -> Mask:
    """The mask of a parameter of this shape without some of its entries; a bitmask where its pattern is broken."""
    kept = shortened(mask.kept.view(shape), axes).flatten(1)
    return Mask(kept, mask.pattern) & Mask(kept)


def _shorten(module: nn.Module, kept: dict[str, dict[int, Tensor]]) -> None:
    """Shorten the tensors of one module, and what it says of its shapes."""
    for own, axes in kept.items():
        value: Tensor = getattr(module, own)
        with torch.no_grad():
            found = shortened(value, axes).contiguous()
        if isinstance(value, nn.Parameter):
            setattr(module, own, nn.Parameter(found, requires_grad=value.requires_grad))
        else:
            module.register_buffer(own, found)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        held = module.weight if module.weight is not None else module.running_mean
        assert held is not None
        module.num_features = len(held)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


@dataclass(frozen=True, eq=False)
class _Group:
    """A group and the number behind each of its positions."""

    coupled: Coupled
    numbers: Tensor


class _Following:
    """The numbers of all values of a graph for a batch of one.

    numbers: of the values, by node, int64 of the value's shape, expanded along the axes that they do not depend on.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.classes = Classes()
        self.shapes = graph.whole_shapes()
        self.numbers: dict[fx.Node, Tensor] = {}
        # Of the output channels of layers, and of all tensors that belong to no layer, by name.
        self.made: dict[str, Tensor] = {}
        self.loose: dict[str, Tensor] = {}
        # The nodes whose values depend on the input, so that their first axis is that of the batch.
        self._fed = {graph.input}
        # What parameters have along one axis.
        self.along: dict[tuple[str, int], Tensor] = {}
        for node in graph.nodes:
            if self._fed.intersection(node.all_input_nodes):
                self._fed.add(node)
            if node.op == "output":
                continue
            made = self._module(node) if node.op == "call_module" else self._value(node)
            if made is not None:
                self.numbers[node] = made
        self._settle_all()
        self._fix(graph.output, f"{graph.output.name} is the network's output")
        self._settle_all()

    def _settle_all(self) -> None:
        while any([self._settle(node) for node in self.numbers]):
            pass

    # What a node makes of the numbers of what it reads.

    def _value(self, node: fx.Node) -> Tensor | None:
        name = operation(node)
        shape = self.shapes.get(node.name)
        if shape is None:
            # A size is no matter of channels unless it is that of their axis.
            if name.startswith("aten."):
                axis = node.args[1] if name == "aten.sym_size.int" else None
                for used in self._read(node.args):
                    if axis is None or axis in self.varying(self.numbers[used]):
                        self._fix(used, f"{where(node)} reads their number")
            return None
        if node.op == "placeholder":
            return self._stuck(shape, f"{node.name} is the network's input")
        if node.op == "get_attr":
            return self._tensor(node, shape)
        if name in _POINTWISE:
            return self._pointwise(node, shape)
        step = _STEPS.get(name) or (_pool if name in _POOLS else _mixed if name in _REDUCTIONS | _SOFTMAXES else None)
        made = step(self, node, shape) if step is not None else None
        return made if made is not None else self._unknown(node, shape)

    def _unknown(self, node: fx.Node, shape: Sequence[int], reason: str = "also reads the channels") -> Tensor:
        """The numbers behind a node that lets no channel of what it reads be cut."""
        self._fix(node, f"{where(node)} {reason}")
        return self._stuck(shape, f"{where(node)} makes them")

    def _fix(self, used: Any, reason: str) -> None:
        """Fix the channels of a node's inputs, or of nodes."""
        for node in self._read(used.args if isinstance(used, fx.Node) and used not in self.numbers else used):
            self.classes.fix(self._small(self.numbers[node]), reason)
        if isinstance(used, fx.Node) and used not in self.numbers:
            for node in self._read(tuple(used.kwargs.values())):
                self.classes.fix(self._small(self.numbers[node]), reason)

    def _read(self, value: Any) -> list[fx.Node]:
        """The nodes with numbers among an argument."""
        found: list[fx.Node] = []
        fx.node.map_arg(value, lambda node: found.append(node) if node in self.numbers else None)
        return found

    def _stuck(self, shape: Sequence[int], reason: str) -> Tensor:
        number = self.classes.fresh(1)
        self.classes.fix(number, reason)
        return number.expand(tuple(shape))

    def _tensor(self, node: fx.Node, shape: tuple[int, ...]) -> Tensor:
        """A tensor that belongs to no layer follows what it meets."""
        name = str(node.target)
        if name not in self.loose:
            if name in dict(self.graph.module.named_parameters()):
                self.loose[name] = self.classes.fresh(math.prod(shape)).view(shape)
            else:
                self.loose[name] = self._stuck(shape, f"{where(node)} is no parameter")
        return self.loose[name]

    def _pointwise(self, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
        inputs = [self.numbers[used] for used in self._read((node.args, tuple(node.kwargs.values())))]
        if operation(node) == "aten.prelu.default" and inputs[1].ndim == 1:
            inputs[1] = inputs[1].view(-1, *(1,) * (len(shape) - 2))
        if not inputs:
            return None
        found = inputs[0]
        for other in inputs[1:]:
            found = self.met(found, other, where(node))
        return found.expand(shape)

    def met(self, first: Tensor, second: Tensor, who: str) -> Tensor:
        """The numbers of what is computed, entry by entry, of two values whose shapes broadcast."""
        axes = max(first.ndim, second.ndim)
        first, second = (v.reshape(*(1,) * (axes - v.ndim), *v.shape) for v in (first, second))
        shape = tuple(min(sizes) and max(sizes) for sizes in zip(first.shape, second.shape, strict=True))
        for whole, part in ((first, second), (second, first)):
            repeated = {axis for axis in range(axes) if part.shape[axis] == 1 < shape[axis]}
            varying = self.varying(whole)
            if varying and varying <= repeated:
                # The other has one entry for all channels: it stays as it is.
                self.classes.fix(self._small(part), f"{who} repeats them")
                return whole.expand(shape)
        crossed = [
            any(part.shape[axis] == 1 < shape[axis] for axis in self.varying(whole))
            for whole, part in ((first, second), (second, first))
        ]
        if any(crossed):
            self.classes.fix(self._small(first), f"{who} crosses them with others")
            self.classes.fix(self._small(second), f"{who} crosses them with others")
        else:
            self.join(first, second)
        return first.expand(shape)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Make the numbers of two values one, where they broadcast."""
        self.classes.join(*(self._small(values) for values in (first, second)))

    def level(self, numbers: Tensor, axes: Iterable[int]) -> None:
        """Make the numbers of a value one along `axes`."""
        first = numbers
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        self.join(numbers, first)

    @staticmethod
    def _small(numbers: Tensor) -> Tensor:
        """Without the repetitions along axes that the numbers were expanded along."""
        for axis in range(numbers.ndim):
            if numbers.stride(axis) == 0 and numbers.shape[axis] > 1:
                numbers = numbers.narrow(axis, 0, 1)
        return numbers

    def varying(self, numbers: Tensor) -> set[int]:
        """The axes along which the channels of a value lie: those along which its numbers differ."""
        roots = self.classes.roots(self._small(numbers))
        lengths = enumerate(roots.shape)
        return {axis for axis, size in lengths if size > 1 and bool((roots != roots.narrow(axis, 0, 1)).any())}

    def vector(self, numbers: Tensor, axis: int) -> Tensor:
        """The numbers along one axis, which are the same along all others."""
        for other in range(numbers.ndim):
            if other != axis:
                numbers = numbers.select(other, 0).unsqueeze(other)
        return numbers.flatten()

    def _aligned(self, node: fx.Node, axis: int) -> Tensor | None:
        """The numbers of a node's input along `axis`, with which parameters are aligned.

        None where its channels lie along another axis; those that lie along several are joined.
        """
        numbers = self.numbers[node.all_input_nodes[0]]
        varying = self.varying(numbers)
        if varying - {axis}:
            if axis not in varying:
                return None
            self.level(numbers, varying - {axis})
        return self.vector(numbers, axis)

    def _module(self, node: fx.Node) -> Tensor:
        module, name = self.graph.module_of(node), str(node.target)
        shape = self.shapes[node.name]
        numbers = self.numbers[node.all_input_nodes[0]]
        last = len(shape) - 1
        if isinstance(module, nn.Linear):
            entries = self._aligned(node, last)
            if entries is None:
                return self._beside(node, shape, last)
            self._align(f"{name}.weight", 1, entries)
            return self._made(node, module.out_features, shape, last)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            entries = self._aligned(node, 1)
            if entries is None:
                return self._unknown(node, shape, "mixes other axes than the channels")
            made = self._made(node, module.out_channels, shape, 1)
            if module.groups == 1:
                self._align(f"{name}.weight", 1, entries)
            else:
                outputs = self.vector(made, 1).view(module.groups, -1)
                self.join(outputs, outputs[:, :1])
                self.join(entries.view(module.groups, -1), outputs[:, :1])
            return made
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            entries = self._aligned(node, 1)
            if entries is not None:
                if isinstance(module, nn.GroupNorm):
                    grouped = entries.view(module.num_groups, -1)
                    self.join(grouped, grouped[:, :1])
                for own in ("weight", "bias", "running_mean", "running_var"):
                    if _has(module, own):
                        self._align(f"{name}.{own}", 0, entries)
            elif isinstance(module, nn.GroupNorm):
                return self._unknown(node, shape, "normalizes over them")
            return numbers
        if isinstance(module, nn.LayerNorm):
            normed = {last - axis for axis in range(len(module.normalized_shape))}
            if self.varying(numbers) & normed:
                self._fix(node, f"{where(node)} normalizes over them")
            return numbers
        self._fix(node, f"{where(node)} looks them up")
        if isinstance(module, nn.Embedding):
            made = self._made(node, module.embedding_dim, shape, last)
            self._align(f"{name}.weight", 1, self.vector(made, last))
            return made
        return self._unknown(node, shape)

    def _made(self, node: fx.Node, count: int, shape: tuple[int, ...], axis: int) -> Tensor:
        """New numbers for the output channels of a layer; the same whenever it is called."""
        name = str(node.target)
        if name not in self.made:
            self.made[name] = self.classes.fresh(count)
            if count == 1:
                self.classes.fix(self.made[name], f"{where(node)} has one output")
            module = self.graph.layer(name)
            for own in ("weight", "bias"):
                if _has(module, own) and not isinstance(module, nn.Embedding):
                    self._align(f"{name}.{own}", 0, self.made[name])
        along = [1] * len(shape)
        along[axis] = count
        return self.made[name].view(along).expand(shape)

    def _align(self, parameter: str, axis: int, entries: Tensor) -> None:
        """Note what a parameter has along an axis; what is used twice means the same both times."""
        self.join(entries, self.along.setdefault((parameter, axis), entries))

    def _beside(self, node: fx.Node, shape: tuple[int, ...], axis: int) -> Tensor:
        """The numbers behind a layer that works on another axis than that of the channels, which stay."""
        numbers = self.numbers[node.all_input_nodes[0]]
        if axis in self.varying(numbers):
            return self._stuck(shape, f"{where(node)} makes them")
        return numbers.narrow(axis, 0, 1).expand(shape)

    def _settle(self, node: fx.Node) -> bool:
        """Join the numbers of a value until what goes with each is a slice along one axis; whether anything changed."""
        numbers = self.numbers[node]
        if operation(node) == "aten.select.int" or (operation(node) == "aten.slice.Tensor" and _steps(node)):
            before = self.numbers[node.all_input_nodes[0]]
            if node.args[1] in self.varying(before):
                self.classes.fix(self._small(before), f"{where(node)} takes some of them")
                return True
        varying = self.varying(numbers)
        if 0 in varying and node in self._fed:
            self.classes.fix(self._small(numbers), f"{where(node)} moves them into the batch")
            return True
        if len(varying) < 2:
            return False
        best: tuple[int, Classes] | None = None
        now = self.classes
        for axis in sorted(varying):
            self.classes = now.copy()
            self.level(numbers, varying - {axis})
            count = len(set(self.classes.roots(self._small(numbers)).flatten().tolist()))
            if best is None or count > best[0]:
                best = count, self.classes
        assert best is not None
        self.classes = best[1]
        return True

    # What is left when all is followed.

    def groups(self) -> list[_Group]:
        """The groups: channels that one layer makes belong together, and so do those of layers that share channels."""
        together = Classes()
        size = len(self.classes._root)
        of = together.fresh(size)
        rooted = {name: self.classes.roots(numbers) for name, numbers in self.made.items()}
        for roots in rooted.values():
            free = roots[roots != 0]
            if len(free):
                together.join(of[free], of[free[:1]])
        found: dict[int, list[str]] = {}
        ordered = [str(node.target) for node in self.graph.nodes if str(node.target) in rooted]
        alone = []
        for name in dict.fromkeys(ordered):
            free = rooted[name][rooted[name] != 0]
            if len(free):
                found.setdefault(int(together.roots(of[free[:1]])), []).append(name)
            else:
                alone.append(name)
        entries = {key: self.classes.roots(numbers) for key, numbers in self._entries()}
        groups = {}
        for names in found.values():
            numbers = torch.cat([rooted[name] for name in names])
            numbers = torch.tensor(list(dict.fromkeys(numbers[numbers != 0].tolist())))
            position = torch.full((size,), -1)
            position[numbers] = torch.arange(len(numbers))
            members = ((key, axis, position[roots]) for (key, axis), roots in entries.items())
            own = [Member(key, axis, at) for key, axis, at in members if bool((at >= 0).any())]
            group = Coupled(names[0], len(numbers), tuple(own))
            if len(numbers) == 1:
                group = Coupled(names[0], 0, (), f"all that is left of {names[0]} goes together")
            groups[names[0]] = _Group(group, numbers[: group.count])
        for name in alone:
            reason = self.classes.reason(self.made[name])
            groups[name] = _Group(Coupled(name, 0, (), reason), self.made[name][:0])
        return [groups[name] for name in dict.fromkeys(ordered) if name in groups]

    def _entries(self) -> Iterable[tuple[tuple[str, int], Tensor]]:
        """The numbers along every axis of a parameter that may be shortened."""
        yield from self.along.items()
        for name, numbers in self.loose.items():
            for axis in self.varying(numbers):
                yield (name, axis), self.vector(numbers, axis)

    def removed(self, cuts: Sequence[Cut]) -> Tensor:
        """Whether the channel of each number goes, bool by root; `UserError` for groups of another graph."""
        groups = {group.coupled.name: group for group in self.groups()}
        gone = torch.zeros(len(self.classes._root), dtype=torch.bool)
        for one in cuts:
            group = groups.get(one.coupled.name)
            if group is None or not _same(group.coupled, one.coupled):
                raise UserError(
                    f"{one.coupled.name} is not coupled in this graph as it was", "find its groups again after a cut"
                )
            gone[group.numbers[~one.kept]] = True
        return gone

    def check_left(self, gone: Tensor) -> None:
        """Raise `UserError` where nothing would be left of a value: pools, say, do not take it."""
        for node in self.numbers:
            _, stays = self._stays(node, gone)
            if stays is not None and not bool(stays.any()):
                raise UserError(f"nothing would be left of {where(node)}", "keep one of its channels at least")

    def resize(self, node: fx.Node, gone: Tensor) -> None:
        """Bring the sizes and bounds that a node names to what is left."""
        name = operation(node)
        if name in ("aten.reshape.default", "aten.expand.default"):
            axis, stays = self._stays(node, gone)
            sizes = list(node.args[1])  # type: ignore[arg-type]
            # Sizes are aligned with the last axes.
            at = axis - (self.numbers[node].ndim - len(sizes))
            if stays is not None and at >= 0 and isinstance(sizes[at], int) and sizes[at] >= 0:
                sizes[at] = int(stays.sum())
                node.args = (node.args[0], sizes, *node.args[2:])
        elif name == "aten.slice.Tensor":
            source, dim, start, stop, *rest = node.args
            axis, stays = self._stays(node.all_input_nodes[0], gone)
            if stays is not None and axis == dim:
                node.args = (source, dim, int(stays[:start].sum()), int(stays[:stop].sum()), *rest)

    def _stays(self, node: fx.Node, gone: Tensor) -> tuple[int, Tensor | None]:
        """The axis of a value's channels, and whether each entry along it stays; None where all of them do."""
        numbers = self.numbers[node]
        varying = self.varying(numbers)
        if len(varying) != 1:
            return 0, None
        (axis,) = varying
        stays = ~gone[self.classes.roots(self.vector(numbers, axis))]
        return axis, None if bool(stays.all()) else stays


def _same(first: Coupled, second: Coupled) -> bool:
    def described(group: Coupled) -> list[tuple[str, int, list[int]]]:
        return [(member.parameter, member.axis, member.position.tolist()) for member in group.members]

    return first.count == second.count and described(first) == described(second)


def _has(module: nn.Module, own: str) -> bool:
    return isinstance(getattr(module, own, None), Tensor)


def _steps(node: fx.Node) -> bool:
    """Whether a slice leaves entries out between others."""
    return bool(node.args[4:] and node.args[4] != 1)


def _pool(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    numbers = following.numbers[node.all_input_nodes[0]]
    axes = range(numbers.ndim - _POOLS[operation(node)], numbers.ndim)
    if following.varying(numbers) & set(axes):
        return None
    for axis in axes:
        numbers = numbers.narrow(axis, 0, 1)
    return numbers.expand(shape)


def _mixed(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """A reduction or a normalization over axes."""
    numbers = following.numbers[node.all_input_nodes[0]]
    given: Any = node.args[1] if len(node.args) > 1 else None
    if given is None:
        return None
    axes = {axis % numbers.ndim for axis in ([given] if isinstance(given, int) else given)}
    if following.varying(numbers) & axes:
        return following._unknown(node, shape, "mixes them")
    if operation(node) in _SOFTMAXES:
        return numbers
    for axis in sorted(axes, reverse=True):
        numbers = numbers.select(axis, 0)
        if len(shape) == following.numbers[node.all_input_nodes[0]].ndim:
            numbers = numbers.unsqueeze(axis)
    return numbers


def _moved(run: Callable[[Tensor, fx.Node, tuple[int, ...]], Tensor]) -> _Step:
    """A step that moves the numbers as it moves entries."""

    def step(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
        return run(following.numbers[node.all_input_nodes[0]], node, shape)

    return step


def _sliced(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    bounds: Any = node.args[1:]
    if len(bounds) < 3 or not all(isinstance(bound, int) and bound >= 0 for bound in bounds):
        return None
    return following.numbers[node.all_input_nodes[0]][(slice(None),) * bounds[0] + (slice(*bounds[1:]),)]


def _joined(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    parts: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return torch.cat([following.numbers[part] for part in parts], axis)


def _stacked(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    parts: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return torch.stack([following.numbers[part] for part in parts], axis)


def _pad(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """Zeros around other axes than that of the channels change nothing; padded channels are fixed."""
    numbers, pads = following.numbers[node.all_input_nodes[0]], list(node.args[1])  # type: ignore[arg-type]
    varying = following.varying(numbers)
    for at in range(len(pads) // 2):
        axis = numbers.ndim - 1 - at
        before, after = pads[2 * at : 2 * at + 2]
        if axis not in varying:
            sizes = list(numbers.shape)
            sizes[axis] = shape[axis]
            numbers = numbers.narrow(axis, 0, 1).expand(sizes)
            continue
        start = max(-before, 0)
        numbers = numbers.narrow(axis, start, numbers.shape[axis] - start - max(-after, 0))
        around = []
        for count in (before, after):
            sizes = [*numbers.shape]
            sizes[axis] = max(count, 0)
            around.append(following._stuck(sizes, f"{where(node)} adds them"))
        if before < 0 or after < 0:
            return None
        numbers = torch.cat([around[0], numbers, around[1]], axis)
    return numbers


def _flipped(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """Entries that change places along other axes than that of the channels."""
    numbers = following.numbers[node.all_input_nodes[0]]
    given: Any = node.args[-1]
    axes = {axis % numbers.ndim for axis in ([given] if isinstance(given, int) else given)}
    return None if not axes or following.varying(numbers) & axes else numbers


def _gated(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """x₁ · σ(x₂), halves of one axis."""
    numbers = following.numbers[node.all_input_nodes[0]]
    axis: Any = node.args[1] if len(node.args) > 1 else -1
    first, second = numbers.chunk(2, axis)
    return following.met(first, second, where(node))


def _product(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """Matrices one by one: what is cut is a whole matrix of every stack, such as a head."""
    parts = [following.numbers[used] for used in following._read(node.args)]
    if len(parts) != 2 or min(part.ndim for part in parts) < 2:
        return None
    return _matrices(following, node, parts, shape)


def _attention(following: _Following, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """softmax(q kᵀ) v, heads along the third last axis, those of keys and values repeated where there are fewer."""
    names = ("query", "key", "value", "attn_mask")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    parts = [following.numbers[given[key]] for key in names[:3]]
    if min(part.ndim for part in parts) < 3:
        return None
    heads = parts[0].shape[-3]
    if given.get("enable_gqa"):
        parts[1:] = [part.repeat_interleave(heads // part.shape[-3], dim=-3) for part in parts[1:]]
    mask = given.get("attn_mask")
    found = _matrices(following, node, parts, shape)
    if found is not None and mask is not None:
        found = following.met(found[..., :1], following.numbers[mask][..., :1], where(node)).expand(shape)
    return found


def _matrices(following: _Following, node: fx.Node, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """Every matrix (.., rows, columns) of each of `parts` goes as a whole, and with those that it meets."""
    axes, batch = len(shape), set(range(len(shape) - 2))
    firsts = []
    for part in parts:
        inside = following.varying(part) & {part.ndim - 1, part.ndim - 2}
        shifted = {axis + axes - part.ndim for axis in following.varying(part)}
        if inside and not shifted & batch:
            return None
        following.level(part, inside)
        firsts.append(part[..., :1, :1])
    found = firsts[0]
    for other in firsts[1:]:
        found = following.met(found, other, where(node))
    return found.expand(shape)


_Step = Callable[[_Following, fx.Node, tuple[int, ...]], Tensor | None]
_STEPS: dict[str, _Step] = {
    "aten.reshape.default": _moved(lambda numbers, node, shape: numbers.reshape(shape)),
    "aten.permute.default": _moved(lambda numbers, node, shape: numbers.permute(node.args[1])),  # type: ignore[arg-type]
    "aten.expand.default": _moved(lambda numbers, node, shape: numbers.expand(shape)),
    "aten.select.int": _moved(lambda numbers, node, shape: numbers.select(*node.args[1:3])),  # type: ignore[arg-type]
    "aten.slice.Tensor": _sliced,
    "aten.pixel_shuffle.default": _moved(lambda numbers, node, shape: torch.pixel_shuffle(numbers, node.args[1])),  # type: ignore[arg-type]
    "aten.pixel_unshuffle.default": _moved(lambda numbers, node, shape: torch.pixel_unshuffle(numbers, node.args[1])),  # type: ignore[arg-type]
    "aten.cat.default": _joined,
    "aten.stack.default": _stacked,
    "aten.constant_pad_nd.default": _pad,
    "aten.roll.default": _flipped,
    "aten.flip.default": _flipped,
    "aten.glu.default": _gated,
    "aten.matmul.default": _product,
    "aten.scaled_dot_product_attention.default": _attention,
}

__all__ = ["coupled", "cut"]
