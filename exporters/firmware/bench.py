"""Emitted C in QEMU: its outputs, a checksum of each layer, and the instructions and the stack of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effcli.errors import MachineError
from effcli.exporters.firmware import targets, tools
from effcli.exporters.firmware.source import fill
from effcli.exporters.firmware.targets import Board, Target

FLAGS = ("-std=c99", "-ffreestanding", "-ffunction-sections", "-fdata-sections")
LINK = ("-nostdlib", "-nostartfiles", "-Wl,--gc-sections")
# What each program is made of, beside the start-up code: the self test of an export, and the comparison program.
_AGAIN = "run it again; if that fails as well, report it with the network"
_PROGRAMS = {
    "main": ("main.c", "semihosting.c", "memory.c"),
    "bench": ("bench.c", "counting.c", "semihosting.c", "memory.c"),
}
_HEADERS = {"main": ("semihosting.h",), "bench": ("semihosting.h", "counting.h")}

Program = Literal["main", "bench"]


class Sizes(NamedTuple):
    """Bytes of the network without the program around it. text: code and constants."""

    text: int
    data: int
    bss: int


@dataclass(frozen=True)
class Measured:
    """What a run in QEMU showed.

    outputs: int8 (n, output bytes); checksums: uint32 (n, layers), FNV-1a of each layer's bytes. instructions: of one
    run without hooks; layer_instructions: those between the calls of the hook, without what the hook itself takes.
    stack: bytes below the caller's at their deepest.
    """

    outputs: NDArray[np.int8]
    checksums: NDArray[np.uint32]
    instructions: int
    layer_instructions: tuple[int, ...]
    stack: int
    sizes: Sizes


def bare(file: str) -> str:
    """A file of the folder `bare`, to be filled with a network's name."""
    return (resources.files("effcli.exporters.firmware") / "bare" / file).read_text(encoding="utf-8")


def sources(program: Program, board: Board) -> tuple[str, ...]:
    """The C files of the folder `bare` that `program` consists of on `board`."""
    return (*_PROGRAMS[program], board.start)


def bare_files(program: Program, board: Board) -> tuple[str, ...]:
    """All files of the folder `bare` that `program` needs on `board`."""
    return (*sources(program, board), *_HEADERS[program], board.script)


def emulator(board: Board) -> tuple[str, ...]:
    """The command that runs a program on `board`, without the program itself."""
    return (
        *(board.emulator, "-M", board.machine, "-bios", "none", "-icount", f"shift={board.shift}"),
        *("-display", "none", "-monitor", "none", "-serial", "none", "-chardev", "stdio,id=console"),
        *("-semihosting-config", "enable=on,target=native,chardev=console"),
    )


def build(
    folder: Path,
    name: str,
    target: Target,
    program: Program,
    work: Path,
    *,
    plain: bool = False,
    optimize: str = "-O2",
    extra_flags: Sequence[str] = (),
) -> Path:
    """Compile the network `name` in `folder` (its sources in `src`, its test in `test`) for the board of `target`.

    program: the self test, or the comparison program. work: where everything is written. plain: without DSP
    instructions. Raises `UserError` where the compiler is not installed, `MachineError` when it fails.
    """
    targets.require(target, run=False)
    folder, work, board = folder.resolve(), work.resolve(), _board(target)
    for file in bare_files(program, board):
        (work / file).write_text(fill(bare(file), name, ()), encoding="utf-8")
    files = [*sorted((folder / "src").glob("*.c")), *(work / file for file in sources(program, board))]
    if program == "main":
        files.append(folder / "test" / f"{name}_test.c")
    elf = work / f"{program}.elf"
    options = [*_options(name, target, plain), optimize, *extra_flags, f"-I{folder / 'src'}", f"-I{work}"]
    linking: list[tools.Word] = [*LINK, "-T", work / board.script, "-lgcc"]
    tools.compile([*target.command, *options, *files, *linking, "-o", elf], work)
    return elf


def run(elf: Path, target: Target, work: Path, timeout: float = 600) -> str:
    """Run a program in QEMU, its files in `work`; what it printed.

    Raises `UserError` where QEMU is not installed, `MachineError` when the program ends with another code than 0 or
    not within `timeout` seconds.
    """
    targets.require(target)
    done = tools.call([*emulator(_board(target)), "-kernel", elf.resolve()], work, timeout)
    if done.returncode != 0:
        lines = [line.removeprefix("error=") for line in (*done.stdout.splitlines(), *done.stderr.splitlines())]
        said = lines[-1] if lines else f"it ended with code {done.returncode}"
        raise MachineError(f"{elf.name} on {target.core} in QEMU: {said}", _AGAIN)
    return done.stdout


def measure(
    folder: Path,
    name: str,
    target: Target,
    inputs: NDArray[np.int8],
    *,
    plain: bool = False,
    optimize: str = "-O2",
    extra_flags: Sequence[str] = (),
    timeout: float = 600,
) -> Measured:
    """Build the network `name` in `folder` with the comparison program, and run it in QEMU.

    inputs: int8 (n, input bytes), in the order of the network's memory; the counts are those of the first one.
    """
    targets.require(target)
    options: dict[str, Any] = {"plain": plain, "optimize": optimize, "extra_flags": extra_flags}
    with tempfile.TemporaryDirectory(prefix="effcli-") as temporary:
        work = Path(temporary)
        elf = build(folder, name, target, "bench", work, **options)
        (work / "inputs.bin").write_bytes(np.ascontiguousarray(inputs, np.int8).tobytes())
        printed = run(elf, target, work, timeout)
        found = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
        ticks = _board(target).ticks
        try:
            width, layers = int(found["output_bytes"]), int(found["layers"])
            record = np.dtype([("output", np.int8, (width,)), ("checksums", "<u4", (layers,))])
            records = np.fromfile(work / "outputs.bin", record)
            layer_ticks = [int(word) for word in found["layer_ticks"].split()]
            instructions, stack = round(int(found["ticks"]) / ticks), int(found["stack"])
        except (KeyError, ValueError, OSError) as error:
            raise MachineError(f"{elf.name} on {target.core} in QEMU ended early", _AGAIN) from error
        if len(records) != len(inputs) or len(layer_ticks) != layers:
            raise MachineError(
                f"{elf.name} on {target.core} in QEMU ended after {len(records)} of {len(inputs)} inputs", _AGAIN
            )
        return Measured(
            records["output"],
            records["checksums"],
            instructions,
            tuple(round(count / ticks) for count in layer_ticks),
            stack,
            sizes(folder, name, target, work, **options),
        )


def sizes(
    folder: Path,
    name: str,
    target: Target,
    work: Path,
    *,
    plain: bool = False,
    optimize: str = "-O2",
    extra_flags: Sequence[str] = (),
) -> Sizes:
    """The sizes of the network's own object files, built without hooks into a new folder in `work`."""
    targets.require(target, run=False)
    objects = Path(tempfile.mkdtemp(dir=work.resolve()))
    files = sorted((folder.resolve() / "src").glob("*.c"))
    options = [*_options(name, target, plain), f"-D{name.upper()}_NO_HOOKS", optimize, *extra_flags]
    tools.compile([*target.command, *options, "-c", *files], objects)
    done = tools.call([target.size_program, "--totals", *sorted(objects.glob("*.o"))], objects)
    if done.returncode != 0:
        raise MachineError(f"{target.size_program} failed: {tools.first_error(done.stderr)}", tools.ANOTHER)
    text, data, bss = done.stdout.splitlines()[-1].split()[:3]
    return Sizes(int(text), int(data), int(bss))


def _options(name: str, target: Target, plain: bool) -> list[str]:
    """What the compiler is told for every file of the network `name`. plain: without DSP instructions."""
    return [*target.flags, *FLAGS, *([f"-D{name.upper()}_PLAIN_C"] if plain else [])]


def _board(target: Target) -> Board:
    if target.board is None:
        raise ValueError(f"{target.name} is not emulated")
    return target.board
