"""The machine: its devices, their names, and how many threads torch takes."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from effcli.errors import UnsupportedError, UserError

# More threads than these, or than so many for each processor, serve nothing and may not all start.
_THREADS = 64
_THREADS_EACH = 8


def pick_device(name: str) -> torch.device:
    """The device that `name` (cpu, cuda, cuda:N or auto) means here; `UnsupportedError` when there is none."""
    if not re.fullmatch(r"cpu|auto|cuda(:[0-9]{1,3})?", name):
        raise UnsupportedError(f"there is no device {name}", "name cpu, cuda, cuda:N or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"there is no device {name} on this machine", "use --device cpu, or a CUDA build of torch"
        )
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself, e.g. 'NVIDIA H100' or 'AMD EPYC 9B45'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def cpu_threads(wanted: int | None) -> Iterator[int]:
    """torch with `wanted` CPU threads, and the former number afterwards; `UserError` for a number that cannot serve."""
    former = torch.get_num_threads()
    if wanted is not None:
        most = max(_THREADS, _THREADS_EACH * (os.cpu_count() or 1))
        if not 1 <= wanted <= most:
            raise UserError(f"threads: {wanted} cannot serve on this machine", f"ask for 1 to {most}")
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(former)
