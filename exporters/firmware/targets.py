"""The processors that C is written for: how their compiler is called, and the board that QEMU stands in for them."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass

from effcli.errors import UnsupportedError, UserError, did_you_mean

# Which Debian package brings a program.
_PACKAGES = {
    "cc": "gcc",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi",
    "riscv64-unknown-elf-gcc": "gcc-riscv64-unknown-elf",
    "qemu-system-arm": "qemu-system-arm",
    "qemu-system-riscv32": "qemu-system-misc",
}


@dataclass(frozen=True)
class Board:
    """What QEMU emulates. script and start: the linker script and the start-up code, files of the folder `bare`.

    Every instruction takes 2^shift ns of virtual time, in which the clock that a program reads advances by `ticks`.
    """

    emulator: str
    machine: str
    script: str
    start: str
    shift: int
    ticks: float


@dataclass(frozen=True)
class Target:
    """One processor. core: what a person calls it; flags: those that its compiler needs; board: None on the host."""

    name: str
    core: str
    compiler: str
    flags: tuple[str, ...] = ()
    board: Board | None = None

    @property
    def command(self) -> tuple[str, ...]:
        """The compiler as it is called; on the host the environment variable CC may name another."""
        chosen = shlex.split(os.environ.get("CC", "")) if self.board is None else []
        return tuple(chosen) or (self.compiler,)

    @property
    def size_program(self) -> str:
        """The program that tells the sizes of sections; it comes with the compiler."""
        return self.compiler.removesuffix("gcc").removesuffix("cc") + "size"


# An instruction takes 128 ns, so that the clocks of 25 and 32 MHz advance by more than one tick with each of them.
_SHIFT = 7


def _cortex_m(core: str, machine: str, script: str, megahertz: int, *floating: str) -> Target:
    board = Board("qemu-system-arm", machine, script, "start_cortex_m.c", _SHIFT, megahertz * 2**_SHIFT / 1000)
    flags = (f"-mcpu=cortex-{core.lower()}", "-mthumb", *(floating or ("-mfloat-abi=soft",)))
    return Target(f"cortex-{core.lower()}", f"Arm Cortex-{core}", "arm-none-eabi-gcc", flags, board)


_ALL = (
    Target("host", "this machine", "cc"),
    # QEMU has no board with an M0+ and enough memory: the M3 runs every instruction of it, and traps here what the
    # M0+ would trap, accesses to addresses that are not aligned.
    _cortex_m("M0plus", "mps2-an385", "mps2.ld", 25),
    _cortex_m("M3", "mps2-an385", "mps2.ld", 25),
    _cortex_m("M4", "mps2-an386", "mps2.ld", 25, "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    _cortex_m("M7", "mps2-an500", "mps2.ld", 25, "-mfloat-abi=hard", "-mfpu=fpv5-d16"),
    _cortex_m("M55", "mps3-an547", "mps3.ld", 32, "-mfloat-abi=hard"),
    Target(
        "rv32imc",
        "RISC-V RV32IMC",
        "riscv64-unknown-elf-gcc",
        ("-march=rv32imc", "-mabi=ilp32", "-mcmodel=medany"),
        Board("qemu-system-riscv32", "virt", "virt.ld", "start_riscv.c", 0, 1.0),
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def find(name: str) -> Target:
    """The target called `name`; `UnsupportedError` when there is none."""
    if name not in TARGETS:
        raise UnsupportedError(f"there is no target {name!r}", did_you_mean(name, TARGETS))
    return TARGETS[name]


def missing(target: Target, run: bool = True) -> tuple[str, ...]:
    """The programs that are not installed here out of those that build for `target` and, with `run`, run the result."""
    needed = [target.command[0], *([target.board.emulator] if target.board and run else [])]
    return tuple(program for program in needed if shutil.which(program) is None)


def remedy(programs: tuple[str, ...]) -> str:
    """The command that installs `programs` on Debian and Ubuntu."""
    packages = dict.fromkeys(_PACKAGES.get(program, program) for program in programs)
    return f"apt-get install {' '.join(packages)}"


def require(target: Target, run: bool = True) -> None:
    """Raise `UserError` unless what builds for `target` and, with `run`, runs the result is installed."""
    absent = missing(target, run)
    if absent:
        raise UserError(f"C for {target.core} needs {' and '.join(absent)}, not installed here", remedy(absent))
