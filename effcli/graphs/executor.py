"""The meaning of an IntegerNetwork: every operation in NumPy, as integers; what others compute is compared with this.

Sums of products of codes go through BLAS in float32 where max Σ|weight| · 128 < 2^24 over the output channels, and in
float64 elsewhere. Every partial sum is then an integer that the type holds exactly, whatever the order of summation,
so the result is that of integer arithmetic (float64 would need 2^38 inputs of one output to leave that range).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from effcli.errors import DataError
from effcli.graphs.integer import (
    HIGHEST,
    LOWEST,
    Add,
    Array,
    AveragePool,
    Clamped,
    Concatenate,
    Constant,
    Convolution,
    Embedding,
    IntegerNetwork,
    LayerNorm,
    Linear,
    MatrixProduct,
    MaxPool,
    Mean,
    Multiply,
    Operation,
    Pad,
    Pair,
    Reshape,
    Slice,
    Softmax,
    Table,
    Transpose,
    Weighted,
    rescale,
)
from effcli.platform import steps

# Bytes of the largest intermediate array of one batch: as fast as larger ones, which leave the caches.
_CHUNK = 1 << 22
# Up to here float32 holds every integer.
_EXACT = 1 << 24
# The largest difference of two codes.
_CODES = HIGHEST - LOWEST


@overload
def run(network: IntegerNetwork, codes: Array, keep: Literal[False] = False) -> Array: ...


@overload
def run(network: IntegerNetwork, codes: Array, keep: Literal[True]) -> dict[str, Array]: ...


def run(network: IntegerNetwork, codes: Array, keep: bool = False) -> Array | dict[str, Array]:
    """Output codes int8 (n, *output shape) of input codes int8 (n, *input shape).

    The batch is taken in parts, so that memory beyond inputs and outputs is bounded. keep: return every value by name
    instead. `DataError` for inputs of another shape or type.
    """
    program = network.program
    if codes.shape[1:] != network.input.shape or codes.dtype != np.int8:
        raise DataError(
            f"codes {codes.dtype} {codes.shape[1:]} for a network that takes int8 {network.input.shape}",
            "the first axis is the batch; the network's own `quantize` makes codes of inputs",
        )
    size = min((_batch(network, step) for step in program.steps), default=max(len(codes), 1))
    kept: dict[str, list[Array]] = {name: [] for name in (program.values if keep else [program.output])}
    last = {name: index for index, step in enumerate(program.steps) for name in step.inputs}
    starts = range(0, max(len(codes), 1), size)
    steps.expect(len(starts) * len(program.steps))
    for start in starts:
        values = {program.input: codes[start : start + size]}
        for index, step in enumerate(program.steps):
            values[step.output] = execute(network, step, values)
            steps.tick()
            for name in set(step.inputs):
                if last[name] == index and name not in kept:
                    del values[name]
        for name, parts in kept.items():
            # What follows from constants alone has a batch of one.
            batch = len(codes[start : start + size])
            parts.append(np.broadcast_to(values[name], (batch, *values[name].shape[1:])))
    whole = {name: np.concatenate(parts) for name, parts in kept.items()}
    return whole if keep else whole[program.output]


def run_float(network: IntegerNetwork, inputs: Array) -> Array:
    """Floating outputs (n, *output shape) of floating inputs (n, *input shape): quantize, run, dequantize."""
    return network.dequantize(run(network, network.quantize(inputs)))


def execute(network: IntegerNetwork, step: Operation, values: Mapping[str, Array]) -> Array:
    """The output of one step, int8 (n, *shape); values: at least its inputs, by name.

    A `Constant`, and what is made of constants alone, has a batch of one, which meets any other.
    """
    inputs = [values[name] for name in step.inputs]
    size, count = _batch(network, step), next((len(codes) for codes in inputs if len(codes) != 1), 1)
    apply = _OPERATIONS[type(step)]
    inputs = [np.broadcast_to(codes, (count, *codes.shape[1:])) for codes in inputs]
    if count <= size:
        return apply(network, step, *inputs)
    return np.concatenate(
        [apply(network, step, *(codes[start : start + size] for codes in inputs)) for start in range(0, count, size)]
    )


def mean_accumulator(network: IntegerNetwork, step: Weighted, codes: Array) -> Array:
    """Mean over inputs and positions of `accumulate`, float64 (out,); codes int8 (n, *input shape), n at least 1."""
    total, size = np.zeros(len(network.array(step, "bias"))), _batch(network, step)
    for start in range(0, len(codes), size):
        sums = accumulate(network, step, codes[start : start + size])
        axis = 1 if isinstance(step, Convolution) else sums.ndim - 1
        moved = np.moveaxis(sums, axis, -1)
        total += moved.reshape(-1, len(total)).sum(0) / math.prod(moved.shape[1:-1])
    result: Array = total / len(codes)
    return result


def accumulate(network: IntegerNetwork, step: Weighted, codes: Array) -> Array:
    """Σ weight · q + bias before rescaling, int64 (n, *output shape), of input codes int8 (n, *input shape)."""
    weight, bias = network.array(step, "weight"), network.array(step, "bias")
    dtype = _exact_type(weight)
    if isinstance(step, Convolution):
        products = _convolve(step, weight.astype(dtype), codes, network.program.values[step.inputs[0]].zero)
    else:
        products = codes.astype(dtype) @ weight.astype(dtype).T
    sums: Array = products.astype(np.int64)
    sums += _by_channel(step, bias, sums.ndim)
    return sums


def _exact_type(weight: Array) -> type[np.floating[Any]]:
    rows = np.abs(weight.reshape(len(weight), -1).astype(np.int64)).sum(1)
    return np.float32 if rows.max(initial=0) * -LOWEST < _EXACT else np.float64


def _by_channel(step: Weighted, constants: Array, dimensions: int) -> Array:
    """constants (out,) shaped to meet outputs: (n, out, height, width) of a convolution, (n, ..., out) of a linear."""
    return constants.reshape(-1, *(1,) * (dimensions - 2)) if isinstance(step, Convolution) else constants


def _convolve(step: Convolution, weight: Array, codes: Array, zero: int) -> Array:
    """Σ weight · q of codes (n, channels, height, width) and a floating weight (out, in / groups, height, width)."""
    out, _, *kernel = weight.shape
    padded = _padded(codes, step.padding, zero, weight.dtype)
    windows = _windows(padded, (kernel[0], kernel[1]), step.stride, step.dilation)
    count, channels, height, width = windows.shape[:4]
    patch = channels // step.groups * math.prod(kernel)
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(count, step.groups, patch, height * width)
    products: Array = weight.reshape(step.groups, out // step.groups, patch) @ columns
    return products.reshape(count, out, height, width)


def _padded(codes: Array, padding: tuple[int, int, int, int], value: int, dtype: Any) -> Array:
    """codes (n, channels, height, width) as `dtype` with rows above and below, columns left and right."""
    if not any(padding):
        return codes.astype(dtype)
    top, bottom, left, right = padding
    count, channels, height, width = codes.shape
    padded = np.full((count, channels, height + top + bottom, width + left + right), value, dtype)
    padded[:, :, top : top + height, left : left + width] = codes
    return padded


def _windows(padded: Array, kernel: Pair, stride: Pair, dilation: Pair) -> Array:
    """A view (n, channels, output height, output width, kernel height, kernel width)."""
    spans = [(length - 1) * step + 1 for length, step in zip(kernel, dilation, strict=True)]
    windows = sliding_window_view(padded, spans, axis=(2, 3))
    result: Array = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return result


def _clamped(step: Clamped, rescaled: Array, zero: int) -> Array:
    """Rescaled numbers plus the output's zero point, clamped, as codes; overwrites `rescaled`."""
    rescaled += zero
    result: Array = np.clip(rescaled, step.low, step.high, out=rescaled).astype(np.int8)
    return result


def _zeros(network: IntegerNetwork, step: Operation) -> tuple[list[int], int]:
    values = network.program.values
    return [values[name].zero for name in step.inputs], values[step.output].zero


def _weighted(network: IntegerNetwork, step: Weighted, codes: Array) -> Array:
    sums = accumulate(network, step, codes)
    multiplier, shift = (_by_channel(step, network.array(step, name), sums.ndim) for name in ("multiplier", "shift"))
    return _clamped(step, rescale(sums, multiplier, shift), _zeros(network, step)[1])


def _add(network: IntegerNetwork, step: Add, first: Array, second: Array) -> Array:
    sums = first.astype(np.int64) * step.multipliers[0] + second.astype(np.int64) * step.multipliers[1]
    return _clamped(step, rescale(sums + step.offset, 1, step.shift), 0)


def _multiply(network: IntegerNetwork, step: Multiply, first: Array, second: Array) -> Array:
    zeros, zero = _zeros(network, step)
    products = (first.astype(np.int64) - zeros[0]) * (second.astype(np.int64) - zeros[1])
    return _clamped(step, rescale(products, step.multiplier, step.shift), zero)


def _max_pool(network: IntegerNetwork, step: MaxPool, codes: Array) -> Array:
    padded = _padded(codes, step.padding, LOWEST, np.int8)
    result: Array = _windows(padded, step.kernel, step.stride, step.dilation).max(axis=(4, 5))
    return result


def _average_pool(network: IntegerNetwork, step: AveragePool, codes: Array) -> Array:
    (zero,), output_zero = _zeros(network, step)
    padded = _padded(codes, step.padding, zero, np.int64) - zero
    sums = _windows(padded, step.kernel, step.stride, (1, 1)).sum(axis=(4, 5))
    return _clamped(step, rescale(sums, step.multiplier, step.shift), output_zero)


def _mean(network: IntegerNetwork, step: Mean, codes: Array) -> Array:
    (zero,), output_zero = _zeros(network, step)
    axes = tuple(axis + 1 for axis in step.axes)
    sums = (codes.astype(np.int64) - zero).sum(axis=axes, keepdims=step.keep)
    return _clamped(step, rescale(sums, step.multiplier, step.shift), output_zero)


def _table(network: IntegerNetwork, step: Table, codes: Array) -> Array:
    result: Array = network.array(step, "table")[codes.astype(np.int64) - LOWEST]
    return result


def _pad(network: IntegerNetwork, step: Pad, codes: Array) -> Array:
    return np.pad(codes, ((0, 0), *step.padding), constant_values=step.value)


def _concatenate(network: IntegerNetwork, step: Concatenate, *parts: Array) -> Array:
    return np.concatenate(parts, axis=step.axis + 1)


def _slice(network: IntegerNetwork, step: Slice, codes: Array) -> Array:
    return codes[(slice(None),) * (step.axis + 1) + (slice(step.start, step.stop, step.step),)]


def _reshape(network: IntegerNetwork, step: Reshape, codes: Array) -> Array:
    return codes.reshape(len(codes), *network.program.values[step.output].shape)


def _transpose(network: IntegerNetwork, step: Transpose, codes: Array) -> Array:
    return codes.transpose(0, *(axis + 1 for axis in step.axes))


def _matrix_product(network: IntegerNetwork, step: MatrixProduct, first: Array, second: Array) -> Array:
    zeros, zero = _zeros(network, step)
    dtype = np.float32 if first.shape[-1] * _CODES**2 < _EXACT else np.float64
    sums: Array = np.matmul(first.astype(dtype) - zeros[0], second.astype(dtype) - zeros[1])
    return _clamped(step, rescale(sums.astype(np.int64), step.multiplier, step.shift), zero)


def _softmax(network: IntegerNetwork, step: Softmax, codes: Array) -> Array:
    wide = codes.astype(np.int64)
    powers = network.array(step, "table").astype(np.int64)[wide.max(axis=-1, keepdims=True) - wide]
    total = powers.sum(axis=-1, keepdims=True)
    quotients = ((powers << step.bits) + total // 2) // total
    result: Array = np.minimum(quotients + LOWEST, HIGHEST).astype(np.int8)
    return result


def _layer_norm(network: IntegerNetwork, step: LayerNorm, codes: Array) -> Array:
    multiplier, bias = (network.array(step, name).astype(np.int64) for name in ("multiplier", "bias"))
    sums = normalized(codes, step.epsilon) * multiplier + bias * 2**16
    return _clamped(step, rescale(sums, 1, 16 + step.shift), _zeros(network, step)[1])


def normalized(codes: Array, epsilon: int) -> Array:
    """The y of a `LayerNorm`, int64 in units of 2^-16, of codes int8 (..., n)."""
    wide, count = codes.astype(np.int64), codes.shape[-1]
    total = wide.sum(axis=-1, keepdims=True)
    variance = count * np.square(wide).sum(axis=-1, keepdims=True) - total**2
    # A row of equal codes has no difference to divide: any divisor will do.
    measure = np.where(variance > 0, variance * 2**16 + epsilon, 1 << 16)
    half = (32 - _bit_length(measure)) // 2
    scaled = np.where(half >= 0, measure << (2 * np.maximum(half, 0)), measure >> (-2 * np.minimum(half, 0)))
    # A square root in float64 of less than 2^52 is right to its last bit, and so is its floor.
    root = np.sqrt(scaled.astype(np.float64)).astype(np.int64)
    return rescale((count * wide - total) * ((2**32 - 1) // root), 1, 8 - half)


def _bit_length(values: Array) -> Array:
    """The length in binary of positive int64; in halves that float64 holds."""
    high = values >> 32
    upper, lower = np.frexp(high.astype(np.float64))[1], np.frexp((values & (2**32 - 1)).astype(np.float64))[1]
    result: Array = np.where(high > 0, 32 + upper, lower).astype(np.int64)
    return result


def _embedding(network: IntegerNetwork, step: Embedding, codes: Array) -> Array:
    result: Array = network.array(step, "table")[codes.astype(np.int64) - LOWEST]
    return result


def _constant(network: IntegerNetwork, step: Constant) -> Array:
    return network.array(step, "value")[None]


_OPERATIONS: dict[type[Operation], Callable[..., Array]] = {
    Convolution: _weighted,
    Linear: _weighted,
    Add: _add,
    Multiply: _multiply,
    MaxPool: _max_pool,
    AveragePool: _average_pool,
    Mean: _mean,
    Table: _table,
    Pad: _pad,
    Concatenate: _concatenate,
    Slice: _slice,
    Reshape: _reshape,
    Transpose: _transpose,
    MatrixProduct: _matrix_product,
    Softmax: _softmax,
    LayerNorm: _layer_norm,
    Embedding: _embedding,
    Constant: _constant,
}


def _batch(network: IntegerNetwork, step: Operation) -> int:
    """How many inputs to take at once, so that the largest array of `step` stays below `_CHUNK`; at least one."""
    values = network.program.values
    numbers = max(math.prod(values[name].shape) for name in (*step.inputs, step.output))
    if isinstance(step, Convolution):
        patch = math.prod(network.array(step, "weight").shape[1:]) * step.groups
        numbers = max(numbers, patch * math.prod(values[step.output].shape[1:]))
    return max(1, _CHUNK // (8 * max(numbers, 1)))
