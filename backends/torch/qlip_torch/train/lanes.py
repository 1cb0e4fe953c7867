"""A lane's endless walk through its share of a source's shards, shuffled in a buffer of bounded memory.

The buffer is filled and emptied in chunks: consecutive samples are read until it is full, then handed out
in an order drawn for that chunk, while the next chunk is read into the room they leave. Where the walk
stands is thus four numbers (where the chunk began, and how many of it are out), and going back there reads
one chunk again without decoding a picture. A reservoir would shuffle a little better, but what it holds
can be restored only by storing it or by reading everything since the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from qlip_core.data.draws import stable_hash
from qlip_core.data.samples import Bad, Sample
from qlip_core.errors import DataError
from qlip_torch.train.order import permute

# A lane may find nothing in its share of a tiny set; its share of the next pass is another one.
_MAX_EMPTY_PASSES = 100

Cursor = tuple[int, int, int]


@runtime_checkable
class StreamSource(Protocol):
    """Samples in shards that are read from their beginning."""

    @property
    def location(self) -> str: ...

    @property
    def shards(self) -> tuple[str, ...]: ...

    def read_shard(
        self, shard: int, *, skip: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[int, Sample | Bad]]:
        """(number in the shard, sample) from number `skip` on, of those with number % parts == part."""
        ...


class ShuffledStream:
    """Lane `lane` of `lanes` of a source.

    In every pass over the source each of its samples comes once, in one lane: the shards are dealt out in
    an order drawn for that pass. With fewer shards than lanes a shard is shared, sample by sample, by
    several lanes that each read through it. At most `buffer` samples are held, and not more than
    `buffer_bytes` beside the one that crosses the limit.
    """

    def __init__(
        self,
        source: StreamSource,
        *,
        stream: str,
        lane: int,
        lanes: int,
        buffer: int,
        buffer_bytes: int,
        state: dict[str, int] | None = None,
    ):
        self.location = source.location
        self._source, self._stream, self._lane, self._lanes = source, stream, lane, lanes
        self._buffer, self._buffer_bytes = buffer, buffer_bytes
        self._parts = -(-lanes // len(source.shards))
        state = state or {"pass": 0, "shard": 0, "sample": 0, "chunk": 0, "popped": 0}
        # Where the chunk that is handed out began, the one that is read, and where the walk is.
        self._begin = self._begin_next = self._cursor = (
            state["pass"],
            state["shard"],
            state["sample"],
        )
        self._chunk, self._turned, self._popped = state["chunk"], False, 0
        self._out: deque[tuple[Sample | Bad, int]] = deque()
        self._next: list[tuple[Sample | Bad, int]] = []
        self._out_bytes, self._next_bytes, self._closed = 0, 0, False
        self._walk = self._walk_from(self._cursor)
        for _ in range(state["popped"]):
            self.pop()

    def state(self) -> dict[str, int]:
        """Where this stands, in JSON types."""
        at_pass, shard, sample = self._begin
        return {
            "pass": at_pass,
            "shard": shard,
            "sample": sample,
            "chunk": self._chunk,
            "popped": self._popped,
        }

    def pop(self) -> Sample | Bad:
        """The next sample. Raises DataError if the source cannot be read, or holds nothing."""
        passes = 0
        while not self._out:
            while not self._closed:
                self._read_one()
            passes += not self._next
            if passes > _MAX_EMPTY_PASSES:
                raise DataError(
                    f"{self.location}: lane {self._lane} of {self._lanes} finds no sample; "
                    "give more data, or fewer streams"
                )
            self._turn()
        item, size = self._out.popleft()
        self._out_bytes -= size
        self._popped += 1
        if not self._closed and self._out_bytes + self._next_bytes < self._buffer_bytes:
            self._read_one()
        return item

    def _turn(self) -> None:
        """The chunk that was read becomes the one that is handed out."""
        self._chunk, self._turned, self._popped = self._chunk + self._turned, True, 0
        key = np.array([stable_hash(f"{self._stream} lane {self._lane}"), self._chunk], np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(self._next)), kind="stable")
        self._out = deque(self._next[i] for i in order)
        self._out_bytes, self._next, self._next_bytes = self._next_bytes, [], 0
        self._begin, self._begin_next, self._closed = self._begin_next, self._cursor, False

    def _read_one(self) -> None:
        self._cursor, item = next(self._walk)
        if item is None:
            # A chunk never spans two passes, or a small set would meet itself in the buffer.
            self._closed = True
        else:
            if isinstance(item, Sample):
                size = len(item.image_bytes) + len(item.caption)
                item = replace(item, meta={})  # not for training
            else:
                size = 0
            self._next.append((item, size))
            self._next_bytes += size
            self._closed = len(self._next) >= self._buffer or self._next_bytes >= self._buffer_bytes

    def _walk_from(self, cursor: Cursor) -> Iterator[tuple[Cursor, Sample | Bad | None]]:
        """Every sample from `cursor` on with the cursor after it; None at the end of each pass."""
        at_pass, number, sample = cursor
        units = len(self._source.shards) * self._parts
        while True:
            key = stable_hash(f"{self._stream} pass {at_pass}")
            while (dealt := self._lane + number * self._lanes) < units:
                shard, part = divmod(permute(dealt, units, key), self._parts)
                for index, item in self._source.read_shard(
                    shard, skip=sample, part=part, parts=self._parts
                ):
                    yield (at_pass, number, index + 1), item
                number, sample = number + 1, 0
            at_pass, number, sample = at_pass + 1, 0, 0
            yield (at_pass, number, sample), None
