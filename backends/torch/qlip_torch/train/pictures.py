"""From a raw picture and its caption to a row of a training batch: CLIP's augmentation, token ids, and, on the
device, normalisation.

Legend: b rows, S image side, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qlip_core.data.draws import Draws, stable_hash
from qlip_core.images import ImageLike, open_image
from qlip_core.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, resize_and_crop

Tokenize = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Batch:
    """pixels: uint8 [b, 3, S, S], for `Normalizer`; ids: int64 [b, T] of the b captions; keys: b names,
    for messages and logs."""

    pixels: Tensor
    ids: Tensor
    keys: list[str]
    captions: list[str] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies while the host continues."""
        return replace(self, pixels=self.pixels.pin_memory(), ids=self.ids.pin_memory())


class Normalizer(nn.Module):
    """uint8 pixels [b, 3, S, S] -> float32 on `device`, bit for bit what `Preprocessing.normalize` computes.

    On the device, so that data workers send a quarter of the bytes; by a table of the 256 levels, so that
    it needs no float64 there. Floating-point pixels count as already normalised.
    """

    table: Tensor
    first: Tensor

    def __init__(
        self,
        device: torch.device,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        table = Preprocessing(1, tuple(mean), tuple(std)).normalize(levels).reshape(-1)
        self.register_buffer("table", torch.from_numpy(table).to(device), persistent=False)
        first = torch.tensor([0, 256, 512], dtype=torch.int32, device=device).view(3, 1, 1)
        self.register_buffer("first", first, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.table.device, non_blocking=True)
        if pixels.is_floating_point():
            return pixels
        places = pixels.int() + self.first
        return self.table.index_select(0, places.flatten()).view(pixels.shape)


@dataclass(frozen=True)
class Augmentation:
    """CLIP's random resized crop: share of the area kept, width over height, and probability of a flip.

    scale (1, 1) does not crop at random: the shortest edge is resized and the centre cut out, as at inference.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image: Image.Image, size: int, draws: Draws) -> Image.Image:
        """RGB of any size -> RGB [size, size]."""
        if self.scale == (1.0, 1.0):
            image = resize_and_crop(image, size)
        else:
            box = self.crop_box(image.width, image.height, draws)
            # Cropped first, because `resize(box=...)` would let the filter use pixels outside the crop.
            image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        if self.flip and draws.chance(self.flip):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def crop_box(self, width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), by torchvision's rule: ten tries, then the centre."""
        for _ in range(10):
            area = width * height * draws.uniform(*self.scale)
            ratio = math.exp(draws.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = draws.below(width - w + 1), draws.below(height - h + 1)
                return left, top, left + w, top + h
        w, h = width, height
        if width < height * self.ratio[0]:
            h = min(height, max(1, round(width / self.ratio[0])))
        elif width > height * self.ratio[1]:
            w = min(width, max(1, round(height * self.ratio[1])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


class Preparer:
    """Decodes, augments and collates. A sample's augmentation depends only on (seed, ordinal)."""

    def __init__(
        self,
        *,
        size: int,
        tokenizer: Tokenize,
        augmentation: Augmentation,
        seed: int,
    ):
        self.size, self._tokenizer, self._augmentation = size, tokenizer, augmentation
        self._stream = stable_hash(f"augmentation {seed}")

    def picture(self, image: ImageLike, name: str, ordinal: int) -> np.ndarray:
        """Augmented uint8 [S, S, 3] for the run's sample number `ordinal`. Raises ImageError."""
        opened = open_image(image, name)
        return np.asarray(
            self._augmentation(opened, self.size, Draws(self._stream, ordinal)), np.uint8
        )

    def batch(self, rows: Sequence[tuple[str, np.ndarray, str]]) -> Batch:
        """From (key, picture [S, S, 3], caption) each."""
        pixels = np.empty((len(rows), 3, self.size, self.size), np.uint8)
        for out, (_, picture, _) in zip(pixels, rows):
            out[:] = picture.transpose(2, 0, 1)
        ids = self._tokenizer([caption for _, _, caption in rows])
        return Batch(
            torch.from_numpy(pixels),
            torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)),
            [key for key, _, _ in rows],
            [caption for _, _, caption in rows],
        )
