"""Random draws that depend on a key alone: the same on every machine, in any order and process.

Philox is counter-based, and its raw 64-bit output is fixed by its definition; numpy promises nothing
of the kind for `Generator.integers` or `choice`, so the draws here are made from the raw output.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 32


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b of `text`: a hash that no process, platform or version changes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Draws:
    """An endless row of independent draws for one (stream, index).

    stream, index: both below 2^64. Two pairs give unrelated rows.
    """

    def __init__(self, stream: int, index: int):
        self._philox = np.random.Philox(key=np.array([stream, index], dtype=np.uint64))
        self._block: list[int] = []

    def bits(self) -> int:
        """64 random bits."""
        if not self._block:
            self._block = self._philox.random_raw(_BLOCK).tolist()
            self._block.reverse()
        return self._block.pop()

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return self.bits() * count >> 64

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[tuple[T, float]]) -> T:
        """One of the (value, weight) pairs' values; the weights need not sum to 1."""
        mark = self.uniform() * sum(weight for _, weight in options)
        for value, weight in options:
            mark -= weight
            if mark < 0:
                return value
        return options[-1][0]


def uniform_grid(seed: int, rows: int, columns: int) -> np.ndarray:
    """float32 [rows, columns] in [0, 1), a function of `seed` (below 2^64) alone."""
    raw = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(rows * columns)
    return ((raw >> np.uint64(40)) * np.float32(2.0**-24)).astype(np.float32).reshape(rows, columns)
