"""Checkpoints on disk: what is written is read back, and every kind of damage is one clear line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from effcli.errors import CheckpointError, MachineError, OutputError
from effcli.files import checkpoint
from effcli.files.checkpoint import DTYPES, Checkpoint, assemble, copy_companions, read_header, write_shard, write_text


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randint(-9, 9, shape).abs()
    return values.to(dtype)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with one shard of three tensors."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64)}, path / "model.safetensors")
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_it_was_written(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = filled(shape, DTYPES[name])
    write_shard(tmp_path / "one.safetensors", {"x": tensor})
    entry = read_header(tmp_path / "one.safetensors")["x"]
    assert entry.dtype == name
    assert same_bytes(checkpoint.read_entry(entry), tensor)
    if not name.startswith("F8"):
        assert same_bytes(load_file(tmp_path / "one.safetensors")["x"], tensor)


def test_a_file_of_several_tensors(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    assert set(opened.entries) == {"a", "b"}
    torch.testing.assert_close(opened.read("a"), torch.arange(6.0).view(2, 3), rtol=0, atol=0)
    assert opened.config == {"model_type": "llama"}
    assert opened.nbytes == (folder / "model.safetensors").stat().st_size


def test_one_whole_file_is_taken_before_an_index_as_stock_loaders_do(sharded: Path) -> None:
    save_file({"whole": torch.ones(1)}, sharded / "model.safetensors")
    assert set(Checkpoint.open(sharded).entries) == {"whole"}


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle(length: int, folder: Path) -> None:
    """Lengths whose first bytes are those of a pickle (80 02) or of a zip archive (PK)."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    data = struct.pack("<Q", length) + header + struct.pack("<2f", 1, 2)
    (folder / "model.safetensors").write_bytes(data)
    assert Checkpoint.open(folder).read("a").tolist() == [1, 2]


def header_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def a_tensor(**changes: Any) -> bytes:
    return header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}, bytes(8))


DAMAGED_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is truncated: 0 bytes"),
    "half a length": (b"\x10\0\0", "is truncated: 3 bytes"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "claims 1099511627776 bytes"),
    "header cut": (header_bytes({"a": 1})[:-2], "is truncated or damaged"),
    "not JSON": (header_bytes(b"garbage!"), "not JSON"),
    "not UTF-8": (header_bytes(b"\xff\xfe\xfd{}"), "not JSON"),
    "nested too deeply": (header_bytes(b"[" * 200_000), "not JSON"),
    "a list": (header_bytes([]), "not a JSON object"),
    "a number": (header_bytes(7), "not a JSON object"),
    "no offsets": (header_bytes({"a": {"dtype": "F32", "shape": [2]}}), "no type, shape and offsets for a"),
    "a tensor that is a list": (header_bytes({"a": [1]}), "no type, shape and offsets for a"),
    "offsets beyond the file": (a_tensor()[:-1], "is truncated: a ends at byte"),
    "offsets that are words": (a_tensor(data_offsets=["x", "y"]), "no type, shape and offsets for a"),
    "three offsets": (a_tensor(data_offsets=[0, 4, 8]), "no type, shape and offsets for a"),
    "negative offset": (a_tensor(data_offsets=[-8, 0]), "is damaged: a has"),
    "end before begin": (a_tensor(data_offsets=[8, 0]), "is damaged: a has -8 bytes"),
    "bytes do not fit the shape": (a_tensor(shape=[3]), "is damaged: a has 8 bytes for the shape (3,)"),
    "negative shape": (a_tensor(shape=[-1, -2]), "is damaged: a has 8 bytes"),
    "null shape": (a_tensor(shape=[None]), "no type, shape and offsets for a"),
    "unknown dtype": (a_tensor(dtype="F3"), "unknown dtype F3"),
    "a dtype that is a list": (a_tensor(dtype=[]), "no type, shape and offsets for a"),
    "a fractional extent": (a_tensor(shape=[2.0]), "no type, shape and offsets for a"),
    "a key too much": (a_tensor(scale=1), "no type, shape and offsets for a"),
    "bytes after the last tensor": (a_tensor() + b"\0", "1 bytes after the last tensor"),
    "a hole": (a_tensor(data_offsets=[4, 12]) + bytes(4), "4 bytes before a belong to none"),
    "two tensors in one place": (
        header_bytes({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in "ab"}, bytes(2)),
        "b overlaps",
    ),
    "a name twice": (
        header_bytes(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            bytes(2),
        ),
        "'a' stands twice",
    ),
    "metadata that is no text": (
        header_bytes({"__metadata__": {"format": 1}, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
        "is damaged",
    ),
    "padding that is no space": (header_bytes(a_tensor()[8:-8] + b"\0", bytes(8)), "not JSON"),
    "a zip archive": (b"PK\x03\x04\x14\x00\x08\x08" + bytes(99), "is a pickle, not safetensors"),
    "a pickle": (b"\x80\x02}q\x00(X\x0c" + bytes(99), "is a pickle, not safetensors"),
}


@pytest.mark.parametrize(("data", "cause"), DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_a_damaged_file(data: bytes, cause: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    refused(lambda: Checkpoint.open(folder), cause)


def test_nothing_is_taken_that_the_library_refuses(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.int8), "c": torch.zeros(0)}
    save_file(tensors, file, {"format": "pt"})
    sound = file.read_bytes()
    (length,) = struct.unpack("<Q", sound[:8])
    text, data = sound[8 : 8 + length], sound[8 + length :]
    spare = [b"0", b"1", b"-", b'"', b"{", b"]", b" ", b"\0", b"4", b"."]
    taken = 0
    for at in range(len(text)):
        changes = [text[:at] + text[at + 1 :], *(text[:at] + new + text[at + 1 :] for new in spare)]
        for changed in changes:
            file.write_bytes(header_bytes(changed, data))
            try:
                names = set(read_header(file))
            except CheckpointError:
                continue
            taken += 1
            with safe_open(file, framework="pt") as opened:
                assert set(opened.keys()) == names
    assert taken > 100


def remove_shard(path: Path) -> None:
    (path / "model-00001-of-00002.safetensors").unlink()


def promise_more(path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["c"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def name_shard(path: Path, shard: Any) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["a"] = shard
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    torch.save({"a": torch.ones(1)}, path / "pytorch_model.bin")


def no_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


DAMAGED_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (remove_shard, "the shard model-00001-of-00002.safetensors is missing"),
    "a shard that is a folder": (
        lambda path: [remove_shard(path), (path / "model-00001-of-00002.safetensors").mkdir()],
        "the shard model-00001-of-00002.safetensors is missing",
    ),
    "the index names a tensor that no shard holds": (
        promise_more,
        "no shard holds c, which the index names",
    ),
    "index not JSON": (lambda path: (path / "model.safetensors.index.json").write_text("{"), "is damaged"),
    "index a list": (lambda path: (path / "model.safetensors.index.json").write_text("[]"), "is damaged"),
    "index without a map": (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "is damaged"),
    "a shard outside": (lambda path: name_shard(path, "../elsewhere.safetensors"), "is no file in its folder"),
    "a shard by its whole path": (lambda path: name_shard(path, "/tmp/x.safetensors"), "is no file in its folder"),
    "a shard without a name": (lambda path: name_shard(path, ""), "is no file in its folder"),
    "a shard that is a number": (lambda path: name_shard(path, 1), "index.json is damaged"),
    "only pickles": (only_pickles, "holds only pickled weights (pytorch_model.bin)"),
    "no weights": (no_weights, "holds no *.safetensors file"),
    "no config": (lambda path: (path / "config.json").unlink(), "holds no config.json"),
    "config not JSON": (lambda path: (path / "config.json").write_text("{model"), "config.json is not JSON"),
    "config not UTF-8": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
    "config a list": (lambda path: (path / "config.json").write_text("[1]"), "config.json is not a JSON object"),
}


@pytest.mark.parametrize(("damage", "cause"), DAMAGED_FOLDERS.values(), ids=DAMAGED_FOLDERS)
def test_a_damaged_folder(damage: Callable[[Path], Any], cause: str, sharded: Path) -> None:
    damage(sharded)
    refused(lambda: Checkpoint.open(sharded), cause)


def test_a_file_and_nothing_instead_of_a_folder(folder: Path) -> None:
    refused(lambda: Checkpoint.open(folder / "model.safetensors"), "is a file")
    refused(lambda: Checkpoint.open(folder / "absent"), "does not exist")


def test_no_tensor_at_all(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    refused(lambda: Checkpoint.open(folder), "holds no tensor")


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    last = max(opened.entries, key=lambda name: opened.entries[name].end)
    refused(lambda: opened.read(last), "ended early")


@given(seed=st.integers(0, 2**32), cut=st.integers(0, 400))
def test_random_damage_never_escapes_the_error(seed: int, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    data = bytearray(header_bytes({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        place, value = torch.randint(0, 256, (2,), generator=generator).tolist()
        data[place % len(data)] = value
    file.write_bytes(bytes(data[:cut]))
    try:
        for entry in read_header(file).values():
            checkpoint.read_entry(entry)
    except CheckpointError as error:
        assert error.remedy
        assert "\n" not in error.cause


def refused(action: Callable[[], Any], cause: str) -> None:
    """One `CheckpointError` with one line that says what is wrong, and one that says what to do."""
    with pytest.raises(CheckpointError) as caught:
        action()
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause
    assert caught.value.remedy
    assert "\n" not in caught.value.remedy


def parts(folder: Path) -> list[Path]:
    """Three small files of mixed widths, odd sizes included."""
    torch.manual_seed(0)
    contents = [
        {
            "z.codes": filled((3, 5), torch.uint8),
            "z.scale": torch.randn(3).bfloat16(),
            "z.zero": filled((3,), torch.int8),
        },
        {"y.weight": torch.randn(4, 3), "y.shape": torch.tensor([4, 3]), "y.flag": torch.tensor(True)},
        {"x.weight": torch.randn(7, 3).half(), "x.wide": torch.randn(3).double(), "x.none": torch.empty(0, 4)},
    ]
    files = []
    for number, tensors in enumerate(contents):
        files.append(folder / f"part-{number}.safetensors")
        write_shard(files[-1], tensors)
    return files


@pytest.mark.parametrize(("limit", "count"), [(10**9, 1), (1, 3), (100, 2)])
def test_assembled_files_hold_the_parts(limit: int, count: int, tmp_path: Path) -> None:
    sources = parts(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    files = assemble(sources, target, "model", limit)
    assert len(files) == count
    (target / "config.json").write_text("{}")
    opened = Checkpoint.open(target)
    stock = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for part in sources:
        for name, tensor in load_file(part).items():
            assert same_bytes(opened.read(name), tensor)
            assert same_bytes(stock.pop(name), tensor)
    assert not stock
    du = subprocess.run(["du", "-cb", *files], capture_output=True, text=True, check=True).stdout
    assert opened.nbytes == int(du.splitlines()[-1].split()[0])
    for entry in opened.entries.values():
        assert entry.begin % DTYPES[entry.dtype].itemsize == 0
    with safe_open(files[0], "pt") as reader:
        assert reader.metadata() == {"format": "pt"}
    index = target / "model.safetensors.index.json"
    assert index.is_file() == (count > 1)
    if count > 1:
        described = json.loads(index.read_text())
        assert described["metadata"]["total_size"] == sum(entry.nbytes for entry in opened.entries.values())
        assert set(described["weight_map"]) == set(opened.entries)
        assert set(described["weight_map"].values()) == {file.name for file in files}


def test_assembling_gives_the_same_bytes_whatever_the_order_of_writing(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    (a,) = assemble(parts(tmp_path), first, "model", 10**9)
    (b,) = assemble(reversed(parts(tmp_path)), second, "model", 10**9)
    assert a.read_bytes() == b.read_bytes()


def test_a_failure_in_the_middle_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = parts(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    sound = checkpoint.read_header

    def header_before_the_file_was_cut(file: Path) -> dict[str, checkpoint.Entry]:
        entries = sound(file)
        if file == sources[1]:
            file.write_bytes(file.read_bytes()[:-4])
        return entries

    monkeypatch.setattr(checkpoint, "read_header", header_before_the_file_was_cut)
    with pytest.raises(MachineError, match="became shorter"):
        assemble(sources, target, "model", 10**9)
    assert list(target.iterdir()) == []


def test_a_replaced_file_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    write_shard(file, {"x": torch.ones(3)})
    before = file.read_bytes()

    def fail(descriptor: int) -> None:
        raise RuntimeError("the power went out")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RuntimeError):
        write_shard(file, {"x": torch.zeros(3)})
    with pytest.raises(RuntimeError):
        write_text(tmp_path / "x.json", "{}")
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_other_files_and_the_umask_stays(
    mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors.tmp").touch(0o600)
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("it changes for all threads"))
            write_shard(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
            write_text(tmp_path / "a.txt", "")
            assemble([tmp_path / "a.safetensors"], tmp_path, "b", 100)
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {oct(0o666 & ~mask)}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "a.txt", "b.safetensors", "other"]


@pytest.mark.parametrize(("code", "cause"), [(28, "no space left"), (122, "no space left"), (30, "cannot write")])
def test_a_full_disk_is_said(code: int, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    for action in (
        lambda: write_shard(tmp_path / "x.safetensors", {"x": torch.ones(1)}),
        lambda: write_text(tmp_path / "x.json", "{}"),
    ):
        with pytest.raises(OutputError) as caught:
            action()
        assert cause in caught.value.cause
        assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_as_safetensors_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's error comes inside the text of safetensors' own."""

    def fail(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OutputError, match="no space left"):
        write_shard(tmp_path / "x.safetensors", {"x": torch.ones(1)})


def test_a_missing_folder_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_shard(tmp_path / "absent" / "x.safetensors", {"x": torch.ones(1)})


def test_companions(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    kept = ("tokenizer.json", "generation_config.json", "special_tokens_map.json", "vocab.txt", "modeling_own.py")
    left = ("README.md", "report.json", "pytorch_model.bin", "x.safetensors.index.json", "model.gguf", ".gitattributes")
    for name in (*kept, *left):
        (folder / name).write_text(name)
    (folder / "onnx").mkdir()
    copy_companions(folder, target)
    assert {file.name for file in target.iterdir()} == set(kept)
