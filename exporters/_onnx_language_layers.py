"""What becomes of a compressed layer in ONNX: onnxruntime's `MatMulNBits`, or an 8-bit integer product.

`com.microsoft.MatMulNBits` (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md) takes codes of
4 or 8 bits with one scale and zero point per block of 16, 32, 64, 128 or 256 inputs. Where a format differs in form
only, its numbers carry over exactly: fewer bits are stored as wider codes, and a scale that covers more than a block is
repeated. Nothing is quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effcli.errors import UnsupportedError
from effcli.exporters import _onnx_integer_linear
from effcli.exporters._obstacles import by_reason
from effcli.exporters._onnx_integer_linear import Inputs, IntegerLinear, declare, declare_rest, input_factor
from effcli.files.layout import Stored
from effcli.formats import Affine, AffineWeight
from effcli.reports.units import count

Tensors = dict[str, Tensor]

_LARGEST_BLOCK = 256
_SMALLEST_BLOCK = 16
# Inputs that a block has where the format has no groups, one of those with a fast kernel.
_FREE_BLOCK = 128


@dataclass(frozen=True)
class Arithmetic:
    """How layers are multiplied.

    precision: of activations, scales and dense weights; activations: "int8" where they are quantized in every run;
    accuracy_level: of `MatMulNBits`, 0 in `precision`, 4 with inputs quantized to 8 bits by block.
    """

    precision: Literal["float32", "float16"] = "float32"
    activations: Literal["int8"] | None = None
    accuracy_level: Literal[0, 4] = 0

    @property
    def exact(self) -> bool:
        """Whether results differ from float32 arithmetic by the order of sums alone."""
        return self.precision == "float32" and self.activations is None and self.accuracy_level == 0


@dataclass(frozen=True)
class Blocks:
    """How `MatMulNBits` holds a weight (rows, columns).

    bits: 4 or 8; size: inputs per block; zeros: whether zero points are stored (else they are 2**(bits-1)).
    """

    rows: int
    columns: int
    bits: int
    size: int
    zeros: bool

    @property
    def number(self) -> int:
        """Blocks in a row; the last may be padded."""
        return -(-self.columns // self.size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "weight_codes": (self.rows, self.number, self.size * self.bits // 8),
            "weight_scale": (self.rows, self.number),
        }
        if self.zeros:
            shapes["weight_zero_point"] = (self.rows, -(-self.number * self.bits // 8))
        return shapes

    def tensors(self, weight: AffineWeight) -> Tensors:
        """The tensors of `shapes`: codes and zero points uint8, low bits first, scales in their stored dtype."""
        codes = torch.zeros(self.rows, self.number * self.size, dtype=torch.uint8)
        codes[:, : self.columns] = weight.codes
        if weight.zero is None:
            # A symmetric zero stands in the middle of the codes; so it does again after widening.
            codes[:, : self.columns] += (1 << (self.bits - 1)) - weight.format.fixed_zero
        packed = {
            "weight_codes": _pack(codes, self.bits).view(self.shapes["weight_codes"]),
            "weight_scale": self._per_block(weight.scale),
        }
        if weight.zero is not None:
            packed["weight_zero_point"] = _pack(self._per_block(weight.zero), self.bits)
        return packed

    def _per_block(self, values: Tensor) -> Tensor:
        """values (1 or rows, scale columns) -> (rows, number): one for each block of a row."""
        repeats = self.number // values.shape[1]
        return values.repeat_interleave(repeats, dim=1).expand(self.rows, self.number).contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 (rows, n) -> uint8 (rows, ceil(n·bits/8)), low bits first; a row's last byte is filled with zeros."""
    if bits == 8:
        return codes
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, ::2] | (padded[:, 1::2] << 4)


def block_size(format: Affine, columns: int) -> int | None:
    """The largest block that never straddles two scales, None when even the smallest does."""
    if format.strategy == "group":
        # The largest power of two that divides the group.
        size = min(format.group_size & -format.group_size, _LARGEST_BLOCK)
        return size if size >= _SMALLEST_BLOCK else None
    size = _SMALLEST_BLOCK
    while size < min(columns, _FREE_BLOCK):
        size *= 2
    return size


def as_blocks(format: Affine, shape: tuple[int, int]) -> Blocks:
    """How a weight of a format that `check` passes is held."""
    size = block_size(format, shape[1])
    assert size is not None
    return Blocks(*shape, 4 if format.bits <= 4 else 8, size, not format.symmetric)


def kernel(stored: Stored, arithmetic: Arithmetic) -> str:
    """The operator that multiplies a layer that `check` passes, e.g. 'MatMulNBits 4 bits level 0'."""
    if _integer(stored, arithmetic):
        return "MatMulInteger 8 bits"
    return f"MatMulNBits {4 if stored.format.bits <= 4 else 8} bits level {arithmetic.accuracy_level}"


def _integer(stored: Stored, arithmetic: Arithmetic) -> bool:
    """Whether a layer is multiplied in integers: by request, or because the checkpoint's inputs are int8."""
    return stored.format.rounds_inputs or arithmetic.activations is not None


def rounds_inputs(layers: Mapping[str, Stored]) -> bool:
    """Whether the inputs of some layers of the checkpoint are int8."""
    return any(stored.format.rounds_inputs for stored in layers.values())


def check(layers: Mapping[str, Stored], arithmetic: Arithmetic) -> None:
    """Raise `UnsupportedError` that names the layers without a place, by reason, and what to do."""
    integer = arithmetic.activations is not None
    if integer and not layers:
        raise UnsupportedError(
            "int8 activations need layers of 8 bits; this checkpoint has none", _onnx_integer_linear.REMEDY
        )
    obstacles = {name: _obstacle(stored, integer) for name, stored in layers.items()}
    obstacles = {name: reason for name, reason in obstacles.items() if reason}
    if not obstacles:
        return
    raise UnsupportedError(
        f"{'int8 activations have' if integer else 'MatMulNBits has'} no place for {by_reason(obstacles)}",
        _onnx_integer_linear.REMEDY if integer else "--dequantize writes dense weights",
    )


def _obstacle(stored: Stored, integer: bool) -> str:
    """Why ONNX has no place for a layer, empty when it has one."""
    format = stored.format
    if stored.kind == "expert":
        return "an expert is a slice of a 3-D parameter"
    if stored.kind not in ("linear", "conv1d"):
        return f"a {stored.kind} is not a linear"
    if not isinstance(format, Affine):
        return f"{format}, weights on no evenly spaced grid"
    if integer or format.rounds_inputs:
        return _onnx_integer_linear.obstacle(format)
    if block_size(format, _SMALLEST_BLOCK) is None:
        return f"groups of {format.group_size}, not a multiple of {_SMALLEST_BLOCK}"
    return ""


def remarks(layers: Mapping[str, Stored], arithmetic: Arithmetic) -> list[str]:
    """What the user should know of how the layers are held and run."""
    inputs = {name: _inputs(stored, arithmetic) for name, stored in layers.items()}
    found = []
    if "run" in inputs.values():
        found.append(
            "int8 activations have one scale for all tokens of a run: a token's logits depend a little on the others"
        )
    if any(inputs.values()):
        found.append("x86 processors without VNNI instructions saturate sums of two int8 products")
    floating = [stored for name, stored in layers.items() if inputs[name] is None]
    for bits in sorted({stored.format.bits for stored in floating} - {4, 8}):
        number = count(sum(stored.format.bits == bits for stored in floating), "layer")
        found.append(f"{number} of {bits} bits stored as {4 if bits < 4 else 8}-bit codes with the same values")
    if arithmetic.accuracy_level == 0 and any(stored.format.bits > 4 for stored in floating):
        found.append(
            "onnxruntime dequantizes 8-bit codes in every run at accuracy level 0, many times slower than float32 for "
            "one token; level 4 has a fast kernel"
        )
    return found


def _inputs(stored: Stored, arithmetic: Arithmetic) -> Inputs | None:
    """What a scale of a layer's inputs serves, None where they stay floating."""
    if not _integer(stored, arithmetic):
        return None
    assert isinstance(stored.format, Affine)
    return _onnx_integer_linear.inputs_of(stored.format)


class PackedLinear(nn.Module):
    """y = Ŵ (x · f) + b as `MatMulNBits`; holds shapes alone, for tracing.

    weight_codes uint8 (out, blocks, bytes), weight_scale (out, blocks), weight_zero_point uint8 (out, bytes),
    input_factor (in,): the reciprocal of an explicit input scale, bias (out,).
    """

    input_factor: Tensor | None
    bias: Tensor | None

    def __init__(self, blocks: Blocks, accuracy_level: int, dtype: torch.dtype, *, bias: bool, scaled: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.attributes: dict[str, Any] = {
            "K": blocks.columns,
            "N": blocks.rows,
            "bits": blocks.bits,
            "block_size": blocks.size,
            "accuracy_level": accuracy_level,
        }
        for name, shape in blocks.shapes.items():
            declare(self, name, shape, dtype if name == "weight_scale" else torch.uint8)
        declare_rest(self, blocks.rows, blocks.columns, dtype, bias, scaled)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        x = x if self.input_factor is None else x * self.input_factor
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, *(self.get_buffer(name) for name in self.blocks.shapes)],
            attrs=self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.blocks.rows),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def replacement(
    stored: Stored, shape: tuple[int, int], arithmetic: Arithmetic, dtype: torch.dtype, bias: bool
) -> PackedLinear | IntegerLinear:
    """The module that multiplies with the codes of a layer (out, in) that `check` passes."""
    inputs = _inputs(stored, arithmetic)
    if inputs is not None:
        return IntegerLinear(shape, dtype, bias=bias, scaled=stored.input_scale, inputs=inputs)
    assert isinstance(stored.format, Affine)
    blocks = as_blocks(stored.format, shape)
    return PackedLinear(blocks, arithmetic.accuracy_level, dtype, bias=bias, scaled=stored.input_scale)


def tensors(module: PackedLinear | IntegerLinear, weight: AffineWeight) -> Tensors:
    """What stands behind the buffers of `module`, its bias left out."""
    found = IntegerLinear.tensors(weight) if isinstance(module, IntegerLinear) else module.blocks.tensors(weight)
    return found | input_factor(weight)
