"""Attention, SiLU and the layout of weights: MLX's own, and others for the one device where those are slow.

MLX's Linux CPU build computes exponentials one at a time (about 16 ns each, where a product takes 0.3 ns), so
that softmax and SiLU would cost as much as all matrix products together. There a polynomial made of
products, sums and shifts is three times as fast for many values; for few, its twenty operations of 10 us
each cost more. And its plain BLAS takes 2.4 times as long for a matrix stored as [out, in] by rows. GPUs
and the CPU of a Mac are fastest with MLX's own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

# Where attention is allowed: bool, broadcast to [B, H, Q, S]; "causal"; or None, everywhere.
Mask = mx.array | str | None
Attend = Callable[[mx.array, mx.array, mx.array, Mask], mx.array]
Unary = Callable[[mx.array], mx.array]

# 2^f for |f| <= 1/2 within 1e-7 of its value (minimax, fitted by reweighted least squares).
_POWER_OF_TWO = (1.3264727e-3, 9.6715129e-3, 5.5507337e-2, 0.24022242, 0.69314698, 1.0)
_LOWEST = -126.0  # exponent of the smallest normal float32
_TO_INTEGER = 1.5 * 2**23  # a float32 plus this is rounded, and its lowest bits are that integer
_FEW = 20_000  # up to so many exponentials MLX's own are faster (Zen 4)


def exp2(t: mx.array) -> mx.array:
    """2^t for float32 t below 127; at least 2^-126."""
    t = mx.maximum(t, _LOWEST)
    shifted = t + _TO_INTEGER
    f = t - (shifted - _TO_INTEGER)
    power = f * _POWER_OF_TWO[0] + _POWER_OF_TWO[1]
    for coefficient in _POWER_OF_TWO[2:]:
        power = power * f + coefficient
    # Multiplying by 2^k is adding k to the exponent, which starts at bit 23.
    exponent = shifted.view(mx.int32) << 23
    return (power.view(mx.int32) + exponent).view(mx.float32)


def attend_fused(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """softmax(q k^T / sqrt(d)) v: q [B, H, Q, d], k and v [B, K, S, d], H a multiple of K -> [B, H, Q, d]."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def attend_polynomial(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """`attend_fused` with `exp2`, in float32: same shapes."""
    (B, H, Q, d), (_, K, S, _) = q.shape, k.shape
    grouped = (q * (d**-0.5 * math.log2(math.e))).reshape(
        B, K, H // K * Q, d
    )  # heads of a group as rows
    keys = k.swapaxes(-1, -2)
    if Q > 1:
        keys = mx.contiguous(keys)  # by columns, like weights
    scores = (grouped @ keys).astype(mx.float32).reshape(B, H, Q, S)
    if isinstance(mask, mx.array):
        scores = mx.where(mask, scores, -mx.inf)
    elif mask == "causal":
        scores = scores + mx.triu(mx.full((Q, S), -mx.inf), 1)
    weights = exp2(scores - scores.max(-1, keepdims=True))
    # Dividing after the product takes d divisions per row instead of S.
    y = weights.astype(v.dtype).reshape(B, K, H // K * Q, S) @ v
    return y.reshape(B, H, Q, d) / weights.sum(-1, keepdims=True).astype(v.dtype)


def attend_by_count(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """`attend_fused` or `attend_polynomial`, whichever is faster for so many scores."""
    B, H, Q, _ = q.shape
    few = B * H * Q * k.shape[2] <= _FEW
    return (attend_fused if few else attend_polynomial)(q, k, v, mask)


def silu_fused(x: mx.array) -> mx.array:
    # Not nn.silu, which is compiled separately; on Linux that runs a C++ compiler.
    return x * mx.sigmoid(x)


def silu_polynomial(x: mx.array) -> mx.array:
    """x / (1 + exp(-x)) with `exp2`."""
    t = mx.minimum(x.astype(mx.float32) * -math.log2(math.e), 126.0)
    return (x / (1 + exp2(t))).astype(x.dtype)


def silu_by_count(x: mx.array) -> mx.array:
    return silu_fused(x) if x.size <= _FEW else silu_polynomial(x)


def by_columns(weight: mx.array) -> mx.array:
    """The same matrix [out, in], stored in memory as its transpose."""
    return mx.contiguous(weight.T).T


def as_published(weight: mx.array) -> mx.array:
    return weight


def by_shorter_side(weight: mx.array) -> mx.array:
    outputs, inputs = weight.shape
    return by_columns(weight) if inputs > outputs else weight


def layout_for_vectors() -> Unary:
    """The layout whose products with one vector are faster: by the shorter side with OpenBLAS's AVX-512 kernels (1.2
    times over a model of 111 M), else by columns (1.1 times with its AVX2 kernels, 2 with the wheel's own BLAS)."""
    core = getattr(ctypes.CDLL(None), "openblas_get_corename", None)
    if core is None:  # no OpenBLAS is preloaded
        return by_columns
    core.restype = ctypes.c_char_p
    wide = core() in (b"SkylakeX", b"Cooperlake", b"SapphireRapids")
    return by_shorter_side if wide else by_columns


@dataclass(frozen=True)
class Kernels:
    """How a model computes attention and SiLU, and how the weights of its linear layers are stored."""

    attend: Attend
    silu: Unary
    lay_out: Unary


FUSED = Kernels(attend_fused, silu_fused, as_published)
PLAIN_CPU = Kernels(attend_by_count, silu_by_count, by_columns)
