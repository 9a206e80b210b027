"""The commands and programs of a Markdown page, carried out as a reader would, on less data.

Fenced blocks are carried out from top to bottom in one folder: `sh` line by line, `python` as one program, and a `yaml`
block with `title="NAME"` is written to the file NAME. A comment on the line before a block says more of it:

    <!-- not run: REASON -->    it is left out
    <!-- fails: TEXT -->        its last command fails, with this text
    <!-- slow -->               the test of the page is a slow one

What a page asks of the Hub becomes the sample, and the texts and images that pages speak of are there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from effcli.cli import main
from effcli.files.locate import CALIBRATION_TEXT, EVALUATION_TEXT, SAMPLES

ROOT = Path(__file__).resolve().parents[2]
# Why a block may be left out.
REASONS = ("needs the network", "installs packages", "needs a GPU", "another tool", "changes the shell")

HUB = {"HuggingFaceTB/SmolLM2-135M-Instruct": "sample:lm"}
LESS_TEXT = {
    "calibration.samples": 2,
    "calibration.length": 32,
    "evaluate.samples": 1,
    "evaluate.length": 32,
    "evaluate.latency": False,
}
LESS_IMAGES = {"calibration.samples": 32, "evaluate.samples": 64, "evaluate.latency": False}
_FENCE = re.compile(
    r"^(?:<!-- (?P<kind>not run|fails|slow)(?:: (?P<said>[^\n]*))? -->\n)?```(?P<info>[^\n]*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_COMMAND = re.compile(r"^(?:    |\t)\s*(?:\$ )?effcli [a-z]+ .*", re.M)
_BLOCK_COMMAND = re.compile(r"^\s*(?:\$ )?effcli [a-z]+ .*", re.M)
# What a shell does to a line and Python does not.
_SHELL = re.compile(r"[|><;&$`*]")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that its text belongs into, and what the comment before it says."""

    language: str
    title: str
    text: str
    # Why it is not carried out, and what its last command fails with; empty otherwise.
    reason: str
    failure: str
    slow: bool


def blocks(page: Path) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        language, _, rest = match["info"].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        kind, said = match["kind"], match["said"] or ""
        reason, failure = (said if kind == each else "" for each in ("not run", "fails"))
        found.append(Block(language, title[1] if title else "", match["text"], reason, failure, kind == "slow"))
    return found


def commands(text: str) -> list[str]:
    """The commands of an `sh` block, with their continuation lines."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def loose_commands(page: Path) -> list[str]:
    """Lines that look like a command of effcli and stand in no block that is carried out."""
    found = _COMMAND.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    for block in blocks(page):
        if block.language != "sh" and not block.reason:
            found += _BLOCK_COMMAND.findall(block.text)
    return [line.strip() for line in found]


def furnish(folder: Path) -> None:
    """Put the data into `folder` that pages name: two texts, a question, two sets of images, and the examples."""
    shutil.copy(CALIBRATION_TEXT, folder / "valid.txt")
    shutil.copy(EVALUATION_TEXT, folder / "test.txt")
    question = {"query": "To be, or not to", "choices": [" be", " sea"], "gold": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    for name, own in (("train", "calibration"), ("test", "evaluation")):
        shutil.copy(SAMPLES["sample:cnn"] / f"{own}.npz", folder / f"{name}.npz")
    (folder / "examples").symlink_to(ROOT / "examples")


def carry_out(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    """Carry out the blocks of `page` in the current folder; the number of commands and programs."""
    import effcli
    from effcli.api import compress

    def smaller(model: Any, *arguments: Any, **keys: Any) -> Any:
        less = {"calibration": {"samples": 2, "length": 32}, "evaluate": False}
        return compress(model, *arguments, **{**less, **keys})

    monkeypatch.setattr(effcli, "compress", smaller, raising=False)
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page):
        if block.reason:
            continue
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
            count += 1
        elif block.language == "sh":
            lines = commands(block.text)
            count += len(lines)
            for line in lines[:-1] if block.failure else lines:
                code = run(line)
                assert code == 0, f"exit code {code} of: {line}\n{capsys.readouterr().err}"
            if block.failure:
                capsys.readouterr()
                assert run(lines[-1]) == 1, lines[-1]
                assert block.failure in " ".join(capsys.readouterr().err.split()), lines[-1]
    return count


def run(line: str) -> int:
    """Carry out one command; its exit code."""
    for name, local in HUB.items():
        line = line.replace(name, local)
    quoted = re.sub(r"'[^']*'", "", line)
    if line.startswith("effcli ") and not _SHELL.search(quoted):
        words = shlex.split(line)[1:]
        return main([*words, *_less(words)])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-euo", "pipefail", "-c", line], env=os.environ | {"PATH": path}).returncode


def _less(words: list[str]) -> list[str]:
    """Further words that make a command of effcli ask for less data, where it does not say how much it asks for."""
    if words[0] not in ("compress", "run") or "--help" in words:
        return []
    model = words[1]
    if words[0] == "run":
        model = yaml.safe_load(Path(model).read_text(encoding="utf-8"))["model"]
    wanted = LESS_IMAGES if model == "sample:cnn" or model.endswith((".pt2", ".onnx")) else LESS_TEXT
    unmeasured = "--no-eval" in words
    said = {word.partition("=")[0] for word in words}
    kept = {key: value for key, value in wanted.items() if not (unmeasured and key.startswith("evaluate"))}
    return [f"--set={key}={json.dumps(value)}" for key, value in kept.items() if key not in said]
