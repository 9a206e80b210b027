"""What a run may replace, who may work where, and what is left when it is killed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from effcli.errors import OutputError
from effcli.run import workplace
from effcli.run.workplace import MARK, Workplace, check_output, exports_in, files_in, resolved

REPORT = json.dumps({"effcli_version": "1", "schema_version": 1})


def written(folder: Path, report: str = REPORT) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report)
    return folder


def test_only_what_effcli_wrote_is_replaced(tmp_path: Path) -> None:
    foreign = tmp_path / "out"
    (foreign / ".git").mkdir(parents=True)
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"was not written by effcli.*\.git, thesis\.txt"):
        check_output(foreign, overwrite=True)
    for text in ("[]", "{", "{}"):
        (foreign / "report.json").write_text(text)
        with pytest.raises(OutputError, match="was not written by effcli"):
            check_output(foreign, overwrite=True)
    check_output(written(tmp_path / "ours"), overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path / "ours", overwrite=False)


def test_what_its_run_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    out = written(tmp_path / "out", json.dumps({"effcli_version": "1", "schema_version": 1, "files": ["a/b", "c"]}))
    (out / "a").mkdir()
    for name in ("a/b", "c"):
        (out / name).write_text("ours")
    (out / "exports" / "onnx").mkdir(parents=True)
    (out / "exports" / "onnx" / MARK).touch()
    (out / "exports" / ".c.effcli-lock").touch()
    check_output(out, overwrite=True)
    assert files_in(out) == ("a/b", "c") and exports_in(out) == ["onnx"]
    for name in (".git/HEAD", "a/mine", "exports/mine/model", "thesis.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "drafts").mkdir()
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"did not write: \.git, a, drafts, exports/mine, link, \.\.\.\n"):
        check_output(out, overwrite=True)


@pytest.mark.parametrize("inside", ["", "exports/safetensors", "data.npz"])
def test_no_input_lies_in_the_output(tmp_path: Path, inside: str) -> None:
    out = written(tmp_path / "out")
    path = out / inside
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.touch()
    linked, holding = tmp_path / "linked", tmp_path / "holding"
    linked.symlink_to(path)
    holding.mkdir()
    (holding / "part").symlink_to(path)
    for given in (path, linked, holding):
        with pytest.raises(OutputError, match=r"which is read|lies in"):
            check_output(out, overwrite=True, inputs=[tmp_path / "absent", given])
    check_output(tmp_path / "new", overwrite=True, inputs=[out])


def test_a_link_is_followed_and_one_that_leads_nowhere_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert resolved(tmp_path / "out") == (tmp_path / "real").resolve()
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("lost", "circle"):
        with pytest.raises(OutputError, match="is a link to"):
            check_output(tmp_path / name, overwrite=True)


def test_the_second_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "out")
    with place.locked():
        with (
            pytest.raises(OutputError, match=f"process {os.getpid()} is writing"),
            Workplace(tmp_path / "out").locked(),
        ):
            pass
        with Workplace(tmp_path / "other").locked():
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_left_keeps_nobody_away(tmp_path: Path) -> None:
    (tmp_path / ".out.effcli-lock").write_text("1\n")
    with Workplace(tmp_path / "out").locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_new_takes_the_place_of_the_old(tmp_path: Path) -> None:
    out = written(tmp_path / "out", "old")
    place = Workplace(out)
    place.begin("request")
    place.place(written(place.folder / "checkpoint-1"))
    assert (out / "report.json").read_text() == REPORT
    assert list(tmp_path.iterdir()) == [out]


def test_killed_before_the_working_folder_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workplace(tmp_path / "out")
    place.begin("request")
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "remove", lambda self: None)
        place.place(written(place.folder / "checkpoint-1"))
    assert place.holds("request") and place.placed
    check_output(tmp_path / "out", overwrite=False)
    (tmp_path / "out" / "report.json").write_text("another")
    assert not place.placed


def test_killed_between_the_old_and_the_new(tmp_path: Path) -> None:
    out = written(tmp_path / "out", "old")
    place = Workplace(out)
    place.begin("request")
    out.rename(place.folder / "replaced")
    # Another request comes; the former output is not lost.
    place.remove()
    assert (out / "report.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_does_not_cost_the_former_output(tmp_path: Path) -> None:
    out = written(tmp_path / "out", "old")
    place = Workplace(out)
    place.begin("request")
    out.rename(place.folder / "replaced")
    out.mkdir()
    place.remove()
    assert (out / "report.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("act", ["remove", "place"])
def test_neither_a_former_output_nor_what_came_after_it_is_lost(tmp_path: Path, act: str) -> None:
    out = written(tmp_path / "out", "old")
    place = Workplace(out)
    place.begin("request")
    new = written(place.folder / "checkpoint-1")
    out.rename(place.folder / "replaced")
    written(out, "another")
    with pytest.raises(OutputError, match="in the place of a former output"):
        place.remove() if act == "remove" else place.place(new)
    assert (out / "report.json").read_text() == "another"
    assert (place.folder / "replaced" / "report.json").read_text() == "old"
    assert (new / "report.json").is_file()


def test_what_the_next_process_has_placed_keeps_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, marker = Workplace(tmp_path / "out"), tmp_path / ".out.effcli-placed"
    original = Workplace._unlock

    def unlock(self: Workplace) -> None:
        original(self)
        marker.write_text("of another")

    with place.locked():
        place.begin("request")
        monkeypatch.setattr(Workplace, "_unlock", unlock)
        place.place(written(place.folder / "checkpoint-1"))
        monkeypatch.undo()
    assert marker.read_text() == "of another"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(workplace.fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="cannot lock files"), Workplace(tmp_path / "out").locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "an out"
    out.mkdir()
    check_output(out, overwrite=False)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"30 25 8:1 /srv {tmp_path}/an\\040out rw - ext4 /dev/sda rw\n")
    monkeypatch.setattr(workplace, "_MOUNTS", mounts)
    with pytest.raises(OutputError, match="mount point"):
        check_output(out, overwrite=True)
    check_output(out / "below", overwrite=False)
    with pytest.raises(OutputError, match="mount point"):
        check_output(Path("/proc"), overwrite=True)


def test_what_unfinished_work_takes(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "out")
    assert place.nbytes == 0
    for name, size in (("pass-1", 1 << 20), ("replaced", 1 << 22)):
        (place.folder / name).mkdir(parents=True)
        (place.folder / name / "file").write_bytes(os.urandom(size))
    assert 1 << 20 <= place.nbytes < 1 << 21
