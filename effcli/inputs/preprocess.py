"""What happens to an image before a network sees it: colour, resize, crop, then x = (value · scale - mean) / std.

The order and the rounding are those of transformers' image processors with Pillow: sizes are resampled in the data's
own type (8 bits stay 8 bits), a crop is central, and what a crop lacks is filled with zeros before normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from effcli.errors import CheckpointError, DataError, UnsupportedError, first_line
from effcli.options import Options

FILE_NAME = "preprocessor_config.json"
Pixels = NDArray[Any]
Layout = Literal["channels_last", "channels_first", "plane", "as_is"]

_Length = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# ITU-R 601-2 luma, as Pillow's conversion to grey has it.
_LUMA = np.array([0.299, 0.587, 0.114])
# A scale below this is one for values up to 255 or more.
_SCALES_BYTES = 0.01
# Values from 0 to 1 do not reach this, with room for scales such as 1/127.5.
_BEYOND_UNIT = 10
# What one image may have, also after it was resized; it takes several times as many bytes while it is decoded.
MOST_PIXELS = 1 << 26
# From this edge on ConvNeXT's processor warps the whole image instead of cropping its middle.
_CONVNEXT_WARPS = 384


class Preprocess(Options):
    """How values in a file become a network's inputs; the key `preprocess` of a recipe."""

    mode: Literal["auto", "gray", "rgb", "bgr"] = Field(
        "auto", description="Colours. auto: image files as the network's channels ask, arrays as they are."
    )
    resize: _Length | tuple[_Length, _Length] | None = Field(
        None, description="The shortest edge, the other in proportion; or height and width."
    )
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = Field("bilinear", description="How to resize.")
    crop: tuple[_Length, _Length] | None = Field(None, description="Height and width of the middle that is kept.")
    scale: _Positive = Field(1.0, description="Factor of the values in the file, often 1/255.")
    mean: _Number | tuple[_Number, ...] = Field(0.0, description="Subtracted after scaling; one, or one per channel.")
    std: _Positive | tuple[_Positive, ...] = Field(1.0, description="Divided by at last; one, or one per channel.")
    layout: Literal["auto", "channels_first", "channels_last"] = Field(
        "auto", description="Where arrays have their channels; auto: where they fit the network."
    )
    inputs: str | None = Field(None, description="Array or column with the inputs. null: found by name and shape.")
    labels: str | None = Field(None, description="Array or column with the labels. null: found by name and type.")

    @field_validator("mean", "std")
    @classmethod
    def _not_empty(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if value == ():
            raise ValueError("give one number, or one per channel")
        return value

    @staticmethod
    def read(folder: Path) -> Preprocess | None:
        """What `preprocessor_config.json` in `folder` says; None without one.

        transformers fills in what the file leaves out, and the result is tried against its image processor on one
        image. `UnsupportedError` when the processor does something that these options cannot say.
        """
        if not (folder / FILE_NAME).is_file():
            return None
        processor = _image_processor(folder)
        remedy = "write what the network expects under preprocess: in a recipe"
        name = type(processor).__name__.removesuffix("Pil")
        refusal = UnsupportedError(f"{name} in {folder} does more than resize, crop, rescale and normalise", remedy)
        image = np.random.default_rng(0).integers(0, 256, (300, 421, 3), dtype=np.uint8)
        try:
            if processor.image_mean is not None and np.size(processor.image_mean) == 1:
                image = image[..., 0]
            expected = processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"]
            found = _translated(processor)
            same = np.allclose(found.apply(image[None], expected.shape[1:]).numpy(), expected, rtol=0, atol=1e-3)
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise refusal from error
        if not same:
            raise refusal
        return found

    def apply(self, images: Pixels | Sequence[Pixels], shape: tuple[int, ...]) -> Tensor:
        """Inputs float32 (n, *shape) of one array (n, ...), or of n images that may differ in size."""
        if isinstance(images, np.ndarray):
            return self.normalize(self.arrange(images, shape))
        arranged = [self.arrange(image[None], shape) for image in images]
        return self.normalize(np.concatenate(arranged) if arranged else np.zeros((0, *shape), np.uint8))

    def arrange(self, values: Pixels, shape: tuple[int, ...], name: str = "the data") -> Pixels:
        """Values (n, ...) of any layout as (n, *shape): coloured, resized and cropped, not yet scaled.

        `DataError`, which calls the values `name`, when they do not come out as `shape`.
        """
        layout = self.find_layout(values.shape[1:], shape, name)
        if layout == "as_is":
            return values
        images = values[..., None] if layout == "plane" else values
        if layout == "channels_first":
            images = np.moveaxis(values, 1, -1)
        images = self._colour(images)
        if self.resize is not None:
            height, width = self._resized(*images.shape[1:3])
            if height * width > MOST_PIXELS:
                raise DataError(f"{name} would be resized to {height:,} × {width:,} pixels", "lower preprocess.resize")
            resized = np.empty((len(images), height, width, images.shape[-1]), _resampled_type(images.dtype))
            for source, target in zip(images, resized, strict=True):
                _resample(source, target, _RESAMPLING[self.resample])
            images = resized
        if self.crop is not None:
            images = _crop(_crop(images, 1, self.crop[0]), 2, self.crop[1])
        return np.moveaxis(images, -1, 1)

    def normalize(self, values: Pixels) -> Tensor:
        """(values · scale - mean) / std of values (n, channels, ...), float32."""
        result = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        trailing = (1,) * (result.dim() - 2)
        mean, std = (torch.tensor(each, dtype=torch.float32) for each in (self.mean, self.std))
        return result.mul_(self.scale).sub_(mean.view(-1, *trailing)).div_(std.view(-1, *trailing))

    def find_layout(self, found: tuple[int, ...], shape: tuple[int, ...], name: str = "the data") -> Layout:
        """How one input of shape `found` becomes one of `shape`; `DataError` when in no way, or in more than one."""
        image = self.resize is not None or self.crop is not None or self.mode != "auto"
        layouts: list[Layout] = []
        if len(shape) == 3:
            layouts = self._fitting(found, shape)
        elif image:
            raise DataError(
                f"the network's input {shape} is no image, so preprocess.resize, crop and mode cannot serve",
                "leave them out",
            )
        elif found == shape:
            layouts = ["as_is"]
        elif (1, *found) == shape:
            layouts = ["plane"]
        # Of a single value first and last are the same.
        if len(layouts) == 1 or (layouts and max(found) == 1):
            return layouts[0]
        if layouts:
            raise DataError(
                f"{name} of shape {found} may have its channels first or last for the network's input {shape}",
                "say which: layout: channels_first or channels_last under preprocess:",
            )
        raise DataError(f"{name} has shape {found}, the network's input is {shape}", self._remedy(found, shape))

    def fits(self, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether inputs of shape `found` become inputs of `shape`, in whichever layout."""
        if len(shape) == 3:
            return bool(self._fitting(found, shape))
        return shape in (found, (1, *found))

    def check_channels(self, shape: tuple[int, ...]) -> None:
        """Raise `DataError` unless mean and std have one number, or one per channel of `shape` (channels, ...)."""
        for key, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) not in (1, shape[0]):
                raise DataError(
                    f"preprocess.{key} has {len(value)} numbers, the network's input {shape} has {shape[0]} channels",
                    "give one number, or one per channel",
                )

    def check_range(self, largest: float, floats: bool, name: str) -> None:
        """Raise `DataError` when values of magnitude up to `largest` cannot be what scale, mean and std are meant for.

        floats: whether the values are stored as floating point numbers.
        """
        if floats and 0 < largest <= 1 and self.scale < _SCALES_BYTES:
            raise DataError(
                f"{name} reaches only {largest:.4g}, as if scaled already, but preprocess.scale is {self.scale:.4g}",
                "set scale: 1 under preprocess:",
            )
        mean, std = np.abs(self.mean), np.asarray(self.std)
        unit = max(mean.max(), std.max()) <= 1 and (mean.max() > 0 or std.min() < 1)
        if unit and largest * self.scale > _BEYOND_UNIT:
            raise DataError(
                f"{name} reaches {largest * self.scale:.4g} after preprocess.scale {self.scale:.4g}, "
                "but mean and std are those of values from 0 to 1",
                f"set scale: {1 / largest:.6g} under preprocess:",
            )

    def _fitting(self, found: tuple[int, ...], shape: tuple[int, ...]) -> list[Layout]:
        """The layouts in which images of shape `found` come out as `shape` (channels, height, width)."""
        if len(found) == 2:
            choices: dict[Layout, tuple[int, int, int]] = {"plane": (1, *found)}
        elif len(found) == 3:
            first, middle, last = found
            choices = {"channels_first": (first, middle, last), "channels_last": (last, first, middle)}
            choices = {layout: sizes for layout, sizes in choices.items() if self.layout in ("auto", layout)}
        else:
            return []
        return [layout for layout, sizes in choices.items() if min(sizes) > 0 and self._becomes(*sizes) == shape]

    def _becomes(self, channels: int, height: int, width: int) -> tuple[int, int, int] | None:
        """(channels, height, width) after colour, resize and crop; None when the colours cannot be converted."""
        if self.mode != "auto":
            if channels not in (1, 3):
                return None
            channels = 1 if self.mode == "gray" else 3
        if self.resize is not None:
            height, width = self._resized(height, width)
        return (channels, *(self.crop or (height, width)))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize
        edge = self.resize or min(height, width)
        return (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))

    def _colour(self, images: Pixels) -> Pixels:
        """images (n, height, width, channels) in the colours of `mode`."""
        channels = images.shape[-1]
        if self.mode == "gray" and channels == 3:
            gray: Pixels = images @ _LUMA
            return (gray.round() if images.dtype.kind in "iu" else gray).astype(images.dtype)[..., None]
        if self.mode in ("rgb", "bgr") and channels == 1:
            return np.repeat(images, 3, axis=-1)
        return images[..., ::-1] if self.mode == "bgr" else images

    def _remedy(self, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
        if len(shape) != 3 or len(found) not in (2, 3):
            return "check that data and network belong together"
        other = self.model_copy(update={"mode": "rgb", "layout": "auto"})
        if self.mode == "auto" and shape[0] in (1, 3) and other._fitting(found, (3, *shape[1:])):
            return f"convert the colours: mode: {'gray' if shape[0] == 1 else 'rgb'} under preprocess:"
        return f"resize or crop to {shape[1]} × {shape[2]} under preprocess:, as the network was trained"


def _crop(images: Pixels, axis: int, length: int) -> Pixels:
    """The middle `length` of images along `axis`, with zeros around where there is less."""
    lack = length - images.shape[axis]
    if lack > 0:
        around = [(0, 0)] * images.ndim
        around[axis] = (lack - lack // 2, lack // 2)
        return np.pad(images, around)
    begin = -lack // 2
    return images[(slice(None),) * axis + (slice(begin, begin + length),)]


def _resampled_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.uint8) if dtype == np.uint8 else np.dtype(np.float32)


def _resample(source: Pixels, target: Pixels, resampling: Image.Resampling) -> None:
    """Resize source (height, width, channels) into target, channel by channel: Pillow knows no float colours."""
    size = target.shape[1], target.shape[0]
    for channel in range(source.shape[-1]):
        plane = np.ascontiguousarray(source[..., channel], dtype=target.dtype)
        target[..., channel] = np.asarray(Image.fromarray(plane).resize(size, resampling))


def _image_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    from effcli.platform.huggingface import quiet_transformers

    quiet_transformers()
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:
        # Whatever transformers says about the file; its first line names the key or the class.
        raise CheckpointError(
            f"{folder / FILE_NAME} cannot be read: {first_line(error)}",
            "copy the file from the original model, or write a preprocess: in a recipe and remove it",
        ) from error


def _translated(processor: Any) -> Preprocess:
    """The options of a transformers image processor in ours; `ValueError` for what ours cannot say."""
    resize, crop = None, None
    if processor.do_center_crop:
        crop = processor.crop_size.height, processor.crop_size.width
    if processor.do_resize:
        size = processor.size
        resize = size.shortest_edge or (size.height, size.width)
        percentage = getattr(processor, "crop_pct", None)
        if percentage is not None and isinstance(resize, int):
            if crop is None and resize >= _CONVNEXT_WARPS:
                resize = resize, resize
            else:
                crop = crop or (resize, resize)
                resize = int(resize / percentage)
    mean, std = np.zeros(1), np.ones(1)
    if processor.do_normalize:
        mean, std = np.atleast_1d(processor.image_mean), np.atleast_1d(processor.image_std)
    if getattr(processor, "rescale_offset", False):
        mean = mean + 1
    if getattr(processor, "include_top", False):
        # EfficientNet's networks were trained on inputs divided by the deviation once more.
        std = std * np.atleast_1d(processor.image_std)
    codes = {int(code): name for name, code in _RESAMPLING.items()}
    return Preprocess.model_validate(
        {
            "mode": "bgr" if getattr(processor, "do_flip_channel_order", False) else "auto",
            "resize": resize,
            "resample": codes[int(processor.resample)] if resize else "bilinear",
            "crop": crop,
            "scale": processor.rescale_factor if processor.do_rescale else 1.0,
            "mean": _numbers(mean),
            "std": _numbers(std),
        }
    )


def _numbers(values: NDArray[Any]) -> float | tuple[float, ...]:
    """One number where all are equal, else one per channel."""
    found = tuple(float(value) for value in values)
    return found[0] if len(set(found)) == 1 else found
