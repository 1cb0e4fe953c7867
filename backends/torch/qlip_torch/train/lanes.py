"""A lane's endless walk through its share of a source's shards, shuffled in a buffer of bounded memory.

The buffer is filled and emptied in chunks: consecutive samples are read until it is full, then handed out
in an order drawn for that chunk, while the next chunk is read into the space they leave. The position is
thus four numbers (where the chunk began, and how many of its samples are out), and returning to it reads
one chunk again without decoding a picture. A reservoir would shuffle a little better, but its contents
could be restored only by storing them or by reading everything since the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

from qlip_core.data.draws import shuffled, stable_hash
from qlip_core.data.permutation import permute
from qlip_core.data.samples import Bad, Sample
from qlip_core.errors import DataError

# A lane may find nothing in its share of a tiny set; in the next pass it has a different share.
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

    In every pass over the source each sample comes once, in one lane: the shards are dealt out to lanes in
    an order drawn for that pass. With fewer shards than lanes, several lanes read through the same shard and
    share its samples. It holds at most `buffer` samples, and at most `buffer_bytes` plus one sample.
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
        # Where the chunk being handed out began, where the one being read began, and the position.
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
        """The position, in JSON types."""
        at_pass, shard, sample = self._begin
        return {
            "pass": at_pass,
            "shard": shard,
            "sample": sample,
            "chunk": self._chunk,
            "popped": self._popped,
        }

    def pop(self) -> Sample | Bad:
        """The next sample. Raises DataError if the source cannot be read or is empty."""
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
        """Start handing out the chunk that was read."""
        self._chunk, self._turned, self._popped = self._chunk + self._turned, True, 0
        stream = stable_hash(f"{self._stream} lane {self._lane}")
        order = shuffled(stream, self._chunk, len(self._next))
        self._out = deque(self._next[i] for i in order)
        self._out_bytes, self._next, self._next_bytes = self._next_bytes, [], 0
        self._begin, self._begin_next, self._closed = self._begin_next, self._cursor, False

    def _read_one(self) -> None:
        self._cursor, item = next(self._walk)
        if item is None:
            # A chunk never spans two passes, or the buffer could hold the same sample twice.
            self._closed = True
        else:
            if isinstance(item, Sample):
                size = len(item.image_bytes) + len(item.caption)
                item = replace(item, meta={})  # training does not need it
            else:
                size = 0
            self._next.append((item, size))
            self._next_bytes += size
            self._closed = len(self._next) >= self._buffer or self._next_bytes >= self._buffer_bytes

    def _walk_from(self, cursor: Cursor) -> Iterator[tuple[Cursor, Sample | Bad | None]]:
        """Every sample from `cursor` on, with the cursor after it; None at the end of each pass."""
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
