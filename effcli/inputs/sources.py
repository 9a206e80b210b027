"""Where inputs lie: arrays in an npz, folders of images, and tables of images (parquet, `datasets` directories).

Arrays are read whole; images are decoded as they are asked for. Pickled objects are never loaded. An image is turned
as its EXIF orientation says and laid on white where it is transparent, as transformers and datasets do it.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from effcli.errors import DataError, EffcliError, UserError, at_fault, did_you_mean, first_line
from effcli.files.documents import parse_json
from effcli.files.walk import files_below
from effcli.inputs.preprocess import MOST_PIXELS, Pixels, Preprocess

Rows = NDArray[np.int64]
# The name of a row or file, for messages, with a path or the bytes of an image.
Item = tuple[str, str | bytes]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_INPUTS = re.compile(r"(.*[_-])?(images?|imgs?|features?|inputs?|data|x|pixel_values|samples)([_-].*)?", re.IGNORECASE)
_LABELS = re.compile(r"(.*[_-])?(labels?|targets?|class|classes|y)([_-].*)?", re.IGNORECASE)
_CLASS_NAMES = re.compile(r"(class|label)_?names|names|classes", re.IGNORECASE)
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
# The formats that are decoded: none of them runs another program.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000")
# Rows of a table decoded from its file at a time.
_TABLE_ROWS = 64
# More rows than this for each byte of a file cannot hold images.
_ROWS_PER_BYTE = 8


@dataclass(frozen=True)
class Source:
    """`count` inputs and what is known of them.

    read(rows, size): values (at most `size`, *shape) of those rows, which ascend; arranged, not yet normalised.
    labels: int64 (count,); names: of the classes; remarks: what the user should know.
    """

    name: str
    count: int
    read: Callable[[Rows, int], Iterator[Pixels]]
    labels: Rows | None = None
    names: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()


def open_source(path: Path, split: str | None, shape: tuple[int, ...], preprocess: Preprocess) -> Source:
    """What `path` holds for a network whose input is `shape`; `DataError` when that cannot serve.

    split: of a `datasets` directory that holds several; None takes the only one, `test` or `validation`.
    """
    if not path.exists():
        raise DataError(f"there is no file or folder {path}", "check the path")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return open_dataset(path, split, shape, preprocess)
    if split is not None:
        raise DataError(f"{path} has no splits, so #{split} names nothing", f"leave out #{split}")
    if path.is_dir():
        return open_folder(path, shape, preprocess)
    if not path.is_file():
        raise DataError(f"{path} is not a file", "give an .npz, a .parquet, a folder of images or of `datasets`")
    if path.suffix == ".parquet":
        return open_parquet(path, shape, preprocess)
    if path.suffix == ".npz":
        return open_npz(path, shape, preprocess)
    raise DataError(
        f"{path} is no kind of data that can be read", "give an .npz, a .parquet, a folder of images or of `datasets`"
    )


def open_npz(path: Path, shape: tuple[int, ...], preprocess: Preprocess) -> Source:
    """Inputs and labels among the arrays of an npz; channels may be first, last or, where there is one, left out."""
    headers = _npz_headers(path)
    key = preprocess.inputs or _find_inputs(path, headers, shape, preprocess)
    name = f"{key} in {path}"
    values = _npz_array(path, headers, key)
    if values.ndim == 0 or len(values) == 0:
        raise DataError(f"{name} is empty", "give at least one input")
    if values.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {values.dtype}, not numbers", "name another array: inputs under preprocess:")
    preprocess.find_layout(values.shape[1:], shape, name)
    floats = values.dtype.kind == "f"
    largest = max(-float(values.min()), float(values.max()))
    if not np.isfinite(largest):
        raise DataError(f"{name} holds NaN or infinite values", "remove the inputs that do")
    preprocess.check_range(largest, floats, name)

    def read(rows: Rows, size: int) -> Iterator[Pixels]:
        for begin in range(0, len(rows), size):
            yield preprocess.arrange(values[rows[begin : begin + size]], shape, name)

    labels = None
    label_key = preprocess.labels or _find_labels(path, headers, len(values), key)
    if label_key is not None:
        labels = _as_labels(_npz_array(path, headers, label_key), len(values), f"{label_key} in {path}")
    remarks = [
        f"{found} in {path} holds {dtype}, not class numbers: the inputs are taken as unlabelled"
        for found, (size, dtype) in headers.items()
        if label_key is None and found != key and dtype.kind not in "iu" and len(size) == 1
        if _LABELS.fullmatch(found) and not _CLASS_NAMES.fullmatch(found)
    ]
    remarks += [
        f"{found} in {path} holds {dtype}, not text: the classes have no names"
        for found, (size, dtype) in headers.items()
        if found not in (key, label_key) and dtype.kind in "OS" and len(size) == 1 and _CLASS_NAMES.fullmatch(found)
    ]
    names = [
        found
        for found, (size, dtype) in headers.items()
        if _CLASS_NAMES.fullmatch(found) and dtype.kind == "U" and len(size) == 1
    ]
    with _damage_of(f"{names[0] if names else ''} in {path}", "write the file again"):
        classes = tuple(str(each) for each in _npz_array(path, headers, names[0])) if names else None
    return Source(str(path), len(values), read, labels, classes, tuple(remarks))


def open_folder(path: Path, shape: tuple[int, ...], preprocess: Preprocess) -> Source:
    """Images in one subfolder per class, numbered in the order of their names, or images alone, without labels."""
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    loose = [entry.path for entry in os.scandir(path) if not entry.is_dir() and _is_image(entry.name)]
    for file in loose:
        _check_file(file)
    files = [list(_images_below(path / name)) for name in folders]
    if loose and any(files):
        raise DataError(
            f"{path} holds images beside folders of images", "give one folder per class, or images without folders"
        )
    if not loose and not any(files):
        raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)})", "check the path")
    if loose:
        return _images(str(path), len(loose), partial(_named_paths, sorted(loose)), shape, preprocess)
    splits = [name for name in folders if name.casefold() in _SPLITS]
    if len(splits) == len(folders):
        raise DataError(
            f"the folders in {path} are parts of a data set, not classes: {', '.join(splits)}",
            f"give one of them, such as {path / splits[0]}",
        )
    flat = [file for group in files for file in group]
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), [len(group) for group in files])
    remarks: tuple[str, ...] = ()
    if all(name.isdecimal() for name in folders) and sorted(folders, key=int) != folders:
        remarks = (
            f"the folders of {path} are classes in the order of their names as text ({', '.join(folders[:4])}, ...), "
            "not as numbers",
        )
    items = partial(_named_paths, flat)
    return _images(str(path), len(flat), items, shape, preprocess, labels, tuple(folders), remarks)


def open_parquet(path: Path, shape: tuple[int, ...], preprocess: Preprocess) -> Source:
    """A parquet file as Hugging Face's image data sets have it: a column of encoded images, and one of labels."""
    arrow, parquet = _optional("pyarrow"), _optional("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # of arrow, in many ways
        raise DataError(f"{path} is no parquet file: {first_line(error)}", "get the file again") from error
    with _damage_of(str(path)):
        image, label, names = _find_columns(path, file.schema_arrow, preprocess)
        groups = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        count = file.metadata.num_rows
        if count != sum(groups) or min(groups, default=0) < 0 or count > _ROWS_PER_BYTE * path.stat().st_size:
            raise DataError(f"{path} is damaged: it cannot hold {count:,} rows", "get the file again")
        labels = None
        if label is not None:
            labels = _as_labels(file.read([label]).column(0).to_numpy(), count, f"{label} in {path}")
    ends = np.cumsum(groups)

    def items(rows: Rows) -> Iterator[Item]:
        read = 0
        for group in np.unique(np.searchsorted(ends, rows, side="right")):
            begin = ends[group] - groups[group]
            batches = iter(file.iter_batches(_TABLE_ROWS, row_groups=[int(group)], columns=[image]))
            while True:
                with _damage_of(str(path)):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    here = rows[(rows >= begin) & (rows < begin + batch.num_rows)]
                    cells = batch.column(0).take(arrow.array(here - begin)).to_pylist()
                yield from _cells(path, here, cells)
                read += len(here)
                begin += batch.num_rows
        if read != len(rows):
            raise DataError(f"{path} is damaged: rows are missing", "get the file again")

    return _images(str(path), count, items, shape, preprocess, labels, names)


def open_dataset(path: Path, split: str | None, shape: tuple[int, ...], preprocess: Preprocess) -> Source:
    """A directory that `datasets` saved: a column of encoded images, and one of labels."""
    library = _optional("datasets")
    try:
        dataset = library.load_from_disk(str(path))
    except Exception as error:  # of the library, of arrow, or of the file system
        raise DataError(f"{path} cannot be loaded by datasets: {first_line(error)}", "save it again") from error
    name, remarks = str(path), []
    if isinstance(dataset, dict):
        chosen = split or _only_split(path, list(dataset))
        if chosen not in dataset:
            raise DataError(f"{path} has no split {chosen!r}", did_you_mean(chosen, dataset))
        if split is None and len(dataset) > 1:
            remarks.append(f"the split {chosen!r} of {path} was taken; {path}#SPLIT takes another")
        name, dataset = f"{path}#{chosen}", dataset[chosen]
    elif split is not None:
        raise DataError(f"{path} has no splits, so #{split} names nothing", f"leave out #{split}")
    with _damage_of(name, "save it again"):
        image, label, names = _find_columns(name, dataset.features.arrow_schema, preprocess)
        table = dataset.select_columns([image]).with_format("arrow")

    def items(rows: Rows) -> Iterator[Item]:
        for begin in range(0, len(rows), _TABLE_ROWS):
            here = rows[begin : begin + _TABLE_ROWS]
            with _damage_of(name, "save it again"):
                cells = table[here.tolist()].column(0).to_pylist()
            yield from _cells(name, here, cells)

    labels = None
    if label is not None:
        with _damage_of(name, "save it again"):
            column = dataset.select_columns([label]).with_format("arrow")[:].column(0)
            labels = _as_labels(column.to_numpy(), len(dataset), f"{label} in {name}")
    return _images(name, len(dataset), items, shape, preprocess, labels, names, tuple(remarks))


def decode(item: Item, gray: bool) -> Pixels:
    """The pixels uint8 (height, width) or (height, width, 3) of an encoded image; `DataError` names a damaged one."""
    name, data = item
    if isinstance(data, str):
        _check_file(data)
    try:
        _check_whole(data)
        with _opened(data) as file, warnings.catch_warnings():
            # Of tags beside the pixels that it leaves out.
            warnings.simplefilter("ignore", UserWarning)
            if file.width * file.height > MOST_PIXELS:
                raise DataError(
                    f"{name} has {file.width:,} × {file.height:,} pixels, more than the {MOST_PIXELS:,} that are read",
                    "make it smaller, or remove it",
                )
            image: Image.Image = ImageOps.exif_transpose(file)
            deep = image.mode.startswith(("I", "F"))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.asarray(image.convert("L" if gray else "RGB"))
    except DataError:
        raise
    except Exception as error:
        # Every decoder fails in its own way.
        raise DataError(f"{name} is damaged or no image: {first_line(error)}", "replace or remove it") from error
    if deep:
        raise DataError(f"{name} has more than 8 bits a channel", "convert it to 8 bits, or give the data as an .npz")
    return pixels


def _check_whole(data: str | bytes) -> None:
    """Let Pillow hold each part of a PNG against its checksum, which it does not do while it decodes."""
    with _opened(data) as file:
        if file.format == "PNG":
            file.verify()


def _opened(data: str | bytes) -> Image.Image:
    """An image whose header alone was read."""
    with warnings.catch_warnings():
        # Its size is judged before it is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_FORMATS)


def _images(
    name: str,
    count: int,
    items: Callable[[Rows], Iterable[Item]],
    shape: tuple[int, ...],
    preprocess: Preprocess,
    labels: Rows | None = None,
    names: tuple[str, ...] | None = None,
    remarks: tuple[str, ...] = (),
) -> Source:
    """A source of encoded images."""
    if count == 0:
        raise DataError(f"{name} holds no images", "give at least one image")
    if len(shape) != 3:
        raise DataError(f"{name} holds images, the network's input {shape} is none", "give the inputs as an .npz")
    gray = preprocess.mode == "gray" or (preprocess.mode == "auto" and shape[0] == 1)
    arranged = preprocess.model_copy(update={"layout": "channels_last"})
    preprocess.check_range(255, False, name)

    def read(rows: Rows, size: int) -> Iterator[Pixels]:
        stream = iter(items(rows))
        while batch := list(islice(stream, size)):
            yield np.concatenate([arranged.arrange(decode(item, gray)[None], shape, item[0]) for item in batch])

    return Source(name, count, read, labels, names, remarks)


def _named_paths(paths: Sequence[str], rows: Rows) -> Iterator[Item]:
    return ((paths[row], paths[row]) for row in rows)


def _cells(source: str | Path, rows: Rows, cells: Sequence[Any]) -> Iterator[Item]:
    """The images in the cells of a table: bytes, or a record of bytes and path."""
    for row, cell in zip(rows, cells, strict=True):
        data = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
        if not isinstance(data, str | bytes):
            raise DataError(f"row {row} of {source} has no image", "remove the row")
        yield f"row {row} of {source}", data


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images_below(folder: Path) -> Iterator[str]:
    """The images in a folder and in those below it, links followed, in the order of the folders' names."""
    for root, names in files_below(folder):
        for name in names:
            if _is_image(name):
                file = os.path.join(root, name)
                _check_file(file)
                yield file


def _check_file(path: str) -> None:
    """Raise `DataError` for what is no regular file: a pipe would be waited for."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not at_fault(error):
            raise
        raise DataError(f"{path} cannot be read: {first_line(error)}", "replace or remove it") from error
    if not regular:
        raise DataError(f"{path} is not a file", "replace or remove it")


@contextmanager
def _damage_of(name: str, remedy: str = "get the file again") -> Iterator[None]:
    """Map whatever a library raises while it reads `name` to a `DataError`: each fails in its own ways."""
    try:
        yield
    except EffcliError:
        raise
    except Exception as error:
        raise DataError(f"{name} is damaged: {first_line(error)}", remedy) from error


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of each array in an npz, without reading the arrays."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
                headers[member.removesuffix(".npy")] = (shape, dtype)
                _check_size(archive.getinfo(member), shape, dtype)
    except Exception as error:  # of zipfile, of zlib, or of numpy, which parses the header as Python
        raise DataError(f"{path} is no npz of arrays: {first_line(error)}", "write it with numpy.savez") from error
    return headers


def _check_size(member: zipfile.ZipInfo, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise `ValueError` when an array would be larger than what is stored of it: memory is taken by its shape."""
    whole = all(length >= 0 for length in shape) and math.prod(shape) * dtype.itemsize <= member.file_size
    if not whole and not dtype.hasobject:
        raise ValueError(f"{member.filename} of shape {shape} is not all there")


def _npz_array(path: Path, headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], key: str) -> Pixels:
    if key not in headers:
        raise DataError(f"{path} holds no array {key!r}", did_you_mean(key, headers))
    if headers[key][1].hasobject:
        raise DataError(
            f"{key} in {path} is a pickled object, which could run any code", "save it as numbers, or as text of type U"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: Pixels = archive[key]
            return array
    except Exception as error:  # of zipfile, zlib or numpy
        raise DataError(f"{key} in {path} is damaged: {first_line(error)}", "write the file again") from error


def _find_inputs(
    path: Path,
    headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]],
    shape: tuple[int, ...],
    preprocess: Preprocess,
) -> str:
    """The array that fits the network, by its name where several do; one that is named so but does not fit, too."""
    arrays = {key: size for key, (size, dtype) in headers.items() if len(size) > 1 and dtype.kind in "biufO"}
    fitting = [key for key, size in arrays.items() if preprocess.fits(size[1:], shape)]
    named = [key for key in fitting or arrays if _INPUTS.fullmatch(key)]
    found = named or fitting
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{key} {dtype} {size}" for key, (size, dtype) in headers.items()) or "no arrays"
    if fitting:
        raise DataError(
            f"{path} has several arrays for the network's input {shape}: {', '.join(found)}",
            f"name one under preprocess:, such as inputs: {found[0]}",
        )
    raise DataError(f"no array in {path} fits the network's input {shape}: {listed}", "check data and preprocess:")


def _find_labels(
    path: Path, headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], count: int, inputs: str
) -> str | None:
    """The array of whole numbers that is named like labels, by its length where several are; None without any."""
    named = {
        key: size[0]
        for key, (size, dtype) in headers.items()
        if key != inputs and _LABELS.fullmatch(key) and dtype.kind in "iu" and size and size[1:] in ((), (1,))
    }
    found = [key for key, length in named.items() if length == count] or list(named)
    return _only_label(path, found)


def _only_label(source: str | Path, found: Sequence[str]) -> str | None:
    if len(found) > 1:
        raise DataError(
            f"{source} may have its labels in {' or '.join(found)}",
            f"name one under preprocess:, such as labels: {found[0]}",
        )
    return found[0] if found else None


def _as_labels(values: Pixels, count: int, name: str) -> Rows | None:
    """Whole numbers (count,) or (count, 1) as int64 (count,); None for the -1 throughout that stands for no labels."""
    if values.dtype.kind not in "iub" or values.shape[1:] not in ((), (1,)):
        raise DataError(
            f"{name} is {values.dtype} {values.shape}, not one class number per input",
            "give whole numbers from 0, or name another: labels under preprocess:",
        )
    if len(values) != count:
        raise DataError(f"{name} has {len(values)} labels for {count} inputs", "give one label per input")
    labels = values.reshape(-1).astype(np.int64)
    return None if bool((labels == -1).all()) else labels


def _find_columns(
    source: str | Path, schema: Any, preprocess: Preprocess
) -> tuple[str, str | None, tuple[str, ...] | None]:
    """The columns of images and of labels in an arrow schema, and the names of the classes that it keeps."""
    types = _optional("pyarrow.types")

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(k).name == "bytes" and is_image(kind.field(k).type) for k in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{source} has several columns {twice!r}", "give each column a name of its own")
    for key in (preprocess.inputs, preprocess.labels):
        if key is not None and key not in schema.names:
            raise DataError(f"{source} has no column {key!r}", did_you_mean(key, schema.names))
    images = [field.name for field in schema if is_image(field.type) and preprocess.inputs in (None, field.name)]
    if len(images) != 1:
        found = f"several columns of images: {', '.join(images)}" if images else "no column of images"
        raise DataError(
            f"{source} has {found}",
            "name the column of encoded images: inputs under preprocess:",
        )
    label = preprocess.labels or _only_label(
        source, [field.name for field in schema if types.is_integer(field.type) and _LABELS.fullmatch(field.name)]
    )
    known = (schema.metadata or {}).get(b"huggingface")
    return images[0], label, None if known is None or label is None else _class_names(source, known, label)


def _class_names(source: str | Path, known: bytes, label: str) -> tuple[str, ...] | None:
    """The names of the classes in what `datasets` notes of a table; None where it notes none."""
    where = f"the note of `datasets` in {source}"
    found = parse_json(known, where, remedy="get the file again", error=DataError)
    for key in ("info", "features", label, "names"):
        if not isinstance(found, dict):
            raise DataError(f"{where} is damaged: an object is missing above {key!r}", "get the file again")
        found = found.get(key)
        if found is None:
            return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{where} is damaged: the names of the classes are no texts", "get the file again")
    return tuple(found)


def _only_split(path: Path, splits: Sequence[str]) -> str:
    found = splits if len(splits) == 1 else [name for name in ("test", "validation") if name in splits]
    if not found:
        raise DataError(f"{path} has the splits {', '.join(splits)}", f"say which: {path}#{splits[0]}")
    return found[0]


def _optional(name: str) -> Any:
    """A module of the extra `datasets`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name.partition('.')[0]} is not installed", "pip install 'effcli[datasets]'") from None
