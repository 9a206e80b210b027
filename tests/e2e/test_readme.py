"""What the README's first command and the examples tell a reader to do, done; test_docs.py does the rest."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from effcli.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

# The recipes as they are, on less data.
SMALL_TEXT = {"calibration.samples": 4, "calibration.length": 128, "evaluate.samples": 2, "evaluate.length": 128}
SMALL_IMAGES = {"calibration.samples": 16, "evaluate.samples": 100}


def weight_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def test_the_two_set_up_commands_stand_in_the_readme() -> None:
    assert "pip install -e . && effcli compress sample:lm --pass awq --bits 4 -o out" in README
    assert "pip install -e '.[test]' && pytest" in README


@pytest.mark.slow
def test_first_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"pip install -e \. && effcli (.*)", README)
    assert command is not None
    # As a user has it: its own process, and nothing but the current directory to go by.
    done = subprocess.run(
        [sys.executable, "-m", "effcli", *shlex.split(command[1])], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    out = tmp_path / "out"
    for name in ("config.json", "recipe.yaml", "report.json", "report.html", "README.md", "model.safetensors"):
        assert (out / name).is_file(), name

    assert main(["verify", str(out)]) == 0
    again = tmp_path / "again"
    assert main(["run", str(out / "recipe.yaml"), "-o", str(again), "--no-eval", "--quiet"]) == 0
    assert weight_hashes(again) == weight_hashes(out) != {}
    assert main(["compare", str(out), str(again)]) == 0
    assert main(["report", str(again)]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = SMALL_TEXT if "sample:lm" in path.read_text(encoding="utf-8") else SMALL_IMAGES
    small = [f"--set={key}={value}" for key, value in wanted.items()]
    assert main(["run", str(path), "-o", str(tmp_path / "out"), *small]) == 0, capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\]\((.*?\.yaml)\)", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in EXAMPLES]
