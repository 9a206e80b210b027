from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from effcli.errors import CheckpointError, DataError
from effcli.files.documents import check_model, parse_json, read_json, read_model, read_object
from effcli.options import Options


class Shape(Options):
    rows: int
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deep"),
        ("[" * 100_000, "nested too deep"),
        ("[" * 65 + "]" * 65, "nested too deep"),
        ("1" * 5000, "a number of 5000 digits"),
        (r'["\ud800"]', "not UTF-8"),
        (b"\xff\xfe{}", "not UTF-8"),
    ],
)
def test_damaged_json_is_refused_with_its_cause(text: str | bytes, cause: str) -> None:
    with pytest.raises(CheckpointError, match=cause):
        parse_json(text, "config.json")


def test_what_real_files_hold_is_taken() -> None:
    # A tokenizer's longest sequence, a state space model's time step, a pair of surrogates, many short lists.
    found = parse_json(r'{"max": 1000000000000000019884624838656, "step": Infinity, "text": "\ud83d\ude00"}', "f")
    assert found == {"max": 10**30 + 19884624838656, "step": float("inf"), "text": "\N{GRINNING FACE}"}
    assert parse_json("[" + ",".join(["[1]"] * 1000) + "]", "f") == [[1]] * 1000
    assert parse_json("[" * 64 + "]" * 64, "f")


def test_a_key_that_stands_twice_is_refused_on_demand() -> None:
    assert parse_json('{"a": 1, "a": 2}', "f") == {"a": 2}
    with pytest.raises(CheckpointError, match="'a' stands twice"):
        parse_json('{"a": 1, "a": 2}', "f", unique=True)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.json is missing"):
        read_json(tmp_path / "x.json", error=DataError)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    with pytest.raises(CheckpointError, match="9 bytes, more than the 8"):
        read_json(tmp_path / "x.json", limit=8)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_object(tmp_path / "x.json")


def test_a_model_names_the_key_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"rows": "many", "colour": 1}')
    with pytest.raises(CheckpointError, match=r"x.json is damaged: rows: .*integer.* \(and 1 more\)"):
        read_model(Shape, tmp_path / "x.json")
    assert check_model(Shape, {"rows": 3, "names": ["a"]}, "x") == Shape(rows=3, names=("a",))
    with pytest.raises(CheckpointError, match="should hold an object, not a list"):
        check_model(Shape, [], "x")


@pytest.mark.parametrize(("code", "kind"), [(errno.EMFILE, OSError), (errno.EIO, OSError), (errno.EISDIR, DataError)])
def test_a_machine_that_fails_is_not_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    file = tmp_path / "file.json"
    file.write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(kind):
        read_json(file, error=DataError)
