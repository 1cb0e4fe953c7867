"""How close a reconstruction is: PSNR and SSIM, as the tokenizer literature measures them."""

from __future__ import annotations

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 images [B, H, W, 3], one each: float64 [B].

    10 log10(255^2 / mean squared error); infinite for equal images.
    """
    _check(a, b)
    error = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of uint8 images [B, H, W, 3], one each: float64 [B], 1 for equal images.

    Wang et al. 2004: Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, no padding,
    mean over places and the three channels. Images below 11 pixels use a window of their size.
    """
    _check(a, b)
    window = min(11, a.shape[1], a.shape[2])
    offsets = np.arange(window) - (window - 1) / 2
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(image: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            view = np.lib.stride_tricks.sliding_window_view(image, window, axis=axis)
            image = view @ kernel
        return image

    out = np.empty(len(a))
    for i in range(len(a)):  # one at a time: five blurred copies of a large batch would not fit
        x, y = a[i : i + 1].astype(np.float64), b[i : i + 1].astype(np.float64)
        mean_x, mean_y = blur(x), blur(y)
        var_x = blur(x * x) - mean_x**2
        var_y = blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        out[i] = (score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()
    return out


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype != np.uint8 or a.ndim != 4 or a.shape != b.shape or b.dtype != np.uint8:
        raise ValueError(
            f"expected two uint8 [B, H, W, 3] of one shape, got {a.dtype} {list(a.shape)} "
            f"and {b.dtype} {list(b.shape)}"
        )
