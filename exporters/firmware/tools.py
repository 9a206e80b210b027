"""Compilers and emulators as programs that are called: what they say, and what it means when they fail."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from effcli.errors import MachineError, UserError

Word = str | Path
# What to do where a tool fails over files that effcli wrote.
ANOTHER = "try another version of it, or report it with the network"

_FAILURE = re.compile(r"\b(error|undefined reference|overflowed|cannot find)\b", re.IGNORECASE)


def call(command: Sequence[Word], folder: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a program in `folder` for at most `timeout` seconds; what it wrote, in English.

    `UserError` when it cannot be started, `MachineError` when it takes longer.
    """
    words = [str(word) for word in command]
    try:
        return subprocess.run(
            words,
            cwd=folder,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise UserError(f"{words[0]} cannot be started: {error.strerror}", f"install {words[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"{words[0]} did not end within {timeout:g} seconds", "run it again when the machine has less to do"
        ) from error


def compile(command: Sequence[Word], folder: Path, timeout: float = 600) -> str:
    """Run a compiler in `folder`; its warnings. `MachineError` with its first error when it fails."""
    done = call(command, folder, timeout)
    if done.returncode != 0:
        raise MachineError(f"{command[0]} failed: {first_error(done.stderr) or f'code {done.returncode}'}", ANOTHER)
    return done.stderr


def first_error(messages: str) -> str:
    """The first line of a compiler's messages that reports an error, else the first line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    failures = [line for line in lines if _FAILURE.search(line)]
    return (failures or lines or [""])[0]
