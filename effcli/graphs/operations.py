"""The operations of an IntegerNetwork: each defined by integers alone, and the rounding that they share.

A tensor of int8 codes q stands for scale · (q - zero). Rounding is declared here and nowhere else: `rescale` drops the
bits of every operation, but for the quotients of `Softmax` and the square root and reciprocal of `LayerNorm`, which are
rounded down as their definitions say.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from effcli.errors import NumericsError
from effcli.options import Options

LOWEST, HIGHEST = -128, 127

Array = NDArray[Any]
Pair = tuple[int, int]

# The multipliers of an addition fit 16 bits, so that one dual multiply-accumulate serves both terms; 2^22 keeps a zero
# point times 2^shift inside 32 bits.
_ADD_BITS = 15
_ADD_SHIFT = 22


def rescale(values: Array, multiplier: Array | int, shift: Array | int) -> Array:
    """⌊(v · multiplier + 2^(shift-1)) / 2^shift⌋, the rounding of every operation: to nearest, halves upwards.

    values: integers of 32 bits; multiplier: 0 to 2^31 - 1, shift: 1 to 62, both numbers or shaped to meet the values.
    Computed in int64, in which the product of an int32 and a multiplier is exact; with shift 32 it is the high word of
    a 64-bit product with rounding. With the multiplier 1 values may have up to 62 bits.
    """
    shifts = np.asarray(shift, dtype=np.int64)
    result: Array = np.multiply(values, np.asarray(multiplier, dtype=np.int64), dtype=np.int64)
    result += np.int64(1) << (shifts - 1)
    result >>= shifts
    return result


def requantizer(scale: float) -> tuple[int, int]:
    """(multiplier, shift) with multiplier / 2^shift next to `scale`, the ratio of accumulator to output scale.

    Shift 32 wherever at least 16 significant bits remain: a core's high-word multiply then rescales in one
    instruction. Elsewhere the multiplier is normalised to 31 bits. Raises `NumericsError` for a scale that is not
    positive, or so large that a single step passes the whole range.
    """
    if not 0 < scale < 2**16:
        raise NumericsError(f"a rescaling by {scale:g} is out of range", "calibrate on data of the network's own kind")
    if 2**-16 <= scale < 0.5 - 2**-33:
        return round(scale * 2**32), 32
    shift = min(30 - math.floor(math.log2(scale)), 62)
    multiplier = round(scale * 2**shift)
    return (multiplier, shift) if multiplier < 2**31 else (multiplier // 2, shift - 1)


def addition(first: float, second: float, zeros: tuple[int, int, int]) -> tuple[Pair, int, int]:
    """(multipliers, offset, shift) of an addition; `first` and `second` are the inputs' scales over the output's.

    zeros: of both inputs and the output. The output is (q₁·m₁ + q₂·m₂ + offset) rescaled by 2^-shift: the zero points
    and the output's own are folded into the offset, and there is one rounding. Every term fits int32.
    """
    largest = max(abs(first), abs(second))
    if not 0 < largest < 2 ** (_ADD_BITS - 2):
        raise NumericsError(f"an addition with the scale ratio {largest:g} is out of range", "calibrate on other data")
    shift = min(_ADD_BITS - 1 - math.floor(math.log2(largest)), _ADD_SHIFT)
    multipliers = round(first * 2**shift), round(second * 2**shift)
    if max(map(abs, multipliers)) >= 2**_ADD_BITS:
        shift -= 1
        multipliers = round(first * 2**shift), round(second * 2**shift)
    offset = (zeros[2] << shift) - zeros[0] * multipliers[0] - zeros[1] * multipliers[1]
    return multipliers, offset, shift


def softmax_bits(count: int, bits: int = 8) -> int:
    """The k of `Softmax` over `count` numbers in steps of 2^-b: the largest with 2^k · max(n, 2^b + ⌈n / 2⌉) < 2^32."""
    return ((2**32 - 1) // max(count, (1 << bits) + (count + 1) // 2)).bit_length() - 1


class Value(Options):
    """A tensor of int8 codes. shape: without the batch axis; it stands for scale · (q - zero)."""

    shape: tuple[int, ...]
    scale: float = Field(gt=0)
    zero: int = Field(ge=LOWEST, le=HIGHEST)


class Operation(Options):
    """One step: `inputs` and `output` name values. source: the line or node that it comes from, for messages."""

    name: str
    inputs: tuple[str, ...]
    output: str
    source: str = ""

    @property
    def arrays(self) -> tuple[str, ...]:
        """The suffixes of the constants that belong to it, stored as `name.suffix`."""
        return ()


class Clamped(Operation):
    """An operation whose result is clamped to [low, high], into which a ReLU is fused."""

    low: int = Field(LOWEST, ge=LOWEST, le=HIGHEST)
    high: int = Field(HIGHEST, ge=LOWEST, le=HIGHEST)


class Weighted(Clamped):
    """Σ weight · q + bias, rescaled per output channel, plus the output's zero point, clamped.

    Arrays: weight int8; bias int32 (out,), with - zero · Σ weight of the input folded in; multiplier int32 (out,);
    shift uint8 (out,). layer: the layer it was made from. weight_bits: how its weights are stored.
    """

    layer: str
    weight_bits: Literal[2, 4, 8] = 8

    @property
    def arrays(self) -> tuple[str, ...]:
        return "weight", "bias", "multiplier", "shift"


class Convolution(Weighted):
    """A convolution of (channels, height, width), weight (out, in / groups, kernel height, kernel width).

    A 1-D convolution over (channels, length) has height 1 everywhere. padding: rows above and below, columns left and
    right, filled with the input's zero point.
    """

    op: Literal["convolution"] = "convolution"
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = Field(1, ge=1)


class Linear(Weighted):
    """A matrix product over the last axis, weight (out, in)."""

    op: Literal["linear"] = "linear"


class Add(Clamped):
    """(q₁·m₁ + q₂·m₂ + offset) / 2^shift, see `addition`; inputs broadcast as in NumPy."""

    op: Literal["add"] = "add"
    multipliers: Pair
    offset: int
    shift: int


class Multiply(Clamped):
    """(q₁ - zero₁)(q₂ - zero₂) rescaled, plus the output's zero point; inputs broadcast as in NumPy."""

    op: Literal["multiply"] = "multiply"
    multiplier: int
    shift: int


class MaxPool(Operation):
    """The largest code in each window; padding never wins. Input and output share one scale."""

    op: Literal["max_pool"] = "max_pool"
    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)


class AveragePool(Clamped):
    """Σ (q - zero) of each window rescaled, plus the output's zero point; the multiplier holds 1 / window size.

    Padding counts as zeros.
    """

    op: Literal["average_pool"] = "average_pool"
    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    multiplier: int
    shift: int


class Mean(Clamped):
    """Σ (q - zero) over `axes` (of the shape without batch) rescaled, plus the output's zero point."""

    op: Literal["mean"] = "mean"
    axes: tuple[int, ...]
    keep: bool = Field(False, description="Keep the axes with extent 1.")
    multiplier: int
    shift: int


class Table(Operation):
    """Any function of one number: output code = table[q + 128]. Arrays: table int8 (256,)."""

    op: Literal["table"] = "table"
    function: str = Field(description="what it computes, e.g. 'sigmoid' or 'requantize'")

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("table",)


class Pad(Operation):
    """Constant padding. padding: (before, after) of each axis; value: the code to fill in."""

    op: Literal["pad"] = "pad"
    padding: tuple[Pair, ...]
    value: int


class Concatenate(Operation):
    """Values of one scale, one after the other along `axis`."""

    op: Literal["concatenate"] = "concatenate"
    axis: int


class Slice(Operation):
    """Every `step`-th entry from `start` to before `stop` along `axis`."""

    op: Literal["slice"] = "slice"
    axis: int
    start: int
    stop: int
    step: int = Field(1, ge=1)


class Reshape(Operation):
    """The same codes in the output's shape."""

    op: Literal["reshape"] = "reshape"


class Transpose(Operation):
    """The axes in another order."""

    op: Literal["transpose"] = "transpose"
    axes: tuple[int, ...]


class MatrixProduct(Clamped):
    """Σ_k (a_mk - zero_a)(b_kn - zero_b) rescaled, plus the output's zero point, clamped.

    Inputs a (..., M, K) and b (..., K, N) with equal leading axes, one at most besides the batch's; output (..., M, N).
    K · 255² < 2^31, that is K ≤ 33,025, so every partial sum fits int32.
    """

    op: Literal["matrix_product"] = "matrix_product"
    multiplier: int
    shift: int


class Softmax(Operation):
    """e_i / Σ e along the last axis of n codes, in steps of 2^-b, b = `bits`.

    With q* the largest code of a row:

        e_i = table[q* - q_i],    S = Σ e_i,    out_i = min(127, ⌊(2^b · e_i + ⌊S / 2⌋) / S⌋ - 128).

    Arrays: table uint32 (256,), 2^k at its start and nowhere larger: table[d] = round(2^k · exp(-d · input scale)). k
    is the largest with 2^k · max(n, 2^b + ⌈n / 2⌉) < 2^32, see `softmax_bits`: S and the dividend fit unsigned 32 bits,
    and S ≥ 2^k > 0. The output's scale is 2^-b, its zero point -128; a probability of 1 becomes 255 · 2^-b. With b = 8
    that is next to 1; over many numbers, none of which is probable, steps are finer. n ≤ 65,536, so k ≥ 7.
    """

    op: Literal["softmax"] = "softmax"
    bits: int = Field(8, ge=8, le=24)

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("table",)


class LayerNorm(Clamped):
    """(x - mean) / √(variance + ε) · weight + bias along the last axis of n ≤ 4,096 codes.

    Its input's scale and zero point cancel. For each row, in this order, every step exact unless it says ⌊⌋:

        s = Σ q_i                           |s| ≤ 2^19
        v = n · Σ q_i² - s²                 n² · variance, 0 ≤ v ≤ n² · 127.5² < 2^38; if v = 0 every y_i below is 0
        m = v · 2^16 + epsilon              2^16 ≤ m < 2^62 as v ≥ 1
        t = ⌊(32 - bits) / 2⌋               bits: the length of m in binary, 17 to 62, so -15 ≤ t ≤ 7
        u = ⌊m · 4^t⌋                       2^30 ≤ u < 2^32
        r = ⌊√u⌋                            2^15 ≤ r < 2^16
        c = ⌊(2^32 - 1) / r⌋                2^16 < c < 2^17, the reciprocal
        d_i = n · q_i - s                   |d_i| ≤ 255 (n - 1) < 2^20
        y_i = rescale(d_i · c, 1, 8 - t)    16 fraction bits, |d_i · c| < 2^37, |y_i| < 2^23
        out_i = rescale(y_i · multiplier_i + bias_i · 2^16, 1, 16 + shift) + zero, clamped

    The last sum stays below 2^55 and rescales in int64. y_i / 2^16 is right to a relative 2^-14, and 2^-17 besides.

    Arrays: multiplier and bias int32 (n,): weight and bias over the output's scale, in units of 2^-shift. epsilon:
    ε · n² · 2^16 / (input scale)², rounded, below 2^61. shift: 8 to 46.
    """

    op: Literal["layer_norm"] = "layer_norm"
    epsilon: int = Field(ge=0, lt=2**61)
    shift: int = Field(ge=8, le=46)

    @property
    def arrays(self) -> tuple[str, ...]:
        return "multiplier", "bias"


class Embedding(Operation):
    """A row for each code: output (..., D) = table[q + 128] of an input (...).

    Arrays: table int8 (256, D), its last rows equal where fewer are known. The input's scale is 1, its zero point -128,
    so that its codes stand for the numbers 0 to 255 of the rows.
    """

    op: Literal["embedding"] = "embedding"

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("table",)


class Constant(Operation):
    """The same codes for every input of a batch; it reads no value. Arrays: value int8 in the output's shape."""

    op: Literal["constant"] = "constant"
    inputs: tuple[str, ...] = Field((), max_length=0)

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("value",)


Step = Annotated[
    Convolution
    | Linear
    | Add
    | Multiply
    | MaxPool
    | AveragePool
    | Mean
    | Table
    | Pad
    | Concatenate
    | Slice
    | Reshape
    | Transpose
    | MatrixProduct
    | Softmax
    | LayerNorm
    | Embedding
    | Constant,
    Field(discriminator="op"),
]
