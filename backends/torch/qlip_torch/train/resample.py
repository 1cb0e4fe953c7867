"""Resizes patch kernels and position tables to another patch size or grid, in float64 numpy.

Both use one matrix: `bicubic(old, new)` [new, old] is what Pillow's bicubic filter (Keys, a = -1/2, widened
when shrinking) does to a row of `old` samples, so it matches the resizing in preprocessing.
"""

from __future__ import annotations

import math

import numpy as np


def bicubic(old: int, new: int) -> np.ndarray:
    """[new, old]: row i has the weights of the old samples in new sample i; rows sum to 1."""
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(old)) / stretch
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def resample_patch(kernel: np.ndarray, size: int) -> np.ndarray:
    """A patch embedding's kernel [D, C, p, p] to [D, C, size, size], float32.

    FlexiViT's pseudo-inverse resize (arXiv 2212.08013, section 3.4): with B the resizing of a patch
    from p to `size`, it minimises |<x, w> - <Bx, w'>| over white-noise patches x, w' = (B^T)^+ w. Where
    the patch grows, a resized image then gives exactly the tokens of the original one. Interpolating
    the kernel itself would scale every token by about (size/p)^2, because a patch is summed over.
    """
    old = kernel.shape[-1]
    if old == size:
        return kernel
    solve = np.linalg.pinv(bicubic(old, size).T)  # [size, p]; the two axes are independent
    out = np.einsum("ap,dcpq,bq->dcab", solve, kernel.astype(np.float64), solve, optimize=True)
    return out.astype(np.float32)


def resample_positions(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A position table [1 + n, D], CLS first and n a square, to [1 + h*w, D], float32.

    Bicubic over the grid; the row of CLS is kept. Raises ValueError if n is not a square.
    """
    cls, patches = table[:1], table[1:]
    side = math.isqrt(len(patches))
    if side * side != len(patches):
        raise ValueError(f"{len(patches)} positions are not a square grid")
    if grid == (side, side):
        return table
    rows, columns = bicubic(side, grid[0]), bicubic(side, grid[1])
    square = patches.reshape(side, side, -1).astype(np.float64)
    out = np.einsum("ar,rcd,bc->abd", rows, square, columns, optimize=True)
    return np.concatenate([cls, out.reshape(grid[0] * grid[1], -1).astype(np.float32)])
