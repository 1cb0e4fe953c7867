"""Shuffled order and random choices as arithmetic: each is computed from a number alone, without stored state."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def permute(position: int, count: int, key: int) -> int:
    """The image of `position` under a pseudo-random permutation of range(count) chosen by `key`.

    A Feistel network over the next even power of two, applied until the result is below `count`: O(1) memory
    for a set of any size, where a shuffled list of numbers would take 8 bytes per sample.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ (turn << 56), key) & mask)
        position = left << half | right
        if position < count:
            return position


def permuted(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """`permute` of many positions at once: int64 [n] in range(count) -> int64 [n]."""
    out = positions.astype(np.uint64)
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    outside = np.arange(len(out))
    while len(outside):
        left, right = out[outside] >> shift, out[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(right ^ np.uint64(turn << 56), key) & mask)
        out[outside] = left << shift | right
        outside = outside[out[outside] >= count]
    return out.astype(np.int64)


def chances(numbers: np.ndarray, key: int, probability: float) -> np.ndarray:
    """bool [n]: which of the numbers, int64 [n], are chosen, each with `probability` and independently."""
    return (mixed(numbers.astype(np.uint64), key) >> np.uint64(11)) * 2.0**-53 < probability


def mixed(values: np.ndarray, key: int) -> np.ndarray:
    """uint64 [n] -> 64 well-mixed bits of each value and `key` (below 2^64)."""
    first, second = (np.uint64(factor) for factor in _FACTORS)
    values = values + np.uint64((key + _STEP) & _MASK)
    values = (values ^ values >> np.uint64(30)) * first
    values = (values ^ values >> np.uint64(27)) * second
    return values ^ values >> np.uint64(31)


def _mix(value: int, key: int) -> int:
    """SplitMix64's finisher: 64 well-mixed bits of (value, key)."""
    value = (value + key + _STEP) & _MASK
    value = ((value ^ value >> 30) * _FACTORS[0]) & _MASK
    value = ((value ^ value >> 27) * _FACTORS[1]) & _MASK
    return value ^ value >> 31
