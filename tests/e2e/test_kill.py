"""A run killed at any moment ends, given again, with the same bytes; scripts/kill_campaign.py tries more moments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_campaign.py"


# Two moments anywhere, those at which the output is put in its place and what is left beside it goes
# away, those at which it replaces another, and two of a run that searches.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "at", "count", "more"),
    [("graph", "files", 2, []), ("graph", "end", 3, []), ("graph", "place", 2, ["--over"]), ("search", "files", 2, [])],
)
def test_a_killed_run_is_finished_by_the_same_command(run: str, at: str, count: int, more: list[str]) -> None:
    words = [sys.executable, SCRIPT, "--runs", run, "--at", at, "--count", str(count), "--seed", "3", *more]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    header, row = done.stdout.splitlines()
    figures = dict(zip(header.split()[3:5], row.split()[3:5], strict=True))
    assert int(figures["moments"]) == count and int(figures["kills"]) >= count
