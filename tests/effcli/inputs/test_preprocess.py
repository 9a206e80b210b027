"""Preprocessing against transformers' own image processors, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from effcli.errors import CheckpointError, DataError, UnsupportedError
from effcli.inputs.preprocess import Preprocess

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}

# As these models have it on the Hub: old files with one number for a size, new ones with names.
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": 224,
    },
    "convnext": {
        **STEPS,
        **IMAGENET,
        "image_processor_type": "ConvNextImageProcessor",
        "crop_pct": 0.875,
        "resample": 3,
        "size": {"shortest_edge": 224},
    },
    "convnext_warped": {
        **STEPS,
        **IMAGENET,
        "image_processor_type": "ConvNextImageProcessor",
        "crop_pct": 0.875,
        "resample": 3,
        "size": {"shortest_edge": 384},
    },
    "resnet": {
        **STEPS,
        **IMAGENET,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "crop_pct": 0.875,
        "resample": 3,
        "size": 224,
    },
    "mobilenet_v2": {
        **STEPS,
        "image_processor_type": "MobileNetV2ImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": {"shortest_edge": 256},
    },
    "efficientnet": {
        **STEPS,
        "image_processor_type": "EfficientNetImageProcessor",
        "do_center_crop": False,
        "crop_size": {"height": 289, "width": 289},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.47853944, 0.4732864, 0.47434163],
        "include_top": True,
        "rescale_offset": False,
        "resample": 0,
        "size": {"height": 224, "width": 224},
    },
    "efficientnet_offset": {
        **STEPS,
        "image_processor_type": "EfficientNetImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.47853944, 0.4732864, 0.47434163],
        "include_top": False,
        "rescale_offset": True,
        "rescale_factor": 1 / 127.5,
        "resample": 3,
        "size": {"height": 41, "width": 57},
    },
    "mobilevit": {
        "image_processor_type": "MobileViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_center_crop": True,
        "do_flip_channel_order": True,
        "crop_size": {"height": 256, "width": 256},
        "resample": 2,
        "size": {"shortest_edge": 288},
    },
    "padded": {
        **STEPS,
        **IMAGENET,
        "image_processor_type": "MobileNetV1ImageProcessor",
        "do_resize": False,
        "do_center_crop": True,
        "crop_size": {"height": 334, "width": 100},
    },
    "not_resized": {
        **STEPS,
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "image_mean": [0.4914, 0.4822, 0.4465],
        "image_std": [0.2023, 0.1994, 0.201],
    },
}


def saved(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 (height, width, 3)."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return (smooth + generator.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(301, 401), (500, 260), (90, 77)])
def test_agrees_with_transformers(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = saved(tmp_path, CONFIGS[name])
    image = picture(*size)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    found = Preprocess.read(folder)
    assert found is not None
    assert found.crop or found.resize or name == "not_resized"
    torch.testing.assert_close(found.apply(image[None], tuple(expected.shape[1:])), expected, rtol=0, atol=2e-6)


def test_what_transformers_fills_in_is_read(tmp_path: Path) -> None:
    assert Preprocess.read(tmp_path) is None
    found = Preprocess.read(saved(tmp_path, CONFIGS["vit"]))
    assert found == Preprocess(resize=(224, 224), scale=1 / 255, mean=0.5, std=0.5)
    assert Preprocess.model_validate_json(found.model_dump_json()) == found


def test_grey_images(tmp_path: Path) -> None:
    config = {**CONFIGS["vit"], "image_mean": [0.25], "image_std": [0.5], "size": {"height": 28, "width": 28}}
    found = Preprocess.read(saved(tmp_path, config))
    assert found == Preprocess(resize=(28, 28), scale=1 / 255, mean=0.25, std=0.5)


@pytest.mark.parametrize("kind", ["LevitImageProcessor", "ImageGPTImageProcessor"])
def test_a_processor_that_does_more_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"{kind} in .* does more than resize, crop, rescale and normalise"):
        Preprocess.read(saved(tmp_path, {"image_processor_type": kind}))


@pytest.mark.parametrize("text", ["{", '{"image_processor_type": "NoSuchImageProcessor"}'])
def test_a_config_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json cannot be read") as caught:
        Preprocess.read(tmp_path)
    assert "\n" not in caught.value.cause


def test_normalised_by_hand() -> None:
    """(value / 2 - mean) / std for two channels of two values."""
    options = Preprocess(scale=0.5, mean=(1.0, 3.0), std=(2.0, 0.5))
    values = np.array([[[[2, 6]], [[6, 8]]]], dtype=np.uint8)
    expected = torch.tensor([[[[0.0, 1.0]], [[0.0, 2.0]]]])
    torch.testing.assert_close(options.apply(values, (2, 1, 2)), expected)


def test_vectors_and_signals() -> None:
    """Inputs that are no images are taken as they are, per feature where mean has one number for each."""
    values = np.array([[-3, 5, 127]], dtype=np.int8)
    assert Preprocess(scale=2, mean=(1.0, 2.0, 3.0)).apply(values, (3,)).tolist() == [[-7, 8, 251]]
    assert Preprocess().apply(values, (1, 3)).tolist() == [[[-3, 5, 127]]]
    with pytest.raises(DataError, match=r"input \(3,\) is no image"):
        Preprocess(crop=(2, 2)).apply(values, (3,))


@pytest.mark.parametrize(
    ("length", "expected"), [(2, [2, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (7, [0, 0, 1, 2, 3, 4, 0])]
)
def test_the_middle_is_kept_and_zeros_come_around(length: int, expected: list[int]) -> None:
    values = np.array([[[1, 2, 3, 4]]], dtype=np.uint8)
    assert Preprocess(crop=(1, length)).apply(values, (1, 1, length)).flatten().tolist() == expected


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_layouts_mean_the_same(height: int, width: int, channels: int, count: int) -> None:
    values = np.random.default_rng(0).normal(size=(count, channels, height, width)).astype(np.float32)
    shape = (channels, height, width)
    first, last = Preprocess(layout="channels_first"), Preprocess(layout="channels_last")
    assert first.apply(values, shape).equal(torch.from_numpy(values))
    assert last.apply(values.transpose(0, 2, 3, 1), shape).equal(torch.from_numpy(values))
    if len({height, width, channels}) > 1:
        assert Preprocess().apply(values, shape).equal(torch.from_numpy(values))
    if channels == 1:
        assert Preprocess().apply(values[:, 0], shape).equal(torch.from_numpy(values))


def test_a_cube_may_lie_either_way() -> None:
    cube = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3)
    with pytest.raises(DataError, match=r"shape \(3, 3, 3\) may have its channels first or last") as caught:
        Preprocess().apply(cube, (3, 3, 3))
    assert "layout: channels_first or channels_last" in caught.value.remedy
    assert Preprocess().apply(cube[:, :1, :1, :1], (1, 1, 1)).tolist() == [[[[0]]]]


@pytest.mark.parametrize(
    ("found", "shape", "remedy"),
    [
        ((28, 28), (3, 28, 28), "mode: rgb"),
        ((28, 28, 3), (1, 28, 28), "mode: gray"),
        ((3, 28, 28), (1, 28, 28), "mode: gray"),
        ((32, 32, 3), (3, 28, 28), "resize or crop to 28 × 28"),
        ((2, 28, 28), (3, 28, 28), "resize or crop"),
        ((641,), (640,), "check that data and network belong together"),
        ((784,), (1, 28, 28), "check that data and network belong together"),
    ],
)
def test_a_wrong_shape_is_said_with_the_right_one(found: tuple[int, ...], shape: tuple[int, ...], remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        Preprocess().apply(np.zeros((2, *found), np.uint8), shape)
    assert str(found) in caught.value.cause and str(shape) in caught.value.cause
    assert remedy in caught.value.remedy
    assert not Preprocess().fits(found, shape)


def test_colours() -> None:
    image = np.array([[[[255, 0, 0], [0, 255, 0], [10, 20, 30]]]], dtype=np.uint8)
    # 0.299 · 255, 0.587 · 255, and 2.99 + 11.74 + 3.42.
    assert Preprocess(mode="gray").apply(image, (1, 1, 3)).flatten().tolist() == [76, 150, 18]
    assert Preprocess(mode="bgr").apply(image, (3, 1, 3))[0, :, 0].t().tolist() == [
        [0, 0, 255],
        [0, 255, 0],
        [30, 20, 10],
    ]
    assert Preprocess(mode="rgb").apply(image[..., 0], (3, 1, 3))[0, :, 0].tolist() == [[255, 0, 10]] * 3


def test_floats_are_resized_as_floats() -> None:
    values = np.array([[[0.0, 1.0], [2.0, 3.0]]])
    found = Preprocess(resize=(1, 1)).apply(values, (1, 1, 1))
    torch.testing.assert_close(found.flatten(), torch.tensor([1.5]))
    assert Preprocess(resize=3).apply(np.zeros((1, 2, 4)), (1, 3, 6)).shape == (1, 1, 3, 6)


def test_images_of_several_sizes() -> None:
    options = Preprocess(resize=8, crop=(6, 6))
    images = [picture(20, 30), picture(31, 9), picture(6, 6)]
    found = options.apply(images, (3, 6, 6))
    assert found.shape == (3, 3, 6, 6)
    assert found.dtype == torch.float32
    for image, result in zip(images, found, strict=True):
        assert options.apply(image[None], (3, 6, 6))[0].equal(result)
    assert options.apply([], (3, 6, 6)).shape == (0, 3, 6, 6)
    assert options.apply(np.zeros((0, 9, 9, 3), np.uint8), (3, 6, 6)).shape == (0, 3, 6, 6)


def test_means_need_one_number_per_channel() -> None:
    with pytest.raises(DataError, match=r"preprocess.mean has 3 numbers, the network's input \(1, 28, 28\) has 1 chan"):
        Preprocess(mean=(0.1, 0.2, 0.3)).check_channels((1, 28, 28))
    Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0,)).check_channels((3, 28, 28))


@pytest.mark.parametrize(
    "options",
    [{"std": 0}, {"std": (1, 0, 1)}, {"mean": ()}, {"scale": -1}, {"mean": float("nan")}, {"resize": 0}, {"size": 2}],
)
def test_options_out_of_bounds(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocess(**options)


@pytest.mark.parametrize(
    ("options", "largest", "floats", "cause"),
    [
        ({"scale": 1 / 255}, 1.0, True, "reaches only 1, as if scaled already"),
        ({"scale": 1 / 255}, 1.0, False, None),
        ({"scale": 1 / 255}, 0.0, True, None),
        ({"scale": 1 / 255}, 255.0, True, None),
        ({"mean": 0.5, "std": 0.5}, 255.0, False, "mean and std are those of values from 0 to 1"),
        ({"std": (0.2, 0.2, 0.2)}, 255.0, True, "mean and std are those of values from 0 to 1"),
        ({"mean": 0.5, "std": 0.5}, 1.0, True, None),
        ({"scale": 1 / 127.5, "mean": 1.0}, 255.0, False, None),
        ({}, 255.0, False, None),
        ({"mean": 120.0, "std": 60.0}, 255.0, False, None),
        ({"scale": 0.5847, "mean": 48.5}, 128.0, False, None),
    ],
)
def test_values_and_scale_must_belong_together(
    options: dict[str, Any], largest: float, floats: bool, cause: str | None
) -> None:
    if cause is None:
        Preprocess(**options).check_range(largest, floats, "it")
        return
    with pytest.raises(DataError, match=cause):
        Preprocess(**options).check_range(largest, floats, "it")
