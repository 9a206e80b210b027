"""A checkpoint on disk: safetensors shards, opened by header, read tensor by tensor, written atomically.

Shards are read with plain reads instead of a memory map: a mapped page counts towards the process's memory until the
file is closed, a tensor read this way is freed with its last reference. Pickle is never executed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from effcli.errors import CheckpointError, MachineError, at_fault, behind, first_line, writing
from effcli.files.documents import check_model, parse_json, read_model, read_object
from effcli.platform.rehearsal import counted
from effcli.platform.steps import expect, tick

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
STOCK_STEM = "model"
OWN_STEM = "effcli"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Weights of other frameworks and tools, which a folder may hold beside the safetensors.
_FOREIGN_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt2")
# A zip archive, as torch.save writes; a bare pickle of protocol 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_NO_PICKLES = "effcli does not execute pickles"
_CONVERT = "convert it: load it with its own code, then `save_pretrained(...)` writes safetensors"
_HEADER_LIMIT = 100_000_000
_COPY_CHUNK = 8 << 20


_Size = Annotated[int, Field(strict=True, lt=2**63)]


class _Described(BaseModel):
    """One tensor in the header of a safetensors file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[_Size, ...] = Field(max_length=64)
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True)
class Entry:
    """Where one tensor stands: `begin` to `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; `CheckpointError` when the file cannot be what it says it is."""
    remedy = "download or copy the file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if len(head) < 8:
                raise CheckpointError(f"{file} is truncated: {size} bytes, not even a header", remedy)
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, _HEADER_LIMIT):
                # Only now: a real header may be 640 or 19280 bytes long, whose first bytes are a pickle's too.
                if head.startswith(_PICKLE_STARTS):
                    raise CheckpointError(f"{file} is a pickle, not safetensors; {_NO_PICKLES}", _CONVERT)
                raise CheckpointError(
                    f"{file} is truncated or damaged: its header claims {length} bytes, the file has {size}", remedy
                )
            data = stream.read(length)
    except OSError as error:
        if not at_fault(error):
            raise
        missing = isinstance(error, FileNotFoundError)
        raise CheckpointError(f"{file} is missing" if missing else f"cannot read {file}: {error}", remedy) from error
    header = parse_json(data, f"the header of {file}", remedy=remedy, unique=True)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged: its header is not a JSON object", remedy)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, info, 8 + length, size, remedy) for name, info in header.items()}
    _check_covered(file, entries, 8 + length, size, remedy)
    try:
        # The library reads the header only. It has the last word on what this format is.
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        if behind(error) is not None:
            raise
        raise CheckpointError(f"{file} is damaged: {first_line(error)}", remedy) from error
    return entries


def _entry(file: Path, name: str, info: Any, start: int, size: int, remedy: str) -> Entry:
    """The tensor `name` as its header describes it; the data starts at byte `start`, the file has `size` bytes."""
    try:
        described = _Described.model_validate(info)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: no type, shape and offsets for {name}", remedy) from error
    dtype, shape = described.dtype, described.shape
    begin, end = described.data_offsets
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has the unknown dtype {dtype}", "convert it to a floating dtype")
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"{file} is damaged: {name} has {end - begin} bytes for the shape {shape}", remedy)
    if start + end > size:
        raise CheckpointError(f"{file} is truncated: {name} ends at byte {start + end}, the file has {size}", remedy)
    return Entry(file, dtype, shape, start + begin, start + end)


def _check_covered(file: Path, entries: Mapping[str, Entry], start: int, size: int, remedy: str) -> None:
    """`CheckpointError` unless each byte from `start` to the end of the file belongs to exactly one tensor."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            raise CheckpointError(f"{file} is damaged: {name} overlaps the tensor before it", remedy)
        if entry.begin > at:
            raise CheckpointError(f"{file} is damaged: {entry.begin - at} bytes before {name} belong to none", remedy)
        at = entry.end
    if at < size:
        raise CheckpointError(f"{file} is damaged: {size - at} bytes after the last tensor belong to none", remedy)


def read_entry(entry: Entry) -> Tensor:
    """Read one tensor into memory of its own."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if tensor.numel():
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.begin)
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            while view.nbytes:
                got = stream.readinto(view)
                if not got:
                    raise CheckpointError(f"{entry.file} ended early", "download or copy the file again")
                view = view[got:]
    return tensor


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory, or one in effcli's own layout.

    entries: every tensor of every shard by its name in the files; config: `config.json` as it stands.
    """

    path: Path
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read the headers; `CheckpointError` for anything that is missing, truncated or no checkpoint."""
        if path.is_file():
            raise CheckpointError(f"{path} is a file", "give the directory that holds config.json and the weights")
        if not path.is_dir():
            raise CheckpointError(f"{path} does not exist", "give a directory, a Hub id, or sample:lm")
        config = read_config(path)
        entries: dict[str, Entry] = {}
        for file in weight_files(path):
            entries.update(read_header(file))
        if not entries:
            raise CheckpointError(f"{path} holds no tensor", "give a directory with *.safetensors files")
        missing = sorted(indexed_names(path) - entries.keys())
        if missing:
            raise CheckpointError(
                f"{path}: no shard holds {missing[0]}, which the index names",
                "download or copy the checkpoint again",
            )
        return Checkpoint(path, config, entries)

    def read(self, name: str) -> Tensor:
        return read_entry(self.entries[name])

    @property
    def nbytes(self) -> int:
        """Size of the weight files, headers included: what `du -b` says."""
        return sum(file.stat().st_size for file in weight_files(self.path))


class _Config(BaseModel):
    """What effcli itself reads of any `config.json`; the rest is for the network's own code."""

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    effcli: dict[str, Any] | None = None


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of the directory `path`."""
    file = path / "config.json"
    if not file.exists():
        raise CheckpointError(f"{path} holds no config.json", "give a Hugging Face checkpoint directory")
    remedy = "restore it from the original checkpoint"
    config = read_object(file, remedy=remedy)
    check_config(config, str(file), remedy)
    return config


def check_config(config: dict[str, Any], source: str, remedy: str) -> None:
    """`CheckpointError`, naming `source`, where effcli's own reading of a `config.json` would trip over it."""
    check_model(_Config, config, source, remedy=remedy)


class _Index(BaseModel):
    """A shard index; what else it holds is for others."""

    weight_map: dict[str, str]


def _weight_map(path: Path) -> dict[str, str] | None:
    """Tensor -> shard, None without an index. One whole file is taken before an index, as stock loaders do."""
    for stem in (STOCK_STEM, OWN_STEM):
        index = path / f"{stem}.safetensors.index.json"
        if (path / f"{stem}.safetensors").is_file():
            return None
        if index.is_file():
            remedy = "download or copy the checkpoint again"
            names = read_model(_Index, index, remedy=remedy).weight_map
            for file in set(names.values()):
                steps = PurePosixPath(file).parts
                if not steps or steps[0] == "/" or ".." in steps or "\0" in file:
                    raise CheckpointError(f"{index} is damaged: {file!r} is no file in its folder", remedy)
            return names
    return None


def indexed_names(path: Path) -> set[str]:
    """The tensors that the shard index promises; empty without an index."""
    return set(_weight_map(path) or ())


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index or its one file; an error when one is missing."""
    names = _weight_map(path)
    if names is not None:
        files = [path / name for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{path}: the shard {file.name} is missing", "download or copy it again")
        return files
    for stem in (STOCK_STEM, OWN_STEM):
        file = path / f"{stem}.safetensors"
        if file.is_file():
            return [file]
    others = sorted(path.glob("*.safetensors"))
    if others:
        return others
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(f"{path} holds only pickled weights ({pickles[0]}); {_NO_PICKLES}", _CONVERT)
    raise CheckpointError(f"{path} holds no *.safetensors file", "give a checkpoint directory with its weights")


def write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file atomically: under a temporary name, synced, then renamed."""
    with replacing(file) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
        except SafetensorError as error:
            # It carries the operating system's error in its text only.
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]), os.strerror(int(code[1]))) if code else error from error


def write_text(file: Path, text: str) -> None:
    """Write a small text file atomically."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name to write under; `file` takes its place once it is whole and on the disk, or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with writing(file):
        try:
            # The umask can only be read by changing it, for all threads: an empty file tells what it leaves. What a
            # killed run left behind may have other permissions.
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            temporary.unlink()
            yield temporary
            # The safetensors library makes its files private; an output is as readable as any other file.
            temporary.chmod(mode)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def assemble(
    parts: Iterable[Path],
    folder: Path,
    stem: str,
    shard_bytes: int,
    carried: Mapping[str, Entry] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Path]:
    """Join the safetensors files `parts` into shards of at most about `shard_bytes` in `folder`, copying bytes.

    carried: further tensors by name, which stand in other files; names: other names for tensors of `parts`, or for the
    layers that they belong to.
    One shard is named `<stem>.safetensors`; several get numbers and an index. Tensors stand widest dtype first, then
    by name, so that each is aligned to its own width, and the same tensors always give the same bytes.
    """
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    further = ({name: entry} for name, entry in (carried or {}).items())
    own = ({_named(name, names or {}): entry for name, entry in read_header(part).items()} for part in parts)
    for entries in chain(own, further):
        part_bytes = sum(entry.nbytes for entry in entries.values())
        if size and size + part_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1].update(entries)
        size += part_bytes
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    for file, entries in zip(files, shards, strict=True):
        _copy_tensors(folder / file, entries)
    if len(shards) > 1:
        weight_map = {tensor: file for file, entries in zip(files, shards, strict=True) for tensor in entries}
        total = sum(entry.nbytes for entries in shards for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return [folder / file for file in files]


def _named(tensor: str, names: Mapping[str, str]) -> str:
    """The other name of a tensor, or its name with that of its layer changed."""
    layer, _, suffix = tensor.rpartition(".")
    return names.get(tensor) or (f"{names[layer]}.{suffix}" if layer in names else tensor)


def _copy_tensors(file: Path, entries: dict[str, Entry]) -> None:
    order = sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry = entries[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as temporary, temporary.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            entry = entries[name]
            with counted(name), entry.file.open("rb") as source:
                source.seek(entry.begin)
                left = entry.nbytes
                while left:
                    chunk = source.read(min(left, _COPY_CHUNK))
                    if not chunk:
                        raise MachineError(f"{entry.file} became shorter while it was copied", "run it again")
                    target.write(chunk)
                    left -= len(chunk)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint of a language model as it is, a step for each file of its own, and what makes it usable."""
    copy_companions(source, target)
    files = [source / "config.json", *source.glob("*.safetensors.index.json"), *weight_files(source)]
    expect(len(files))
    with writing(target):
        for file in files:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            tick()


# What a loader, a tokenizer or a reader of the licence looks for; texts and data beside them stay behind.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
_OURS = {"config.json", "report.json"}


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes a checkpoint usable besides its weights and config: tokenizer, generation settings, code."""
    with writing(target):
        for file in sorted({file for pattern in _COMPANIONS for file in source.glob(pattern)}):
            if file.is_file() and file.name not in _OURS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
