"""Reading what `qlip tokenize` wrote: any image's tokens by number, and shuffled batches for training.

shards = TokenShards("tokens/", fingerprint=model.fingerprint)
shards.tokens(slice(0, 8)), shards.captions(slice(0, 8))
for batch in shards.batches(256, seed=0, start=step, rank=rank, world_size=world_size):
    ...    # TokenBatch, endlessly; batch `step` of a rank is always the same

Files are memory-mapped, so memory holds no more than the system caches. Copy remote sets first.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qlip_core.data.draws import stable_hash
from qlip_core.data.locations import expand, local_path, scheme
from qlip_core.data.permutation import chances, permuted
from qlip_core.data.samples import Tally
from qlip_core.data.token_format import (
    MAX_NAMED,
    SUFFIX,
    Header,
    Settings,
    decode_text,
    read_header,
)
from qlip_core.errors import DataError, TokenFileError
from qlip_core.tensorfile import DTYPES
from qlip_core.tokens import VisualTokens

Rows = int | slice | Sequence[int] | np.ndarray
# Files mapped at a time; each takes a file descriptor, and a process on a Mac has 256.
MAX_MAPPED = 128
_DIGESTED = 4096  # values of each tensor; reading all would take hours for a large set


@dataclass(frozen=True)
class TokenBatch:
    """Images of a set, one per row: their tokens (named by their keys) and captions."""

    tokens: VisualTokens
    captions: tuple[str, ...]
    indices: np.ndarray
    """int64 [B]: their numbers in the set."""
    flipped: np.ndarray
    """bool [B]: which tokens are those of the mirror image."""

    def __len__(self) -> int:
        return len(self.tokens)


class TokenShards:
    """All token shards of a folder, a file or a pattern as one set of images, in the input's order.

    Raises TokenFileError for shards of a tokenizer other than `fingerprint`, for shards made with different
    settings or from different sets, and, unless `partial`, if some are missing.
    """

    def __init__(
        self, location: str | Path, fingerprint: str | None = None, *, partial: bool = False
    ) -> None:
        self.location = str(location)
        found = [(path, read_header(path)) for path in shard_files(self.location)]
        found.sort(key=lambda item: item[1].origin.number)
        self.paths = tuple(path for path, _ in found)
        self.headers = tuple(header for _, header in found)
        self._check_same(fingerprint)
        self._check_complete(partial)
        self.settings: Settings = self.headers[0].settings
        # Number of each shard's first image, and the total.
        self._starts = np.cumsum([0, *(header.count for header in self.headers)], dtype=np.int64)
        self._map = self._mapper()

    def _check_same(self, fingerprint: str | None) -> None:
        path, first = self.paths[0], self.headers[0]
        if fingerprint is not None and first.settings.model != fingerprint:
            raise TokenFileError(
                f"{path}: made by another tokenizer ({first.settings.model}, this one is "
                f"{fingerprint}): use that model, or tokenize the set again with this one"
            )
        for other_path, other in zip(self.paths, self.headers):
            if differences := first.settings.differences(other.settings):
                raise TokenFileError(
                    f"{other_path}: {differences} (as in {path.name}): shards of one set are made "
                    "with the same settings; keep each kind in a folder of its own"
                )
            if other.origin.of != first.origin.of:
                raise TokenFileError(
                    f"{other_path}: is of a set of {other.origin.of} shards and {path.name} of one "
                    f"of {first.origin.of}: keep each set in a folder of its own"
                )

    def _check_complete(self, partial: bool) -> None:
        numbers = [header.origin.number for header in self.headers]
        for i in range(1, len(numbers)):
            if numbers[i] == numbers[i - 1]:
                raise TokenFileError(
                    f"{self.paths[i]}: is shard {numbers[i]} of its set, as is "
                    f"{self.paths[i - 1].name}: keep each set in a folder of its own"
                )
        if len(numbers) < self.headers[0].origin.of and not partial:
            raise TokenFileError(
                f"{self.location}: {len(numbers)} of {self.headers[0].origin.of} token shards: finish "
                "with the same `qlip tokenize` command, or read what there is with partial=True"
            )

    # -- what it is --------------------------------------------------------------------------

    def __len__(self) -> int:
        """Images, mirror images not counted."""
        return int(self._starts[-1])

    def digest(self) -> str:
        """SHA-256 that identifies this set: of every shard's settings, origin and sizes, and the first values of
        its tensors, but not of the set's location or the name of its source."""
        digest = hashlib.sha256()
        for shard, header in enumerate(self.headers):
            names = sorted(header.entries)
            sizes = [(name, header.entries[name].shape) for name in names]
            origin = asdict(replace(header.origin, source=""))
            digest.update(json.dumps([asdict(header.settings), origin, sizes]).encode())
            for name in names:
                digest.update(self._tensor(shard, name).ravel()[:_DIGESTED].tobytes())
        return digest.hexdigest()

    @property
    def skipped(self) -> dict[str, Any]:
        """Bad samples of all shards: {"counts": {reason: n}, "named": [...]}."""
        tally = Tally(keep=MAX_NAMED)
        for header in self.headers:
            tally.include(header.skipped)
        return tally.to_dict()

    # -- by number ---------------------------------------------------------------------------

    def tokens(self, rows: Rows, *, flipped: bool | np.ndarray = False) -> VisualTokens:
        """Tokens of images by number (one: still a batch), named by their keys.

        `flipped`, bool or [B]: of the mirror images; ValueError where the set has none.
        """
        indices = self._indices(rows)
        flipped = np.broadcast_to(np.asarray(flipped, bool), len(indices))
        if flipped.any() and not self.settings.flips:
            raise ValueError(
                f"{self.location}: made with augmentation none, so without mirror images"
            )
        packed = np.empty((len(indices), self.settings.row_bytes), np.uint8)
        for shard, places in self._by_shard(indices):
            rows_there = indices[places] - self._starts[shard]
            mirrored = flipped[places]
            packed[places[~mirrored]] = self._tensor(shard, "bits")[rows_there[~mirrored]]
            if mirrored.any():
                packed[places[mirrored]] = self._tensor(shard, "bits_flipped")[rows_there[mirrored]]
        settings = self.settings
        names = tuple(self._texts(indices, "keys", "key_offsets"))
        return VisualTokens(packed, settings.length, settings.grid, settings.model, names)

    def captions(self, rows: Rows) -> list[str]:
        """Captions of images by number."""
        return self._texts(self._indices(rows), "captions", "caption_offsets")

    def keys(self, rows: Rows) -> list[str]:
        """Keys of images by number: what their set calls them."""
        return self._texts(self._indices(rows), "keys", "key_offsets")

    def labels(self, rows: Rows) -> list[str]:
        """Labels of images by number; "" where the input had none."""
        return self._texts(self._indices(rows), "labels", "label_offsets")

    # -- in order ----------------------------------------------------------------------------

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        flip: float = 0.5,
    ) -> Iterator[TokenBatch]:
        """`batch(step, …)` for step = start, start + 1, …, endlessly."""
        step = start
        while True:
            yield self.batch(
                step, batch_size, seed=seed, rank=rank, world_size=world_size, flip=flip
            )
            step += 1

    def batch(
        self,
        step: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        flip: float = 0.5,
    ) -> TokenBatch:
        """The `batch_size` images that `rank` of `world_size` trains on at `step`, computed without stored state.

        All ranks' batches, step by step and rank by rank, make one endless sequence in which every
        `len(self)` places hold each image once, in an order drawn from (seed, epoch). If the set has mirror
        images, each place takes one with probability `flip`. Raises TokenFileError for an empty set.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank (={rank}) must be from 0 to world_size - 1 (={world_size - 1})")
        if batch_size < 1 or step < 0:
            raise ValueError(
                f"batch_size (={batch_size}) must be positive, step (={step}) not negative"
            )
        count = len(self)
        if not count:
            raise TokenFileError(
                f"{self.location}: holds no image, so there is nothing to train on"
            )
        places = (step * world_size + rank) * batch_size + np.arange(batch_size, dtype=np.int64)
        epochs = places // count
        indices = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = stable_hash(f"tokens seed {seed} epoch {epoch}")
            indices[here] = permuted(places[here] - epoch * count, count, key)
        flipped = np.zeros(batch_size, bool)
        if self.settings.flips:
            flipped = chances(places, stable_hash(f"tokens seed {seed} flip"), flip)
        return self._batch(indices, flipped)

    def _batch(self, indices: np.ndarray, flipped: np.ndarray) -> TokenBatch:
        tokens = self.tokens(indices, flipped=flipped)
        return TokenBatch(tokens, tuple(self.captions(indices)), indices, flipped)

    # -- files -------------------------------------------------------------------------------

    def _indices(self, rows: Rows) -> np.ndarray:
        """int64 [B] in range(len(self))."""
        count = len(self)
        if isinstance(rows, slice):
            return np.arange(*rows.indices(count), dtype=np.int64)
        indices = np.atleast_1d(np.asarray(rows))
        if indices.size == 0:
            return np.empty(0, np.int64)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise TypeError(
                f"images are picked by integers, got {indices.dtype} {list(indices.shape)}"
            )
        outside = indices[(indices < -count) | (indices >= count)]
        if len(outside):
            raise IndexError(f"image {outside[0]} of {count} in {self.location}")
        indices = indices.astype(np.int64)
        return np.where(indices < 0, indices + count, indices)

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, which of `indices` lie in it)."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards):
            yield int(shard), np.flatnonzero(shards == shard)

    def _texts(self, indices: np.ndarray, blob: str, offsets: str) -> list[str]:
        texts = [""] * len(indices)
        for shard, places in self._by_shard(indices):
            if blob not in self.headers[shard].entries:
                continue
            data, bounds = self._tensor(shard, blob), self._tensor(shard, offsets)
            for place, row in zip(
                places.tolist(), (indices[places] - self._starts[shard]).tolist()
            ):
                begin, end = int(bounds[row]), int(bounds[row + 1])
                if not 0 <= begin <= end <= len(data):
                    raise TokenFileError(
                        f"{self.paths[shard]}: {offsets} of image {row} are {begin} and {end}, "
                        f"in {len(data)} bytes: damaged; tokenize this shard again"
                    )
                texts[place] = decode_text(data[begin:end].tobytes())
        return texts

    def _tensor(self, shard: int, name: str) -> np.ndarray:
        entry = self.headers[shard].entries[name]
        dtype = DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        if not count:
            return np.empty(entry.shape, dtype)
        return np.frombuffer(self._map(shard), dtype, count, entry.start).reshape(entry.shape)

    def _mapper(self) -> Callable[[int], mmap.mmap]:
        return lru_cache(MAX_MAPPED)(lambda shard: _mapped(self.paths[shard], self.headers[shard]))

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps; each process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map = self._mapper()


def shard_files(location: str) -> list[Path]:
    """The token shards that `location` stands for: a folder's, one file, or {…} and * for many.

    Raises TokenFileError if there are none.
    """
    try:
        addresses = expand(location)
    except DataError as error:
        raise TokenFileError(str(error)) from None
    paths: list[Path] = []
    for address in addresses:
        if scheme(address):
            raise TokenFileError(
                f"{address}: token shards are memory-mapped: copy them to this machine first"
            )
        path = local_path(address)
        paths += sorted(visible_shards(path)) if path.is_dir() else [path]
    if not paths:
        raise TokenFileError(f"{location}: no token shards (*{SUFFIX}) in this folder")
    return paths


def is_token_set(location: str) -> bool:
    """Whether `location` names token shards, by the names of its files: a folder, file or pattern."""
    try:
        paths = shard_files(location)
    except TokenFileError:
        return False
    return all(path.suffix == SUFFIX for path in paths)


def visible_shards(folder: Path) -> list[Path]:
    """Files of a folder with token shards' suffix, except hidden ones, which are still being written."""
    return [path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".")]


def _mapped(path: Path, header: Header) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise TokenFileError(f"{path}: can no longer be read ({error})") from None
    if len(whole) != header.size:
        raise TokenFileError(
            f"{path}: has {len(whole)} bytes and had {header.size} when the set was opened: "
            "open it again"
        )
    return whole
