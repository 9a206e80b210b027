"""The log of a command: what it did, and how it ended, beside what it shows."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from effcli.cli import main

COMPRESS = ["compress", "sample:lm", "--pass", "linear:bits=4,group_size=32", "--no-eval", "-o"]
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|ERROR) .+")


def test_a_run_is_logged_and_shown_as_without_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "run.log"
    assert main([*COMPRESS, str(tmp_path / "plain")]) == 0
    shown = capsys.readouterr()
    assert main([*COMPRESS, str(tmp_path / "logged"), "--log-file", str(log)]) == 0
    again = capsys.readouterr()
    for one, two in ((shown.out, again.out), (shown.err, again.err)):
        assert [line.split()[:1] for line in one.splitlines()] == [line.split()[:1] for line in two.splitlines()]
    lines = log.read_text(encoding="utf-8").splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [line for line in lines if "INFO input: " in line] and [line for line in lines if "INFO linear: " in line]
    assert logging.getLogger("effcli").level == logging.NOTSET
    assert main(["verify", str(tmp_path / "logged"), "--log-file", str(log)]) == 0
    assert len(log.read_text(encoding="utf-8").splitlines()) > len(lines)


def test_an_error_is_logged_with_its_remedy_and_on_debug_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run.log"
    name = tmp_path / "not\x1bhere"
    for level, traced in (("error", False), ("debug", True)):
        assert main(["verify", str(name), "--log-file", str(log), "--log-level", level]) == 1
        text = log.read_text(encoding="utf-8")
        assert "ERROR " in text and "does not exist" in text and "\x1b" not in text
        assert ("Traceback" in text) == traced
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--log-level", "info"], "add --log-file FILE"),
        (["--log-file", "nowhere/run.log"], "choose another --log-file"),
        (["--log-file", "run.log", "--log-level", "loud"], "'loud' is not one of"),
    ],
)
def test_what_is_wrong_with_a_log_is_said(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "sample:lm", *options]) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--log-file", "/dev/full"]) == 0
    assert capsys.readouterr().err == ""
