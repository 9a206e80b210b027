"""Resident memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak() -> int:
    """Highest resident set since the start, or since `reset_peak` where the system can reset it; bytes."""
    if _STATUS.exists():
        return _field("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current() -> int:
    """Resident set now, bytes; the peak where the system does not tell."""
    return _field("VmRSS") if _STATUS.exists() else peak()


def reset_peak() -> bool:
    """Start the peak anew from what is resident now; False where the system cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Tensors of some megabytes come from the heap, and what one block leaves free there, in pieces, the next one cannot
    always use: without this the resident set grows from block to block although nothing is held.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if release is not None:
        release(0)


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
