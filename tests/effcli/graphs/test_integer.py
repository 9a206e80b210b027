"""Integer networks: the rounding rule by hand, multipliers that are as good as their bits, and a file that holds it."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from torch import nn

from effcli.errors import CheckpointError, NumericsError
from effcli.files.checkpoint import weight_files
from effcli.formats import Codebook, CodebookWeight
from effcli.graphs import executor
from effcli.graphs.graph import Builder, Facts
from effcli.graphs.integer import (
    CODEBOOK,
    HIGHEST,
    LOWEST,
    Array,
    Constant,
    Embedding,
    IntegerNetwork,
    LayerNorm,
    Linear,
    MatrixProduct,
    Program,
    Reshape,
    Softmax,
    Value,
    Weighted,
    addition,
    is_integer,
    requantizer,
    rescale,
)
from effcli.graphs.rows import look_up
from effcli.layers.contract import Observed
from effcli.passes.quantize import int8

INT32 = st.integers(-(2**31), 2**31 - 1)
FACTS = Facts(origin="test", shape=(5,))


def linear_network(bits: Literal[2, 4, 8] = 8) -> IntegerNetwork:
    """A linear layer of 5 inputs and 3 outputs, its codes at both ends of what `bits` hold."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = np.random.default_rng(0).integers(low, high + 1, (3, 5)).astype(np.int8)
    weight[0, :2] = low, high
    step = Linear(name="fc", inputs=("x",), output="y", layer="fc", weight_bits=bits, low=-100)
    values = {"x": Value(shape=(5,), scale=0.5, zero=-3), "y": Value(shape=(3,), scale=0.25, zero=7)}
    arrays: dict[str, Array] = {
        "fc.weight": weight,
        "fc.bias": np.array([-1, 2, 3], dtype=np.int32),
        "fc.multiplier": np.array([1 << 30] * 3, dtype=np.int32),
        "fc.shift": np.array([31, 32, 62], dtype=np.uint8),
    }
    return IntegerNetwork(Program(input="x", output="y", values=values, steps=(step,)), arrays, FACTS)


@pytest.mark.parametrize(
    ("value", "multiplier", "shift", "expected"),
    [
        (1, 1, 1, 1),  # a half goes up
        (-1, 1, 1, 0),  # so does a negative one
        (-3, 1, 1, -1),
        (3, 1, 1, 2),
        (5, 3, 2, 4),  # 15 / 4
        (-5, 3, 2, -4),
        (2**31 - 1, 2**31 - 1, 31, 2**31 - 2),
        (-(2**31), 2**31 - 1, 62, -1),
        (-(2**31), 2**31 - 1, 31, -(2**31) + 1),
        (7, 0, 5, 0),
    ],
)
def test_rescaling_by_hand(value: int, multiplier: int, shift: int, expected: int) -> None:
    assert rescale(np.array([value], dtype=np.int32), multiplier, shift).tolist() == [expected]


@given(values=st.lists(INT32, min_size=1, max_size=5), multiplier=st.integers(0, 2**31 - 1), shift=st.integers(1, 62))
def test_rescaling_is_exact(values: list[int], multiplier: int, shift: int) -> None:
    """Against fractions of unbounded integers; the values themselves stay as they were."""
    given_values = np.array(values, dtype=np.int64)
    expected = [math.floor(Fraction(value * multiplier, 1 << shift) + Fraction(1, 2)) for value in values]
    assert rescale(given_values, multiplier, shift).tolist() == expected
    assert given_values.tolist() == values


def test_rescaling_per_channel() -> None:
    values = np.arange(-6, 6).reshape(1, 3, 4)
    multipliers, shifts = np.array([1, 3, 5]).reshape(3, 1), np.array([1, 2, 3], dtype=np.uint8).reshape(3, 1)
    found = rescale(values, multipliers, shifts)
    for channel in range(3):
        expected = np.floor(values[:, channel] * multipliers[channel] / 2.0 ** shifts[channel] + 0.5)
        np.testing.assert_array_equal(found[:, channel], expected)


@given(st.floats(2.0**-32, 2.0**16, exclude_max=True))
def test_a_multiplier_is_next_to_its_scale(scale: float) -> None:
    multiplier, shift = requantizer(scale)
    assert 0 <= multiplier < 2**31 and 1 <= shift <= 62
    assert math.ldexp(multiplier, -shift) == pytest.approx(scale, rel=2.0**-17)
    # The high word of a product where 16 bits suffice, 30 bits elsewhere.
    if not 2.0**-16 <= scale < 0.49:
        assert math.ldexp(multiplier, -shift) == pytest.approx(scale, rel=2.0**-30)
    else:
        assert shift == 32


@pytest.mark.parametrize("scale", [0.5 - 2.0**-34, 0.5, 1 - 2.0**-40, 1.0, 2.0**16 * (1 - 2.0**-50), 2.0**-16])
def test_multipliers_at_the_seams(scale: float) -> None:
    multiplier, shift = requantizer(scale)
    assert 0 < multiplier < 2**31 and 1 <= shift <= 62
    assert math.ldexp(multiplier, -shift) == pytest.approx(scale, rel=2.0**-30)


def test_a_tiny_scale_becomes_nothing() -> None:
    assert requantizer(2.0**-100)[0] == 0


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**16, math.inf, math.nan])
def test_scales_that_no_multiplier_expresses(scale: float) -> None:
    with pytest.raises(NumericsError, match="out of range"):
        requantizer(scale)


CODES = st.integers(LOWEST, HIGHEST)


@given(
    first=st.floats(2.0**-10, 2.0**12),
    second=st.floats(-(2.0**12), 2.0**12),
    zeros=st.tuples(CODES, CODES, CODES),
    codes=st.tuples(CODES, CODES),
)
def test_an_addition_is_right_to_a_step_and_its_multipliers_precision(
    first: float, second: float, zeros: tuple[int, int, int], codes: tuple[int, int]
) -> None:
    multipliers, offset, shift = addition(first, second, zeros)
    assert max(map(abs, multipliers)) < 2**15 and 1 <= shift <= 22
    terms = codes[0] * multipliers[0], codes[1] * multipliers[1], offset
    assert max(map(abs, (*terms, sum(terms)))) < 2**31
    found = int(rescale(np.array([sum(terms)]), 1, shift)[0])
    exact = (codes[0] - zeros[0]) * first + (codes[1] - zeros[1]) * second + zeros[2]
    # Half a step, and half a unit of each multiplier, which has 15 bits for the larger scale.
    assert abs(found - exact) <= 0.5 + 2 * 255 * 2.0 ** -(shift + 1) + 1e-9


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (2.0**13, 1.0), (1.0, -(2.0**13)), (math.nan, 1.0)])
def test_additions_out_of_range(first: float, second: float) -> None:
    with pytest.raises(NumericsError, match="out of range"):
        addition(first, second, (0, 0, 0))


def test_quantizing_by_hand() -> None:
    """scale ½, zero -3: halves go to even before the zero point is added, and the ends hold."""
    network = linear_network()
    codes = network.quantize(np.array([[0.25, 0.75, -0.25, 1000, -1000]], dtype=np.float32))
    assert codes.dtype == np.int8 and codes.tolist() == [[-3, -1, -3, 127, -128]]
    outputs = network.dequantize(np.array([[7, 8, -128]], dtype=np.int8))
    assert outputs.dtype == np.float32 and outputs.tolist() == [[0, 0.25, -33.75]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_file_holds_the_network(bits: Literal[2, 4, 8], tmp_path: Path) -> None:
    network = linear_network(bits)
    assert not is_integer(tmp_path)
    network.save(tmp_path)
    assert is_integer(tmp_path)
    found = IntegerNetwork.read(tmp_path)
    assert found.program == network.program and found.facts == network.facts
    assert found.arrays.keys() == network.arrays.keys()
    for name, array in network.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        linear_network(4).save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert len({file.stat().st_mode for file in (tmp_path / "a").iterdir()}) == 1


def with_codebook(bits: Literal[2, 4], tables: int) -> IntegerNetwork:
    """`linear_network` with weights that are entries of one table, or of one for each output."""
    plain, random = linear_network(bits), np.random.default_rng(1)
    table = random.integers(-127, 128, (tables, 1 << bits)).astype(np.int8)
    weight = look_up(table, random.integers(0, 1 << bits, (3, 5)).astype(np.uint8))
    arrays = {**plain.arrays, "fc.weight": weight, f"fc.{CODEBOOK}": table}
    return IntegerNetwork(plain.program, arrays, FACTS)


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_file_holds_numbers_and_tables(bits: Literal[2, 4], tables: int, tmp_path: Path) -> None:
    network = with_codebook(bits, tables)
    network.save(tmp_path)
    stored = load_file(tmp_path / "effcli.safetensors")
    # One 32-bit word of numbers for each row.
    assert stored["fc.weight"].nbytes == 3 * 4 and stored[f"fc.{CODEBOOK}"].nbytes == tables << bits
    found = IntegerNetwork.read(tmp_path)
    assert found.arrays.keys() == network.arrays.keys()
    for name, array in network.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    codes = np.random.default_rng(2).integers(-128, 128, (4, 5)).astype(np.int8)
    np.testing.assert_array_equal(executor.run(found, codes), executor.run(network, codes))


@pytest.mark.parametrize("damage", ["no table", "short table"])
def test_damaged_tables(damage: str, tmp_path: Path) -> None:
    network = with_codebook(4, 1)
    network.save(tmp_path)
    stored = load_file(tmp_path / "effcli.safetensors")
    table = stored.pop(f"fc.{CODEBOOK}")
    if damage == "short table":
        stored[f"fc.{CODEBOOK}"] = np.ascontiguousarray(table[:, :2])
    save_file(stored, tmp_path / "effcli.safetensors")
    with pytest.raises(CheckpointError, match="holds no integer network"):
        IntegerNetwork.read(tmp_path)


def test_weights_that_are_no_entries_are_not_saved(tmp_path: Path) -> None:
    network = with_codebook(4, 1)
    missing = next(code for code in range(-127, 128) if code not in network.arrays[f"fc.{CODEBOOK}"])
    network.arrays["fc.weight"][1, 2] = missing
    with pytest.raises(CheckpointError, match="fc: there are weights that the table lacks"):
        network.save(tmp_path)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_a_graph_with_tables_becomes_integers_that_keep_its_codes(strategy: Any, tmp_path: Path) -> None:
    """Through `int8`: codes and tables as they were, the depthwise layer's too where that saves something."""
    torch.manual_seed(0)
    b = Builder()
    x = b.call("aten.relu.default", b.module("stem", nn.Conv2d(8, 12, 3), b.input()))
    x = b.call("aten.relu.default", b.module("depth", nn.Conv2d(12, 12, 3, groups=12), x))
    fc = nn.Linear(12, 7)
    graph = b.finish(b.module("fc", fc, b.call("aten.mean.dim", x, [2, 3], False)), Facts(origin="t", shape=(8, 9, 9)))
    stored: dict[str, CodebookWeight] = {}
    for site in graph.sites():
        format = Codebook("kmeans", 4, strategy, dtype=torch.float32)
        shape = site.rows, site.columns
        table = (torch.randn(format.blocks(shape), 16) / 8).sort(1).values
        stored[site.name] = CodebookWeight(format, torch.randint(0, 16, shape).to(torch.uint8), table)
        graph.set_weight(site.name, stored[site.name])
    inputs = torch.randn(64, 8, 9, 9)
    made = int8.Int8().transform(graph, Observed(batches=lambda: iter(inputs.split(16))))
    network = made.network
    assert isinstance(network, IntegerNetwork) and made.remarks == ()
    steps = {step.layer: step for step in network.program.steps if isinstance(step, Weighted)}
    # Tables of 16 entries for 9 or 12 weights save nothing.
    kept = {"stem"} if strategy == "channel" else {"stem", "depth", "fc"}
    for name, weight in stored.items():
        step, table = steps[name], network.codebook(steps[name])
        if name not in kept:
            assert table is None and step.weight_bits == 8 and made.notes[name]["table_unrolled"] is True
            continue
        assert table is not None and step.weight_bits == 4 and made.notes[name]["tables"] == len(table)
        integers = network.array(step, "weight").reshape(weight.shape)
        np.testing.assert_array_equal(integers, look_up(table, weight.codes.numpy()))
    network.save(tmp_path)
    again, codes = IntegerNetwork.read(tmp_path), network.quantize(inputs.numpy())
    np.testing.assert_array_equal(executor.run(again, codes), executor.run(network, codes))
    found, expected = executor.run_float(network, inputs.numpy()), graph.run(inputs).numpy()
    assert 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()) > 28


def test_a_file_holds_the_parts_of_a_transformer(tmp_path: Path) -> None:
    """Every type of constant, and an operation that reads nothing."""
    steps: tuple[Any, ...] = (
        Embedding(name="rows", inputs=("x",), output="e"),
        Constant(name="place", output="p"),
        MatrixProduct(name="product", inputs=("e", "p"), output="m", multiplier=3, shift=9, low=-5),
        Softmax(name="weigh", inputs=("m",), output="s"),
        LayerNorm(name="norm", inputs=("s",), output="y", epsilon=2**60, shift=46),
    )
    shapes = {"x": (5,), "e": (5, 3), "p": (3, 2), "m": (5, 2), "s": (5, 2), "y": (5, 2)}
    values = {name: Value(shape=shape, scale=1.0, zero=-128) for name, shape in shapes.items()}
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "rows.table": random.integers(-128, 128, (256, 3)).astype(np.int8),
        "place.value": random.integers(-128, 128, (3, 2)).astype(np.int8),
        "weigh.table": random.integers(0, 2**32, 256).astype(np.uint32),
        "norm.multiplier": np.array([-(2**31), 2**31 - 1], np.int32),
        "norm.bias": np.array([5, -6], np.int32),
    }
    network = IntegerNetwork(Program(input="x", output="y", values=values, steps=steps), arrays, FACTS)
    network.save(tmp_path)
    found = IntegerNetwork.read(tmp_path)
    assert found.program == network.program and found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LayerNorm, {"epsilon": -1, "shift": 8}),
        (LayerNorm, {"epsilon": 2**61, "shift": 8}),
        (LayerNorm, {"epsilon": 0, "shift": 7}),
        (LayerNorm, {"epsilon": 0, "shift": 47}),
        (Constant, {}),
    ],
)
def test_operations_out_of_their_bounds(make: Any, options: dict[str, int]) -> None:
    """A shift or an ε that would leave 64 bits, and a constant that reads something."""
    with pytest.raises(ValidationError):
        make(name="op", inputs=("x",), output="y", **options)


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no constant", "not json"])
def test_damaged_networks(damage: str, tmp_path: Path) -> None:
    network = linear_network()
    network.save(tmp_path)
    weights, program = tmp_path / "effcli.safetensors", tmp_path / "integer.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no constant":
        program.write_text(program.read_text().replace('"name": "fc"', '"name": "other"'))
    else:
        program.write_text("{")
    with pytest.raises(CheckpointError):
        IntegerNetwork.read(tmp_path)


PROBE = np.array([[-128, 0, 127, 1, -1], [5, 4, 3, 2, 1]], dtype=np.int8)


def with_probe(probe: Array | None) -> IntegerNetwork:
    network = linear_network()
    return IntegerNetwork(network.program, network.arrays, network.facts, probe)


def test_a_probe_goes_along(tmp_path: Path) -> None:
    """Beside the weights and not among them, whose size the network's is."""
    sizes = {}
    for name, probe in (("bare", None), ("probed", PROBE)):
        folder = tmp_path / name
        folder.mkdir()
        with_probe(probe).save(folder)
        sizes[name] = sum(file.stat().st_size for file in weight_files(folder))
    assert IntegerNetwork.read(tmp_path / "bare").probe is None
    found = IntegerNetwork.read(tmp_path / "probed").probe
    assert found is not None and found.dtype == np.int8
    np.testing.assert_array_equal(found, PROBE)
    assert sizes["bare"] == sizes["probed"]
    with np.load(tmp_path / "probed" / "probe.npz", allow_pickle=False) as stored:
        assert stored.files == ["codes"]


def test_a_probe_that_is_gone_is_none_of_a_former_run(tmp_path: Path) -> None:
    """Saved over another, a network without a probe has none."""
    with_probe(PROBE).save(tmp_path)
    with_probe(None).save(tmp_path)
    assert IntegerNetwork.read(tmp_path).probe is None


def test_a_probe_is_written_the_same_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for seconds in (0.0, 2e9):
        monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
        with_probe(PROBE).save(tmp_path)
        written.append((tmp_path / "probe.npz").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("damage", ["truncated", "empty", "no codes", "pickle", "one array"])
def test_damaged_probes(damage: str, tmp_path: Path) -> None:
    with_probe(PROBE).save(tmp_path)
    file = tmp_path / "probe.npz"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-30])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no codes":
        np.savez(file, inputs=PROBE)
    elif damage == "pickle":
        np.savez(file, codes=np.array([{"a": 1}], dtype=object))
    else:
        with file.open("wb") as stream:
            np.save(stream, PROBE)
    with pytest.raises(CheckpointError, match="holds no integer network") as caught:
        IntegerNetwork.read(tmp_path)
    assert "\n" not in caught.value.cause


@pytest.mark.parametrize("probe", [PROBE.astype(np.int16), PROBE[:, :4], PROBE[0], PROBE[:0]])
def test_probes_of_another_network(probe: Array, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the probe holds .* takes int8 \(5,\)"):
        with_probe(probe)
    with_probe(PROBE).save(tmp_path)
    np.savez(tmp_path / "probe.npz", codes=probe)
    with pytest.raises(CheckpointError, match="the probe holds"):
        IntegerNetwork.read(tmp_path)


def reshape(source: str, target: str) -> Reshape:
    return Reshape(name=target, inputs=(source,), output=target)


@pytest.mark.parametrize(
    ("steps", "output", "names", "message"),
    [
        ((reshape("z", "y"),), "y", "xy", "nothing has written before"),
        ((reshape("x", "y"), reshape("x", "y")), "y", "xy", "written twice"),
        ((reshape("x", "x"),), "x", "x", "written twice"),
        ((reshape("x", "y"),), "y", "xyz", "do not fit together"),
        ((reshape("x", "y"),), "z", "xy", "do not fit together"),
    ],
)
def test_programs_that_cannot_run(steps: Any, output: str, names: str, message: str) -> None:
    values = {name: Value(shape=(5,), scale=1.0, zero=0) for name in names}
    with pytest.raises(ValidationError, match=message):
        Program(input="x", output=output, values=values, steps=steps)


def test_a_constant_must_be_there() -> None:
    network = linear_network()
    arrays = {name: array for name, array in network.arrays.items() if name != "fc.shift"}
    with pytest.raises(CheckpointError, match=r"fc\.shift is missing"):
        IntegerNetwork(network.program, arrays, FACTS)
