"""The emitted C on this machine: every byte of every layer, warnings, sanitizers, and the switches of the header."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from integer_networks import Network, random_network

from effcli.errors import UnsupportedError
from effcli.exporters.firmware import check, targets
from effcli.exporters.firmware.generate import Generated, generate
from effcli.graphs.integer import IntegerNetwork

WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror")
MAIN = '#include "tiny.h"\nint main(void) { return tiny_selftest() != 0; }\n'


def written(network: IntegerNetwork, folder: Path, single_header: bool = False, name: str = "tiny") -> Generated:
    generated = generate(network, name, tests=3, single_header=single_header)
    check.write_sources(folder, generated, name)
    return generated


def compiled(folder: Path, *flags: str, main: str = MAIN, compiler: str = "gcc") -> Path:
    """The self test of `folder` as a program; a warning is an error."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    (folder / "main.c").write_text(main)
    sources = [*sorted((folder / "src").glob("*.c")), *sorted((folder / "test").glob("*.c")), folder / "main.c"]
    program = folder / "program"
    command = [compiler, *WARNINGS, *flags, "-I", folder / "src", *sources, "-o", program]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def passes(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def everything() -> IntegerNetwork:
    """One network with every kernel that images need."""
    net = Network((3, 11, 9))
    net.convolution(8, (3, 3), padding=(1, 1, 1, 1), stride=(2, 1), relu=True)
    start = net.convolution(8, (3, 3), groups=8, padding=(1, 1, 1, 1), shifts=True)
    net.mean((1, 2), keep=True)
    net.multiply(start, net.convolution(8, (1, 1), bits=4))
    net.add(net.convolution(8, (1, 1), bits=4), start)
    net.max_pool(kernel=(2, 2), stride=(1, 2), padding=(1, 0, 0, 0))
    net.average_pool(kernel=(2, 2), stride=(2, 2), padding=(0, 1, 0, 0))
    net.concatenate((net.last, net.table()), 0)
    net.convolution(6, (1, 2), groups=2, shifts=True)
    net.pad(((0, 0), (1, 0), (0, 1)))
    net.slice(1, 0, 3, 2)
    net.flatten()
    net.linear(7, shifts=True)
    net.linear(130, relu=True)
    net.linear(3, bits=4)
    return net.finish()


def transformer() -> IntegerNetwork:
    """Tokens, positions, attention of two heads, norms and a perceptron; softmaxes in steps of 1/256 and finer."""
    net = Network((7,))
    start = net.add(net.embedding(12), net.constant((7, 12)))
    entry = net.layer_norm()
    query, key, value = (
        net.transpose((1, 0, 2), net.reshape((7, 2, 6), net.linear(12, entry, shifts=True))) for _ in range(3)
    )
    scores = net.matrix_product(query, net.transpose((0, 2, 1), key))
    mixed = net.matrix_product(net.softmax(scores), value)
    net.reshape((7, 12), net.transpose((1, 0, 2), mixed))
    start = net.add(net.linear(12), start)
    net.layer_norm(epsilon=0)
    net.linear(20)
    net.table()
    net.add(net.linear(12, bits=4), start)
    net.slice(0, 0, 1)
    net.linear(5)
    net.softmax()
    net.linear(300)
    net.softmax(bits=14)
    return net.finish()


CASES: dict[str, Callable[[], IntegerNetwork]] = {
    "everything": everything,
    "transformer": transformer,
    **{f"random {seed}": lambda seed=seed: random_network(seed) for seed in range(12)},
}


@pytest.mark.parametrize("case", CASES)
def test_every_byte_of_every_layer(case: str, tmp_path: Path) -> None:
    network = CASES[case]()
    generated = written(network, tmp_path)
    codes = np.random.default_rng(9).integers(-128, 128, (20, *network.input.shape)).astype(np.int8)
    codes[0], codes[1] = -128, 127
    check.compare(network, generated.program, tmp_path, "tiny", targets.find("host"), codes)


@pytest.mark.parametrize("halved", ["0", "1"])
@pytest.mark.parametrize("case", ["everything", "transformer", "random 3", "random 7"])
def test_clean_under_sanitizers(case: str, halved: str, tmp_path: Path) -> None:
    written(CASES[case](), tmp_path)
    sanitizers = ("-fsanitize=undefined,address", "-fno-sanitize-recover")
    passes(compiled(tmp_path, "-O1", *sanitizers, f"-DTINY_HALF_PRODUCTS={halved}"))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3", "-Os"])
def test_no_warnings_at_any_level(compiler: str, level: str, tmp_path: Path) -> None:
    written(everything(), tmp_path)
    passes(compiled(tmp_path, level, compiler=compiler))


@pytest.mark.parametrize(
    "switch", ["-DTINY_NO_HOOKS", "-DTINY_PLAIN_C", "-DTINY_HALF_PRODUCTS=1", '-DTINY_WEIGHTS_SECTION=".weights"']
)
def test_switches(switch: str, tmp_path: Path) -> None:
    written(everything(), tmp_path)
    passes(compiled(tmp_path, switch))


def test_an_arena_of_its_own_and_addresses_that_are_refused(tmp_path: Path) -> None:
    written(everything(), tmp_path)
    main = """#include "tiny.h"
static int8_t in[TINY_INPUT_BYTES], out[TINY_OUTPUT_BYTES];
#if defined(TINY_DEFAULT_ARENA)
int main(void)
{
    return tiny_run(in, out, 0) != 0;
}
#else
static uint64_t arena[TINY_ARENA_BYTES / 8u + 2u];
int main(void)
{
    int wrong = tiny_run(in, out, 0) != -1;
    wrong |= tiny_run(0, out, arena) != -1;
    wrong |= tiny_run(in, 0, arena) != -1;
    wrong |= tiny_run(in, out, (uint8_t *)arena + 4) != -1;
    wrong |= tiny_run(in, out, arena) != 0;
    /* Input and output may lie in the arena. */
    wrong |= tiny_run(tiny_input(arena), tiny_output(arena), arena) != 0;
    return wrong;
}
#endif
"""
    passes(compiled(tmp_path, main=main))
    passes(compiled(tmp_path, "-DTINY_DEFAULT_ARENA", main=main))


def test_outputs_are_the_same_in_the_arena(tmp_path: Path) -> None:
    written(everything(), tmp_path)
    main = """#include "tiny.h"
static int8_t in[TINY_INPUT_BYTES], out[TINY_OUTPUT_BYTES];
static uint64_t arena[TINY_ARENA_BYTES / 8u + 1u];
int main(void)
{
    uint32_t i;
    int wrong;
    for (i = 0; i < TINY_INPUT_BYTES; ++i)
        in[i] = tiny_input(arena)[i] = (int8_t)(i * 73u % 251u - 125u);
    wrong = tiny_run(tiny_input(arena), tiny_output(arena), arena);
    for (i = 0; i < TINY_OUTPUT_BYTES; ++i)
        out[i] = tiny_output(arena)[i];
    wrong |= tiny_run(in, tiny_output(arena), arena);
    for (i = 0; i < TINY_OUTPUT_BYTES; ++i)
        wrong |= out[i] != tiny_output(arena)[i];
    return wrong;
}
"""
    passes(compiled(tmp_path, "-Wno-sign-conversion", main=main))


def test_one_header(tmp_path: Path) -> None:
    generated = written(everything(), tmp_path, single_header=True)
    assert list(generated.sources) == ["tiny.h"]
    passes(compiled(tmp_path))


def test_a_self_test_that_is_wrong_fails(tmp_path: Path) -> None:
    written(everything(), tmp_path)
    weights = tmp_path / "src" / "tiny_weights.c"
    text = weights.read_text()
    found = re.search(r"tiny_0_constants\[\d+\] = \{\n    (-?\d+)", text)
    assert found is not None
    weights.write_text(text[: found.start(1)] + str(int(found[1]) + 100000) + text[found.end(1) :])
    program = compiled(tmp_path)
    assert subprocess.run([str(program)], check=False).returncode == 1


def test_no_libc_no_heap_no_float(tmp_path: Path) -> None:
    """Nothing is called that the network does not bring along, and nothing is stored that changes."""
    written(everything(), tmp_path)
    for file in ("tiny.c", "tiny_weights.c"):
        command = ["gcc", "-std=c99", "-O2", "-ffreestanding", "-mgeneral-regs-only", "-c", "-I", "src", f"src/{file}"]
        subprocess.run([*command, "-o", f"{file}.o"], cwd=tmp_path, check=True)
    listed = subprocess.run(["nm", "tiny.c.o", "tiny_weights.c.o"], cwd=tmp_path, capture_output=True, text=True)
    symbols = [line.split()[-2:] for line in listed.stdout.splitlines() if len(line.split()) > 1]
    outside = {name for kind, name in symbols if kind == "U"} - {"_GLOBAL_OFFSET_TABLE_"}
    assert all(name.startswith("tiny_") for name in outside), outside
    assert not [name for kind, name in symbols if kind in "bBdDcC"]


def test_clean_under_cppcheck(tmp_path: Path) -> None:
    if shutil.which("cppcheck") is None:
        pytest.skip("cppcheck is not installed")
    written(everything(), tmp_path)
    command = ["cppcheck", "--enable=warning,portability,performance", "--std=c99", "--error-exitcode=1", "--quiet"]
    done = subprocess.run(
        [*command, "--inline-suppr", "-I", "src", "src"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["net", "net_x", "int8", "state"])
def test_names_that_meet_those_of_the_kernels(name: str, tmp_path: Path) -> None:
    network = random_network(3)
    generated = written(network, tmp_path, name=name)
    assert network.probe is not None
    check.compare(network, generated.program, tmp_path, name, targets.find("host"), network.probe)


def test_names_of_layers_stay_text(tmp_path: Path) -> None:
    net = Network((4,))
    net.linear(3)
    step = net.steps[0].model_copy(update={"name": 'net_0 */ "quoted" @0@'})
    net.steps[0] = step
    net.arrays = {f"{step.name}.{key.rpartition('.')[2]}": value for key, value in net.arrays.items()}
    written(net.finish(), tmp_path)
    passes(compiled(tmp_path))


def test_a_network_without_steps_copies_its_input(tmp_path: Path) -> None:
    net = Network((2, 3, 4))
    net.transpose((1, 2, 0))
    net.flatten()
    network = net.finish()
    generated = written(network, tmp_path)
    assert network.probe is not None
    check.compare(network, generated.program, tmp_path, "tiny", targets.find("host"), network.probe)


def test_a_row_of_too_many_inputs_is_refused() -> None:
    net = Network((40000,))
    net.linear(1)
    with pytest.raises(UnsupportedError, match=r"linear0 has 40000 inputs"):
        generate(net.finish(), "tiny")
