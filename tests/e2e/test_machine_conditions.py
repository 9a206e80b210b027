"""What a machine lacks ends in one line with its cause and a remedy, or does not matter at all."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effcli.errors import MachineError, OutputError, UserError, machine_condition, writing

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


def effcli(*arguments: str | bytes, **options: object) -> subprocess.CompletedProcess[str]:
    keys = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    keys["env"] = os.environ | keys.get("env", {})  # type: ignore[operator]
    return subprocess.run([sys.executable, "-m", "effcli", *arguments], **keys)  # type: ignore[call-overload, no-any-return]


def test_ascii_is_enough(tmp_path: Path) -> None:
    arguments = ("compress", "sample:cnn", "--pass", "linear", "-o", str(tmp_path / "o"))
    done = effcli(*arguments, "--set", "evaluate.latency=false", env=ASCII)
    assert done.returncode == 0, done.stderr
    assert "+-" in done.stderr
    assert (done.stdout + done.stderr).isascii()


def test_a_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = effcli("passes", "--json", stdout=full)
    assert done.returncode == 2
    cause, remedy = done.stderr.splitlines()
    assert cause == "error: cannot write to standard output: No space left on device"
    assert remedy.startswith("  send it where there is room")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_output(closed: int) -> None:
    done = effcli("passes", preexec_fn=lambda: os.close(closed))
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_reader_that_went_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = effcli("passes", stdout=writer)
    os.close(writer)
    assert "internal error" not in done.stderr and "Traceback" not in done.stderr


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    done = effcli("inspect", os.fsencode(tmp_path) + b"/\xff")
    assert done.returncode == 1
    assert "is not UTF-8" in done.stderr and r"\udcff" in done.stderr


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    done = effcli(
        *("compress", "sample:cnn", "--pass", "linear", "--no-eval", "-o", str(tmp_path / "o")),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode in (1, 2)
    assert "a file would become larger than the system allows" in done.stderr
    assert len(done.stderr.splitlines()[-2:]) == 2 and "internal error" not in done.stderr


def test_no_folder_for_temporary_files() -> None:
    error = machine_condition(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"))
    assert isinstance(error, MachineError)
    assert "TMPDIR" in error.remedy


def test_torch_and_python_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        found = machine_condition(error)
        assert found is not None and found.cause == "out of memory" and found.remedy


def surrogate() -> None:
    "a\udcff".encode()


def test_a_name_within_a_folder_that_is_not_utf8() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        surrogate()
    assert isinstance(machine_condition(caught.value), UserError)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: RuntimeError("Error: I/O error: File too large (os error 27)"), "larger than the system allows"),
        (lambda: OSError("1000 requested and 10 written"), "no space left"),
    ],
)
def test_what_libraries_say_of_the_disk(make: Callable[[], Exception], cause: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=cause), writing(tmp_path):
        raise make()


def test_an_error_of_ours_is_no_machine_condition() -> None:
    assert machine_condition(KeyError("x")) is None
    assert machine_condition(RuntimeError("shapes differ")) is None
