"""What changes a digest and what does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from effcli.errors import DataError
from effcli.files import digest


def test_content_counts_and_dates_do_not(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    before = digest.of_file(file)
    os.utime(file, ns=(0, 0))
    assert digest.of_file(file) == before
    file.write_bytes(b"two")
    assert digest.of_file(file) != before


def test_a_large_file_that_is_changed_and_dated_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_WHOLE", 1 << 10)
    file = tmp_path / "a"
    file.write_bytes(bytes(1 << 21))
    before, dates = digest.of_file(file), file.stat()
    with file.open("r+b") as stream:
        stream.seek(1_500_001)
        stream.write(b"x")
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert digest.of_file(file) != before


def test_a_folder_of_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.png").write_bytes(b"0")
    found = {digest.of_path(tmp_path)}
    (tmp_path / "class" / "1.png").write_bytes(b"1")
    found.add(digest.of_path(tmp_path))
    (tmp_path / "class" / "1.png").write_bytes(b"2")
    found.add(digest.of_path(tmp_path))
    monkeypatch.setattr(digest, "_WHOLE", 1)
    found.add(digest.of_path(tmp_path))
    (tmp_path / "class" / "1.png").write_bytes(b"3")
    found.add(digest.of_path(tmp_path))
    assert len(found) == 5
    assert digest.of_path(tmp_path / "nothing") == "missing"


def test_a_folder_is_followed_through_links(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").write_bytes(b"old")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cats").symlink_to("../cats")
    before = digest.of_path(tmp_path / "images")
    (tmp_path / "cats" / "1.png").write_bytes(b"new")
    assert digest.of_path(tmp_path / "images") != before
    (tmp_path / "images" / "circle").symlink_to(".")
    with pytest.raises(DataError, match="a folder that it lies in"):
        digest.of_path(tmp_path / "images")
