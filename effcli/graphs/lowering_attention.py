"""What `lowering` makes of the parts of a transformer: products of activations, softmax, layer norm and embedding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx, nn

from effcli.errors import NumericsError, UnsupportedError
from effcli.graphs.assembly import REMEDY, Assembly, Numbers, codes_of, multiplier, numbers, origin
from effcli.graphs.fusion import INDICES
from effcli.graphs.graph import operation, where
from effcli.graphs.integer import (
    HIGHEST,
    LOWEST,
    Embedding,
    LayerNorm,
    MatrixProduct,
    Reshape,
    Softmax,
    Transpose,
    softmax_bits,
)

_CODES = HIGHEST - LOWEST
# The longest rows for which the bounds of the operations hold.
_LONGEST_SOFTMAX, _LONGEST_NORM = 65536, 4096


def product(assembly: Assembly, node: fx.Node) -> None:
    """A product of two tensors of activations, matrix by matrix."""
    axes = len(assembly.shapes[node.name])
    names = assembly.operand(node, node.args[0], axes), assembly.operand(node, node.args[1], axes)
    first, second = (assembly.values[name] for name in names)
    target, value, clamps = assembly.result(node)
    if not 2 <= len(first.shape) == len(second.shape) <= 3 or first.shape[:-2] != second.shape[:-2]:
        raise UnsupportedError(
            f"{where(node)} multiplies {first.shape} by {second.shape}: no matrices one by one", REMEDY
        )
    if first.shape[-1] * _CODES**2 >= 2**31:
        raise UnsupportedError(f"{where(node)} sums {first.shape[-1]} products, which may leave 32 bits", REMEDY)
    factor, shift = multiplier(node, first.scale * second.scale / value.scale)
    options: dict[str, Any] = {"multiplier": factor, "shift": shift, "source": origin(node), **clamps}
    assembly.steps.append(MatrixProduct(name=node.name, inputs=names, output=target, **options))


def softmax(assembly: Assembly, node: fx.Node) -> None:
    """Along the last axis; along another, that one is moved there and back."""
    source, axis = assembly.source(node), int(node.args[1]) - 1  # type: ignore[arg-type]
    shape = assembly.values[source].shape
    assembly.declare(node.name, shape)
    if axis < 0:
        raise UnsupportedError(f"{where(node)} compares the inputs of a batch", REMEDY)
    if shape[axis] > _LONGEST_SOFTMAX:
        raise UnsupportedError(
            f"{where(node)} weighs {shape[axis]} numbers, more than the {_LONGEST_SOFTMAX} that 32 bits allow", REMEDY
        )
    last = len(shape) - 1
    axes = [other for other in range(len(shape)) if other != axis] + [axis]
    entry, result = source, node.name
    if axis != last:
        entry, result = f"{node.name}.input", f"{node.name}.output"
        moved = tuple(shape[each] for each in axes)
        assembly.declare(entry, moved, like=source)
        assembly.declare(result, moved, like=node.name)
        assembly.steps.append(Transpose(name=entry, inputs=(source,), output=entry, axes=tuple(axes)))
    # Steps of 2^-bits: the scale is a power of two.
    bits = 1 - math.frexp(assembly.values[node.name].scale)[1]
    assembly.steps.append(Softmax(name=result, inputs=(entry,), output=result, bits=bits, source=origin(node)))
    exponents = -np.arange(_CODES + 1) * assembly.values[source].scale
    powers = np.rint(np.ldexp(np.exp(exponents), softmax_bits(shape[axis], bits)))
    assembly.arrays[f"{result}.table"] = powers.astype(np.uint32)
    if axis != last:
        back = tuple(int(place) for place in np.argsort(axes))
        assembly.steps.append(Transpose(name=node.name, inputs=(result,), output=node.name, axes=back))


def layer_norm(assembly: Assembly, node: fx.Node) -> None:
    """Over the last axis."""
    module = assembly.graph.module_of(node)
    assert isinstance(module, nn.LayerNorm)
    source = assembly.values[assembly.source(node)]
    target, value, clamps = assembly.result(node)
    count = source.shape[-1]
    if len(module.normalized_shape) != 1:
        raise UnsupportedError(f"{where(node)} normalizes over {module.normalized_shape}, not one axis", REMEDY)
    if count > _LONGEST_NORM:
        raise UnsupportedError(
            f"{where(node)} normalizes {count} numbers, more than the {_LONGEST_NORM} that 64 bits allow", REMEDY
        )
    gain = np.ones(count) if module.weight is None else numbers(module.weight)
    offset = np.zeros(count) if module.bias is None else numbers(module.bias)
    gains, biases, shift = _fixed_point(node, gain / value.scale, offset / value.scale)
    # Where ε dwarfs every variance that codes can have, the result is nothing, however large it is exactly.
    epsilon = round(min(module.eps * (count / source.scale) ** 2 * 2**16, 2.0**60))
    options: dict[str, Any] = {"epsilon": epsilon, "shift": shift, "source": origin(node), **clamps}
    assembly.steps.append(LayerNorm(name=node.name, inputs=(assembly.source(node),), output=target, **options))
    assembly.arrays[f"{node.name}.multiplier"] = gains
    assembly.arrays[f"{node.name}.bias"] = biases


def _fixed_point(node: fx.Node, gain: Numbers, offset: Numbers) -> tuple[Any, Any, int]:
    """Both as int32 in units of 2^-shift, and the shift, from 8 to 46."""
    largest = max(np.abs(gain).max(initial=0), np.abs(offset).max(initial=0), 2.0**-16)
    shift = min(30 - math.ceil(math.log2(largest)), 46)
    if shift < 8:
        raise NumericsError(f"{where(node)} scales by {largest:g} steps of its output", "calibrate on other data")
    found = [np.rint(np.ldexp(array, shift)).astype(np.int32) for array in (gain, offset)]
    return found[0], found[1], shift


def embedding(assembly: Assembly, node: fx.Node) -> None:
    module = assembly.graph.module_of(node)
    assert isinstance(module, nn.Embedding)
    rows = numbers(module.weight)
    if len(rows) > _CODES + 1:
        raise UnsupportedError(
            f"{where(node)} has {len(rows)} rows, more than the {_CODES + 1} that a code of 8 bits tells apart",
            "give the network its rows as inputs, looked up outside",
        )
    given = node.all_input_nodes[0]
    while operation(given) == "aten.to.dtype":
        given = given.all_input_nodes[0]
    value = assembly.declare(node.name, assembly.shapes[node.name])
    assembly.steps.append(Embedding(name=node.name, inputs=(given.name,), output=node.name, source=origin(node)))
    padded = np.concatenate([rows, np.repeat(rows[-1:], _CODES + 1 - len(rows), axis=0)])
    assembly.arrays[f"{node.name}.table"] = codes_of(value, padded)


def conversion(assembly: Assembly, node: fx.Node) -> None:
    """To whole numbers, which the codes of what an embedding looks up are already."""
    source = assembly.source(node)
    if assembly.fusion.grids.get(assembly.fusion.groups[node.name]) != INDICES:
        raise UnsupportedError(f"{where(node)} has no integer operation", REMEDY)
    assembly.declare(node.name, assembly.shapes[node.name])
    assembly.steps.append(Reshape(name=node.name, inputs=(source,), output=node.name, source=origin(node)))
