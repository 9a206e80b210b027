"""The canonical form of each operator that needs one: what passes and exporters may rely on.

A rule is given a node of the trace and its arguments as what they became, by the names of the operator's schema. It
returns what the node becomes: a node of the graph, a constant, or a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from effcli.errors import UnsupportedError
from effcli.graphs.graph import Graph, where
from effcli.importers import _layers
from effcli.importers._aten import operation
from effcli.importers._lower import Constant, Lowering, Rule, Values
from effcli.importers._trace import Trace


def _first(values: Values) -> Any:
    return next(iter(values.values()))


def _source(node: fx.Node) -> fx.Node:
    """The node of the trace that a node works on."""
    return node.all_input_nodes[0]


def _axis(low: Lowering, node: fx.Node, axis: int) -> int:
    """An axis of a node's value, counted from the front."""
    return axis % max(1, len(low.two[node].sizes))


def _repeated(value: Sequence[int] | int, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _as_it_came(low: Lowering, node: fx.Node, values: Values) -> fx.Node:
    return low.plain(node, *operation(node), values)


def _unchanged(low: Lowering, node: fx.Node, values: Values) -> Any:
    return _first(values)


def _dropout(low: Lowering, node: fx.Node, values: Values) -> Any:
    if values["train"]:
        raise UnsupportedError(f"{where(node)} drops values at random", "export the network again after `.eval()`")
    return _first(values)


def _converted(low: Lowering, node: fx.Node, values: Values) -> Any:
    dtype = low.two[node].dtype
    if low.two[_source(node)].dtype == dtype:
        return _first(values)
    return low.call(node, "aten.to.dtype", _first(values), dtype)


def _item(low: Lowering, node: fx.Node, values: Values) -> Any:
    parts, index = values.values()
    return parts[index] if isinstance(parts, list) else low.call(node, "operator.getitem", parts, index)


def _reshaped(low: Lowering, node: fx.Node, values: Values) -> Any:
    sizes = low.sizes(node)
    if sizes == low.sizes(_source(node)):
        return _first(values)
    return low.call(node, "aten.reshape.default", _first(values), sizes)


def _permuted(order: Callable[[int, Values], list[int]]) -> Rule:
    """order: from the number of axes to the old axis of each new one."""

    def rule(low: Lowering, node: fx.Node, values: Values) -> Any:
        dims = order(len(low.two[node].sizes), values)
        return _first(values) if dims == sorted(dims) else low.call(node, "aten.permute.default", _first(values), dims)

    return rule


def _swap(*usual: int) -> Callable[[int, Values], list[int]]:
    """Two axes change places: those that the operator names, or the usual ones."""

    def order(axes: int, values: Values) -> list[int]:
        one, other = usual or list(values.values())[1:]
        dims = list(range(axes))
        if axes > 1:
            dims[one], dims[other] = dims[other], dims[one]
        return dims

    return order


def _move(axes: int, values: Values) -> list[int]:
    origin, target = ([axis % axes for axis in _repeated(values[key], 1)] for key in ("source", "destination"))
    rest = iter(axis for axis in range(axes) if axis not in origin)
    placed = dict(zip(target, origin, strict=True))
    return [placed[axis] if axis in placed else next(rest) for axis in range(axes)]


def _expanded(low: Lowering, node: fx.Node, values: Values) -> Any:
    asked = values["size"]
    before = _source(node)
    missing = (0,) * (len(asked) - len(low.two[before].sizes))
    kept = [
        old == new and other == later
        for old, new, other, later in zip(
            missing + low.two[before].sizes,
            low.two[node].sizes,
            missing + low.three[before].sizes,
            low.three[node].sizes,
            strict=True,
        )
    ]
    if all(kept):
        return values["self"]
    sizes = [-1 if keep else size for keep, size in zip(kept, asked, strict=True)]
    expanded = low.call(node, "aten.expand.default", values["self"], sizes)
    low.expanded[expanded] = values["self"]
    return expanded


def _attention(low: Lowering, node: fx.Node, values: Values) -> Any:
    """The mask broadcasts by itself, and one that masks nothing is none."""
    mask = low.expanded.get(values["attn_mask"], values["attn_mask"])
    if isinstance(mask, Constant) and mask.value.dtype == torch.bool and bool(mask.value.all()):
        mask = None
    return _as_it_came(low, node, {**values, "attn_mask": mask})


def _inner_axis(low: Lowering, node: fx.Node, axis: int) -> int:
    """An axis of what a node works on, counted from the front; it must not be the batch."""
    before = _source(node)
    axis = _axis(low, before, axis)
    if axis in low.moving(before):
        raise UnsupportedError(f"{where(node)} takes a part of the batch", "treat every input of a batch alike")
    return axis


def _sliced(low: Lowering, node: fx.Node, values: Values) -> Any:
    before = _source(node)
    if low.two[before] == low.two[node] and low.three[before] == low.three[node] and values.get("step", 1) == 1:
        return values["self"]
    axis = _inner_axis(low, node, values["dim"])
    stop = values["start"] + values["length"] if "length" in values else values["end"]
    part = slice(values["start"], stop, values.get("step", 1)).indices(low.two[before].sizes[axis])
    return low.call(node, "aten.slice.Tensor", values["self"], axis, *part)


def _split(low: Lowering, node: fx.Node, values: Values) -> Any:
    axis = _inner_axis(low, node, values["dim"])
    parts, start = [], 0
    for shape in low.two[node]:
        stop = start + shape.sizes[axis]
        parts.append(low.call(node, "aten.slice.Tensor", values["self"], axis, start, stop, 1))
        start = stop
    return parts if len(parts) > 1 else [values["self"]]


def _unbound(low: Lowering, node: fx.Node, values: Values) -> Any:
    axis = _inner_axis(low, node, values["dim"])
    return [low.call(node, "aten.select.int", values["self"], axis, index) for index in range(len(low.two[node]))]


def _selected(low: Lowering, node: fx.Node, values: Values) -> Any:
    axis = _inner_axis(low, node, values["dim"])
    index = values["index"] % low.two[_source(node)].sizes[axis]
    return low.call(node, "aten.select.int", values["self"], axis, index)


def _joined(low: Lowering, node: fx.Node, values: Values) -> Any:
    tensors = values["tensors"]
    if len(tensors) == 1:
        return tensors[0]
    return low.call(node, "aten.cat.default", tensors, _axis(low, node, values["dim"]))


def _padded(low: Lowering, node: fx.Node, values: Values) -> Any:
    if values.get("mode", "constant") != "constant":
        return _as_it_came(low, node, values)
    if not any(values["pad"]):
        return values["self"]
    return low.call(node, "aten.constant_pad_nd.default", values["self"], values["pad"], values["value"] or 0.0)


def _elementwise(name: str) -> Rule:
    """A tensor with a tensor or a number; alpha multiplies the second beforehand."""

    def rule(low: Lowering, node: fx.Node, values: Values) -> Any:
        if values.get("rounding_mode") is not None:
            return _as_it_came(low, node, values)
        second, alpha = values["other"], values.get("alpha", 1)
        if isinstance(second, Constant) and second.value.dim() == 0:
            second = second.value.item()
        if alpha != 1:
            number = isinstance(second, int | float)
            second = second * alpha if number else low.call(node, "aten.mul.Tensor", second, alpha)
        return low.call(node, f"aten.{name}.Tensor", values["self"], second)

    return rule


def _subtracted_from(low: Lowering, node: fx.Node, values: Values) -> Any:
    negative = low.call(node, "aten.mul.Tensor", values["self"], -values["alpha"])
    return low.call(node, "aten.add.Tensor", negative, values["other"])


def _clamped(low: Lowering, node: fx.Node, values: Values) -> Any:
    lowest = values.get("min", values.get("min_val"))
    highest = values.get("max", values.get("max_val"))
    if lowest == 0 and highest is None:
        return low.call(node, "aten.relu.default", values["self"])
    if isinstance(lowest, int | float) and isinstance(highest, int | float):
        return low.call(node, "aten.hardtanh.default", values["self"], lowest, highest)
    return _as_it_came(low, node, values)


def _relu6(low: Lowering, node: fx.Node, values: Values) -> Any:
    return low.call(node, "aten.hardtanh.default", values["self"], 0.0, 6.0)


def _max_pooled(low: Lowering, node: fx.Node, values: Values) -> Any:
    kernel, padding, dilation = (_repeated(values[key], 2) for key in ("kernel_size", "padding", "dilation"))
    stride = _repeated(values["stride"] or kernel, 2)
    pooled = low.call(
        node, "aten.max_pool2d.default", values["self"], kernel, stride, padding, dilation, values["ceil_mode"]
    )
    return [pooled] if isinstance(low.two[node], list) else pooled


def _average_pooled(low: Lowering, node: fx.Node, values: Values) -> Any:
    kernel, padding = (_repeated(values[key], 2) for key in ("kernel_size", "padding"))
    stride = _repeated(values["stride"] or kernel, 2)
    rest = values["ceil_mode"], values["count_include_pad"], values["divisor_override"]
    return low.call(node, "aten.avg_pool2d.default", values["self"], kernel, stride, padding, *rest)


def _adaptively_pooled(low: Lowering, node: fx.Node, values: Values) -> Any:
    sizes = _repeated(values["output_size"], 2)
    return low.call(node, "aten.adaptive_avg_pool2d.default", values["self"], sizes)


def _mean(low: Lowering, node: fx.Node, values: Values) -> Any:
    before = _source(node)
    axes = _repeated(values["dim"], 1) if values.get("dim") is not None else []
    every = list(range(len(low.two[before].sizes)))
    axes = [_axis(low, before, axis) for axis in axes] or every
    return low.call(node, "aten.mean.dim", values["self"], axes, values.get("keepdim", False))


def _softmax(low: Lowering, node: fx.Node, values: Values) -> Any:
    name = operation(node)[0].removeprefix("_")
    return low.call(node, f"aten.{name}.int", values["self"], _axis(low, node, values["dim"]))


def _linear(low: Lowering, node: fx.Node, values: Values) -> Any:
    weight, bias = values["weight"], values["bias"]
    if not _constants(weight, bias):
        return _as_it_came(low, node, values)
    return low.module(node, weight.name, _layers.linear(weight.value, _tensor(bias)), values["input"])


def _product(low: Lowering, node: fx.Node, values: Values) -> Any:
    """A product with a constant (in, out) is a linear layer."""
    first, second = list(values.values())[:2]
    if isinstance(second, Constant) and second.value.dim() == 2:
        return low.module(node, second.name, _layers.linear(second.value.t(), None), first)
    return low.call(node, "aten.matmul.default", first, second)


def _product_and_bias(low: Lowering, node: fx.Node, values: Values) -> Any:
    """bias + first @ second; with constants (out,) and (in, out) a linear layer."""
    bias, first, second = values["self"], values["mat1"], values["mat2"]
    scaled = values["alpha"] != 1 or values["beta"] != 1
    if scaled or isinstance(first, Constant) or not _constants(second, bias) or bias.value.dim() != 1:
        return _as_it_came(low, node, values)
    return low.module(node, second.name, _layers.linear(second.value.t(), bias.value), first)


def _convolved(low: Lowering, node: fx.Node, values: Values) -> Any:
    weight, bias, source = values["weight"], values["bias"], values["input"]
    fits = _constants(weight, bias) and weight.value.dim() in (3, 4) and not values.get("transposed", False)
    if not fits or len(low.two[_source(node)].sizes) != weight.value.dim():
        return _as_it_came(low, node, values)
    kernel = weight.value.shape[2:]
    stride, dilation = (_repeated(values[key], len(kernel)) for key in ("stride", "dilation"))
    padding = values["padding"]
    if isinstance(padding, str):
        total = [dil * (size - 1) if padding == "same" else 0 for dil, size in zip(dilation, kernel, strict=True)]
        padding = [each // 2 for each in total]
        if any(each % 2 for each in total):
            # The odd one goes to the end, and constant_pad_nd counts from the last axis.
            pads = [side for each in reversed(total) for side in (each // 2, each - each // 2)]
            source = low.call(node, "aten.constant_pad_nd.default", source, pads, 0.0)
            padding = [0]
    padding = _repeated(padding, len(kernel))
    module = _layers.convolution(weight.value, _tensor(bias), stride, padding, dilation, values["groups"])
    return low.module(node, weight.name, module, source)


def _batch_norm(low: Lowering, node: fx.Node, values: Values) -> Any:
    weight, bias, mean, variance = (values[key] for key in ("weight", "bias", "running_mean", "running_var"))
    if values.get("training") or mean is None:
        raise UnsupportedError(
            f"{where(node)} normalises by the batch that it sees", "export the network again after `.eval()`"
        )
    axes = len(low.two[_source(node)].sizes)
    if axes > 4 or not _constants(mean, variance, weight, bias):
        return _as_it_came(low, node, values)
    module = _layers.batch_norm(axes, mean.value, variance.value, _tensor(weight), _tensor(bias), values["eps"])
    return _parts(low, node, low.module(node, (weight or mean).name, module, values["input"]))


def _layer_norm(low: Lowering, node: fx.Node, values: Values) -> Any:
    weight, bias = values["weight"], values["bias"]
    if weight is None or not _constants(weight, bias):
        return _as_it_came(low, node, values)
    module = _layers.layer_norm(weight.value, _tensor(bias), values["eps"])
    return _parts(low, node, low.module(node, weight.name, module, values["input"]))


def _group_norm(low: Lowering, node: fx.Node, values: Values) -> Any:
    weight, bias = values["weight"], values["bias"]
    if weight is None or not _constants(weight, bias):
        return _as_it_came(low, node, values)
    module = _layers.group_norm(values["num_groups"], weight.value, _tensor(bias), values["eps"])
    return low.module(node, weight.name, module, values["input"])


def _embedded(low: Lowering, node: fx.Node, values: Values) -> Any:
    weight = values["weight"]
    if not _constants(weight):
        return _as_it_came(low, node, values)
    return low.module(node, weight.name, _layers.embedding(weight.value), values["indices"])


def _parts(low: Lowering, node: fx.Node, made: fx.Node) -> Any:
    """`made` for an operator that also gives statistics, which nothing reads in evaluation."""
    return [made] if isinstance(low.two[node], list) else made


def _constants(first: Any, *others: Any) -> bool:
    """Whether the first is a constant, and the others are or are missing."""
    return isinstance(first, Constant) and all(other is None or isinstance(other, Constant) for other in others)


def _tensor(value: Constant | None) -> Tensor | None:
    return None if value is None else value.value


RULES: dict[str, Rule] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy"), _unchanged),
    **dict.fromkeys(("alpha_dropout", "dropout", "feature_dropout"), _dropout),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _converted),
    "getitem": _item,
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
        _reshaped,
    ),
    "permute": _permuted(lambda axes, values: [axis % axes for axis in values["dims"]]),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _permuted(_swap())),
    "t": _permuted(_swap(0, 1)),
    **dict.fromkeys(("mT", "adjoint"), _permuted(_swap(-2, -1))),
    **dict.fromkeys(("movedim", "moveaxis"), _permuted(_move)),
    "expand": _expanded,
    **dict.fromkeys(("slice", "narrow"), _sliced),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "unbind": _unbound,
    "select": _selected,
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    "add": _elementwise("add"),
    "sub": _elementwise("sub"),
    **dict.fromkeys(("mul", "multiply"), _elementwise("mul")),
    **dict.fromkeys(("div", "divide", "true_divide"), _elementwise("div")),
    "rsub": _subtracted_from,
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"), _clamped),
    "relu6": _relu6,
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), _max_pooled),
    "avg_pool2d": _average_pooled,
    "adaptive_avg_pool2d": _adaptively_pooled,
    "mean": _mean,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
    "scaled_dot_product_attention": _attention,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _product),
    "addmm": _product_and_bias,
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolved),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    "group_norm": _group_norm,
    "embedding": _embedded,
}


def lower(trace: Trace, origin: str) -> Graph:
    """The graph of a trace; `UnsupportedError` names the node that a graph cannot hold."""
    return Lowering(trace, RULES).graph(origin)
