"""What a file or a folder holds, as a short text that changes when the content does."""

from __future__ import annotations

import hashlib
from pathlib import Path

from effcli.files.walk import files_below

# Up to this size a file is read whole, and so is a folder whose files have this size together.
_WHOLE = 64 << 20
_HEAD = 1 << 20
_SAMPLE = 16 << 10
_SAMPLES = 64


def of_path(path: Path) -> str:
    """The digest of a file, or of all files below a folder, links followed; `missing` where there is nothing."""
    if path.is_file():
        return of_file(path)
    if not path.is_dir():
        return "missing"
    below = (Path(root, name) for root, names in files_below(path) for name in names)
    files = sorted(file for file in below if file.is_file())
    whole = sum(file.stat().st_size for file in files) <= _WHOLE
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(path)}\0{of_file(file) if whole else _dates(file)}\0".encode(errors="replace"))
    return found.hexdigest()


def of_folder(folder: Path) -> dict[str, str]:
    """The digests of the files that stand in a folder itself, by name, hidden ones left out."""
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())
    return {name: of_file(folder / name) for name in names}


def of_file(file: Path) -> str:
    """The digest of a file: of all its content, or of its dates, its beginning and samples where it is large."""
    size = file.stat().st_size
    found = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= _WHOLE:
            while data := stream.read(_HEAD):
                found.update(data)
            return found.hexdigest()
        found.update(_dates(file).encode() + stream.read(_HEAD))
        for k in range(_SAMPLES):
            stream.seek((size - _SAMPLE) * (k + 1) // _SAMPLES)
            found.update(stream.read(_SAMPLE))
    return found.hexdigest()


def _dates(file: Path) -> str:
    """What the file system says of a file; the time of change of the inode cannot be set back."""
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
