"""The learned metrics that `qlip_core.evaluation` takes as callables: LPIPS and Inception's features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from qlip_core.files import sha256_of
from qlip_torch.inception import SIDE, Inception, build_inception
from qlip_torch.perceptual import Lpips, build_perceptual, perceptual_files

# Inception at 299 px needs tens of MB per image.
_IMAGES_AT_ONCE = 32


@contextmanager
def exact_inference() -> Iterator[None]:
    """Inference with convolutions in float32, as on a CPU; by default cuDNN rounds their inputs to TensorFloat-32."""
    before = torch.backends.cudnn.allow_tf32
    # Not `cudnn.flags`, which also resets whether algorithms are deterministic or benchmarked.
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class LpipsMetric:
    """LPIPS-VGG16 of uint8 pictures, float32; a `qlip_core.evaluation.reconstruction.PairMetric`."""

    def __init__(self, model: Lpips, weights: str, device: str) -> None:
        self._model = model.to(device).eval()
        self._device = device
        self.protocol = f"LPIPS-VGG16 at the picture's own size, [-1, 1], weights {weights}"

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = []
        with exact_inference():
            for start in range(0, len(a), _IMAGES_AT_ONCE):
                rows = slice(start, start + _IMAGES_AT_ONCE)
                x, y = (_tensor(images[rows], self._device) / 127.5 - 1 for images in (a, b))
                out.append(self._model.distances(x, y).cpu().numpy())
        return np.concatenate(out)


class InceptionFeatures:
    """Inception's 2048 features of uint8 pictures; a `qlip_core.evaluation.reconstruction.Features`."""

    def __init__(self, model: Inception, weights: str, device: str) -> None:
        self._model = model.to(device)
        self._device = device
        self.protocol = (
            "Inception-V3 of 2015-12-05, pool3 (2048), resized to "
            f"{SIDE}x{SIDE} bilinearly without antialiasing, weights {weights}"
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        out = []
        with exact_inference():
            for start in range(0, len(images), _IMAGES_AT_ONCE):
                x = _tensor(images[start : start + _IMAGES_AT_ONCE], self._device)
                out.append(self._model(x).cpu().numpy())
        return np.concatenate(out)


def lpips_metric(source: str, device: str = "cpu") -> LpipsMetric:
    """LPIPS with the weights that `build_perceptual` takes. Raises CheckpointError."""
    model = build_perceptual(source)
    if source == "random":
        return LpipsMetric(model, f"{model.name}, NOT LPIPS", device)
    return LpipsMetric(model, sha256_of(perceptual_files(source)), device)


def inception_features(source: str, device: str = "cpu") -> InceptionFeatures:
    """Inception with the weights that `build_inception` takes. Raises CheckpointError."""
    model, weights = build_inception(source)
    return InceptionFeatures(model, weights, device)


def _tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device).float()
