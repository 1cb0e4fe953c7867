"""The training loader: captioned pictures from many sources, in an order that a restart reproduces.

with make_loader(DataConfig(), image_size=64, tokenizer=..., batch_size=64) as loader:
    for batch in loader: ...

What is guaranteed, with B the global batch, W ranks, M micro-batches of B/(W*M) rows each on every rank:

- A run that stops after batch k and continues from `state_dict()` sees the batches that an uninterrupted run
  sees, row for row, augmentation included, with any number of workers before and after.
- If all sources have random access (the emoji set, folders), global batch k holds the same rows for every W,
  and in the same order if M is 1. Each pass over a folder uses every sample once.
- If any source is a stream (tars, parquet), the same holds for every W that divides V, the number of
  `streams`: the configuration's or, if that is 0, the smallest divisor of B that is at least W times
  `workers` and, if possible, a multiple of 8. A run keeps the V it was started with.
  Each pass uses every sample once; lanes of unequal length begin their next pass at different times.
- A sample's augmentation depends only on the seed and the number of its row in the run.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qlip_core.data.samples import Limits, Tally
from qlip_core.errors import DataError, RecipeError
from qlip_torch.train.feeds import Failure, IndexedFeed, IndexedSource, LaneFeed, Part
from qlip_torch.train.lanes import StreamSource
from qlip_torch.train.order import Mixture
from qlip_torch.train.pictures import Augmentation, Batch, Preparer, Tokenize
from qlip_torch.train.sources import open_training_source
from qlip_torch.train.strict import at_least
from qlip_torch.train.workers import is_death, start_worker, starting_workers

__all__ = ["Batch", "DataConfig", "Loader", "Source", "make_loader", "merge_states"]

log = logging.getLogger(__name__)
_DEFAULT_STREAMS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where samples come from, and their share, by `weight`, among all sources.

    location: "emoji", or "emoji?split=train&seed=1&size=96&common_share=0.5&plain=true&names=common"
    (or names=classes: the hundred of the classification test); a folder of images, each with a .txt
    beside it; a parquet file or folder; tars by path, URL, glob or {0000..0099}.
    """

    location: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.location:
            raise RecipeError('location is empty: name a set, or "emoji"')
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise RecipeError(f"weight (={self.weight}) of {self.location} must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """The data part of a recipe.

    seed: of order and augmentation. workers: processes that prepare batches (0: the trainer's own process
    does); prefetch: batches that each holds ready. scale, ratio: CLIP's random resized crop, as share of the
    area and width over height (scale = [1, 1] turns it off); flip: probability of a mirror image.
    For streams: shuffle_buffer (samples) and shuffle_megabytes (of encoded samples) limit what each of the
    `streams` lanes holds; streams = 0 is automatic. image_megabytes: larger files count as bad samples.
    """

    sources: tuple[Source, ...] = (Source("emoji"),)
    seed: int = 0
    workers: int = 1
    prefetch: int = 4
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    shuffle_buffer: int = 512
    shuffle_megabytes: int = 128
    streams: int = 0
    image_megabytes: int = 64

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("sources is empty: name at least one")
        at_least(self, 0, "workers", "streams", "seed")
        at_least(self, 1, "prefetch", "shuffle_buffer", "shuffle_megabytes", "image_megabytes")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise RecipeError(f"scale (={self.scale}) must be two shares, 0 < low <= high <= 1")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise RecipeError(f"ratio (={self.ratio}) must be two ratios, 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise RecipeError(f"flip (={self.flip}) must be a chance from 0 to 1")


class _QuietLoader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """Does not warn: `_warn_of_many_workers` does, and counts those of all ranks."""


class Loader:
    """Endless batches of this rank, from `make_loader`. Close it, or use it in a `with` statement."""

    def __init__(
        self,
        feed: IndexedFeed | LaneFeed,
        *,
        workers: int,
        pieces: int,
        prefetch: int,
        batch_size: int,
        micro_batches: int,
        state: dict[str, Any],
    ):
        """`pieces`: how many of the feed's parts make a micro-batch; `prefetch`: parts that each worker holds
        ready; `state`: where the feed starts."""
        self.bad = Tally()
        self.bad.include(state["bad"])
        self.samples: int = state["samples"]
        self._pieces, self._batch_size, self._micro_batches = pieces, batch_size, micro_batches
        self._lanes = dict(state["lanes"])
        self._state = state
        self._loader = _QuietLoader(
            feed,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=start_worker if workers else None,
            # Micro-batches joined from several pieces are pinned in `_joined`.
            pin_memory=torch.cuda.is_available() and pieces == 1,
            # Its own generator, because the default one is the run's, which a restart must not advance.
            generator=torch.Generator().manual_seed(0),
        )
        self._items: Iterator[Part | Failure] | None = None
        self._closed = False

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. Raises DataError, naming the worker, if a source cannot be read."""
        if self._closed:
            raise DataError("this loader is closed; make another one from its state")
        if self._items is None:
            with starting_workers() if self._loader.num_workers else nullcontext():
                self._items = iter(self._loader)
        pieces: list[Batch] = []
        while len(pieces) < self._pieces:
            part = self._received(self._items)
            self._lanes |= part.lanes
            for bad in part.bad:
                self.bad.add(bad)
            if part.batch is not None:
                pieces.append(part.batch)
        self.samples += self._batch_size // self._micro_batches
        if self.samples % self._batch_size == 0:
            self._state = self._state | {
                "samples": self.samples,
                "lanes": dict(self._lanes),
                "bad": self.bad.to_dict(),
            }
        if len(pieces) == 1:
            return pieces[0]
        return Batch(
            _joined([piece.pixels for piece in pieces]),
            _joined([piece.ids for piece in pieces]),
            [key for piece in pieces for key in piece.keys],
            [caption for piece in pieces for caption in piece.captions],
        )

    def _received(self, items: Iterator[Part | Failure]) -> Part:
        try:
            item = next(items)
        except (ConnectionError, EOFError) as error:
            if not self._loader.num_workers or " in DataLoader worker process " in str(error):
                raise  # raised here or in a worker that lives
            # A worker that is killed while it hands over a tensor: its connection breaks before the system tells
            # of its end.
            self.close()
            raise _death(f"{type(error).__name__} while it handed over a batch") from None
        if isinstance(item, Part):
            return item
        self.close()
        raise DataError(f"data worker {item.worker}: {item.message}")

    def state_dict(self) -> dict[str, Any]:
        """The position after the last global batch handed out in full (not those prefetched), in JSON types.

        Each rank's state has its own lanes and bad samples, so store `merge_states` of all ranks' states.
        """
        return self._state

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        items, self._items, self._closed = self._items, None, True
        if items is not None and self._loader.num_workers:
            # Dropping the reference is not enough: the traceback of an error keeps the iterator alive until the
            # trainer exits, which would then wait for workers that nobody has told to stop.
            try:
                items._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]
            except RuntimeError as error:
                # That one of them was dead already is no news now; torch has stopped the others all the same.
                if not is_death(error):
                    raise

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        # torch raises it when the system tells that a child is gone, wherever the trainer is at that moment.
        if error is not None and is_death(error):
            raise _death(str(error).strip(" .")) from None


def _death(how: str) -> DataError:
    return DataError(
        f"a data process has died ({how}). If memory ran out, take fewer data.workers "
        "or a smaller data.prefetch, and go on with --resume"
    )


def make_loader(
    data: DataConfig,
    *,
    image_size: int,
    tokenizer: Tokenize,
    batch_size: int,
    micro_batches: int = 1,
    rank: int = 0,
    world_size: int = 1,
    state: Mapping[str, Any] | None = None,
) -> Loader:
    """The loader of rank `rank`, from the beginning or from a saved state (see the module's guarantees).

    batch_size: rows of the global batch; each rank gets batch_size / world_size of them, split into
    `micro_batches`. tokenizer: texts -> int64 [B, T]. Raises DataError for sources that do not exist, sizes
    that do not divide, and a state of other data.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank}: must be from 0 to {world_size - 1}")
    if batch_size < 1 or batch_size % (world_size * micro_batches):
        raise DataError(
            f"batch size {batch_size}: must divide by the {world_size} processes"
            + (f" times {micro_batches} micro-batches" if micro_batches > 1 else "")
        )
    micro_rows = batch_size // world_size // micro_batches
    limits = Limits(image_bytes=data.image_megabytes * 2**20)
    sources = [
        open_training_source(source.location, image_size, data.seed, limits)
        for source in data.sources
    ]
    weights = [source.weight for source in data.sources]
    preparer = Preparer(
        size=image_size,
        tokenizer=tokenizer,
        augmentation=Augmentation(data.scale, data.ratio, data.flip),
        seed=data.seed,
    )
    indexed = [source for source in sources if not isinstance(source, StreamSource)]
    old = dict(state) if state else None
    streams = 0 if len(indexed) == len(sources) else _streams(data, batch_size, world_size, old)
    fresh = {
        "version": 1,
        "data": _describe(data, sources, streams),
        "streams": streams,
        "samples": 0,
        "lanes": {},
        "bad": Tally().to_dict(),
    }
    begin = fresh if old is None else _checked_state(old, fresh, rank)
    if not streams:
        mixture = Mixture(weights, f"{data.seed} mixture")
        feed = IndexedFeed(
            indexed,
            mixture,
            preparer,
            seed=data.seed,
            batch_size=batch_size // micro_batches,
            rank=rank,
            world_size=world_size,
            start=begin["samples"],
        )
        workers, piece, prefetch = data.workers, micro_rows, data.prefetch
    else:
        lanes = range(rank * streams // world_size, (rank + 1) * streams // world_size)
        # A piece never spans two micro-batches; if the lanes divide its rows, each lane has a share of every one.
        share = 0 if micro_rows % len(lanes) else micro_rows // len(lanes)
        piece = math.gcd(batch_size // streams, micro_rows, share)
        feed = LaneFeed(
            sources,
            {lane: Mixture(weights, f"{data.seed} mixture {lane}") for lane in lanes},
            preparer,
            seed=data.seed,
            rows=batch_size // streams,
            piece=piece,
            lanes=streams,
            buffer=data.shuffle_buffer,
            buffer_bytes=data.shuffle_megabytes * 2**20,
            states=begin["lanes"],
        )
        workers = min(data.workers, len(lanes))
        prefetch = data.prefetch * math.ceil(micro_rows / piece / max(1, workers))
        begin["lanes"] = {k: v for k, v in begin["lanes"].items() if int(k) in lanes}
    _check_shared_memory(workers, prefetch, piece, image_size)
    _warn_of_many_workers(workers)
    return Loader(
        feed,
        workers=workers,
        pieces=micro_rows // piece,
        prefetch=prefetch,
        batch_size=batch_size,
        micro_batches=micro_batches,
        state=begin,
    )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the ranks' states, in rank order, into one that any number of ranks can continue from."""
    first = states[0]
    bad, lanes = Tally(), {}
    for state in states:
        if any(state[key] != first[key] for key in ("version", "data", "streams", "samples")):
            raise DataError("the ranks' data states are not of the same run and step")
        bad.include(state["bad"])
        lanes |= state["lanes"]
    return dict(first) | {"lanes": lanes, "bad": bad.to_dict()}


def _streams(
    data: DataConfig, batch_size: int, world_size: int, state: dict[str, Any] | None
) -> int:
    """V: the configuration's, the saved one, or the smallest that suits ranks, workers and batch."""
    least = world_size * max(1, data.workers)
    chosen = data.streams or (state or {}).get("streams", 0)
    if not chosen:
        step = math.lcm(world_size, math.gcd(batch_size, _DEFAULT_STREAMS))
        fits = [v for v in range(step, batch_size + 1, step) if batch_size % v == 0 and v >= least]
        chosen = fits[0] if fits else step
    if state and (chosen % world_size or batch_size % chosen):
        raise DataError(
            f"this run was started with {chosen} streams of data: continue it with a number of processes that "
            f"divides {chosen}, not {world_size}"
        )
    if chosen % world_size or batch_size % chosen:
        raise DataError(
            f"{chosen} streams: must be a multiple of the {world_size} processes and divide "
            f"the batch size {batch_size}; set data.streams"
        )
    return chosen


def _describe(
    data: DataConfig, sources: Sequence[IndexedSource | StreamSource], streams: int
) -> dict[str, Any]:
    """What decides the order of samples; a state is valid only for data with the same description."""
    sizes = [len(s.shards) if isinstance(s, StreamSource) else s.count for s in sources]
    return {
        "seed": data.seed,
        "sources": [
            {"location": source.location, "weight": source.weight, "size": size}
            for source, size in zip(data.sources, sizes)
        ],
        "shuffle": [data.shuffle_buffer, data.shuffle_megabytes] if streams else [],
    }


def _checked_state(old: dict[str, Any], fresh: dict[str, Any], rank: int) -> dict[str, Any]:
    if set(old) != set(fresh) or old["version"] != fresh["version"]:
        raise DataError("the saved data position is from another version; start the data again")
    if (old["data"], old["streams"]) != (fresh["data"], fresh["streams"]):
        raise DataError(
            "the saved data position belongs to other data "
            f"({_difference(old, fresh)}); restore the data (for a lost tar, an empty file of its name will "
            "do), or start it again"
        )
    # Kept by one rank only, so that a later merge does not count them W times.
    return old | {"bad": old["bad"] if rank == 0 else Tally().to_dict()}


def _difference(old: dict[str, Any], fresh: dict[str, Any]) -> str:
    if old["streams"] != fresh["streams"]:
        return f"streams {old['streams']}, now {fresh['streams']}"
    key = next(k for k in fresh["data"] if old["data"].get(k) != fresh["data"][k])
    return f"{key} {old['data'].get(key)}, now {fresh['data'][key]}"


def _check_shared_memory(workers: int, prefetch: int, rows: int, size: int) -> None:
    """Workers hand over `rows` at a time in shared memory; if it runs out, SIGBUS kills them without a message."""
    memory = Path("/dev/shm")
    if not workers or sys.platform != "linux" or not memory.is_dir():
        return
    need = rows * 3 * size * size * workers * (prefetch + 1)
    free = shutil.disk_usage(memory).free
    if need > free:
        raise DataError(
            f"{workers} workers with prefetched batches need {need >> 20} MB of "
            f"shared memory, /dev/shm has {free >> 20}: enlarge it (docker --shm-size), "
            "or lower data.workers or data.prefetch"
        )


def _warn_of_many_workers(workers: int) -> None:
    can_tell = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_tell else (os.cpu_count() or 1)
    total = workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if total > cores and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning(
            "%d data processes on %d %s: lower data.workers; more than one a core are no faster and take memory",
            total,
            cores,
            "core" if cores == 1 else "cores",
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; for a GPU in page-locked memory, from which it copies while the host continues."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    out = torch.empty(shape, dtype=parts[0].dtype, pin_memory=torch.cuda.is_available())
    return torch.cat(list(parts), out=out)


def _unchanged(item: T) -> T:
    return item
