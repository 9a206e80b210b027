"""What the benchmarks share: a child process with its time and memory measured, the machine's name, a table."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measured:
    """A finished child process. seconds: wall clock, its start included; peak: highest resident set, bytes."""

    seconds: float
    peak: int
    code: int
    output: str
    errors: str

    @property
    def last_line(self) -> str:
        """The last line that it wrote to its error stream: of a Python traceback, the message."""
        lines = self.errors.strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {self.code}"


def run(command: Sequence[str | Path], extra: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end, with `extra` environment variables.

    The system counts the memory of the process that starts a child towards the child's peak until the child's own
    program runs, so a script that calls this must not have imported torch.
    """
    assert "torch" not in sys.modules
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        # The library's own progress bars and telemetry are no part of what is measured.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **(extra or {})}
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        texts = [stream.read().decode("utf-8", "replace") for stream in (output, errors)]
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(seconds, usage.ru_maxrss * unit, process.returncode, *texts)


def checked(command: Sequence[str | Path], extra: Mapping[str, str] | None = None) -> Measured:
    """`run`, and stop the whole script with the child's errors when it fails."""
    result = run(command, extra)
    if result.code:
        raise SystemExit(f"{result.errors}\n{' '.join(map(str, command))}: exit code {result.code}")
    return result


def effcli(*arguments: str | Path) -> list[str | Path]:
    """The command line of effcli under the Python that runs the benchmark."""
    return [sys.executable, "-m", "effcli", *arguments]


def threads_environment(threads: int | None) -> dict[str, str]:
    """Environment variables that give every library in a child `threads` CPU threads; none for their own choice."""
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def weight_bytes(folder: Path) -> int:
    """Size of the weight files in `folder`, bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def machine(threads: int | None = None) -> str:
    """One line that names the machine and the software."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        name = " ".join(names[0].split()) if names else name
    cores = os.cpu_count() or 1
    used = f", {threads} threads" if threads is not None else ""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "effcli"))
    return f"{name}, {cores} cores{used}{load}; Python {platform.python_version()}, {packages}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
