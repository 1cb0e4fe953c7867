"""Preprocessing: CLIPImageProcessor's, with Pillow alone, bit for bit (SPEC section 2)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qlip_core.errors import ConfigError
from qlip_core.images import ImageLike, open_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A resized image over this many pixels is never made in full; only the crop is computed.
_MAX_RESIZED = 2**25


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into the model's pixels, and back. `size` is S."""

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def of_folder(cls, folder: Path, size: int) -> Preprocessing:
        """From the `preprocessor_config.json` in a model's folder (`from_file`); CLIP's if it has none."""
        path = folder / "preprocessor_config.json"
        return cls.from_file(path, size) if path.is_file() else cls(size)

    @classmethod
    def from_file(cls, path: Path, size: int) -> Preprocessing:
        """From a `preprocessor_config.json`, for a model of side `size`.

        Raises ConfigError if the file asks for anything but CLIP's preprocessing at that size.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
        expected = {
            "size": size,
            "crop_size": size,
            "resample": 3,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
        }
        for key, want in expected.items():
            got = _side(key, values[key]) if key in values else want
            if got != want:
                raise ConfigError(f"{path}: {key} is {values[key]!r}, this model needs {want!r}")
        factor = values.get("rescale_factor", 1 / 255)
        if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
            raise ConfigError(f"{path}: rescale_factor is {factor!r}, expected 1/255")
        return cls(
            size,
            _triple(values, "image_mean", CLIP_MEAN, path),
            _triple(values, "image_std", CLIP_STD, path),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`."""
        return {
            "crop_size": {"height": self.size, "width": self.size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(self.std),
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": self.size},
        }

    def __call__(self, image: ImageLike, name: str | None = None) -> np.ndarray:
        """One image -> float32 [3, S, S], normalised. Raises ImageError."""
        return self.normalize(np.asarray(resize_and_crop(open_image(image, name), self.size)))

    def normalize(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> float32 [3, H, W]: rounded where CLIPImageProcessor rounds."""
        scaled = (image.astype(np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    def to_images(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [B, 3, S, S] normalised -> uint8 [B, S, S, 3], clipped and rounded."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        images = pixels.transpose(0, 2, 3, 1) * std + mean
        return np.rint(images.clip(0, 1) * 255).astype(np.uint8)


def resized_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shortest edge resized to `size` and the other one rounded down."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size` (bicubic), then the centre `size` x `size`."""
    width, height = resized_size(*image.size, size)
    left, top = (width - size) // 2, (height - size) // 2
    bicubic = Image.Resampling.BICUBIC
    if width * height > _MAX_RESIZED:
        # A sliver (1 x 20,000 at S = 256 would be five million rows): apply the same filter at the same
        # places only to the crop, columns first as Pillow does for the whole image.
        x, y = image.width / width, image.height / height
        columns, rows = (left * x, (left + size) * x), (top * y, (top + size) * y)
        box = (columns[0], 0, columns[1], image.height)
        image = image.resize((size, image.height), bicubic, box=box)
        return image.resize((size, size), bicubic, box=(0, rows[0], size, rows[1]))
    if (width, height) != image.size:
        image = image.resize((width, height), bicubic)
    return image.crop((left, top, left + size, top + size))


def _side(key: str, value: Any) -> Any:
    """The single number in 224, {"height": 224, "width": 224}, or, for `size`, {"shortest_edge": 224}."""
    shapes = [{"height", "width"}, *([{"shortest_edge"}] if key == "size" else [])]
    if isinstance(value, dict) and set(value) in shapes:
        sides = list(value.values())
        return sides[0] if all(side == sides[0] for side in sides) else value
    return value


def _triple(
    values: dict[str, Any], key: str, default: tuple[float, ...], path: Path
) -> tuple[float, ...]:
    value = values.get(key, list(default))
    good = (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) and abs(v) < 1e6 for v in value)
    )
    positive = key == "image_std"
    if not good or (positive and not all(v > 0 for v in value)):
        above = " above 0" if positive else ""
        raise ConfigError(f"{path}: {key} must be three numbers{above}, got {value!r}")
    return tuple(float(v) for v in value)
