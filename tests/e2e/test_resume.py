"""A run killed in the middle goes on from the last written block, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from effcli.cli import main

STEPS = ["--pass=awq:bits=4", "--pass=linear:bits=3,ignore=['*.down_proj']"]
ARGUMENTS = [*STEPS, "--no-eval", "--set=calibration.samples=8"]

# Kills its own process without a goodbye once block 3 of the first pass is on the disk.
KILLED = """
import os, signal, sys
from effcli.language import journal
from effcli.cli import main

advance = journal.Journal.advance

def killing(self, done):
    advance(self, done)
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

journal.Journal.advance = killing
main(sys.argv[1:])
"""


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
def test_kill_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    # One thread: sums in another order would differ in the last bit between processes with other thread counts.
    command = ["compress", "sample:lm", "-o", str(out), "--threads=1", *ARGUMENTS]
    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / ".out.effcli").is_dir()

    assert main(command) == 0
    assert "going on from the last written block" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    assert main(["compress", "sample:lm", "-o", str(whole), "--threads=1", *ARGUMENTS]) == 0
    assert hashes(out) == hashes(whole) != {}


@pytest.mark.slow
def test_another_request_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["compress", "sample:lm", "-o", str(out), *ARGUMENTS]
    subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True)
    assert main([*command, "--set=passes.0.bits=3"]) == 0
    assert "going on" not in capsys.readouterr().err
