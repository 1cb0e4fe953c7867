"""What runs in a data worker: it reads samples in order, prepares them and collates them into parts of batches.

The sources decide which of two feeds is used. Legend: B rows of the global batch, W ranks, V lanes.

- `IndexedFeed` for sources with random access (the emoji set, folders): row j of global batch k is
  sample k*B + j of one global order, whatever W and the number of workers; rank r has a contiguous slice.
- `LaneFeed` if any source is a stream (tars, parquet): V lanes, each an endless shuffled stream over its
  own share of the shards; a global batch is B/V rows of every lane, rank r has a contiguous slice of the
  lanes, and its workers share those. So batches depend on V, not on W or the workers.
  Workers hand over rows in pieces; a piece is from one lane and for one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from qlip_core.data.draws import Draws, stable_hash
from qlip_core.data.samples import BROKEN_IMAGE, Bad, Sample
from qlip_core.errors import DataError, ImageError, QlipError
from qlip_core.images import ImageLike
from qlip_torch.train.lanes import ShuffledStream, StreamSource
from qlip_torch.train.order import Mixture, epoch_index
from qlip_torch.train.pictures import Batch, Preparer

# This many unusable samples in a row are no coincidence, so stop with an error.
MAX_BAD_IN_A_ROW = 1000

Row = tuple[str, np.ndarray, str]


class IndexedSource(Protocol):
    """Samples by number. `count` is None if there is no end to them."""

    @property
    def location(self) -> str: ...

    @property
    def count(self) -> int | None: ...

    def read(self, index: int) -> Sample | Rendered | Bad: ...


@dataclass(frozen=True)
class Rendered:
    """A sample that was drawn rather than decoded: uint8 [H, W, 3]."""

    key: str
    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class Part:
    """What a worker hands over: rows of one micro-batch (None: this worker has none this turn), the bad
    samples found on the way, and, from a `LaneFeed`, the lane's position after them."""

    batch: Batch | None
    bad: list[Bad]
    lanes: dict[str, Any]

    def pin_memory(self) -> Part:
        """Called by the loader if there is a GPU."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Failure:
    """A worker's QlipError, sent as a value, since raised in a worker it would arrive as a wrapped traceback."""

    worker: int
    message: str


class IndexedFeed(IterableDataset[Part | Failure]):
    """Whole batches of this rank; worker w makes every `workers`-th one."""

    def __init__(
        self,
        sources: Sequence[IndexedSource],
        mixture: Mixture,
        preparer: Preparer,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        start: int,
    ):
        self._sources, self._mixture, self._preparer = sources, mixture, preparer
        self._seed, self._batch_size, self._start = seed, batch_size, start
        self._rows = batch_size // world_size
        self._first = rank * self._rows

    def __iter__(self) -> Iterator[Part | Failure]:
        worker, workers = _worker()
        return guarded(self._parts(worker, workers), worker)

    def _parts(self, worker: int, workers: int) -> Iterator[Part]:
        start = self._start + self._first + worker * self._batch_size
        while True:
            bad: list[Bad] = []
            rows = [self._row(n, bad) for n in range(start, start + self._rows)]
            yield Part(self._preparer.batch(rows), bad, {})
            start += workers * self._batch_size

    def _row(self, ordinal: int, bad: list[Bad]) -> Row:
        number, position = self._mixture.locate(ordinal)
        return indexed_row(
            self._sources[number], number, position, ordinal, self._seed, self._preparer, bad
        )


class LaneFeed(IterableDataset[Part | Failure]):
    """The rows that this worker's lanes contribute to every batch of this rank, in pieces.

    Every lane contributes `rows` to a global batch, in `rows / piece` turns over all of this rank's lanes. In
    a turn the workers deliver in the order of the lanes, so batches do not depend on the number of workers.
    """

    def __init__(
        self,
        sources: Sequence[IndexedSource | StreamSource],
        mixtures: dict[int, Mixture],
        preparer: Preparer,
        *,
        seed: int,
        rows: int,
        piece: int,
        lanes: int,
        buffer: int,
        buffer_bytes: int,
        states: dict[str, Any],
    ):
        """`mixtures`: by lane, for this rank's lanes; `lanes`: number of all lanes; `rows`: B/V, a multiple of
        `piece`."""
        self._sources, self._mixtures, self._preparer = sources, mixtures, preparer
        self._seed, self._turns, self._piece, self._lanes = seed, rows // piece, piece, lanes
        self._buffer, self._buffer_bytes, self._states = buffer, buffer_bytes, states

    def __iter__(self) -> Iterator[Part | Failure]:
        worker, workers = _worker()
        return guarded(self._parts(worker, workers), worker)

    def _parts(self, worker: int, workers: int) -> Iterator[Part]:
        # The loader takes one part from each worker in turn, so all must give equally many; some are empty.
        mine = sorted(self._mixtures)[worker::workers]
        idle = -(-len(self._mixtures) // workers) - len(mine)
        lanes = [self._lane(lane) for lane in mine]
        while True:
            for _ in range(self._turns):
                for lane in lanes:
                    bad: list[Bad] = []
                    rows = [lane.row(bad) for _ in range(self._piece)]
                    yield Part(self._preparer.batch(rows), bad, {str(lane.number): lane.state()})
                for _ in range(idle):
                    yield Part(None, [], {})

    def _lane(self, number: int) -> _Lane:
        state = self._states.get(str(number))
        streams = {
            i: ShuffledStream(
                source,
                stream=f"{self._seed} source {i}",
                lane=number,
                lanes=self._lanes,
                buffer=self._buffer,
                buffer_bytes=self._buffer_bytes,
                state=state["streams"][str(i)] if state else None,
            )
            for i, source in enumerate(self._sources)
            if isinstance(source, StreamSource)
        }
        mixture = self._mixtures[number]
        return _Lane(
            number,
            self._lanes,
            self._sources,
            streams,
            mixture,
            self._seed,
            self._preparer,
            state["rows"] if state else 0,
        )


class _Lane:
    """One lane: picks the next source and reads its next usable row."""

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: Sequence[IndexedSource | StreamSource],
        streams: dict[int, ShuffledStream],
        mixture: Mixture,
        seed: int,
        preparer: Preparer,
        rows: int,
    ):
        self.number, self._lanes, self._sources, self._streams = number, lanes, sources, streams
        self._mixture, self._seed, self._preparer, self._done = mixture, seed, preparer, rows

    def row(self, bad: list[Bad]) -> Row:
        source, place = self._mixture.locate(self._done)
        ordinal = self._done * self._lanes + self.number
        stream = self._streams.get(source)
        if stream is None:
            indexed = self._sources[source]
            position = place * self._lanes + self.number
            row = indexed_row(
                indexed,  # type: ignore[arg-type]
                source,
                position,
                ordinal,
                self._seed,
                self._preparer,
                bad,
            )
        else:
            row = first_usable(stream.pop, ordinal, stream.location, self._preparer, bad)
        self._done += 1
        return row

    def state(self) -> dict[str, Any]:
        return {
            "rows": self._done,
            "streams": {str(i): stream.state() for i, stream in self._streams.items()},
        }


def indexed_row(
    source: IndexedSource,
    number: int,
    position: int,
    ordinal: int,
    seed: int,
    preparer: Preparer,
    bad: list[Bad],
) -> Row:
    """The row at `position` of a source's endless order.

    A bad sample is replaced by another, drawn from all samples by the row's ordinal: moving every later sample
    up by one would make each rank's slice depend on what the others found.
    """
    count = source.count
    if count is None:
        return first_usable(lambda: source.read(position), ordinal, source.location, preparer, bad)
    substitutes = Draws(stable_hash(f"{seed} substitute {number}"), ordinal)
    first = epoch_index(position, count, f"{seed} source {number}")
    attempts = chain([first], (substitutes.below(count) for _ in repeat(None)))
    return first_usable(
        lambda: source.read(next(attempts)), ordinal, source.location, preparer, bad
    )


def first_usable(
    read: Callable[[], Sample | Rendered | Bad],
    ordinal: int,
    location: str,
    preparer: Preparer,
    bad: list[Bad],
) -> Row:
    """The first row from `read` that decodes; failures before it go to `bad`."""
    for _ in range(MAX_BAD_IN_A_ROW):
        found = read()
        if isinstance(found, Bad):
            bad.append(found)
            continue
        image: ImageLike = found.image if isinstance(found, Rendered) else found.image_bytes
        try:
            return found.key, preparer.picture(image, found.key, ordinal), found.caption
        except ImageError as error:
            detail = str(error).removeprefix(f"{found.key}: ")
            where = "" if isinstance(found, Rendered) else found.where
            bad.append(Bad(found.key, where or location, BROKEN_IMAGE, detail))
    raise DataError(
        f"{location}: {MAX_BAD_IN_A_ROW} samples in a row cannot be used, the last one: {bad[-1]}; "
        "`qlip data check` lists them"
    )


def guarded(parts: Iterator[Part], worker: int) -> Iterator[Part | Failure]:
    """The parts, ending in a Failure where a QlipError stops them."""
    try:
        yield from parts
    except QlipError as error:
        yield Failure(worker, str(error))


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
