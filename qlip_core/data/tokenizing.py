"""Bulk tokenization: a set of captioned pictures to token shards, one for each shard of the set.

Any number of processes share a set: process `rank` makes every world_size-th shard. A shard is written
whole when its last sample is done, and existing ones are left as they are, so after a kill the same command
continues where it stopped. Batches never span shards and depend only on the shard, so neither a restart nor
the number of processes changes a byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlip_core import bsq
from qlip_core.data.background import in_background
from qlip_core.data.samples import BROKEN_ARCHIVE, BROKEN_IMAGE, Bad, Sample, Tally, label_of
from qlip_core.data.shards import AnySource
from qlip_core.data.token_format import (
    MAX_NAMED,
    SUFFIX,
    Header,
    Settings,
    ShardWriter,
    read_header,
)
from qlip_core.data.token_shards import visible_shards
from qlip_core.data.token_units import SHARD_SIZE, Unit, unit_samples, units_of
from qlip_core.errors import DataError, ImageError, TokenFileError
from qlip_core.loading import Progress, check_batch_size, default_workers

if TYPE_CHECKING:
    from qlip_core.model import Model

DEFAULT_BATCH = 32
_READY = 2  # batches of pixels that wait for the model


@dataclass
class Report:
    """What one process did, and what its shards contain."""

    settings: Settings
    shards: int
    """Shards of the whole set."""
    mine: int
    """Shards of this process."""
    made: int = 0
    """Shards written now; the others already existed."""
    images: int = 0
    """Images in all of this process's shards."""
    encoded: int = 0
    """Images among them that were tokenized now."""
    skipped: Tally = field(default_factory=lambda: Tally(keep=MAX_NAMED))
    """Bad samples of all of this process's shards."""
    failed: list[str] = field(default_factory=list)
    """Shards that could not be read and so were not made, and why."""


def tokenize(
    model: Model,
    source: AnySource,
    out: str | Path,
    *,
    augmentation: str = "none",
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = DEFAULT_BATCH,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Tokenize `rank`'s shards of `source` into the folder `out`, which is created if needed.

    `shard_size` is images per shard if `source` is a folder; `workers` threads decode; `force` replaces
    existing shards; `progress` is called with the number of images done since the last call. A bad sample is
    left out and counted, and a shard that cannot be read is left for the next run; both are in the report.
    Raises TokenFileError if `out` holds shards of other settings or another set, QlipError for a model
    without bits.
    """
    check_batch_size(batch_size)
    if world_size < 1:
        raise DataError(f"world_size (={world_size}) must be at least 1")
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}: ranks run from 0 to {world_size - 1}")
    settings = Settings.of(model, augmentation)
    out = Path(out)
    units = units_of(source, shard_size)
    _check_strangers(out, units)
    mine = units[rank::world_size]
    report = Report(settings, len(units), len(mine))
    _remove_leftovers(out, mine)
    wanted = [unit for unit in mine if force or not _is_done(out, unit, settings, report)]
    _make_folder(out)
    events = in_background(
        _prepared(source, wanted, model, batch_size, workers or default_workers()), _READY
    )
    writer, tally = ShardWriter(settings), Tally(keep=MAX_NAMED)
    with closing(events):
        for event in events:
            if isinstance(event, Bad):
                tally.add(event)
            elif isinstance(event, _Batch):
                packed, flipped = _encode(model, event.pixels, settings.flips)
                writer.add(packed, flipped, event.captions, event.keys, event.labels)
                if progress is not None:
                    progress(len(packed))
            else:
                if event.failure:
                    report.failed.append(event.failure)
                else:
                    _write(writer, out, event.unit, model, tally)
                    report.made += 1
                    header = read_header(shard_path(out, event.unit))
                    _include(report, header)
                    report.encoded += header.count
                writer, tally = ShardWriter(settings), Tally(keep=MAX_NAMED)
    return report


def _encode(model: Model, pixels: np.ndarray, flips: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Packed bits uint8 [b, row_bytes] of pixels and, with `flips`, of their mirror images."""
    packed = bsq.pack(model.network.encode(pixels))
    if not flips:
        return packed, None
    return packed, bsq.pack(model.network.encode(np.ascontiguousarray(pixels[..., ::-1])))


# -- the folder --------------------------------------------------------------------------------


def shard_path(out: Path, unit: Unit) -> Path:
    return out / f"{unit.name}{SUFFIX}"


def _check_strangers(out: Path, units: list[Unit]) -> None:
    """Raises TokenFileError for shards of another set, which would be read along with this one's."""
    names = {f"{unit.name}{SUFFIX}" for unit in units}
    for path in sorted(visible_shards(out)) if out.is_dir() else []:
        if path.name not in names:
            raise TokenFileError(
                f"{path}: not a token shard of this set: name another folder with -o, or move it away"
            )


def _remove_leftovers(out: Path, mine: list[Unit]) -> None:
    """Remove half-written files of a killed run; only for this process's shards, since others may be running."""
    names = {shard_path(out, unit).name for unit in mine}
    for path in out.glob(f".*{SUFFIX}.*.tmp") if out.is_dir() else []:
        if path.name[1:].rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def _is_done(out: Path, unit: Unit, settings: Settings, report: Report) -> bool:
    """Whether the unit's shard exists. Raises TokenFileError if it is not the expected one."""
    path = shard_path(out, unit)
    if not path.exists():
        return False
    try:
        header = read_header(path)
    except TokenFileError as error:
        raise TokenFileError(
            f"{error}; to make it again, delete it and run the same command again"
        ) from None
    # Made from an archive that was incomplete then, such as an unfinished download, and is complete now.
    cut = BROKEN_ARCHIVE in header.skipped["counts"]
    if cut and not header.origin.same_input(unit.origin):
        return False
    if differences := settings.differences(header.settings):
        raise TokenFileError(
            f"{path}: already exists, and its {differences}: name another folder with -o, or replace "
            "it with --force"
        )
    if not header.origin.same_input(unit.origin):
        was = header.origin
        raise TokenFileError(
            f"{path}: already exists, made from {was.shard} (shard {was.number} of {was.of}, "
            f"{was.shard_bytes} bytes), which is not what is to be tokenized now: name another "
            "folder with -o, or replace it with --force"
        )
    _include(report, header)
    return True


def _include(report: Report, header: Header) -> None:
    """Count a finished shard."""
    report.images += header.count
    report.skipped.include(header.skipped)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}): name another with -o") from None


def _write(writer: ShardWriter, out: Path, unit: Unit, model: Model, tally: Tally) -> None:
    path = shard_path(out, unit)
    try:
        writer.write(path, unit.origin, model.backend, tally.to_dict())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}): fix that and run the same command again, "
            "which continues from here"
        ) from None


# -- reading and decoding, beside the model ----------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Pixels float32 [b, 3, S, S] of samples of one shard."""

    pixels: np.ndarray
    captions: list[str]
    keys: list[str]
    labels: list[str]


@dataclass(frozen=True)
class _Done:
    """The end of a shard; `failure` says why it ended early, if it did."""

    unit: Unit
    failure: str = ""


@dataclass(frozen=True)
class _Decoding:
    """A sample whose pixels are being decoded."""

    sample: Sample
    pixels: Future[np.ndarray]


def _prepared(
    source: AnySource, units: list[Unit], model: Model, batch_size: int, workers: int
) -> Generator[_Batch | Bad | _Done, None, None]:
    """All units in turn: batches interleaved with bad samples, then an end for each unit."""
    pixels: list[np.ndarray] = []
    captions: list[str] = []
    keys: list[str] = []
    labels: list[str] = []
    events = _decoded(source, units, model, 2 * batch_size + workers, workers)
    with closing(events):
        for event in events:
            if isinstance(event, Bad):
                yield event
                continue
            if isinstance(event, _Decoding):
                try:
                    pixels.append(event.pixels.result())
                except ImageError as error:
                    key, where = event.sample.key, event.sample.where
                    yield Bad(key, where, BROKEN_IMAGE, str(error).removeprefix(f"{key}: "))
                    continue
                captions.append(event.sample.caption)
                keys.append(event.sample.key)
                labels.append(label_of(event.sample.meta))
            if pixels and (len(pixels) == batch_size or isinstance(event, _Done)):
                yield _Batch(np.stack(pixels), captions, keys, labels)
                pixels, captions, keys, labels = [], [], [], []
            if isinstance(event, _Done):
                yield event


def _decoded(
    source: AnySource, units: list[Unit], model: Model, ahead: int, workers: int
) -> Generator[_Decoding | Bad | _Done, None, None]:
    """Samples in order; threads decode up to `ahead` of them in advance, including the next unit's."""
    executor = ThreadPoolExecutor(workers, thread_name_prefix="images")
    waiting: deque[_Decoding | Bad | _Done] = deque()
    try:
        for unit in units:
            for event in _started(source, unit, model, executor):
                waiting.append(event)
                if len(waiting) >= ahead:
                    yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _started(
    source: AnySource, unit: Unit, model: Model, executor: ThreadPoolExecutor
) -> Iterator[_Decoding | Bad | _Done]:
    try:
        for item in unit_samples(source, unit):
            if isinstance(item, Bad):
                yield item
            else:
                future = executor.submit(model.preprocessing, item.image_bytes, item.key)
                yield _Decoding(item, future)
    except DataError as error:
        yield _Done(unit, str(error))
    else:
        yield _Done(unit)
