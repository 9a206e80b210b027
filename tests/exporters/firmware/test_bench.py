"""The bench in QEMU, on a network written by hand whose counts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from firmware_tools import BOARDS, NAME, STRICT, need_target, write_fake

from effcli.errors import MachineError, UserError
from effcli.exporters.firmware import bench, targets, vectors
from effcli.exporters.firmware.targets import Target

INPUTS = np.array([[1, 2, 3], [-128, 0, 127], [-1, -1, -1]], np.int8)

# Two instructions a round, whatever the compiler thinks of it.
LOOP = """{
    uint32_t rounds = %du;
#if defined(__riscv)
    __asm__ volatile("1: addi %%0, %%0, -1\\n\\tbnez %%0, 1b" : "+r"(rounds));
#else
    __asm__ volatile(".syntax unified\\n1: subs %%0, %%0, #1\\n\\tbne 1b" : "+l"(rounds) : : "cc");
#endif
    }"""


def loop(rounds: int) -> str:
    """C that executes 2 · rounds instructions and a few."""
    return LOOP % rounds


@pytest.fixture(params=BOARDS, ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Target:
    need_target(request.param)
    chosen: Target = request.param
    return chosen


@pytest.fixture
def cortex_m4() -> Target:
    target = targets.find("cortex-m4")
    need_target(target)
    return target


def test_outputs_checksums_and_sizes(target: Target, tmp_path: Path) -> None:
    found = bench.measure(write_fake(tmp_path), NAME, target, INPUTS, extra_flags=STRICT)
    middle = (INPUTS + np.int8(1)).astype(np.int8)
    outputs = np.stack([middle[:, 0] + middle[:, 1], middle[:, 1] + middle[:, 2]], 1).astype(np.int8)
    np.testing.assert_array_equal(found.outputs, outputs)
    sums = np.stack([vectors.checksums(middle), vectors.checksums(outputs)], 1)
    np.testing.assert_array_equal(found.checksums, sums)
    assert 0 < found.sizes.text < 1000 and found.sizes.data == found.sizes.bss == 0
    assert len(found.layer_instructions) == 2
    assert 0 <= sum(found.layer_instructions) < found.instructions < 300


def test_instructions_are_counted(target: Target, tmp_path: Path) -> None:
    none = bench.measure(write_fake(tmp_path / "none", loop(1), loop(1)), NAME, target, INPUTS)
    some = bench.measure(write_fake(tmp_path / "some", loop(1001), loop(501)), NAME, target, INPUTS)
    assert abs(some.instructions - none.instructions - 3000) <= 2
    added = np.subtract(some.layer_instructions, none.layer_instructions)
    assert np.abs(added - [2000, 1000]).max() <= 2


def test_the_clock_may_wrap(target: Target, tmp_path: Path) -> None:
    # 40 million instructions are eight rounds of a 24-bit timer; the handler takes a few of them each time.
    found = bench.measure(write_fake(tmp_path, loop(15_000_000), loop(5_000_000)), NAME, target, INPUTS[:1])
    assert abs(found.instructions - 40_000_000) < 500
    assert np.abs(np.subtract(found.layer_instructions, [30_000_000, 10_000_000])).max() < 400


def test_the_stack_is_that_of_the_network(target: Target, tmp_path: Path) -> None:
    buffer = "{ volatile int8_t large[2000]; large[0] = 1; large[1999] = large[0]; }"
    small = bench.measure(write_fake(tmp_path / "small"), NAME, target, INPUTS)
    large = bench.measure(write_fake(tmp_path / "large", buffer), NAME, target, INPUTS)
    assert small.stack <= 128
    assert 2000 <= large.stack - small.stack <= 2064


@pytest.mark.parametrize("optimize", ["-Os", "-O3"])
def test_other_levels_of_optimization(optimize: str, target: Target, tmp_path: Path) -> None:
    """The smallest code calls the compiler's own library, the fastest one has vectors before main."""
    expected = bench.measure(write_fake(tmp_path), NAME, target, INPUTS)
    found = bench.measure(tmp_path, NAME, target, INPUTS, optimize=optimize)
    np.testing.assert_array_equal(found.outputs, expected.outputs)
    np.testing.assert_array_equal(found.checksums, expected.checksums)


def test_a_layout_for_plain_c_is_asked_for(cortex_m4: Target, tmp_path: Path) -> None:
    text = "#if defined(FAKE_PLAIN_C)\nout[1] = 99;\n#endif"
    found = bench.measure(write_fake(tmp_path, "", text), NAME, cortex_m4, INPUTS, plain=True)
    assert (found.outputs[:, 1] == 99).all()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("middle[70] = 0;", "the network writes beside its arena"),
        ("middle[-1] = 0;", "the network writes beside its arena"),
        ("((void (*)(void))(uintptr_t)0xf0000001u)();", "FAULT"),
        ("return -1;", "the network refuses its arena"),
    ],
)
@pytest.mark.parametrize("name", ["cortex-m4", "rv32imc"])
def test_what_goes_wrong_on_the_board(code: str, said: str, name: str, tmp_path: Path) -> None:
    target = targets.find(name)
    need_target(target)
    with pytest.raises(MachineError, match=f"on {target.core} in QEMU: {said}"):
        bench.measure(write_fake(tmp_path, code), NAME, target, INPUTS)


def test_an_unaligned_access_is_a_fault_on_a_cortex_m0(tmp_path: Path) -> None:
    target = targets.find("cortex-m0plus")
    need_target(target)
    code = "*(volatile uint32_t *)((uintptr_t)middle + 1u) = 1u;"
    with pytest.raises(MachineError, match="FAULT"):
        bench.measure(write_fake(tmp_path, code), NAME, target, INPUTS)


def test_an_endless_loop_is_ended(cortex_m4: Target, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="qemu-system-arm did not end within 2 seconds"):
        bench.measure(write_fake(tmp_path, "for (;;) { }"), NAME, cortex_m4, INPUTS, timeout=2)


def test_the_first_error_of_the_compiler_is_told(cortex_m4: Target, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        bench.measure(write_fake(tmp_path, "no_such_thing = 1;"), NAME, cortex_m4, INPUTS)
    assert "error: 'no_such_thing' undeclared" in caught.value.cause and "\n" not in caught.value.cause


def test_a_network_that_does_not_fit(cortex_m4: Target, tmp_path: Path) -> None:
    helpers = "extern int8_t huge[8000000]; int8_t huge[8000000] = {1};"
    with pytest.raises(MachineError, match=r"will not fit in region|overflowed by"):
        bench.measure(write_fake(tmp_path, "middle[1] += huge[in[0]];", "", helpers), NAME, cortex_m4, INPUTS)


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        bench.measure(write_fake(tmp_path / "fake"), NAME, targets.find("cortex-m4"), INPUTS)
    assert caught.value.remedy == "apt-get install gcc-arm-none-eabi qemu-system-arm"


def test_nothing_is_left_behind(cortex_m4: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    bench.measure(write_fake(tmp_path / "good"), NAME, cortex_m4, INPUTS)
    with pytest.raises(MachineError):
        bench.measure(write_fake(tmp_path / "bad", "broken"), NAME, cortex_m4, INPUTS)
    assert not list(scratch.iterdir())
