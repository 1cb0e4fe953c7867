"""Binary spherical quantization in numpy: bits, indices, groups, packed bytes, soft entropies.

SPEC 1.3; BSQ (arXiv 2406.07548). L bits per patch, g bits per group. Conversions are exact: integers
are shifted, never summed as floats (28-bit indices do not fit a float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlip_core.config import MAX_LENGTH, QuantizerConfig

# -- bits <-> integers <-> bytes ---------------------------------------------------------------


def quantize(u: np.ndarray) -> np.ndarray:
    """Bits of unit vectors: uint8 0/1 of the same shape. A bit is 1 only if u > 0 (0 and NaN: 0)."""
    return (u > 0).astype(np.uint8)


def bits_to_codes(bits: np.ndarray) -> np.ndarray:
    """Corners of the sphere: float32 +-1/sqrt(L), [..., L]."""
    scale = np.float32(1 / np.sqrt(bits.shape[-1]))
    return np.where(bits != 0, scale, -scale)


def bits_to_integers(bits: np.ndarray, width: int) -> np.ndarray:
    """Runs of `width` bits as integers, most significant first: [..., L] -> int64 [..., L/width].

    Raises ValueError if `width` does not divide L or does not fit an int64.
    """
    length = bits.shape[-1]
    _check_width(length, width)
    weights = np.int64(1) << np.arange(width - 1, -1, -1, dtype=np.int64)
    runs = bits.reshape(*bits.shape[:-1], length // width, width).astype(np.int64)
    return (runs * weights).sum(-1)


def integers_to_bits(integers: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `bits_to_integers`: int64 [..., n] -> uint8 [..., n*width].

    Raises ValueError for values outside 0 to 2^width - 1.
    """
    integers = np.asarray(integers)
    if not np.issubdtype(integers.dtype, np.integer):
        raise ValueError(f"indices must be integers, got {integers.dtype}")
    if not 1 <= width <= MAX_LENGTH:
        raise ValueError(f"{width} bits: an index has 1 to {MAX_LENGTH}")
    if integers.size and (integers.min() < 0 or int(integers.max()) >> width):
        raise ValueError(
            f"values run from {integers.min()} to {integers.max()}, "
            f"outside 0 to 2^{width} - 1: not indices of {width} bits"
        )
    shifts = np.arange(width - 1, -1, -1, dtype=np.int64)
    bits = (integers.astype(np.int64)[..., None] >> shifts) & 1
    return bits.astype(np.uint8).reshape(*integers.shape[:-1], integers.shape[-1] * width)


def pack(bits: np.ndarray) -> np.ndarray:
    """Bits of images as bytes: [B, N, L] -> uint8 [B, ceil(N*L/8)].

    Patch by patch, most significant first, each image padded with zeros to a whole byte.
    """
    images, patches, length = bits.shape
    return np.packbits(bits.reshape(images, patches * length), axis=1)


def packed_bytes(patches: int, length: int) -> int:
    """Bytes of an image as `pack` writes it: ceil(N*L/8)."""
    return (patches * length + 7) // 8


def unpack(packed: np.ndarray, patches: int, length: int) -> np.ndarray:
    """Inverse of `pack`: uint8 [B, ceil(N*L/8)] -> uint8 0/1 [B, N, L]."""
    bits = np.unpackbits(packed, axis=1, count=patches * length)
    return bits.reshape(len(packed), patches, length)


def _check_width(length: int, width: int) -> None:
    if not 1 <= width <= MAX_LENGTH:
        raise ValueError(f"{width} bits: an index has 1 to {MAX_LENGTH}")
    if length % width:
        raise ValueError(f"a group of {width} bits does not divide the code of {length} bits")


# -- soft entropies ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entropies:
    """The terms of BSQ's loss, in nats (SPEC 1.3)."""

    per_sample: float
    """Mean over tokens of the soft assignment's entropy, summed over groups; minimised."""
    codebook: float
    """Entropy of the mean soft assignment, summed over groups; maximised."""
    commitment: float
    """mean(sum((u_hat - u)^2)), without its weight beta."""
    loss: float
    """(gamma_0 per_sample - gamma_1 codebook) / t + beta commitment."""


def soft_entropies(u: np.ndarray, config: QuantizerConfig) -> Entropies:
    """BSQ's quantization loss of unit vectors `u` [..., L], in float64, exactly and cheaply.

    The softmax over the 2^g corners factorises over the bits: bit i is 1 with probability
    sigmoid(4 t u_i / sqrt(L)). The per-sample entropy is then a sum of binary entropies, and the mean
    joint over the g bits of a group is one product of two half-groups' joints.
    """
    length, t = config.embed_dim, config.inv_temperature
    if u.shape[-1] != length:
        raise ValueError(f"u has {u.shape[-1]} values per token, the quantizer has {length} bits")
    u = u.reshape(-1, length).astype(np.float64)
    tokens = len(u)
    p = _sigmoid(4 * t * u / np.sqrt(length))  # [tokens, L]
    per_sample = float(_binary_entropy(p).sum(-1).mean())
    group = 1 if config.persample_entropy_compute == "analytical" else config.group_size
    codebook = 0.0
    for start in range(0, length, group):
        bits = p[:, start : start + group]
        half = group // 2
        mean = _joint(bits[:, :half]).T @ _joint(bits[:, half:]) / tokens
        codebook += float(_entropy(mean))
    corners = np.where(u > 0, 1.0, -1.0) / np.sqrt(length)
    commitment = float(((corners - u) ** 2).sum(-1).mean())
    penalty = config.gamma_0 * per_sample - config.gamma_1 * codebook
    return Entropies(per_sample, codebook, commitment, penalty / t + config.beta * commitment)


def _joint(p: np.ndarray) -> np.ndarray:
    """Joint of independent bits: [tokens, n] -> [tokens, 2^n], first bit most significant."""
    joint = np.ones((len(p), 1))
    for i in range(p.shape[1]):
        bit = np.stack([1 - p[:, i], p[:, i]], axis=-1)
        joint = (joint[:, :, None] * bit[:, None]).reshape(len(p), -1)
    return joint


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum()


def _binary_entropy(p: np.ndarray) -> np.ndarray:
    q = 1 - p
    return -(p * np.log(np.where(p > 0, p, 1)) + q * np.log(np.where(q > 0, q, 1)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
