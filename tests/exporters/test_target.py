"""What an export replaces, and what a killed one leaves to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from effcli.errors import CheckpointError, OutputError
from effcli.exporters._target import MARK, replacing
from effcli.run.workplace import Workplace

SOURCE = Path(__file__).parent


def write(target: Path, text: str, overwrite: bool = False) -> None:
    with replacing(SOURCE, target, overwrite) as folder:
        (folder / "model.onnx").write_text(text)


def read(target: Path) -> str:
    return (target / "model.onnx").read_text()


def test_only_what_carries_the_mark_is_replaced(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.json", "model.onnx", "model.pt2", "model.safetensors", "plan.json"):
        (foreign / name).write_text("mine")
        with pytest.raises(OutputError, match=r"holds no export that effcli wrote.*it holds config\.json") as caught:
            write(foreign, "new", overwrite=True)
        assert "move away what is there" in caught.value.remedy
        assert (foreign / name).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file", "new", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"]


def test_an_export_is_replaced_and_so_is_an_empty_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    write(target, "old", overwrite=True)
    assert (target / MARK).is_file()
    with pytest.raises(OutputError, match="exists"):
        write(target, "new")
    write(target, "new", overwrite=True)
    assert read(target) == "new" and list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_former(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "old")
    with pytest.raises(RuntimeError), replacing(SOURCE, target, True):
        raise RuntimeError
    assert read(target) == "old" and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_export_left_goes_away(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".target.effcli-export" / "deep").mkdir(parents=True)
    (tmp_path / ".target.effcli-lock").write_text("1\n")
    write(target, "new")
    assert read(target) == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("placed", [False, True])
def test_killed_while_the_former_was_replaced(placed: bool, tmp_path: Path) -> None:
    target, former = tmp_path / "target", tmp_path / ".target.effcli-former"
    write(target, "old")
    target.rename(former)
    if placed:
        write(tmp_path / "other", "new")
        (tmp_path / "other").rename(target)
    with pytest.raises(OutputError, match="exists"):
        write(target, "newer")
    # Nothing is lost, and nothing is left.
    assert read(target) == ("new" if placed else "old") and list(tmp_path.iterdir()) == [target]


def test_two_at_the_same_time(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with (
        Workplace(target).locked(),
        pytest.raises(OutputError, match="is writing"),
    ):
        write(target, "new")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    ghost = tmp_path / "ghost"
    with pytest.raises(CheckpointError, match="does not exist"), replacing(ghost, ghost / "exports" / "onnx", False):
        pass
    assert list(tmp_path.iterdir()) == []
