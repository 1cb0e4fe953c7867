"""Random draws that depend only on a key: the same on every machine, in any order and process.

Philox is counter-based, and its definition fixes its raw 64-bit output. numpy does not promise the same
for `Generator.integers` or `choice`, so the draws here are made from the raw output.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 32


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b of `text`: a hash that is the same in every process, platform and version."""
    # A name in a tar need not be Unicode; its bytes are then in `text` as lone surrogates.
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Draws:
    """An endless sequence of independent draws for one (stream, index).

    stream, index: both below 2^64. Different pairs give unrelated sequences.
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
        """A value from (value, weight) pairs; the weights need not sum to 1."""
        mark = self.uniform() * sum(weight for _, weight in options)
        for value, weight in options:
            mark -= weight
            if mark < 0:
                return value
        return options[-1][0]


def shuffled(stream: int, index: int, count: int) -> np.ndarray:
    """range(count) in a random order, int64 [count], for one (stream, index), both below 2^64."""
    key = np.array([stream, index], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def uniform_grid(seed: int, rows: int, columns: int) -> np.ndarray:
    """float32 [rows, columns] in [0, 1), a function only of `seed` (below 2^64)."""
    raw = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(rows * columns)
    return ((raw >> np.uint64(40)) * np.float32(2.0**-24)).astype(np.float32).reshape(rows, columns)
