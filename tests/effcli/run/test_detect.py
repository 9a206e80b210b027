"""What an output was made from, as the user names it: which of the two paths is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effcli.errors import CheckpointError
from effcli.files.locate import SAMPLES
from effcli.reports.report import Report
from effcli.run import detect


def output(folder: Path, bare_report: Report) -> Path:
    """An output that holds a language model, as far as its config says, and a report."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    bare_report.write(folder)
    return folder


def test_a_misspelt_input(tmp_path: Path, bare_report: Report) -> None:
    out = output(tmp_path / "out", bare_report)
    with pytest.raises(CheckpointError, match=r"--against mispelt: mispelt does not exist") as caught:
        detect.check_input(out, "mispelt")
    assert caught.value.remedy.startswith(f"name the model that {out} was made from, by its report sample:lm: ")


def test_an_input_of_the_other_kind(tmp_path: Path, bare_report: Report) -> None:
    out = output(tmp_path / "out", bare_report)
    with pytest.raises(CheckpointError) as caught:
        detect.check_input(out, "sample:cnn")
    assert caught.value.cause == f"--against sample:cnn: it is a network read as a graph, and {out} is a language model"
    with pytest.raises(CheckpointError, match=r"it is a language model, and .* is a network read as a graph") as caught:
        detect.check_input(SAMPLES["sample:cnn"], str(out))
    assert caught.value.remedy == f"name the model that {SAMPLES['sample:cnn']} was made from"


def test_what_is_no_checkpoint_is_left_to_who_reads_it(tmp_path: Path, bare_report: Report) -> None:
    detect.check_input(output(tmp_path / "out", bare_report), str(tmp_path))
    detect.check_input(tmp_path / "out", "sample:lm")
