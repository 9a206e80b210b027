"""Emitted C as a shared library of this machine, on a network written by hand."""

from __future__ import annotations

import ctypes
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from firmware_tools import NAME, STRICT, need_target, write_fake

from effcli.errors import MachineError, UserError
from effcli.exporters.firmware import targets
from effcli.exporters.firmware.host import HostLibrary


@pytest.fixture(autouse=True)
def compiler() -> None:
    need_target(targets.find("host"))


def random_inputs(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-128, 128, (count, 3)).astype(np.int8)


def test_outputs_and_layers_of_many_inputs(tmp_path: Path) -> None:
    library = HostLibrary(write_fake(tmp_path), NAME, ("-O2", *STRICT))
    assert library.warnings == ""
    inputs = random_inputs(1000)
    middle = (inputs + np.int8(1)).astype(np.int8)
    outputs = np.stack([middle[:, 0] + middle[:, 1], middle[:, 1] + middle[:, 2]], 1).astype(np.int8)
    np.testing.assert_array_equal(library.run(inputs), outputs)
    first, second = library.layers(inputs)
    np.testing.assert_array_equal(first, middle)
    np.testing.assert_array_equal(second, outputs)
    # Other orders in memory are taken as well.
    np.testing.assert_array_equal(library.run(inputs[::-1]), outputs[::-1])


def test_inputs_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    library = HostLibrary(write_fake(tmp_path), NAME)
    for inputs in (np.zeros((2, 4), np.int8), np.zeros(3, np.int8), np.zeros((2, 3), np.int16)):
        with pytest.raises(ValueError, match="fake takes int8"):
            library.run(inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("middle[64] = 0;", "it writes beside its arena"),
        ("*(middle - 1) = 0;", "it writes beside its arena"),
        ("return -1;", "it refuses its arena"),
        ("if (hook != 0 && in[0] == 9) hook(context, 0, middle, 9u);", "its layers write more for one input"),
    ],
)
def test_what_a_network_must_not_do(code: str, said: str, tmp_path: Path) -> None:
    library = HostLibrary(write_fake(tmp_path, code), NAME, ("-O0",))
    inputs = random_inputs(5)
    inputs[4, 0] = 9
    with pytest.raises(MachineError, match=f"the C of fake fails: {said}"):
        library.layers(inputs)


def test_what_an_earlier_run_left_is_not_there(tmp_path: Path) -> None:
    library = HostLibrary(write_fake(tmp_path, "", "out[1] = middle[40];"), NAME)
    assert len(set(library.run(np.zeros((3, 3), np.int8))[:, 1].tolist())) == 3


def test_the_first_error_of_the_compiler_is_told(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no_such_thing") as caught:
        HostLibrary(write_fake(tmp_path, "no_such_thing = 1;"), NAME)
    assert "\n" not in caught.value.cause


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(UserError, match="C for this machine needs no-such-cc"):
        HostLibrary(write_fake(tmp_path), NAME)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    library = HostLibrary(write_fake(tmp_path / "fake"), NAME)
    assert not list(scratch.iterdir())
    assert len(library.run(random_inputs(2))) == 2


def test_memory_functions_of_the_bare_target(tmp_path: Path) -> None:
    """Those that stand in for a libc, at all alignments and overlaps."""
    source = resources.files("effcli.exporters.firmware") / "bare" / "memory.c"
    names = ("memcpy", "memmove", "memset", "memcmp")
    command = ["cc", "-std=c99", "-O2", "-shared", "-fPIC", "-ffreestanding", *STRICT]
    command += [f"-D{name}=own_{name}" for name in names]
    subprocess.run([*command, str(source), "-o", str(tmp_path / "memory.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "memory.so"))
    before = np.arange(64, dtype=np.uint8)
    for to, start, count in [(0, 32, 16), (1, 33, 15), (3, 32, 0), (4, 40, 21), (2, 35, 9)]:
        memory = before.copy()
        address = memory.ctypes.data
        library.own_memcpy(ctypes.c_void_p(address + to), ctypes.c_void_p(address + start), ctypes.c_size_t(count))
        assert memory[to : to + count].tolist() == before[start : start + count].tolist()
        assert memory[to + count :].tolist() == before[to + count :].tolist() and memory[:to].tolist() == list(
            range(to)
        )
    for to, start, count in [(4, 0, 32), (0, 4, 32), (5, 2, 31), (2, 5, 31), (7, 7, 9)]:
        memory = before.copy()
        address = memory.ctypes.data
        library.own_memmove(ctypes.c_void_p(address + to), ctypes.c_void_p(address + start), ctypes.c_size_t(count))
        assert memory[to : to + count].tolist() == before[start : start + count].tolist()
    for to, count in [(0, 16), (1, 9), (3, 0), (8, 13)]:
        memory = before.copy()
        library.own_memset(ctypes.c_void_p(memory.ctypes.data + to), 0x1FE, ctypes.c_size_t(count))
        assert memory[to : to + count].tolist() == [0xFE] * count
        assert memory[to + count :].tolist() == before[to + count :].tolist()
    for first, second, count in [(b"abc", b"abd", 3), (b"abd", b"abc", 3), (b"abc", b"abd", 2), (b"\xff", b"\x01", 1)]:
        found = library.own_memcmp(first, second, ctypes.c_size_t(count))
        assert found == (first[:count] > second[:count]) - (first[:count] < second[:count])
