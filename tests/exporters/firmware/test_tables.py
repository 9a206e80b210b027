"""Weights that are entries of a table: packed by hand, and computed with as the executor does, on every processor."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from firmware_tools import STRICT, need, need_target
from hypothesis import given
from hypothesis import strategies as st
from integer_networks import Network, random_network

from effcli.exporters.firmware import bench, check, packing, tables, targets
from effcli.exporters.firmware.convolution import Depthwise
from effcli.exporters.firmware.generate import Generated, generate
from effcli.exporters.firmware.requantize import Requantized
from effcli.graphs.integer import CODEBOOK, Array, IntegerNetwork, Weighted
from effcli.graphs.rows import look_up, numbers_in

Bits = Literal[2, 4]
PROCESSORS = [
    ("cortex-m4", False),
    ("cortex-m4", True),
    ("cortex-m0plus", False),
    ("cortex-m3", False),
    ("cortex-m55", True),
    ("rv32imc", False),
]


MAIN = '#include "tiny.h"\nint main(void) { return tiny_selftest() != 0; }\n'


def written(network: IntegerNetwork, folder: Path) -> Generated:
    generated = generate(network, "tiny", tests=3)
    check.write_sources(folder, generated, "tiny")
    return generated


def passes(folder: Path, *flags: str, compiler: str = "gcc") -> None:
    """Compile the self test of `folder`, where a warning is an error, and run it."""
    need(compiler)
    (folder / "main.c").write_text(MAIN)
    sources = [*sorted((folder / "src").glob("*.c")), *sorted((folder / "test").glob("*.c")), folder / "main.c"]
    program = folder / "program"
    command = [compiler, "-std=c99", *STRICT, *flags, "-I", folder / "src", *sources, "-o", program]
    for words in (command, [program]):
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def network() -> IntegerNetwork:
    """Layers with work enough for pairs and without, odd channels, groups, and a last block that is not full."""
    net = Network((3, 9, 7))
    net.convolution(11, padding=(1, 1, 1, 1))
    net.convolution(11, groups=11, padding=(1, 1, 1, 1), shifts=True)
    net.convolution(6, (1, 1), relu=True)
    net.convolution(10, (2, 3), groups=2)
    net.flatten()
    net.linear(9)
    net.linear(3, shifts=True)
    return net.finish()


def tokens() -> IntegerNetwork:
    """Linear layers of several rows."""
    net = Network((7,))
    net.linear(10, net.embedding(13))
    net.linear(5)
    return net.finish()


def tabled(network: IntegerNetwork, bits: Bits, channels: bool, entries: int | None = None) -> IntegerNetwork:
    """The network with all weights random entries of random tables: one for each layer, or one for each channel."""
    random = np.random.default_rng(bits)
    arrays, steps = dict(network.arrays), []
    for step in network.program.steps:
        if isinstance(step, Weighted):
            weight = network.array(step, "weight")
            count = entries or 1 << bits
            table = random.integers(-127, 128, (len(weight) if channels else 1, count)).astype(np.int8)
            numbers = random.integers(0, count, (len(weight), weight[0].size)).astype(np.uint8)
            arrays[f"{step.name}.weight"] = look_up(table, numbers).reshape(weight.shape)
            arrays[f"{step.name}.{CODEBOOK}"] = table
            step = step.model_copy(update={"weight_bits": bits})
        steps.append(step)
    program = network.program.model_copy(update={"steps": tuple(steps)})
    return IntegerNetwork(program, arrays, network.facts, network.probe)


def linear_of(inputs: int, outputs: int) -> IntegerNetwork:
    net = Network((inputs,))
    net.linear(outputs)
    return net.finish()


def inputs_of(network: IntegerNetwork, count: int) -> Array:
    codes = np.random.default_rng(9).integers(-128, 128, (count, *network.input.shape)).astype(np.int8)
    codes[0], codes[1] = -128, 127
    return codes


def test_a_word_of_numbers_by_hand() -> None:
    # k0 k2, then k1 k3 of the first channel, then of the second, from the lowest bits up.
    block = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    assert packing.table_words(block, 2) == 0b00_10_01_11_11_01_10_00
    assert packing.table_words(block, 2).dtype == np.uint16
    block = np.array([[0xF, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    assert packing.table_words(block, 4) == 0x_7564_312F
    assert packing.table_words(block, 4).dtype == np.uint32


@given(st.integers(1, 9), st.integers(1, 13), st.sampled_from([2, 4]), st.integers(0, 99))
def test_pairs_unpack_to_the_numbers(out: int, count: int, bits: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, (out, count)).astype(np.uint8)
    words = packing.pairs(numbers, 1, bits)[0]
    shifts = bits * np.array([[0, 2, 1, 3], [4, 6, 5, 7]])
    unpacked = (words.astype(np.int64)[..., None, None] >> shifts) & ((1 << bits) - 1)
    rows = unpacked.swapaxes(1, 2).reshape(2 * len(words), -1)
    np.testing.assert_array_equal(rows[:out, :count], numbers)
    assert not rows[out:].any() and not rows[:, count:].any()


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("case", ["layers", "tokens", *range(8)])
def test_every_byte_of_every_layer(case: str | int, bits: Bits, channels: bool, tmp_path: Path) -> None:
    need_target(targets.find("host"))
    plain = network() if case == "layers" else tokens() if case == "tokens" else random_network(int(case))
    made = tabled(plain, bits, channels)
    generated = written(made, tmp_path)
    check.compare(made, generated.program, tmp_path, "tiny", targets.find("host"), inputs_of(made, 10))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("name", "plain"), PROCESSORS)
def test_every_processor_gives_the_same(name: str, plain: bool, bits: Bits, channels: bool, tmp_path: Path) -> None:
    target = targets.find(name)
    need_target(target)
    made = tabled(network(), bits, channels)
    generated = written(made, tmp_path)
    paired = [task.paired for task in generated.program.tasks if isinstance(task, Requantized)]
    assert any(paired) is not channels and not all(paired)
    (tmp_path / "work").mkdir()
    bench.build(tmp_path, "tiny", target, "main", tmp_path / "work", plain=plain, extra_flags=STRICT)
    check.compare(made, generated.program, tmp_path, "tiny", target, inputs_of(made, 3), plain=plain)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (131, 5), (640, 12), (3, 200)])
@pytest.mark.parametrize("halved", ["0", "1"])
def test_rows_of_any_length(inputs: int, outputs: int, halved: str, tmp_path: Path) -> None:
    """Chunks, a first entry that fills up blocks, and products of sums, in which it counts."""
    kinds: list[tuple[Bits, bool]] = [(2, False), (2, True), (4, False), (4, True)]
    for index, (bits, channels) in enumerate(kinds):
        folder = tmp_path / str(index)
        folder.mkdir()
        written(tabled(linear_of(inputs, outputs), bits, channels), folder)
        passes(folder, "-O1", f"-DTINY_HALF_PRODUCTS={halved}")


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("halved", ["0", "1"])
def test_clean_under_sanitizers(channels: bool, halved: str, tmp_path: Path) -> None:
    written(tabled(network(), 4, channels), tmp_path)
    sanitizers = ("-fsanitize=undefined,address", "-fno-sanitize-recover")
    passes(tmp_path, "-O1", *sanitizers, f"-DTINY_HALF_PRODUCTS={halved}")


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O3"])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_warnings(compiler: str, level: str, bits: Bits, tmp_path: Path) -> None:
    written(tabled(network(), bits, bits == 2), tmp_path)
    passes(tmp_path, level, compiler=compiler)


def test_a_table_with_fewer_entries_than_numbers(tmp_path: Path) -> None:
    """Three bits are stored as four; what is beyond the table is zero and read by nobody."""
    made = tabled(network(), 4, False, entries=8)
    generated = written(made, tmp_path)
    check.compare(made, generated.program, tmp_path, "tiny", targets.find("host"), inputs_of(made, 4))


def test_two_bits_without_a_table_take_half_of_four(tmp_path: Path) -> None:
    """They are entries of -2, -1, 0, 1."""
    net = Network((40,))
    net.linear(8, bits=2)
    made = net.finish()
    generated = written(made, tmp_path)
    (task,) = generated.program.tasks
    assert task.arrays["weights"].values.nbytes == 40 * 8 // 4
    assert task.arrays["table"].values.tolist() == [[-2, -1, 0, 1]]
    check.compare(made, generated.program, tmp_path, "tiny", targets.find("host"), inputs_of(made, 4))


@pytest.mark.parametrize(("channels", "step"), [(False, 0), (True, 16)])
def test_bytes_are_those_of_numbers_and_tables(channels: bool, step: int) -> None:
    generated = generate(tabled(linear_of(64, 16), 4, channels), "tiny", tests=1)
    (task,) = generated.program.tasks
    assert isinstance(task, Requantized) and task.table_step == step
    (layer,) = json.loads(generated.documents["plan.json"])["layers"]
    assert (layer["weights"], layer["codebook"], layer["bits"]) == (64 * 16 // 2, 16 * 16 if channels else 16, 4)
    assert layer["requantization"] == layer["codebook"] + 16 * 8
    assert generated.cost.constants == layer["weights"] + layer["requantization"]


def test_pairs_are_written_where_they_are_worth_it() -> None:
    """1 KiB for 16 entries of one table and enough products, nothing else."""
    made = tabled(linear_of(64, 64), 4, False)
    (step,) = made.program.steps
    assert isinstance(step, Weighted)
    weights = tables.weights(made, step)
    assert (weights.scratch(2048), weights.scratch(2047)) == (1024, 0)
    channels = weights._replace(table=np.zeros((64, 16), np.int8))
    assert channels.scratch(1 << 20) == 0
    assert weights._replace(bits=2, table=np.zeros((1, 4), np.int8)).scratch(128) == 64
    assert weights._replace(table=None).scratch(1 << 20) == 0


def test_depthwise_filters_stay_bytes() -> None:
    net = Network((8, 5, 5))
    net.convolution(8, groups=8)
    generated = generate(tabled(net.finish(), 4, False), "tiny", tests=1)
    (task,) = generated.program.tasks
    assert isinstance(task, Depthwise) and "table" not in task.arrays
    (layer,) = generated.cost.layers
    assert (layer.weights, layer.bits, layer.codebook) == (72, 8, 0)


@given(st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_numbers_are_found_again(out: int, count: int, channels: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Few values, so that entries repeat.
    table = random.integers(-3, 4, (out if channels else 1, 16)).astype(np.int8)
    codes = look_up(table, random.integers(0, 16, (out, count)).astype(np.uint8))
    numbers = numbers_in(table, codes)
    assert numbers.dtype == np.uint8
    np.testing.assert_array_equal(look_up(table, numbers), codes)
