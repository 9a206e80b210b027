"""What all tests share: imports as users have them, no network, real data where it is there."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The tests import the installed package: with the checkout on the path `passes` and `kernels` would be packages too.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Read by huggingface_hub when it is imported: a test that would download something fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# Read by torch when it is imported: small networks are no faster on many threads, and on a busy machine far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read by Triton when it is imported: without a GPU its kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

NO_SKIP = os.environ.get("EFFCLI_NO_SKIP") == "1"

# No deadline: the first example may import torch. In CI the same examples each time; elsewhere new ones are tried.
settings.register_profile("effcli", deadline=None, derandomize=NO_SKIP)
settings.load_profile("effcli")

# What CI cannot have: a GPU, and gptqmodel, which asks for a later torch than effcli supports. A reader of our own
# reads the layouts in any case.
ALLOWED_REASONS = ("needs a GPU", "needs gptqmodel")


@pytest.fixture(autouse=True)
def no_lines_of_slow_phases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line for a phase because this machine is slow: only the tests of phases, whose clock stands, see them."""
    if request.path.name != "test_terminal.py":
        from effcli.reports import terminal

        monkeypatch.setattr(terminal, "MOMENT", math.inf)


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """Finds real networks and texts by name, e.g. `asset("text_wikitext2")`; the test skips where there are none."""
    root = Path(os.environ.get("EFFCLI_ASSETS") or ROOT.parent / "shared" / "assets")

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"needs {name} in the folder EFFCLI_ASSETS ({root})")
        return root / name

    return find


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    return _unskipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    return _unskipped(report)


def _unskipped(report: Any) -> Any:
    """With EFFCLI_NO_SKIP=1 a skip is a failure, unless it is for want of what CI cannot have."""
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_REASONS):
            report.outcome = "failed"
            report.longrepr = f"skipped although EFFCLI_NO_SKIP=1: {reason}"
    return report
