"""The executor against float64 arithmetic of torch on the same integers: every operation, at odd shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from effcli.errors import DataError
from effcli.graphs import executor
from effcli.graphs.graph import Facts
from effcli.graphs.integer import (
    Add,
    Array,
    AveragePool,
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
    Program,
    Reshape,
    Slice,
    Softmax,
    Table,
    Transpose,
    Value,
    requantizer,
    softmax_bits,
)

ZERO_X, ZERO_Y = -5, 11


def codes(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def network_of(step: Operation, shapes: dict[str, tuple[int, ...]], arrays: dict[str, Array]) -> IntegerNetwork:
    """One step, from the value x to the value y."""
    zeros = {"x": ZERO_X, "y": ZERO_Y}
    values = {name: Value(shape=shape, scale=0.5, zero=zeros[name]) for name, shape in shapes.items()}
    program = Program(input="x", output="y", values=values, steps=(step,))  # type: ignore[arg-type]
    return IntegerNetwork(program, {f"op.{key}": array for key, array in arrays.items()}, Facts(origin="", shape=()))


def run_one(make: type[Operation], inputs: Array, shape: tuple[int, ...], arrays: Any = None, **options: Any) -> Array:
    """The output of one step on input codes (n, ...); shape: of the output, without batch."""
    step = make(name="op", inputs=("x",), output="y", **options)
    network = network_of(step, {"x": inputs.shape[1:], "y": shape}, arrays or {})
    found = executor.run(network, inputs)
    assert found.dtype == np.int8 and found.shape == (len(inputs), *shape)
    return found


def finished(exact: Tensor, multiplier: Any, shift: Any, low: int = -128, high: int = 127) -> Array:
    """⌊sum · multiplier / 2^shift + ½⌋ + zero, clamped, in float64: exact for the small sums and multipliers here."""
    scaled = torch.floor(exact * torch.as_tensor(multiplier / 2.0**shift) + 0.5) + ZERO_Y
    return scaled.clamp(low, high).numpy().astype(np.int8)


def weights(out: int, *rest: int, seed: int = 1) -> dict[str, Array]:
    """Constants of a layer whose multipliers have few bits, so that float64 holds every product."""
    generator = np.random.default_rng(seed)
    return {
        "weight": generator.integers(-128, 128, (out, *rest)).astype(np.int8),
        "bias": generator.integers(-9999, 9999, out).astype(np.int32),
        "multiplier": generator.integers(1, 1 << 15, out).astype(np.int32),
        "shift": generator.integers(20, 28, out).astype(np.uint8),
    }


CONVOLUTIONS = [
    # channels, outputs, kernel, stride, padding (above, below, left, right), dilation, groups, height, width
    (3, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 7, 9),
    (3, 4, (3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1, 8, 8),
    (4, 6, (2, 3), (2, 3), (0, 2, 3, 1), (1, 1), 2, 11, 5),
    (6, 6, (3, 3), (1, 2), (1, 0, 2, 1), (1, 1), 6, 5, 7),
    (4, 12, (3, 1), (1, 1), (2, 2, 0, 0), (2, 1), 4, 6, 3),
    (1, 3, (5, 4), (2, 2), (2, 2, 1, 1), (1, 2), 1, 13, 10),
    (7, 5, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 3, 1),
    (5, 2, (1, 7), (1, 3), (0, 0, 3, 3), (1, 1), 1, 1, 23),
    (5, 5, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 5, 5, 4),
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_convolution(geometry: Any, batch: int) -> None:
    channels, out, kernel, stride, padding, dilation, groups, height, width = geometry
    inputs, arrays = codes(batch, channels, height, width), weights(out, channels // groups, *kernel)
    above, below, left, right = padding
    padded = functional.pad(torch.from_numpy(inputs).double(), (left, right, above, below), value=ZERO_X)
    weight, bias = (torch.from_numpy(arrays[name]).double() for name in ("weight", "bias"))
    exact = functional.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    found = run_one(Convolution, inputs, tuple(exact.shape[1:]), arrays, layer="op", low=-99, high=101, **options)
    multiplier, shift = (arrays[name].reshape(-1, 1, 1) for name in ("multiplier", "shift"))
    np.testing.assert_array_equal(found, finished(exact, multiplier, shift, -99, 101))


def test_a_convolution_by_hand() -> None:
    """Codes 1 to 4 around the zero -5, a weight of 2 halved again, and one column of padding on the right."""
    arrays = {
        "weight": np.full((1, 1, 1, 1), 2, dtype=np.int8),
        "bias": np.array([10], dtype=np.int32),
        "multiplier": np.array([1], dtype=np.int32),
        "shift": np.array([1], dtype=np.uint8),
    }
    inputs = np.array([1, 2, 3, 4], dtype=np.int8).reshape(1, 1, 2, 2)
    found = run_one(Convolution, inputs, (1, 2, 3), arrays, layer="op", padding=(0, 0, 0, 1))
    assert (found - ZERO_Y).tolist() == [[[[6, 7, 0], [8, 9, 0]]]]


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_linear(shape: tuple[int, ...], batch: int) -> None:
    inputs, arrays = codes(batch, *shape), weights(7, 5)
    weight, bias = (torch.from_numpy(arrays[name]).double() for name in ("weight", "bias"))
    exact = functional.linear(torch.from_numpy(inputs).double(), weight, bias)
    found = run_one(Linear, inputs, (*shape[:-1], 7), arrays, layer="op")
    np.testing.assert_array_equal(found, finished(exact, arrays["multiplier"], arrays["shift"]))


@pytest.mark.parametrize("columns", [1030, 1040, 5000])
def test_sums_on_both_sides_of_what_float32_holds(columns: int) -> None:
    """Σ |weight| · 128 around and beyond 2^24, every weight and input at its end: odd sums that float32 would round."""
    arrays = weights(2, columns)
    arrays["weight"][:] = 127
    arrays["weight"][1] = -128
    inputs = np.full((1, columns), 127, dtype=np.int8)
    inputs[0, -1] = 126
    network = network_of(Linear(name="op", inputs=("x",), output="y", layer="op"), {"x": (columns,), "y": (2,)}, arrays)
    found = executor.accumulate(network, network.program.steps[0], inputs)  # type: ignore[arg-type]
    expected = arrays["weight"].astype(np.int64) @ inputs[0].astype(np.int64) + arrays["bias"]
    assert found.tolist() == [expected.tolist()]


def test_the_full_range_of_multipliers() -> None:
    """31-bit multipliers on 32-bit sums, against Python's integers."""
    arrays = weights(3, 2)
    arrays["bias"] = np.array([2**30, -(2**30), 12345], dtype=np.int32)
    multiplier, shift = requantizer(3e-8)
    arrays["multiplier"] = np.array([multiplier, multiplier, 2**31 - 1], dtype=np.int32)
    arrays["shift"] = np.array([shift, shift, 42], dtype=np.uint8)
    inputs = codes(4, 2)
    found = run_one(Linear, inputs, (3,), arrays, layer="op")
    for row, output in zip(inputs.tolist(), found.tolist(), strict=True):
        for channel in range(3):
            total = sum(w * q for w, q in zip(arrays["weight"][channel].tolist(), row, strict=True))
            total += int(arrays["bias"][channel])
            half = 1 << (int(arrays["shift"][channel]) - 1)
            scaled = (total * int(arrays["multiplier"][channel]) + half) >> int(arrays["shift"][channel])
            assert output[channel] == min(max(scaled + ZERO_Y, -128), 127)


@pytest.mark.parametrize("other", [(3, 4, 5), (3, 1, 1), (1, 4, 5)])
def test_addition_and_multiplication(other: tuple[int, ...]) -> None:
    """Of a value with a slice of it, which is broadcast."""
    inputs = codes(2, 3, 4, 5)
    slices = [
        Slice(name=f"s{axis}", inputs=(f"v{axis}",), output=f"v{axis + 1}", axis=axis, start=0, stop=extent)
        for axis, extent in enumerate(other)
    ]
    shapes = [(*other[:axis], *(3, 4, 5)[axis:]) for axis in range(4)]
    values = {f"v{axis}": Value(shape=shape, scale=1.0, zero=ZERO_X) for axis, shape in enumerate(shapes)}
    values["y"] = Value(shape=(3, 4, 5), scale=1.0, zero=ZERO_Y)
    smaller = inputs[:, : other[0], : other[1], : other[2]]
    first, second = (torch.from_numpy(array).double() for array in (inputs, smaller))
    names = {"name": "op", "inputs": ("v0", "v3"), "output": "y"}

    add = Add(**names, multipliers=(300, -200), offset=1234, shift=9, low=-50, high=60)
    program = Program(input="v0", output="y", values=values, steps=(*slices, add))
    found = executor.run(IntegerNetwork(program, {}, Facts(origin="", shape=())), inputs)
    exact = torch.floor((first * 300 - second * 200 + 1234) / 2**9 + 0.5).clamp(-50, 60)
    np.testing.assert_array_equal(found, exact.numpy())

    multiply = Multiply(**names, multiplier=77, shift=12, high=90)
    program = Program(input="v0", output="y", values=values, steps=(*slices, multiply))
    found = executor.run(IntegerNetwork(program, {}, Facts(origin="", shape=())), inputs)
    np.testing.assert_array_equal(found, finished((first - ZERO_X) * (second - ZERO_X), 77, 12, high=90))


POOLS = [
    # kernel, stride, padding (above, below, left, right), dilation
    ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((3, 2), (1, 2), (1, 1, 0, 1), (1, 1)),
    ((3, 3), (2, 2), (0, 1, 1, 0), (1, 1)),
    ((2, 3), (1, 1), (0, 0, 1, 1), (3, 1)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), POOLS)
@pytest.mark.parametrize("batch", [0, 2])
def test_pools(kernel: Any, stride: Any, padding: Any, dilation: Any, batch: int) -> None:
    inputs = codes(batch, 3, 7, 9)
    above, below, left, right = padding
    given = torch.from_numpy(inputs).double()
    lowest = functional.pad(given, (left, right, above, below), value=-999.0)
    exact = functional.max_pool2d(lowest, kernel, stride, 0, dilation)
    options = {"kernel": kernel, "stride": stride, "padding": padding}
    found = run_one(MaxPool, inputs, tuple(exact.shape[1:]), **options, dilation=dilation)
    np.testing.assert_array_equal(found, exact.numpy())
    if dilation == (1, 1):
        zeros = functional.pad(given - ZERO_X, (left, right, above, below))
        sums = functional.avg_pool2d(zeros, kernel, stride, divisor_override=1)
        found = run_one(AveragePool, inputs, tuple(sums.shape[1:]), **options, multiplier=99, shift=10, low=0)
        np.testing.assert_array_equal(found, finished(sums, 99, 10, low=0))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2), (2,)])
@pytest.mark.parametrize("keep", [True, False])
def test_mean(axes: tuple[int, ...], keep: bool) -> None:
    inputs = codes(3, 4, 5, 6)
    sums = (torch.from_numpy(inputs).double() - ZERO_X).sum([axis + 1 for axis in axes], keepdim=keep)
    found = run_one(Mean, inputs, tuple(sums.shape[1:]), axes=axes, keep=keep, multiplier=55, shift=11)
    np.testing.assert_array_equal(found, finished(sums, 55, 11))


def test_a_table_covers_all_codes() -> None:
    inputs = np.arange(-128, 128).astype(np.int8)[None]
    table = inputs[0, ::-1].copy()
    found = run_one(Table, inputs, (256,), {"table": table}, function="reverse")
    assert found.tolist() == [table.tolist()]


def test_moves() -> None:
    inputs = codes(2, 3, 4, 5)
    given = torch.from_numpy(inputs)
    found = run_one(Pad, inputs, (4, 4, 8), padding=((0, 1), (0, 0), (2, 1)), value=-7)
    np.testing.assert_array_equal(found, functional.pad(given, (2, 1, 0, 0, 0, 1), value=-7).numpy())
    found = run_one(Slice, inputs, (3, 4, 2), axis=2, start=1, stop=5, step=2)
    np.testing.assert_array_equal(found, inputs[:, :, :, 1:5:2])
    np.testing.assert_array_equal(run_one(Reshape, inputs, (12, 5)), inputs.reshape(2, 12, 5))
    found = run_one(Transpose, inputs, (5, 3, 4), axes=(2, 0, 1))
    np.testing.assert_array_equal(found, given.permute(0, 3, 1, 2).numpy())
    step = Concatenate(name="op", inputs=("x", "x"), output="y", axis=1)
    found = executor.run(network_of(step, {"x": (3, 4, 5), "y": (3, 8, 5)}, {}), inputs)
    np.testing.assert_array_equal(found, np.concatenate([inputs, inputs], axis=2))


EXTREMES = np.array([[[-128] * 6], [[127] * 6], [[-128] * 3 + [127] * 3], [[127] + [-128] * 5]], dtype=np.int8)


def product_of(first: Array, second: Array, **options: Any) -> Array:
    """a @ b of codes (n, ..., M, K) and (n, ..., K, N), both beside each other in the values a and b."""
    shapes = {"a": first.shape[1:], "b": second.shape[1:], "y": (*first.shape[1:-1], second.shape[-1])}
    step = MatrixProduct(name="op", inputs=("a", "b"), output="y", **options)
    zeros = {"a": ZERO_X, "b": 3, "y": ZERO_Y}
    values = {name: Value(shape=shape, scale=0.5, zero=zeros[name]) for name, shape in shapes.items()}
    other = Constant(name="other", inputs=(), output="b")
    program = Program(input="a", output="y", values=values, steps=(other, step))
    network = IntegerNetwork(program, {"other.value": second[0]}, Facts(origin="", shape=()))
    return executor.execute(network, step, {"a": first, "b": second})


def test_a_matrix_product_by_hand() -> None:
    """(5, 6) from the codes 0 and 1 around the zero -5; (1, 2) from 4 and 5 around 3: 17 · ½ rounds up to 9."""
    found = product_of(np.array([[[0, 1]]], np.int8), np.array([[[4], [5]]], np.int8), multiplier=1, shift=1)
    assert found.tolist() == [[[9 + ZERO_Y]]]


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("inner", [1, 7, 300])
def test_matrix_products(leading: tuple[int, ...], inner: int) -> None:
    first, second = codes(2, *leading, 4, inner), codes(2, *leading, inner, 5, seed=1)
    found = product_of(first, second, multiplier=345, shift=20, low=-100, high=90)
    exact = (torch.from_numpy(first).double() - ZERO_X) @ (torch.from_numpy(second).double() - 3)
    np.testing.assert_array_equal(found, finished(exact, 345, 20, -100, 90))


@pytest.mark.parametrize("ends", [(-128, -128), (-128, 127), (127, 127)])
def test_the_longest_matrix_product(ends: tuple[int, int]) -> None:
    """33,025 terms at either end of the codes, whose sum float32 would not hold."""
    first, second = np.full((1, 1, 33025), ends[0], np.int8), np.full((1, 33025, 1), ends[1], np.int8)
    first[0, 0, 0] += 1 if ends[0] < 0 else -1
    exact = int(((first[0, 0].astype(int) - ZERO_X) * (second[0, :, 0].astype(int) - 3)).sum())
    found = product_of(first, second, multiplier=1 << 30, shift=55)
    assert found.tolist() == [[[min(max(((exact >> 24) + 1 >> 1) + ZERO_Y, -128), 127)]]]


def softmax_table(count: int, scale: float, bits: int = 8) -> Array:
    """As its docstring says."""
    powers: Array = np.rint(2.0 ** softmax_bits(count, bits) * np.exp(-np.arange(256) * scale)).astype(np.uint32)
    return powers


def run_softmax(inputs: Array, scale: float, bits: int = 8) -> Array:
    table = softmax_table(inputs.shape[-1], scale, bits)
    return run_one(Softmax, inputs, inputs.shape[1:], {"table": table}, bits=bits)


def test_a_softmax_by_hand() -> None:
    """Powers of two: ½, ¼, ⅛, ⅛ of 256, whatever the largest code."""
    for largest in (127, 0, -125):
        row = np.array([[largest, largest - 1, largest - 2, largest - 2]]).clip(-128).astype(np.int8)
        assert run_softmax(row, float(np.log(2))).tolist() == [[0, -64, -96, -96]]


@pytest.mark.parametrize("count", [1, 2, 3, 511, 512, 513, 65536])
def test_a_softmax_fits_unsigned_32_bits(count: int) -> None:
    power = 2 ** softmax_bits(count)
    assert count * power < 2**32 and 256 * power + count * power // 2 < 2**32
    assert 2 * power * max(count, 256 + (count + 1) // 2) >= 2**32 and power >= 2**15


@pytest.mark.parametrize("bits", [8, 9, 17, 24])
@pytest.mark.parametrize("count", [1, 3, 1000, 65536])
def test_a_softmax_in_fine_steps_fits_unsigned_32_bits(count: int, bits: int) -> None:
    power = 2 ** softmax_bits(count, bits)
    assert count * power < 2**32 and 2**bits * power + count * power // 2 < 2**32 and power >= 2**7


@pytest.mark.parametrize(("count", "bits"), [(300, 14), (1000, 16), (65536, 22)])
def test_a_softmax_of_many_small_numbers(count: int, bits: int) -> None:
    """Steps of 2^-bits: right to a step, where those of 1/256 would all be zero."""
    inputs = np.random.default_rng(0).integers(-20, 20, (2, count)).astype(np.int8)
    exact = torch.softmax(torch.from_numpy(inputs).double() * 0.01, -1).numpy()
    found = run_softmax(inputs, 0.01, bits).astype(int) + 128
    assert np.abs(found - exact * 2**bits).max() <= 1 and found.min() > 16
    assert run_softmax(inputs, 0.01).max() < -126


@given(count=st.integers(1, 40), scale=st.floats(1e-4, 10), seed=st.integers(0, 999))
def test_a_softmax_is_right_to_half_a_step(count: int, scale: float, seed: int) -> None:
    """Half a step, and what rounding the table leaves; a probability of 1 is a step below."""
    inputs = codes(3, 2, count, seed=seed)
    found = run_softmax(inputs, scale)
    exact = torch.softmax(torch.from_numpy(inputs).double() * scale, -1).numpy() * 256
    slack = 256 * (count + 1) / 2.0 ** (softmax_bits(count) + 1)
    assert np.abs(found.astype(int) + 128 - np.minimum(exact, 255)).max() <= 0.5 + slack


def test_softmax_at_the_ends() -> None:
    found = run_softmax(EXTREMES, 0.1)
    # A sixth and a third of 256, and one alone.
    assert found.tolist() == [[[-85] * 6], [[-85] * 6], [[-128] * 3 + [-43] * 3], [[127] + [-128] * 5]]
    assert run_softmax(codes(2, 4, 1), 0.1).tolist() == [[[127]] * 4] * 2


def run_norm(inputs: Array, epsilon: int = 0, gain: float = 30, bias: float = 0, **options: Any) -> Array:
    count = inputs.shape[-1]
    arrays = {
        "multiplier": np.full(count, round(gain * 2**20), np.int32),
        "bias": np.full(count, round(bias * 2**20), np.int32),
    }
    return run_one(LayerNorm, inputs, inputs.shape[1:], arrays, epsilon=epsilon, shift=20, **options)


def test_a_layer_norm_by_hand() -> None:
    """(1, -1, -1, 1) is its own result: v = 16, m = 2^20, t = 5, u = 2^30, r = 2^15, c = 2^17 - 1, y = ±(2^16 - ½)."""
    inputs = np.array([[[6, 4, 4, 6]]], np.int8)
    assert executor.normalized(inputs, 0).tolist() == [[[65536, -65535, -65535, 65536]]]
    assert run_norm(inputs).tolist() == [[[41, -19, -19, 41]]]
    assert run_norm(inputs, bias=2.5, gain=-30, high=30).tolist() == [[[-16, 30, 30, -16]]]


def test_a_layer_norm_of_equal_codes_is_its_bias() -> None:
    for inputs in (EXTREMES[:2], codes(3, 2, 1), np.zeros((1, 4), np.int8)):
        for epsilon in (0, 1, 2**61 - 1):
            assert np.unique(run_norm(inputs, epsilon, bias=3)).tolist() == [3 + ZERO_Y]


@given(
    count=st.sampled_from([2, 3, 5, 64, 768, 4096]),
    epsilon=st.integers(0, 60).map(lambda power: 2**power),
    spread=st.sampled_from([1, 2, 20, 128]),
    seed=st.integers(0, 999),
)
def test_a_layer_norm_is_right_to_14_bits(count: int, epsilon: int, spread: int, seed: int) -> None:
    inputs = np.random.default_rng(seed).integers(-spread, spread, (4, count)).astype(np.int8)
    inputs[:2] = -128
    inputs[0, seed % count], inputs[1, : count // 2] = 127, 127
    wide = inputs.astype(np.float64)
    variance = wide.var(-1, keepdims=True) * count**2
    root = np.sqrt(variance + epsilon / 2**16)
    exact = (wide - wide.mean(-1, keepdims=True)) * count / root
    found = executor.normalized(inputs, epsilon)
    assert np.abs(found).max() < 2**23
    assert np.all(np.abs(found / 2**16 - exact) <= np.abs(exact) * 2.0**-14 + 2.0**-17 + 1e-12)


@given(count=st.integers(1, 9), seed=st.integers(0, 999), shift=st.integers(-20, 20))
def test_a_layer_norm_does_not_see_a_shift(count: int, seed: int, shift: int) -> None:
    inputs = np.random.default_rng(seed).integers(-100, 100, (2, count)).astype(np.int8)
    np.testing.assert_array_equal(run_norm(inputs + np.int8(shift), 77), run_norm(inputs, 77))


def test_the_largest_sum_of_a_layer_norm() -> None:
    """All bounds at once: the longest row, one code at the other end, multiplier and bias of 31 bits."""
    inputs = np.full((1, 4096), -128, np.int8)
    inputs[0, 0] = 127
    y = executor.normalized(inputs, 0)[0].tolist()
    assert abs(y[0] / 2**16 - 4095**0.5) < 64 * 2.0**-14
    for shift in (8, 46):
        arrays = {name: np.full(4096, 2**31 - 1, np.int32) for name in ("multiplier", "bias")}
        found = run_one(LayerNorm, inputs, (4096,), arrays, epsilon=0, shift=shift)[0].tolist()
        limit = 2**31 - 1
        sums = [(each * limit + limit * 2**16 + (1 << (15 + shift)) >> (16 + shift)) + ZERO_Y for each in y[:2]]
        assert found[:2] == [min(max(each, -128), 127) for each in sums]


def test_an_embedding_takes_rows() -> None:
    table = codes(256, 3)
    inputs = np.array([[-128, 127, 0], [5, 5, -1]], np.int8)
    found = run_one(Embedding, inputs, (3, 3), {"table": table})
    np.testing.assert_array_equal(found, table[[[0, 255, 128], [133, 133, 127]]])


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_a_constant_meets_any_batch(batch: int) -> None:
    """Added, joined, and alone as the output; the parts of a batch too."""
    inputs, value = codes(batch, 2, 3), codes(1, 3)
    values = {name: Value(shape=(2, 3), scale=0.5, zero=0) for name in "xs"}
    values |= {"c": Value(shape=(1, 3), scale=0.5, zero=0), "y": Value(shape=(3, 3), scale=0.5, zero=0)}
    steps = (
        Constant(name="c", output="c"),
        Add(name="s", inputs=("c", "x"), output="s", multipliers=(1 << 4, 1 << 4), offset=0, shift=4),
        Concatenate(name="y", inputs=("c", "s"), output="y", axis=0),
    )
    network = IntegerNetwork(
        Program(input="x", output="y", values=values, steps=steps), {"c.value": value}, Facts(origin="", shape=())
    )
    kept = executor.run(network, inputs, keep=True)
    sums = np.clip(inputs.astype(int) + value, -128, 127)
    np.testing.assert_array_equal(kept["c"], np.broadcast_to(value, (batch, 1, 3)))
    np.testing.assert_array_equal(kept["y"], np.concatenate([kept["c"], sums], axis=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_CHUNK", 1)
        np.testing.assert_array_equal(executor.run(network, inputs), kept["y"])


def test_a_network_of_a_constant_alone() -> None:
    values = {"x": Value(shape=(2,), scale=1, zero=0), "c": Value(shape=(3,), scale=1, zero=0)}
    program = Program(input="x", output="c", values=values, steps=(Constant(name="c", output="c"),))
    network = IntegerNetwork(program, {"c.value": np.array([1, 2, 3], np.int8)}, Facts(origin="", shape=()))
    assert executor.run(network, codes(2, 2)).tolist() == [[1, 2, 3]] * 2


@given(batch=st.integers(0, 9), size=st.sampled_from([1, 4000, 20000, 1 << 22]))
def test_parts_of_a_batch_make_no_difference(batch: int, size: int) -> None:
    inputs, arrays = codes(batch, 3, 6, 6), weights(4, 3, 3, 3)
    step = Convolution(name="op", inputs=("x",), output="y", layer="op")
    network = network_of(step, {"x": (3, 6, 6), "y": (4, 4, 4)}, arrays)
    whole = executor.run(network, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_CHUNK", size)
        kept = executor.run(network, inputs, keep=True)
        np.testing.assert_array_equal(executor.run(network, inputs), whole)
        np.testing.assert_array_equal(executor.execute(network, step, {"x": inputs}), whole)
        if batch:
            means = executor.mean_accumulator(network, step, inputs)
            np.testing.assert_allclose(means, executor.accumulate(network, step, inputs).mean((0, 2, 3)))
    assert kept.keys() == {"x", "y"}
    np.testing.assert_array_equal(kept["x"], inputs)
    np.testing.assert_array_equal(kept["y"], whole)


def test_floating_inputs_and_outputs() -> None:
    arrays = {"table": np.arange(-128, 128).astype(np.int8)}
    step = Table(name="op", inputs=("x",), output="y", function="identity")
    network = network_of(step, {"x": (2,), "y": (2,)}, arrays)
    found = executor.run_float(network, np.array([[1.0, -2.2]], dtype=np.float32))
    # Codes 2 - 5 and -4 - 5 around the zero 11 of the output, in steps of a half.
    assert found.tolist() == [[-7.0, -10.0]]


@pytest.mark.parametrize("inputs", [np.zeros((2, 3), np.int8), np.zeros((2, 2), np.int16)])
def test_other_inputs_are_refused(inputs: Array) -> None:
    step = Reshape(name="op", inputs=("x",), output="y")
    with pytest.raises(DataError, match="for a network that takes int8"):
        executor.run(network_of(step, {"x": (2,), "y": (2,)}, {}), inputs)
