"""The order of training data as arithmetic: which sample is at a position follows from its number alone, in
any process, without stored state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlip_core.data.draws import shuffled, stable_hash
from qlip_core.data.permutation import permute
from qlip_core.errors import DataError


def epoch_index(position: int, count: int, stream: str) -> int:
    """The index at `position` of an endless sequence in which every `count` positions visit each index once."""
    epoch, offset = divmod(position, count)
    return permute(offset, count, stable_hash(f"{stream} epoch {epoch}"))


class Mixture:
    """An endless interleaving of sources in proportion to their weights.

    In every block of `BLOCK` places each source has a fixed number of them, its weight's share rounded, in
    an order drawn for that block. Hence proportions are exact, and the place alone tells how often its source
    was used before.
    """

    BLOCK = 1000

    def __init__(self, weights: Sequence[float], stream: str):
        shares = np.asarray(weights, np.float64)
        shares = shares / shares.sum() * self.BLOCK
        counts = np.floor(shares).astype(np.int64)
        # Largest remainder, ties to the first.
        extra = np.argsort(counts - shares, kind="stable")[: self.BLOCK - int(counts.sum())]
        counts[extra] += 1
        if not counts.all():
            low = int(np.argmin(counts))
            raise DataError(
                f"weight {weights[low]} is under 1/{2 * self.BLOCK} of all weights: "
                "such a source would never be read; raise it or leave the source out"
            )
        self._counts, self._stream = counts, stream
        self._block, self._sources, self._ranks = -1, np.empty(0), np.empty(0)

    def locate(self, place: int) -> tuple[int, int]:
        """(source, number of its places before this one)."""
        if len(self._counts) == 1:
            return 0, place
        block, offset = divmod(place, self.BLOCK)
        if block != self._block:
            self._draw(block)
        source = int(self._sources[offset])
        return source, block * int(self._counts[source]) + int(self._ranks[offset])

    def _draw(self, block: int) -> None:
        order = shuffled(stable_hash(self._stream), block, self.BLOCK)
        self._sources = np.repeat(np.arange(len(self._counts)), self._counts)[order]
        self._ranks = np.zeros(self.BLOCK, np.int64)
        for source, count in enumerate(self._counts):
            self._ranks[self._sources == source] = np.arange(count)
        self._block = block
