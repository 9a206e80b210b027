"""Damaged inputs of every kind end in a refusal with a cause; scripts/fuzz.py tries many more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"
DATA = "parquet,images,npz,jsonl,yaml,spec,report,recipe"
KINDS = f"safetensors,config,own,index,graph,integer,onnx,pt2,{DATA}"
COUNT = 8


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_damaged_inputs_are_refused_with_a_cause(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("pyarrow")
    done = fuzz("--kinds", KINDS, "--count", str(COUNT), "--seed", "3", "--keep", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "kept").exists()
    *_, last = done.stdout.splitlines()
    assert last.split()[:2] == ["all", str(COUNT * len(KINDS.split(",")))]


def test_an_unknown_kind() -> None:
    done = fuzz("--kinds", "yoml")
    assert done.returncode == 2
    assert "no such kind: yoml" in done.stderr
