"""What each ONNX operator becomes in a graph: one function an operator, found in `OPERATORS`.

A function takes the node as an `Operator` and returns its first output, or all of them as a tuple. What an operator
can do and a graph cannot is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from effcli.importers._onnx_translation import Array, Operator

Pads = list[tuple[int, int]]

_FLOAT32 = 1
# HardSigmoid with the slope that torch's operator has; the file holds it in float32.
_SIXTH = 1 / 6

_UNARY = {
    "Abs": "aten.abs.default",
    "Erf": "aten.erf.default",
    "Exp": "aten.exp.default",
    "HardSwish": "aten.hardswish.default",
    "Log": "aten.log.default",
    "Neg": "aten.neg.default",
    "Reciprocal": "aten.reciprocal.default",
    "Relu": "aten.relu.default",
    "Sigmoid": "aten.sigmoid.default",
    "Sqrt": "aten.sqrt.default",
    "Tanh": "aten.tanh.default",
}
_BINARY = {"Add": "aten.add.Tensor", "Div": "aten.div.Tensor", "Mul": "aten.mul.Tensor", "Sub": "aten.sub.Tensor"}
_GATES = {
    torch.ops.aten.sigmoid.default: "aten.silu.default",
    torch.ops.aten.hardsigmoid.default: "aten.hardswish.default",
}
_REDUCTIONS = {"ReduceMax": "aten.amax.default", "ReduceMean": "aten.mean.dim", "ReduceSum": "aten.sum.dim_IntList"}


def unary(op: Operator) -> fx.Node:
    return op.call(_UNARY[op.kind], op.activation())


def binary(op: Operator) -> fx.Node:
    """A sum, difference, product or quotient; a constant comes second, c - x as -x + c and c / x as (1 / x) · c."""
    first, second = op.operand(0), op.operand(1)
    if isinstance(first, fx.Node) and second is not None:
        return _gated(op, first, second) or op.call(_BINARY[op.kind], first, op.term(second, first))
    x, kind = op.activation(1), op.kind
    if kind == "Sub":
        x, kind = op.call("aten.mul.Tensor", x, -1.0), "Add"
    elif kind == "Div":
        x, kind = op.call("aten.reciprocal.default", x), "Mul"
    assert isinstance(first, np.ndarray)
    return op.call(_BINARY[kind], x, op.term(first, x))


def _gated(op: Operator, first: fx.Node, second: fx.Node | Array) -> fx.Node | None:
    """x · sigmoid(x) and x · hardsigmoid(x) as the one operator that they are."""
    if op.kind == "Mul" and isinstance(second, fx.Node):
        for x, gate in ((first, second), (second, first)):
            if gate.target in _GATES and gate.args[0] is x:
                return op.call(_GATES[gate.target], x)
    return None


def power(op: Operator) -> fx.Node:
    exponent = op.needed(1)
    if exponent.size != 1:
        raise op.refuse("has an exponent of several numbers")
    return op.call("aten.pow.Tensor_Scalar", op.activation(), float(exponent.reshape(())))


def clip(op: Operator) -> fx.Node:
    x = op.activation()
    low, high = (None if bound is None else float(bound.reshape(())) for bound in (op.constant(1), op.constant(2)))
    if low is not None and low <= -torch.finfo(torch.float32).max:
        low = None
    if high is not None and high >= torch.finfo(torch.float32).max:
        high = None
    if low is not None and high is not None:
        if low > high:
            raise op.refuse(f"has a range from {low:g} to {high:g}", "export the network again")
        return op.call("aten.hardtanh.default", x, low, high)
    if low == 0:
        return op.call("aten.relu.default", x)
    return x if low is None and high is None else op.call("aten.clamp.default", x, low, high)


def hard_sigmoid(op: Operator) -> fx.Node:
    x, alpha, beta = op.activation(), op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if math.isclose(alpha, _SIXTH, rel_tol=1e-6) and beta == 0.5:
        return op.call("aten.hardsigmoid.default", x)
    scaled = op.call("aten.mul.Tensor", x, alpha)
    return op.call("aten.hardtanh.default", op.call("aten.add.Tensor", scaled, beta), 0.0, 1.0)


def elu(op: Operator) -> fx.Node:
    return op.call("aten.elu.default", op.activation(), op.attribute("alpha", 1.0))


def leaky_relu(op: Operator) -> fx.Node:
    return op.call("aten.leaky_relu.default", op.activation(), op.attribute("alpha", 0.01))


def gelu(op: Operator) -> fx.Node:
    approximate = op.attribute("approximate", "none")
    options = {} if approximate == "none" else {"approximate": approximate}
    return op.call("aten.gelu.default", op.activation(), **options)


def softmax(op: Operator) -> fx.Node:
    """Along one axis; before operator set 13 along all axes from `axis` on, taken as one."""
    x = op.activation()
    shape = op.shape(x)
    operation = "aten.softmax.int" if op.kind == "Softmax" else "aten.log_softmax.int"
    if op.opset >= 13:
        return op.call(operation, x, op.axis(op.attribute("axis", -1), len(shape)))
    axis = op.axis(op.attribute("axis", 1), len(shape))
    flat = op.reshape(x, [*shape[:axis], math.prod(shape[axis:])])
    return op.reshape(op.call(operation, flat, axis), shape)


def identity(op: Operator) -> fx.Node:
    return op.activation()


def dropout(op: Operator) -> fx.Node:
    training = op.constant(2)
    if training is not None and training.any():
        raise op.refuse("is in training mode", "export the network in evaluation mode: model.eval()")
    return op.activation()


def cast(op: Operator) -> fx.Node:
    from onnx import TensorProto

    to = op.attribute("to", _FLOAT32)
    if to in (TensorProto.INT64, TensorProto.INT32):
        # The numbers of rows, whatever integers hold them.
        return op.call("aten.to.dtype", op.activation(), torch.int64)
    if to != _FLOAT32:
        raise op.refuse(f"makes {TensorProto.DataType.Name(to).lower()} of float32", "export the network in float32")
    return op.activation()


def convolution(op: Operator) -> fx.Node:
    x, weight, bias = op.activation(), op.needed(1), op.constant(2)
    rank = weight.ndim - 2
    _check_rank(op, x, rank)
    kernel, groups = weight.shape[2:], op.attribute("group", 1)
    stride, dilation = _per_axis(op, "strides", rank), _per_axis(op, "dilations", rank)
    pads = _pads(op, x, kernel, stride, dilation)
    if not _even(pads):
        x, pads = _padded(op, x, pads, 0.0), [(0, 0)] * rank
    module = filled(
        nn.Conv1d if rank == 1 else nn.Conv2d,
        {"weight": weight, "bias": bias},
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        kernel_size=tuple(kernel),
        stride=tuple(stride),
        padding=tuple(before for before, _ in pads),
        dilation=tuple(dilation),
        groups=groups,
        bias=bias is not None,
    )
    return op.layer(module, x)


def gemm(op: Operator) -> fx.Node:
    """α · x Wᵀ + β · b as a layer."""
    if op.attribute("transA", 0):
        raise op.refuse("transposes its input, the batch axis included")
    weight, bias = op.needed(1), op.constant(2)
    weight = op.attribute("alpha", 1.0) * (weight if op.attribute("transB", 0) else weight.T)
    if bias is not None:
        if bias.ndim == 2 and bias.shape[0] != 1:
            raise op.refuse("adds another bias to each input of a batch")
        bias = op.attribute("beta", 1.0) * np.broadcast_to(bias.reshape(-1), weight.shape[:1])
    return op.layer(_linear(weight, bias), op.activation())


def matmul(op: Operator) -> fx.Node:
    first, second = op.operand(0), op.operand(1)
    if isinstance(first, fx.Node) and isinstance(second, np.ndarray) and second.ndim == 2:
        return op.layer(_linear(second.T, None), first)
    operands = [value if isinstance(value, fx.Node) else op.tensor(value) for value in (first, second)]  # type: ignore[arg-type]
    return op.call("aten.matmul.default", *operands)


def batch_norm(op: Operator) -> fx.Node:
    if op.attribute("training_mode", 0):
        raise op.refuse("is in training mode", "export the network in evaluation mode: model.eval()")
    x = op.activation()
    rank = len(op.shape(x)) - 2
    if rank:
        _check_rank(op, x, rank)
    names = "weight", "bias", "running_mean", "running_var"
    tensors = {name: op.needed(index + 1) for index, name in enumerate(names)}
    module = filled(
        nn.BatchNorm2d if rank == 2 else nn.BatchNorm1d,
        {**tensors, "num_batches_tracked": np.array(0)},
        num_features=tensors["weight"].size,
        eps=op.attribute("epsilon", 1e-5),
    )
    return op.layer(module, x)


def layer_norm(op: Operator) -> fx.Node:
    x = op.activation()
    shape = op.shape(x)
    extents = shape[op.axis(op.attribute("axis", -1), len(shape)) :]
    weight, bias = np.broadcast_to(op.needed(1), extents), op.constant(2)
    tensors = {"weight": weight, "bias": None if bias is None else np.broadcast_to(bias, extents)}
    options = {"normalized_shape": extents, "eps": op.attribute("epsilon", 1e-5), "bias": bias is not None}
    return op.layer(filled(nn.LayerNorm, tensors, **options), x)


def max_pool(op: Operator) -> fx.Node:
    x, kernel = op.activation(), op.attribute("kernel_shape", [])
    _check_rank(op, x, len(kernel))
    stride, dilation = _per_axis(op, "strides", len(kernel)), _per_axis(op, "dilations", len(kernel))
    pads, ceil = _pads(op, x, kernel, stride, dilation), _ceil(op)
    if not _even(pads) or any(2 * before > width for (before, _), width in zip(pads, kernel, strict=True)):
        if ceil:
            raise op.refuse("pads unevenly and rounds its size up", "set ceil_mode or the padding to 0")
        x, pads = _padded(op, x, pads, -math.inf), [(0, 0)] * len(kernel)
    padding = [before for before, _ in pads]
    return op.call(f"aten.max_pool{len(kernel)}d.default", x, kernel, stride, padding, dilation, ceil)


def average_pool(op: Operator) -> fx.Node:
    x, kernel = op.activation(), op.attribute("kernel_shape", [])
    rank = len(kernel)
    _check_rank(op, x, rank)
    stride = _per_axis(op, "strides", rank)
    if any(extent != 1 for extent in _per_axis(op, "dilations", rank)):
        raise op.refuse("has dilations, which effcli does not average with")
    pads, ceil = _pads(op, x, kernel, stride, [1] * rank), _ceil(op)
    counted = bool(op.attribute("count_include_pad", 0)) or not np.any(pads)
    operation = f"aten.avg_pool{rank}d.default"
    if _even(pads) and all(2 * before <= width for (before, _), width in zip(pads, kernel, strict=True)):
        return op.call(operation, x, kernel, stride, [before for before, _ in pads], ceil, counted)
    if ceil:
        raise op.refuse("pads unevenly and rounds its size up", "set ceil_mode or the padding to 0")
    mean = op.call(operation, _padded(op, x, pads, 0.0), kernel, stride, [0] * rank, False, True)
    if counted:
        return mean
    inside = functional.pad(torch.ones(1, 1, *op.shape(x)[2:]), [extent for pair in reversed(pads) for extent in pair])
    pool = functional.avg_pool1d if rank == 1 else functional.avg_pool2d
    share: Any = pool(inside, kernel, stride)
    return op.call("aten.mul.Tensor", mean, op.tensor((1 / share)[0].numpy()))


def global_average_pool(op: Operator) -> fx.Node:
    x = op.activation()
    if len(op.shape(x)) == 4:
        return op.call("aten.adaptive_avg_pool2d.default", x, [1, 1])
    return op.call("aten.mean.dim", x, list(range(2, len(op.shape(x)))), True)


def global_max_pool(op: Operator) -> fx.Node:
    x = op.activation()
    extents = list(op.shape(x)[2:])
    _check_rank(op, x, len(extents))
    return op.call(f"aten.max_pool{len(extents)}d.default", x, extents, extents)


def reduction(op: Operator) -> fx.Node:
    x = op.activation()
    rank = len(op.shape(x))
    axes = op.integers(1, "axes")
    if not axes and op.attribute("noop_with_empty_axes", 0):
        return x
    axes = sorted(op.axis(axis, rank) for axis in axes or range(rank))
    return op.call(_REDUCTIONS[op.kind], x, axes, bool(op.attribute("keepdims", 1)))


def pad(op: Operator) -> fx.Node:
    mode = op.attribute("mode", "constant")
    if mode != "constant":
        raise op.refuse(f"pads in mode {mode!r}", "pad with a constant")
    x, extents, value, axes = op.activation(), op.needed(1).reshape(-1), op.constant(2), op.constant(3)
    rank = len(op.shape(x))
    chosen = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    pads = [(0, 0)] * rank
    for axis, before, after in zip(chosen, extents[: len(chosen)], extents[len(chosen) :], strict=True):
        pads[axis] = int(before), int(after)
    if pads[0] != (0, 0):
        op.axis(0, rank)
    return _padded(op, x, pads[1:], 0.0 if value is None else float(value.reshape(())))


def concatenate(op: Operator) -> fx.Node:
    parts = op.activations()
    axis = op.axis(op.attribute("axis", 0), len(op.shape(parts[0])))
    return parts[0] if len(parts) == 1 else op.call("aten.cat.default", parts, axis)


def take_slice(op: Operator) -> fx.Node:
    x, starts, stops = op.activation(), op.needed(1).reshape(-1), op.needed(2).reshape(-1)
    axes, steps = op.constant(3), op.constant(4)
    axes = np.arange(starts.size) if axes is None else axes.reshape(-1)
    steps = np.ones_like(starts) if steps is None else steps.reshape(-1)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        if step < 1:
            raise op.refuse(f"steps backwards, by {step}")
        x = _sliced(op, x, int(axis), slice(int(start), int(stop), int(step)))
    return x


def split(op: Operator) -> tuple[fx.Node, ...]:
    x = op.activation()
    shape = op.shape(x)
    axis = op.axis(op.attribute("axis", 0), len(shape))
    sizes = op.integers(1, "split")
    if sizes is None:
        # All of one size; the last is smaller where they do not divide the axis.
        size = -(-shape[axis] // op.outputs)
        sizes = [min(size, shape[axis] - size * number) for number in range(op.outputs)]
    if min(sizes, default=0) < 0 or sum(sizes) != shape[axis]:
        raise op.refuse(f"splits {shape[axis]} entries into {', '.join(map(str, sizes))}", "export the network again")
    stops = np.cumsum(sizes)
    return tuple(
        _sliced(op, x, axis, slice(int(stop - size), int(stop), 1)) for size, stop in zip(sizes, stops, strict=True)
    )


def gather(op: Operator) -> fx.Node:
    """Entries in a row along an axis: a slice, without its axis for a single index.

    Rows of a constant, picked by an activation: an embedding.
    """
    table = op.operand(0)
    if isinstance(table, np.ndarray) and isinstance(op.operand(1), fx.Node):
        if table.ndim != 2 or op.attribute("axis", 0) != 0:
            raise op.refuse("looks up other than the rows of a matrix")
        sizes = dict(zip(("num_embeddings", "embedding_dim"), table.shape, strict=True))
        return op.layer(filled(nn.Embedding, {"weight": table}, **sizes), op.activation(1))
    x, index = op.activation(), op.needed(1)
    shape = op.shape(x)
    axis = op.axis(op.attribute("axis", 0), len(shape))
    places = [int(place) % shape[axis] for place in index.reshape(-1)]
    if index.ndim > 1 or not places or places != list(range(places[0], places[0] + len(places))):
        raise op.refuse("picks entries that are not in a row")
    found = _sliced(op, x, axis, slice(places[0], places[-1] + 1, 1))
    return found if index.ndim else op.reshape(found, [*shape[:axis], *shape[axis + 1 :]])


def reshape(op: Operator) -> fx.Node:
    """To a shape in which 0 keeps an axis and -1 takes what is left."""
    x = op.activation()
    shape, target = op.shape(x), [int(extent) for extent in op.needed(1).reshape(-1)]
    if not op.attribute("allowzero", 0):
        target = [shape[axis] if extent == 0 else extent for axis, extent in enumerate(target)]
    if -1 in target:
        rest = -math.prod(target)
        left = math.prod(shape) // rest if rest > 0 else 0
        target = [left if extent == -1 else extent for extent in target]
    if math.prod(target) != math.prod(shape):
        raise op.refuse(
            f"reshapes to {tuple(target)}, which holds for one batch size only",
            "export the network so that it works on batches of any size",
        )
    return op.reshape(x, target)


def flatten(op: Operator) -> fx.Node:
    x, axis = op.activation(), op.attribute("axis", 1)
    shape = op.shape(x)
    axis += len(shape) if axis < 0 else 0
    return op.reshape(x, [math.prod(shape[:axis]), math.prod(shape[axis:])])


def squeeze(op: Operator) -> fx.Node:
    x, axes = op.activation(), op.integers(1, "axes")
    shape = op.shape(x)
    if axes is None:
        raise op.refuse("names no axes, so that it would drop a batch of one", "name the axes to drop")
    chosen = {op.axis(axis, len(shape)) for axis in axes}
    return op.reshape(x, [extent for axis, extent in enumerate(shape) if axis not in chosen])


def unsqueeze(op: Operator) -> fx.Node:
    x, axes = op.activation(), op.integers(1, "axes") or []
    shape = list(op.shape(x))
    rank = len(shape) + len(axes)
    for axis in sorted(op.axis(axis, rank) for axis in axes):
        shape.insert(axis, 1)
    return op.reshape(x, shape)


def transpose(op: Operator) -> fx.Node:
    x = op.activation()
    rank = len(op.shape(x))
    axes = list(op.attribute("perm", range(rank - 1, -1, -1)))
    if axes[0] != 0:
        raise op.refuse("moves the batch axis", "export the network so that the batch comes first throughout")
    return op.permute(x, axes)


def filled(kind: type[nn.Module], tensors: dict[str, Array | None], **options: Any) -> nn.Module:
    """A module with the given tensors; those that are None it does not have."""
    module: nn.Module = nn.utils.skip_init(kind, **options)  # type: ignore[no-untyped-call]
    given = {name: torch.tensor(array.copy(order="C")) for name, array in tensors.items() if array is not None}
    module.load_state_dict(given, assign=True)
    return module


def _linear(weight: Array, bias: Array | None) -> nn.Module:
    """weight (out, in), bias (out,)."""
    out, width = weight.shape
    options = {"in_features": width, "out_features": out, "bias": bias is not None}
    return filled(nn.Linear, {"weight": np.ascontiguousarray(weight, np.float32), "bias": bias}, **options)


def _check_rank(op: Operator, x: fx.Node, rank: int) -> None:
    """Refuse an operator unless it works on one or two axes after batch and channels, and `x` has them."""
    if rank not in (1, 2) or len(op.shape(x)) != rank + 2:
        raise op.refuse(
            f"works on {rank} axes of a tensor with {len(op.shape(x))}; effcli takes 1 or 2 after batch and channels"
        )


def _per_axis(op: Operator, name: str, rank: int) -> list[int]:
    """An attribute with one number for each of `rank` axes, 1 unless given; refused with another count."""
    values: list[int] = op.attribute(name, [1] * rank)
    if len(values) != rank:
        raise op.refuse(f"has {len(values)} {name} for {rank} axes")
    return values


def _pads(op: Operator, x: fx.Node, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pads:
    """(before, after) of each axis after batch and channels."""
    mode, rank = op.attribute("auto_pad", "NOTSET"), len(kernel)
    if mode == "VALID":
        return [(0, 0)] * rank
    if mode == "NOTSET":
        pads = op.attribute("pads", [0] * (2 * rank))
        return list(zip(pads[:rank], pads[rank:], strict=True))
    found = []
    for size, width, step, spread in zip(op.shape(x)[2:], kernel, stride, dilation, strict=True):
        outputs = -(-size // step)
        total = max((outputs - 1) * step + (width - 1) * spread + 1 - size, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return found


def _ceil(op: Operator) -> bool:
    """Whether windows that begin inside count although they end outside; automatic padding fixes the size itself."""
    return bool(op.attribute("ceil_mode", 0)) and op.attribute("auto_pad", "NOTSET") == "NOTSET"


def _even(pads: Pads) -> bool:
    return all(before == after >= 0 for before, after in pads)


def _padded(op: Operator, x: fx.Node, pads: Pads, value: float) -> fx.Node:
    """`x` with its last axes padded, one pair of `pads` each."""
    used = next((k for k, pair in enumerate(pads) if any(pair)), None)
    if used is None:
        return x
    flat = [extent for pair in reversed(pads[used:]) for extent in pair]
    return op.call("aten.constant_pad_nd.default", x, flat, value)


def _sliced(op: Operator, x: fx.Node, axis: int, part: slice) -> fx.Node:
    """A part of an axis; the whole is no operation."""
    shape = op.shape(x)
    axis += len(shape) if axis < 0 else 0
    start, stop, step = part.indices(shape[axis])
    if (start, step) == (0, 1) and stop == shape[axis]:
        return x
    return op.call("aten.slice.Tensor", x, op.axis(axis, len(shape)), start, max(start, stop), step)


Translated = fx.Node | tuple[fx.Node, ...]

OPERATORS: dict[str, Callable[[Operator], Translated]] = {
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_BINARY, binary),
    **dict.fromkeys(_REDUCTIONS, reduction),
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Concat": concatenate,
    "Conv": convolution,
    "Dropout": dropout,
    "Elu": elu,
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "HardSigmoid": hard_sigmoid,
    "Identity": identity,
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": softmax,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Pad": pad,
    "Pow": power,
    "Reshape": reshape,
    "Slice": take_slice,
    "Softmax": softmax,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
