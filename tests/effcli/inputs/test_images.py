"""Inputs from every kind of source, and the one line that each bad one gets."""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from effcli.errors import DataError, UserError
from effcli.inputs.images import Inputs, open_inputs, spread
from effcli.inputs.preprocess import Preprocess

UNIT = Preprocess(scale=1 / 255, mean=0.5, std=0.25)


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def whole(inputs: Inputs, size: int = 3) -> tuple[Tensor, Tensor | None]:
    """All batches joined, after a look at their sizes."""
    parts = list(inputs.batches(size))
    assert [len(values) for values, _ in parts[:-1]] == [size] * (len(parts) - 1)
    labels = [right for _, right in parts if right is not None]
    values = torch.cat([values for values, _ in parts])
    assert len(values) == len(inputs)
    return values, torch.cat(labels) if labels else None


def class_folders(root: Path, suffix: str = ".png") -> np.ndarray:
    """Two images of ants, one of bees, none of cats; returns them in that order, uint8 (3, 8, 6, 3)."""
    images = pixels(3, 8, 6, 3)
    for name in ("cat", "bee", "ant/more", ".hidden"):
        (root / name).mkdir(parents=True)
    Image.fromarray(images[0]).save(root / "ant" / f"1{suffix}", lossless=True)
    Image.fromarray(images[1]).save(root / "ant" / "more" / f"0{suffix}", lossless=True)
    Image.fromarray(images[2]).save(root / "bee" / f"x{suffix.upper()}", lossless=True)
    (root / "bee" / "notes.txt").write_text("no image")
    return images


@pytest.mark.parametrize("kind", ["npz", "folder", "parquet", "dataset"])
def test_batches_in_another_order(kind: str, tmp_path: Path) -> None:
    images = pixels(9, 8, 6, 3)
    if kind == "npz":
        source = savez(tmp_path / "data.npz", images=images, labels=np.arange(9))
    elif kind == "folder":
        source = tmp_path / "data"
        for k, image in enumerate(images):
            (source / f"class{k}").mkdir(parents=True)
            Image.fromarray(image).save(source / f"class{k}" / "one.png")
    else:
        datasets = importlib.import_module("datasets")
        columns = {"image": [Image.fromarray(image) for image in images], "label": list(range(9))}
        made = datasets.Dataset.from_dict(
            columns, datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        )
        source = tmp_path / ("data.parquet" if kind == "parquet" else "data")
        made.to_parquet(source, batch_size=4) if kind == "parquet" else made.save_to_disk(source)
    inputs = open_inputs(source, (3, 8, 6), UNIT, samples=8)
    stored, _ = whole(inputs)
    assert inputs.labels is not None
    order = np.array([5, 0, 7, 2, 6, 1, 4], np.int64)
    parts = list(inputs.batches(3, order))
    for (values, labels), rows in zip(parts, ([0, 5, 7], [1, 2, 6], [4]), strict=True):
        assert labels is not None and labels.tolist() == inputs.labels[rows].tolist()
        assert torch.equal(values, stored[rows])
    (values, labels), *others = inputs.batches(9, np.array([2, 3, 6], np.int64))
    assert not others and torch.equal(values, stored[[2, 3, 6]])
    assert list(inputs.batches(3, np.zeros(0, np.int64))) == []


@pytest.mark.parametrize(
    ("data", "shape", "axes"),
    [
        ((7, 8, 6, 3), (3, 8, 6), (0, 3, 1, 2)),
        ((7, 3, 8, 6), (3, 8, 6), (0, 1, 2, 3)),
        ((7, 49, 10), (1, 49, 10), None),
        ((7, 49, 10, 1), (1, 49, 10), (0, 3, 1, 2)),
        ((7, 640), (640,), (0, 1)),
        ((7, 11, 5), (11, 5), (0, 1, 2)),
    ],
)
def test_arrays_in_any_layout(
    data: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...] | None, tmp_path: Path
) -> None:
    values = pixels(*data)
    source = savez(tmp_path / "d.npz", images=values, labels=np.arange(7, dtype=np.uint8), scale=0.5, zero_point=3)
    found = open_inputs(source, shape, UNIT, classes=7, labelled=True)
    arranged = values[:, None] if axes is None else values.transpose(axes)
    expected = torch.from_numpy((arranged / 255 - 0.5) / 0.25).float()
    result, labels = whole(found)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert labels is not None and labels.tolist() == list(range(7))
    assert labels.dtype == torch.int64 and found.labels is not None and found.labels.dtype == np.int64
    assert (len(found), found.shape, found.names, found.remarks) == (7, shape, None, ())


def test_arrays_are_found_by_name_shape_and_type(tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    values = pixels(5, 4)
    savez(data, spectra=values, other=pixels(5, 3), y=np.ones((5, 1), np.int32), weights=np.ones(5, np.int64))
    found = open_inputs(data, (4,), Preprocess(), labelled=True)
    assert found.labels is not None and found.labels.tolist() == [1] * 5
    assert whole(found)[0].equal(torch.from_numpy(values).float())
    savez(data, x=values, more=pixels(5, 4), class_names=["ant", "bee"])
    found = open_inputs(data, (4,), Preprocess(), classes=2)
    assert (found.labels, found.names) == (None, ("ant", "bee"))


def test_parts_of_a_data_set_need_a_name(tmp_path: Path) -> None:
    """As Keras saves MNIST; the labels follow the length of the inputs."""
    test = pixels(2, 28, 28)
    data = savez(tmp_path / "m.npz", x_train=pixels(3, 28, 28), y_train=[1, 2, 3], x_test=test, y_test=[4, 5])
    with pytest.raises(DataError, match=r"several arrays for the network's input \(1, 28, 28\): x_train, x_test"):
        open_inputs(data, (1, 28, 28), Preprocess())
    found = open_inputs(data, (1, 28, 28), Preprocess(inputs="x_test"))
    values, labels = whole(found)
    assert values.equal(torch.from_numpy(test[:, None]).float())
    assert labels is not None and labels.tolist() == [4, 5]
    with pytest.raises(DataError, match=r"y_train in .* has 3 labels for 2 inputs"):
        open_inputs(data, (1, 28, 28), Preprocess(inputs="x_test", labels="y_train"))


def test_labels_of_minus_one_stand_for_none(tmp_path: Path) -> None:
    data = savez(tmp_path / "d.npz", x=pixels(2, 4), labels=[-1, -1])
    assert open_inputs(data, (4,), Preprocess(), classes=3).labels is None
    with pytest.raises(DataError, match="has no labels"):
        open_inputs(data, (4,), Preprocess(), labelled=True)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (
            {"images": np.zeros((2, 28, 28))},
            {},
            r"images in .* has shape \(28, 28\), the network's input is \(3, 8, 6\)",
        ),
        (
            {"a": np.zeros((2, 28)), "b": [1]},
            {},
            r"no array in .* fits the network's input \(3, 8, 6\): a float64 \(2, 28",
        ),
        ({}, {}, r"no array in .* fits the network's input \(3, 8, 6\): no arrays"),
        ({"x": np.zeros((0, 3, 8, 6))}, {}, "x in .* is empty"),
        ({"x": np.full((1, 3, 8, 6), np.nan)}, {}, "x in .* holds NaN or infinite values"),
        ({"x": np.full((1, 3, 8, 6), np.inf)}, {}, "x in .* holds NaN or infinite values"),
        ({"x": np.full((1, 3, 8, 6), 0.5)}, {"scale": 1 / 255}, "x in .* reaches only 0.5, as if scaled already"),
        ({"x": np.full((1, 3, 8, 6), 255)}, {"mean": 0.5}, "x in .* reaches 255 after preprocess.scale 1"),
        ({"x": np.array([["a"]])}, {"inputs": "x"}, "x in .* holds <U1, not numbers"),
        ({"x": np.zeros((1, 3, 8, 6))}, {"inputs": "X"}, "holds no array 'X'"),
        ({"x": np.zeros((1, 3, 8, 6))}, {"mean": (0.0, 1.0)}, "preprocess.mean has 2 numbers"),
        ({"x": np.zeros((1, 3, 8, 6)), "y": [3]}, {}, "has a label 3, the network's classes are 0 to 2"),
        ({"x": np.zeros((2, 3, 8, 6)), "y": [0, -1]}, {}, "has a label -1, the network's classes are 0 to 2"),
        ({"x": np.zeros((2, 3, 8, 6)), "y": [0]}, {}, "y in .* has 1 labels for 2 inputs"),
        ({"x": np.zeros((1, 3, 8, 6)), "y": [0.5]}, {"labels": "y"}, "y in .* is float64 .*, not one class number per"),
        ({"x": np.zeros((1, 3, 8, 6)), "y": [0], "label": [0]}, {}, "may have its labels in y or label"),
        ({"x": np.zeros((1, 3, 8, 6)), "names": ["ant"]}, {}, r"has 1 classes \(ant\), the network 3"),
    ],
)
def test_bad_arrays(arrays: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        open_inputs(data, (3, 8, 6), Preprocess(**options), classes=3)
    assert "\n" not in caught.value.cause and caught.value.remedy


def test_numbers_named_like_labels_are_said_to_be_left_out(tmp_path: Path) -> None:
    for labels in ([0.5, 1], np.array([0, 1], dtype=object), ["a", "b"], [True, False]):
        source = savez(tmp_path / "d.npz", x=np.zeros((2, 3, 8, 6)), labels=labels)
        found = open_inputs(source, (3, 8, 6), Preprocess())
        assert found.labels is None
        (remark,) = found.remarks
        kind = np.asarray(labels).dtype
        assert remark == f"labels in {source} holds {kind}, not class numbers: the inputs are taken as unlabelled"


def test_class_names_that_are_no_text_are_said_to_be_left_out(tmp_path: Path) -> None:
    for names in (np.array(["ant", "bee"], dtype=object), np.array([b"ant", b"bee"])):
        source = savez(tmp_path / "d.npz", x=np.zeros((2, 3, 8, 6)), labels=[0, 1], class_names=names)
        found = open_inputs(source, (3, 8, 6), Preprocess())
        assert found.names is None and found.labels is not None
        assert found.remarks == (f"class_names in {source} holds {names.dtype}, not text: the classes have no names",)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    data = tmp_path / "d.npz"
    np.savez(data, images=np.array([[Bomb()]], dtype=object), y=[0])
    with pytest.raises(DataError, match=r"images in .* is a pickled object"):
        open_inputs(data, (1,), Preprocess())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no npz", b"\x93NUMPY\x01\x00"])
def test_no_npz(content: bytes, tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    data.write_bytes(content)
    with pytest.raises(DataError, match="is no npz of arrays"):
        open_inputs(data, (4,), Preprocess())


def test_a_damaged_array(tmp_path: Path) -> None:
    data = savez(tmp_path / "d.npz", x=pixels(50_000, 4))
    content = bytearray(data.read_bytes())
    content[100_000] ^= 255
    data.write_bytes(content)
    with pytest.raises(DataError, match=r"x in .* is damaged"):
        open_inputs(data, (4,), Preprocess())


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_a_folder_per_class(suffix: str, tmp_path: Path) -> None:
    """The hidden folder is no class; the empty one keeps its number."""
    images = class_folders(tmp_path, suffix)
    found = open_inputs(str(tmp_path), (3, 8, 6), UNIT, classes=3, labelled=True)
    values, labels = whole(found, 2)
    torch.testing.assert_close(values, UNIT.apply(images, (3, 8, 6)), rtol=0, atol=0)
    assert labels is not None and labels.tolist() == [0, 0, 1]
    assert (found.names, found.remarks) == (("ant", "bee", "cat"), ())
    assert whole(found, 2)[0].equal(values)


def test_images_without_labels(tmp_path: Path) -> None:
    """In the order of their names, resized and cropped as they are read; jpeg is lossy."""
    smooth = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None] * 6, (40, 30, 3))
    Image.fromarray(smooth).save(tmp_path / "b.jpg", quality=95)
    Image.fromarray(smooth[:20]).save(tmp_path / "a.jpeg", quality=95)
    options = Preprocess(resize=16, crop=(12, 12))
    found = open_inputs(tmp_path, (3, 12, 12), options, samples=9)
    values, labels = whole(found)
    assert labels is None and found.labels is None and found.names is None
    assert found.remarks == ()
    torch.testing.assert_close(values, options.apply([smooth[:20], smooth], (3, 12, 12)), rtol=0, atol=4)


def test_colours_of_files(tmp_path: Path) -> None:
    """Files are converted to the network's colours; what is transparent lies on white; a camera's turn is undone."""
    Image.new("L", (2, 1), 100).save(tmp_path / "a.png")
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(tmp_path / "b.png")
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.save(tmp_path / "c.png", transparency=0)
    turned = Image.new("RGB", (1, 2), (0, 0, 255))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "d.png", exif=exif)
    rgb = whole(open_inputs(tmp_path, (3, 1, 2), Preprocess()))[0]
    assert rgb[..., 0, 0].tolist() == [[100] * 3, [255] * 3, [255, 0, 0], [0, 0, 255]]
    gray = whole(open_inputs(tmp_path, (1, 1, 2), Preprocess()))[0]
    assert gray[:, 0, 0, 0].tolist() == [100, 255, 76, 29]
    bgr = whole(open_inputs(tmp_path, (3, 1, 2), Preprocess(mode="bgr")))[0]
    assert bgr.equal(rgb.flip(1))


def test_numbers_as_names_of_classes(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2), int(name)).save(tmp_path / name / "a.png")
    found = open_inputs(tmp_path, (1, 2, 2), Preprocess(), classes=3)
    assert found.names == ("1", "10", "2")
    assert "as text (1, 10, 2, ...), not as numbers" in found.remarks[0]


def test_bad_folders(tmp_path: Path) -> None:
    def refused(message: str, folder: Path = tmp_path, shape: tuple[int, ...] = (3, 8, 6), **options: Any) -> None:
        with pytest.raises(DataError, match=message) as caught:
            open_inputs(folder, shape, Preprocess(**options), classes=4, labelled=True)
        assert "\n" not in caught.value.cause and caught.value.remedy

    refused("holds no images")
    class_folders(tmp_path / "test")
    refused("are parts of a data set, not classes: test")
    refused(r"has 3 classes \(ant, bee, cat\), the network 4", tmp_path / "test")
    refused("holds images, the network's input .* is none", tmp_path / "test", (640,))
    refused("reaches 255 after preprocess.scale 1", tmp_path / "test", mean=0.5, std=0.5)
    refused("has no labels", tmp_path / "test" / "bee")
    Image.new("RGB", (6, 8)).save(tmp_path / "loose.png")
    refused("holds images beside folders of images")


@pytest.mark.parametrize("kind", ["truncated", "checksum", "later", "text", "size", "deep"])
def test_a_bad_image_is_named(kind: str, tmp_path: Path) -> None:
    Image.fromarray(pixels(1, 8, 6, 3)[0]).save(tmp_path / "a.png")
    bad = tmp_path / "b.png"
    if kind == "truncated":
        bad.write_bytes((tmp_path / "a.png").read_bytes()[:100])
    elif kind == "checksum":
        # The last byte of the pixels' checksum, which decoding does not look at.
        data = bytearray((tmp_path / "a.png").read_bytes())
        data[data.index(b"IEND") - 5] ^= 1
        bad.write_bytes(data)
    elif kind == "later":
        frames = [Image.fromarray(frame) for frame in pixels(2, 8, 6, 3)]
        frames[0].save(bad, save_all=True, append_images=frames[1:])
        bad.write_bytes(bad.read_bytes().replace(b"fdAT\0\0\0\2", b"fdAT\0\0\0\3"))
    elif kind == "text":
        bad.write_text("no image")
    elif kind == "size":
        Image.new("RGB", (9, 9)).save(bad)
    else:
        Image.fromarray(np.zeros((8, 6), np.uint16)).save(bad)
    found = open_inputs(tmp_path, (3, 8, 6), Preprocess())
    with pytest.raises(DataError, match=r"b\.png (is damaged|has more than 8 bits|has shape \(9, 9, 3\))") as caught:
        whole(found)
    assert "\n" not in caught.value.cause


def encoded(image: np.ndarray, folder: Path) -> bytes:
    Image.fromarray(image).save(folder / "one.png")
    return (folder / "one.png").read_bytes()


def image_dataset(images: np.ndarray, labels: list[int], names: list[str]) -> Any:
    datasets = importlib.import_module("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"img": [Image.fromarray(image) for image in images], "label": labels}, features)


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    """Rows from several row groups, some of which hold none of the samples."""
    images = pixels(11, 8, 6, 3)
    labels = [k % 3 for k in range(11)]
    image_dataset(images, labels, ["ant", "bee", "cat"]).to_parquet(tmp_path / "d.parquet", batch_size=2)
    found = open_inputs(tmp_path / "d.parquet", (3, 8, 6), UNIT, classes=3, labelled=True)
    values, right = whole(found)
    assert values.equal(UNIT.apply(images, (3, 8, 6)))
    assert right is not None and right.tolist() == labels
    assert (found.names, found.remarks) == (("ant", "bee", "cat"), ())
    few = open_inputs(tmp_path / "d.parquet", (3, 8, 6), UNIT, samples=3)
    rows = spread(11, 3)
    assert whole(few)[0].equal(values[rows])
    assert few.labels is not None and few.labels.tolist() == [labels[row] for row in rows]
    assert "3 of 11 inputs" in few.remarks[0]


def test_parquet_of_bytes_in_one_large_group(tmp_path: Path) -> None:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    images = pixels(5, 8, 6, 3)
    cells = [encoded(images[k % 5], tmp_path) for k in range(150)]
    table = arrow.table({"image": cells, "fine_label": list(range(150)), "coarse_label": [0] * 150})
    file = tmp_path / "d.parquet"
    parquet.write_table(table, file)
    with pytest.raises(DataError, match="may have its labels in fine_label or coarse_label"):
        open_inputs(file, (3, 8, 6), UNIT)
    found = open_inputs(file, (3, 8, 6), UNIT.model_copy(update={"labels": "fine_label"}), samples=70)
    values, labels = whole(found, 32)
    assert labels is not None and len(set(labels.tolist())) == 70
    assert values.equal(UNIT.apply(images, (3, 8, 6))[labels % 5])


def test_bad_tables(tmp_path: Path) -> None:
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    file = tmp_path / "d.parquet"

    def refused(message: str, table: Any = None, **options: Any) -> None:
        if table is not None:
            parquet.write_table(arrow.table(table), file)
        with pytest.raises(DataError, match=message) as caught:
            whole(open_inputs(file, (3, 8, 6), Preprocess(**options)))
        assert "\n" not in caught.value.cause and caught.value.remedy

    file.write_text("no parquet")
    refused("is no parquet file")
    refused("has no column of images", {"text": ["a"]})
    refused("has several columns of images: a, b", {"a": [b""], "b": [b""]})
    refused("has no column 'c'", inputs="c")
    refused("holds no images", {"a": arrow.array([], arrow.binary())})
    refused("row 1 of .* has no image", {"a": [encoded(pixels(1, 8, 6, 3)[0], tmp_path), None]})
    refused("row 0 of .* is damaged or no image", {"a": [b"no image"]})
    refused("label in .* not one class number per input", {"a": [b"", b""], "label": arrow.array([1, None])})


def test_a_directory_of_datasets(tmp_path: Path) -> None:
    datasets = importlib.import_module("datasets")
    images = pixels(7, 8, 6, 3)
    one = image_dataset(images, [0, 1, 0, 1, 0, 1, 1], ["ant", "bee"])
    one.save_to_disk(tmp_path / "one")
    found = open_inputs(tmp_path / "one", (3, 8, 6), UNIT, classes=2, labelled=True)
    values, labels = whole(found)
    assert values.equal(UNIT.apply(images, (3, 8, 6)))
    assert labels is not None and labels.tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert (found.names, found.remarks) == (("ant", "bee"), ())

    datasets.DatasetDict(train=one, test=one.select([5, 2])).save_to_disk(tmp_path / "two")
    found = open_inputs(tmp_path / "two", (3, 8, 6), UNIT)
    assert whole(found)[0].equal(values[[5, 2]])
    assert "the split 'test'" in found.remarks[0]
    found = open_inputs(f"{tmp_path / 'two'}#train", (3, 8, 6), UNIT)
    assert (len(found), found.remarks) == (7, ())
    with pytest.raises(DataError, match="has no split 'tset'") as caught:
        open_inputs(f"{tmp_path / 'two'}#tset", (3, 8, 6), UNIT)
    assert "did you mean 'test'" in caught.value.remedy
    with pytest.raises(DataError, match="has no splits, so #test names nothing"):
        open_inputs(f"{tmp_path / 'one'}#test", (3, 8, 6), UNIT)

    datasets.DatasetDict(a=one, b=one).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="has the splits a, b"):
        open_inputs(tmp_path / "many", (3, 8, 6), UNIT)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded by datasets"):
        open_inputs(tmp_path / "one", (3, 8, 6), UNIT)


@pytest.mark.parametrize("kind", ["parquet", "directory"])
def test_what_is_missing_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow" if kind == "parquet" else "datasets", None)
    source = tmp_path / "d.parquet" if kind == "parquet" else tmp_path
    (tmp_path / "d.parquet").touch()
    (tmp_path / "dataset_dict.json").touch()
    with pytest.raises(UserError, match=r"(pyarrow|datasets) is not installed\npip install 'effcli\[datasets\]'"):
        open_inputs(source, (3, 8, 6), UNIT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "there is no file or folder"),
        ("nothing#test", "there is no file or folder"),
        ("d.csv", "is no kind of data that can be read"),
        ("d.csv#test", "has no splits, so #test names nothing"),
    ],
)
def test_no_source(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(DataError, match=message):
        open_inputs(tmp_path / name, (3, 8, 6), UNIT)


def test_a_name_may_hold_a_number_sign(tmp_path: Path) -> None:
    data = savez(tmp_path / "run#1.npz", x=pixels(2, 4))
    assert len(open_inputs(data, (4,), Preprocess())) == 2


@given(st.integers(1, 400), st.data())
def test_samples_are_spread(count: int, data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, count))
    rows = spread(count, samples)
    for k, row in enumerate(rows.tolist()):
        assert k * count // samples <= row < (k + 1) * count // samples


def test_samples_of_sorted_and_of_alternating_classes() -> None:
    """About 10 of 100 from each of ten classes, whichever way 1000 inputs are ordered."""
    rows = spread(1000, 100)
    assert np.bincount(rows // 100).tolist() == [10] * 10
    assert np.bincount(rows % 10, minlength=10).min() >= 8


def test_mlperf_tiny_keywords(asset: Callable[[str], Path]) -> None:
    """The array is int8 and q stands for (q - zero point) · scale, which lie beside it as scalars."""
    data = asset("tiny_dscnn_kws") / "data.npz"
    scale = 0.5847029089927673
    options = Preprocess(scale=scale, mean=83 * scale)
    found = open_inputs(data, (1, 49, 10), options, classes=12, labelled=True)
    values, _ = whole(found, 256)
    with np.load(data) as archive:
        expected = (archive["features_int8"].astype(np.float64) - 83) * scale
        assert found.labels is not None and (found.labels == archive["labels"]).all()
    torch.testing.assert_close(values[:, 0], torch.from_numpy(expected).float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cifar10_jpeg/test", (3, 32, 32)), ("fashion_mnist/test", (1, 28, 28)), ("mnist_5k/mnist5k", (1, 28, 28))],
)
def test_real_images(name: str, shape: tuple[int, ...], asset: Callable[[str], Path]) -> None:
    folder, _, file = name.partition("/")
    found = open_inputs(asset(folder) / f"{file}.npz", shape, UNIT, classes=10, samples=500, labelled=True)
    values, labels = whole(found, 128)
    assert labels is not None and np.bincount(labels).min() > 25
    assert values.shape == (500, *shape)
    assert -2 <= float(values.min()) < float(values.max()) <= 2


def all_read(path: Path, shape: tuple[int, ...] = (3, 4, 4)) -> int:
    return sum(len(values) for values, _ in open_inputs(path, shape, Preprocess()).batches(2))


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    Image.fromarray(pixels(1, 4, 4, 3)[0]).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b.png is not a file"):
        all_read(tmp_path)
    nested = tmp_path / "nested"
    (nested / "one").mkdir(parents=True)
    os.mkfifo(nested / "one" / "c.png")
    with pytest.raises(DataError, match=r"c.png is not a file"):
        all_read(nested)
    os.mkfifo(tmp_path / "d.npz")
    with pytest.raises(DataError, match=r"d.npz is not a file"):
        all_read(tmp_path / "d.npz")
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b.png cannot be read"):
        all_read(tmp_path)


def test_a_link_to_the_folder_above_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels(1, 4, 4, 3)[0]).save(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "loop").symlink_to(tmp_path / "one")
    with pytest.raises(DataError, match="a link to a folder that it lies in"):
        all_read(tmp_path)


def test_a_large_image_is_refused_by_its_header(tmp_path: Path) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has 13,000 × 13,000 pixels"):
        all_read(tmp_path)


def test_an_image_that_resizing_makes_large_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1, 20_000)).save(tmp_path / "a.png")
    preprocess = Preprocess(resize=224, crop=(4, 4))
    with pytest.raises(DataError, match="would be resized to"):
        list(open_inputs(tmp_path, (3, 4, 4), preprocess).batches(1))


def test_tags_that_are_left_out_are_not_warned_of(tmp_path: Path) -> None:
    Image.fromarray(pixels(1, 8, 6, 3)[0]).save(tmp_path / "a.png", "TIFF", software="x" * 40)
    data = (tmp_path / "a.png").read_bytes()
    # The tag now claims more bytes than the file has; warnings are errors here.
    (tmp_path / "a.png").write_bytes(data.replace(b"\x31\x01\x02\0\x29\0\0\0", b"\x31\x01\x02\0\x29\0\1\0"))
    assert data != (tmp_path / "a.png").read_bytes()
    assert len(whole(open_inputs(tmp_path, (3, 8, 6), Preprocess()))[0]) == 1


def test_only_formats_of_images_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="damaged or no image"):
        all_read(tmp_path)


@pytest.mark.parametrize(
    ("note", "names"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"info": 3}', None),
        (b'{"info": {"features": []}}', None),
        (b'{"info": {"features": {"label": {"names": "ab"}}}}', None),
        (b"[" * 90_000, None),
        (b"{}", ()),
        (b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}', ("a", "b")),
    ],
)
def test_what_a_table_notes_of_its_classes(note: bytes, names: tuple[str, ...] | None, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = encoded(pixels(1, 4, 4, 3)[0], tmp_path)
    table = arrow.table({"image": [data, data], "label": [0, 1]}).replace_schema_metadata({b"huggingface": note})
    parquet.write_table(table, tmp_path / "t.parquet")
    if names is None:
        with pytest.raises(DataError, match=r"damaged|not JSON|nested"):
            all_read(tmp_path / "t.parquet")
    else:
        assert (open_inputs(tmp_path / "t.parquet", (3, 4, 4), Preprocess()).names or ()) == names


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    images = pa.array([encoded(image, tmp_path) for image in pixels(2, 8, 6, 3)])
    for name, column in (("image", pa.array([1, 2])), ("label", pa.array(["a", "b"]))):
        table = pa.table({"image": images, "label": [0, 1]}).append_column(name, column)
        pq.write_table(table, tmp_path / "d.parquet")
        with pytest.raises(DataError, match=f"has several columns '{name}'"):
            open_inputs(tmp_path / "d.parquet", (3, 8, 6), Preprocess())


def test_damaged_pages_of_a_table(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = encoded(pixels(1, 4, 4, 3)[0], tmp_path)
    parquet.write_table(arrow.table({"image": [data, data], "label": [0, 1]}), tmp_path / "t.parquet")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[4:12] = b"\xff" * 8
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        all_read(tmp_path / "t.parquet")


@pytest.mark.parametrize("shape", ["(8, 3, 4, 4", "(800000000000, 3, 4, 4)", "(-1, 3, 4, 4)", "(2, 'a')"])
def test_damaged_headers_of_arrays(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 1536
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", member)
    with pytest.raises(DataError, match="is no npz of arrays"):
        all_read(tmp_path / "a.npz")
